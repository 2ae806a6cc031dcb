"""What penalties are made from: `metrics.Evidence` of one model, measured when it is first asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor

from lampq_rt.calibrate import moves
from lampq_rt.calibrate.distributed import UNIT
from lampq_rt.calibrate.evidence import Measurements
from lampq_rt.calibrate.metrics import alpha, attention, fisher
from lampq_rt.calibrate.metrics.alpha import TypeDrops
from lampq_rt.calibrate.metrics.base import Curves, Table
from lampq_rt.calibrate.metrics.context import straight_through
from lampq_rt.calibrate.metrics.fisher import Fisher
from lampq_rt.calibrate.metrics.fisher_output import output
from lampq_rt.calibrate.observe import LinearObservation
from lampq_rt.calibrate.replay import Replay
from lampq_rt.calibrate.variables import Variable
from lampq_rt.memory import trim
from lampq_rt.sites import Site

ALONE_IMAGES = 2 * UNIT
"""Images whose residual streams, one before every block, are held at once."""


class SearchEvidence:
    """`metrics.Evidence` of one model with one range search, and one nominal width of all sites.

    Args:
        measurements: of the model.
        search: name of the range search.
        nominal: the width.
        variables: what is chosen.
        shared: evidence of other variables, all else equal, whose Fisher information is used again.
    """

    def __init__(
        self,
        measurements: Measurements,
        search: str,
        nominal: int,
        variables: tuple[Variable, ...],
        shared: SearchEvidence | None = None,
    ) -> None:
        self.measurements, self.search, self.nominal = measurements, search, nominal
        self.variables, self._shared = variables, shared

    @property
    def sites(self) -> tuple[Site, ...]:
        """See `Evidence.sites`."""
        return self.measurements.linears

    @cached_property
    def table(self) -> Table:
        """See `Evidence.table`."""
        m, alone = self.measurements, {v.site.name for v in self.variables if not v.whole}
        sites = dict.fromkeys(variable.site for variable in self.variables)
        return m.params(self.search, {s.name: m.widths(s, weight=s.name in alone) for s in sites})

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """See `Evidence.weights`."""
        return self.measurements.weights

    @property
    def fisher(self) -> Mapping[str, Fisher]:
        """See `Evidence.fisher`."""
        return self.measurements.fisher

    @cached_property
    def context(self) -> Mapping[str, Fisher]:
        """See `Evidence.context`. Labels are drawn from the quantised model: there, Fisher's matrix is that of KL."""
        if self._shared is not None:
            return self._shared.context
        m = self.measurements
        with self._at_nominal():
            return fisher.score(
                m.simulation.model,
                m.images,
                [site.name for site in self.sites],
                blocks=m.blocks,
                seed=m.seed,
                progress=lambda d, n: m.report(f"Fisher information at {self.nominal} bits", d, n),
                shard=m.shard,
            )

    @contextmanager
    def _at_nominal(self) -> Iterator[None]:
        """The simulation has every site at the nominal width, and gradients pass straight through."""
        m = self.measurements
        sites = {site.name: m.formats(site, m.nearest(site, self.nominal)) for site in m.description.sites}
        m.simulation.set(m.chosen(self.search, sites))
        trim()
        try:
            with straight_through(m.simulation):
                yield
        finally:
            m.simulation.reset()

    @cached_property
    def attention(self) -> Curves:
        """See `Evidence.attention`."""
        table = self._matmuls()
        self.measurements.simulation.reset()
        return self._attention(table)

    @cached_property
    def attention_context(self) -> Curves:
        """See `Evidence.attention_context`."""
        table = self._matmuls()
        with self._at_nominal():
            return self._attention(table)

    def _matmuls(self) -> Table:
        """The part of `table` that is of attention matmuls."""
        return {v.site.name: self.table[v.site.name] for v in self.variables if v.site.is_matmul}

    def _attention(self, table: Table) -> Curves:
        m = self.measurements
        return attention.errors(
            m.simulation,
            m.images,
            table,
            seed=m.seed,
            progress=lambda d, n: m.report("errors of attention", d, n),
        )

    @cached_property
    def alone(self) -> Curves:
        """See `Evidence.alone`."""
        m, logits = self.measurements, dict[str, list[Tensor]]()
        m.simulation.reset()
        parts = m.images.split(ALONE_IMAGES)
        for number, images in enumerate(parts):
            with torch.no_grad():
                replay = Replay(m.simulation, images)
                for done, site in enumerate(self.sites, 1):
                    m.simulation.set({site.name: self.table[site.name][self.nominal]})
                    logits.setdefault(site.name, []).append(replay(site.block))
                    m.simulation.set({site.name: None})
                    m.report(
                        "what every linear does alone", number * len(self.sites) + done, len(parts) * len(self.sites)
                    )
        answers = {name: m.shard.gather(torch.cat(own)) for name, own in logits.items()}
        return {name: {self.nominal: m.judge.judge(own).divergence} for name, own in answers.items()}

    @cached_property
    def moves(self) -> Curves:
        """See `Evidence.moves`. Where weights are rounded by GPTQ, the nominal model is the compensated one."""
        m = self.measurements
        compensated = m.preparation.rounding == "gptq"
        return moves.measure(m, self.search, self.nominal, self.variables, compensated)

    @cached_property
    def drops(self) -> TypeDrops:
        """See `Evidence.drops`."""
        m = self.measurements
        return alpha.measure(
            m.simulation,
            self.sites,
            self.table,
            m.judge,
            seed=m.seed,
            progress=lambda d, n: m.report("accuracy by layer type", d, n),
        )

    @cached_property
    def errors(self) -> dict[str, dict[int, float]]:
        """||W_hat x_hat - W x||^2 / ||W x||^2 of each linear by width, x in floating point."""
        found: dict[str, dict[int, float]] = {}
        for site in self.sites:
            seen, weight = self.measurements.observations[site.name], self.weights[site.name]
            assert isinstance(seen, LinearObservation)
            exact = seen.rows @ weight.t()
            size = max(float(exact.square().sum()), 1e-300)
            found[site.name] = {
                bits: float((output(seen.rows, weight, params) - exact).square().sum()) / size
                for bits, params in self.table[site.name].items()
            }
        return found
