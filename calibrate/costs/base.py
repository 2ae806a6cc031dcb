"""Costs and budgets. A cost is linear in the one-hot choice of formats, or in pairs of neighbours' choices, so that a
MILP can hold any number of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import nn

from lampq_rt.backends import Formats
from lampq_rt.errors import BudgetError
from lampq_rt.plan import SiteParams
from lampq_rt.registry import Registry
from lampq_rt.sites import Description, Site

Limit = float | str
"""A number in the cost's own unit, or a text like "15%": that share of what the model costs in floating point."""


Edges = Mapping[tuple[str, str], Mapping[tuple[int, int], float]]
"""A cost by two sites and their widths."""

TIMED = ("latency_ms", "speedup")
"""Units that need a latency table, given with a batch size: "latency_ms@8", or "2@8" as the limit (`costs.latency`)."""


class Cost(Protocol):
    """One unit, for one model. The total of a plan is `constant` plus the sum of `of` over the sites."""

    full: float
    """What the floating-point model (fp32) costs; a percentage refers to it."""

    constant: float
    """What no choice of formats changes."""

    def of(self, site: Site, formats: Formats) -> float:
        """What `site` costs in these formats."""
        ...


@runtime_checkable
class PairCost(Cost, Protocol):
    """A cost that also depends on what a site's neighbour has: `edges` are added to the sum."""

    edges: Edges


def total(cost: Cost, description: Description, sites: Mapping[str, SiteParams]) -> float:
    """What a model costs with its sites as given."""
    alone = sum(cost.of(site, sites[site.name].formats) for site in description.sites)
    edges = cost.edges if isinstance(cost, PairCost) else {}
    together = sum(pairs[sites[a].bits, sites[b].bits] for (a, b), pairs in edges.items())
    return cost.constant + alone + together


class CostFactory(Protocol):
    """Reads from a model what a cost needs."""

    def __call__(self, model: nn.Module, description: Description) -> Cost:
        """The cost of that model; `description` lists its sites."""
        ...


COSTS: Registry[CostFactory] = Registry("budget unit")


@dataclass(frozen=True, init=False)
class Budget:
    """Upper limits, any several at once: `Budget(mean_bits=4, weight_bytes="15%", latency_ms="2@8")`.

    `latency_ms` is milliseconds of a batch; `speedup`, a lower limit, is how many times as fast as the fastest
    floating-point model of the latency table. Both name the batch size behind an @.

    Attributes:
        limits: by unit (a name in `COSTS`, or "latency_ms@8"): a positive number in that unit, or "P%" of the cost in
            fp32.
    """

    limits: Mapping[str, Limit]

    def __init__(self, **limits: Limit | None) -> None:
        """Keep the limits that are not None.

        Raises:
            BudgetError: unknown unit, no limit at all, or a limit that is not a positive number or percentage.
        """
        given = {unit: limit for unit, limit in limits.items() if limit is not None}
        if not given:
            raise BudgetError(f"a budget needs at least one limit; units: {_units()}")
        parts = [_with_batch(unit, limit) for unit, limit in given.items()]
        twice = {unit for unit, _ in parts if [u for u, _ in parts].count(unit) > 1}
        if twice:
            raise BudgetError(f"budget {min(twice)!r} is given twice")
        object.__setattr__(self, "limits", {unit: _checked(unit, limit) for unit, limit in sorted(parts)})

    @classmethod
    def parse(cls, *texts: str) -> Budget:
        """The budget that texts like "weight_bytes=15%" and "latency_ms=2@8" describe, as the command line takes them.

        Raises:
            BudgetError: as the constructor; also for a text without "=", and for a unit given twice.
        """
        limits: dict[str, Limit] = {}
        for text in texts:
            unit, equals, limit = (part.strip() for part in text.partition("="))
            if not equals or not limit:
                raise BudgetError(f"budget {text!r} is not of the form UNIT=LIMIT; units: {_units()}")
            name, value = _with_batch(unit, limit)
            if name in limits:
                raise BudgetError(f"budget {name!r} is given twice")
            limits[name] = value
        return cls(**limits)

    def __or__(self, other: Budget) -> Budget:
        """Both budgets at once; `other` decides where both limit one unit."""
        return Budget(**{**self.limits, **other.limits})

    def __iter__(self) -> Iterator[str]:
        return iter(self.limits)

    @property
    def batches(self) -> list[int]:
        """Batch sizes that a latency is limited at, ascending."""
        return sorted({int(unit.partition("@")[2]) for unit in self.limits if "@" in unit})

    def resolve(self, unit: str, full: float) -> float:
        """The limit of `unit` as a number; `full` is what 100 % means."""
        limit = self.limits[unit]
        return full * float(limit[:-1]) / 100 if isinstance(limit, str) else limit

    def __str__(self) -> str:
        return ", ".join(
            f"{unit} {limit if isinstance(limit, str) else f'{limit:g}'}" for unit, limit in self.limits.items()
        )


def _with_batch(unit: str, limit: Limit) -> tuple[str, Limit]:
    """("latency_ms", "2@8") as ("latency_ms@8", "2"); every other pair as it is."""
    if unit in TIMED and isinstance(limit, str) and "@" in limit:
        number, _, batch = limit.partition("@")
        return f"{unit}@{batch.strip()}", number
    return unit, limit


def _checked(unit: str, limit: Limit) -> Limit:
    """`limit` as a float, or as a clean percentage."""
    name, at, batch = unit.partition("@")
    if name in TIMED:
        if not re.fullmatch("[1-9][0-9]{0,5}", batch):
            raise BudgetError(f"budget {unit} = {limit}: a limit and a batch size are needed, like {name}=2@8")
    elif unit not in COSTS.names():
        raise BudgetError(f"unknown budget unit {unit!r}; units: {_units()}")
    text = limit.strip() if isinstance(limit, str) else limit
    percent = isinstance(text, str) and text.endswith("%")
    try:
        if isinstance(text, bool):
            raise ValueError
        number = float(text[:-1] if isinstance(text, str) and percent else text)
    except (TypeError, ValueError):
        number = math.nan
    if name == "speedup" and percent:
        raise BudgetError(f"budget {unit} = {limit}; it must be a number of times, like speedup=2@8")
    if not (math.isfinite(number) and number > 0):
        raise BudgetError(
            f"budget {unit} = {limit}; it must be a positive number or a percentage of fp32 (units: {_units()})"
        )
    return f"{number:g}%" if percent else number


def _units() -> str:
    return ", ".join(sorted([*COSTS.names(), *TIMED]))
