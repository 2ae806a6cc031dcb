"""What a penalty is made from, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from lampq_rt.calibrate.metrics.alpha import TypeDrops
from lampq_rt.calibrate.metrics.fisher import Fisher
from lampq_rt.calibrate.variables import Variable
from lampq_rt.plan import SiteParams
from lampq_rt.registry import Registry
from lampq_rt.sites import Site

Table = Mapping[str, Mapping[int, SiteParams]]
"""Formats and steps by site and width."""

Curves = Mapping[str, Mapping[int, float]]
"""A number by variable, or by site, and width."""


class Evidence(Protocol):
    """What the calibrator has measured of one model. Each part is measured when it is first asked for."""

    @property
    def sites(self) -> tuple[Site, ...]:
        """The blocks' linears."""
        ...

    @property
    def variables(self) -> tuple[Variable, ...]:
        """What is chosen: a width a linear, or more (`calibrate/variables.py`). Penalties are by their names."""
        ...

    @property
    def table(self) -> Table:
        """Formats and steps of the variables' sites at every width that may be chosen, all operands at that width,
        narrowest first."""
        ...

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """Their weights in floating point, fp32 [N, K]."""
        ...

    @property
    def fisher(self) -> Mapping[str, Fisher]:
        """Their gradients' statistics in the floating-point model."""
        ...

    @property
    def context(self) -> Mapping[str, Fisher]:
        """The same in the model with every site at the nominal width."""
        ...

    @property
    def attention(self) -> Curves:
        """What a width of an attention matmul does in the floating-point model, in nats (`attention.errors`)."""
        ...

    @property
    def attention_context(self) -> Curves:
        """The same in the model with every site at the nominal width."""
        ...

    @property
    def alone(self) -> Curves:
        """Divergence on the calibration images, in nats, with one linear alone at the nominal width and all else in
        floating point."""
        ...

    @property
    def moves(self) -> Curves:
        """Divergence on the calibration images, in nats, when one variable alone moves from the nominal width to one
        below or above it, all else at the nominal width."""
        ...

    @property
    def drops(self) -> TypeDrops:
        """What quantising one layer of each type alone does to the answers."""
        ...


@dataclass(frozen=True)
class Score:
    """A penalty's answer.

    Attributes:
        penalties: by variable and width, narrowest first; only their ratios matter.
        sensitivity: one number per site for people: the larger, the more it deserves bits.
        facts: JSON-able facts for the plan's provenance.
    """

    penalties: Mapping[str, Mapping[int, float]]
    sensitivity: Mapping[str, float]
    facts: Mapping[str, Any] = field(default_factory=dict)


class Penalty(Protocol):
    """One model of what a width does to the answers: additive over variables."""

    def __call__(self, evidence: Evidence) -> Score:
        """Penalties of every variable of `evidence` at every width of its site's table."""
        ...


PENALTIES: Registry[Penalty] = Registry("penalty")
