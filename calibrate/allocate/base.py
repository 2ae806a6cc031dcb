"""What an allocator is given and what it answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from lampq_rt.errors import BudgetError
from lampq_rt.registry import Registry

TOLERANCE = 1e-9
"""Relative excess over a limit that is a rounding error of the sum, not a broken budget."""

Edges = Mapping[tuple[str, str], Mapping[tuple[int, int], float]]
"""A cost by two sites and their widths."""

Bits = Mapping[str, int]
"""A width for every site that the allocator decides on."""


@dataclass(frozen=True)
class Problem:
    """Choose one width per site: least total penalty, every total cost within its limit.

    Where widths are free, a "site" is a variable (`calibrate/variables.py`): a site's weight, its input, or a matmul.

    Attributes:
        penalties: by site and width; what a width does to the answers, in any unit that can be added up. Every site
            has the widths that it may choose from here, narrowest first.
        costs: by unit, site and width.
        limits: by unit, of the whole model.
        constants: by unit, what everything else costs (0 where missing).
        edges: by unit, what two sites cost together beside what each costs alone, by their widths; may be negative.
        inverse: by unit whose budget people give as a lower limit, the number that a cost divides to theirs: with a
            baseline's milliseconds, a latency becomes a speed-up. For messages.
        ties: by two sites, widths that both of them have or neither: floating point, of a weight and its input.
    """

    penalties: Mapping[str, Mapping[int, float]]
    costs: Mapping[str, Mapping[str, Mapping[int, float]]]
    limits: Mapping[str, float]
    constants: Mapping[str, float]
    edges: Mapping[str, Edges] = field(default_factory=dict)
    inverse: Mapping[str, float] = field(default_factory=dict)
    ties: Mapping[tuple[str, str], Sequence[int]] = field(default_factory=dict)

    def cost(self, unit: str, bits: Bits) -> float:
        """Total of `unit` at these widths, `constants` and `edges` included."""
        costs = self.costs[unit]
        alone = sum(costs[site][width] for site, width in bits.items())
        together = sum(pairs[bits[a], bits[b]] for (a, b), pairs in self.edges.get(unit, {}).items())
        return self.constants.get(unit, 0.0) + alone + together

    def excess(self, unit: str, bits: Bits) -> float:
        """How far these widths lie above the limit of `unit`, as a share of it; 0.0 where they keep it."""
        over = self.cost(unit, bits) / self.limits[unit] - 1.0
        return over if over > TOLERANCE else 0.0

    def fits(self, bits: Bits) -> bool:
        """True where every budget is kept, and every tie."""
        if any(w in (bits[a], bits[b]) and bits[a] != bits[b] for (a, b), tied in self.ties.items() for w in tied):
            return False
        return not any(self.excess(unit, bits) for unit in self.limits)

    def penalty(self, bits: Bits) -> float:
        """Total penalty at these widths."""
        return sum(self.penalties[site][width] for site, width in bits.items())


@dataclass(frozen=True)
class Allocation:
    """An allocator's answer.

    Attributes:
        bits: a width for every site of the problem.
        objective: total penalty.
        gap: relative distance of `objective` to the proven lower bound; 0.0 where it is optimal, None where nothing
            is proven.
    """

    bits: Bits
    objective: float
    gap: float | None


class Allocator(Protocol):
    """One way of choosing bits."""

    def __call__(self, problem: Problem) -> Allocation:
        """Widths within all budgets.

        Raises:
            BudgetError: there are none; one line with the smallest value that each broken budget could have.
        """
        ...


ALLOCATORS: Registry[Allocator] = Registry("allocator")


def infeasible(problem: Problem, smallest: Mapping[str, float]) -> BudgetError:
    """The error for a problem without a solution: `smallest` is the least feasible value of each broken budget."""
    parts = []
    for unit, least in smallest.items():
        limit, bound = problem.limits[unit], "smallest"
        if unit in problem.inverse:
            limit, least, bound = problem.inverse[unit] / limit, problem.inverse[unit] / least, "largest"
        least = _feasible(least, up=bound == "smallest")
        parts.append(f"{unit} = {_number(limit)} cannot be met; the {bound} possible here is {_number(least)}")
    return BudgetError("; ".join(parts))


def _feasible(value: float, *, up: bool) -> float:
    """`value` to six digits, rounded so that it can be met as it is printed."""
    if value == 0.0 or value >= 1e6 or float(f"{value:.6g}") == value:
        return value
    unit = 10.0 ** (math.floor(math.log10(abs(value))) - 5)
    return (math.ceil(value / unit - 1e-6) if up else math.floor(value / unit + 1e-6)) * unit


def _number(value: float) -> str:
    """For people: all digits of a large number (rounded up, so that it is feasible), six of a small one."""
    return f"{-int(-value // 1):,}" if value >= 1e6 else f"{value:.6g}"
