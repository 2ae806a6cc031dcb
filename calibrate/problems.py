"""From variables, penalties and a budget to the problem that an allocator solves.

A cost is told the formats of a whole site. Where weight and input of a linear have variables of their own, what a
site costs is taken apart: what each costs beside the other's narrowest width, and what both cost together beside
that, which is an edge (of `bops`, a product of the two widths; of other costs nothing). A latency knows the weight's
width alone, so its edges between neighbouring linears are between their weights; a linear in floating point has both
operands there, which is a tie.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from lampq_rt.backends import Formats
from lampq_rt.calibrate.allocate import ALLOCATORS, Allocator, Problem
from lampq_rt.calibrate.costs import COSTS, Budget, Cost, edges_of
from lampq_rt.calibrate.costs.timed import TimedCosts
from lampq_rt.calibrate.evidence import Measurements
from lampq_rt.calibrate.variables import Variable
from lampq_rt.errors import BudgetError
from lampq_rt.formats import FLOAT_BITS, INTEGER_BITS
from lampq_rt.sites import Site

Penalties = Mapping[str, Mapping[int, float]]

W, A = "mean_bits", "mean_activation_bits"

Pair = dict[tuple[int, int], float]

NOTHING = 1e-9
"""Relative size of an edge that is a rounding error."""


class Problems:
    """Poses the problems of one model.

    Args:
        model: in floating point.
        measurements: of that model as prepared; only its sites and menus of formats are looked at.
        timed: costs that need a latency table.
    """

    def __init__(self, model: nn.Module, measurements: Measurements, timed: TimedCosts) -> None:
        self.measurements, self.timed = measurements, timed
        self.description = measurements.description
        self.costs: dict[str, Cost] = {unit: COSTS.get(unit)(model, self.description) for unit in COSTS}

    def cost(self, unit: str) -> Cost:
        """What that unit of a budget costs."""
        return self.timed[unit] if TimedCosts.has(unit) else self.costs[unit]

    def limits(self, budget: Budget) -> dict[str, float]:
        """By unit, the limit in the cost's own unit."""
        return {unit: self._limit(budget, unit) for unit in budget}

    def formats(self, variables: Sequence[Variable], bits: Mapping[str, int], nominal: int) -> dict[str, Formats]:
        """Formats of all sites, in order of execution: at these widths, the others at the nominal one."""
        decided: dict[str, list[int]] = {}
        for variable in variables:
            decided.setdefault(variable.site.name, []).append(bits[variable.name])
        m = self.measurements
        return {
            site.name: m.formats(site, *decided.get(site.name, [m.nearest(site, nominal)]))
            for site in self.description.sites
        }

    def problem(
        self,
        variables: Sequence[Variable],
        limits: Mapping[str, float],
        nominal: int,
        penalties: Penalties | None,
    ) -> Problem:
        """The choice of widths with the other sites at the nominal width; by default, penalties know no data."""
        widths = {v.name: self._widths(v, limits) for v in variables}
        if penalties is None:
            sizes = {v.name: v.site.params if v.has_weight and v.whole else v.site.macs for v in variables}
            penalties = {name: {w: sizes[name] * 4.0**-w for w in row} for name, row in widths.items()}
        penalties = {
            name: {w: 0.0 if w == FLOAT_BITS else penalties[name][w] for w in row} for name, row in widths.items()
        }
        by_site: dict[str, list[Variable]] = {}
        for variable in variables:
            by_site.setdefault(variable.site.name, []).append(variable)
        weights = {v.site.name: v.name for v in variables if v.has_weight}
        costs, constants, edges = {}, {}, {}
        for unit in limits:
            cost = self.cost(unit)
            costs[unit], pairs = self._taken_apart(cost, by_site, widths)
            others = (site for site in self.description.sites if site.name not in by_site)
            constants[unit] = cost.constant + sum(
                cost.of(site, self.measurements.formats(site, self.measurements.nearest(site, nominal)))
                for site in others
            )
            between = {(weights[a], weights[b]): dict(found) for (a, b), found in edges_of(cost).items()}
            if pairs or between:
                edges[unit] = {**pairs, **between}
        ties = {
            (own[0].name, own[1].name): [FLOAT_BITS]
            for own in by_site.values()
            if len(own) > 1 and FLOAT_BITS in widths[own[0].name]
        }
        return Problem(penalties, costs, limits, constants, edges, self.timed.inverse(limits), ties)

    def nominal_bits(self, allocator_name: str, variables: Sequence[Variable], limits: Mapping[str, float]) -> int:
        """A budget of mean bits, rounded; without one, the widest width that does not exceed the mean that it leaves.

        Nothing is measured for it, so that a budget that cannot be met says so at once.

        Raises:
            BudgetError: no choice of bits keeps the limits.
        """
        allocator: Allocator = ALLOCATORS.get(allocator_name)
        if W in limits:
            nominal = _rounded(limits[W])
            allocator(self.problem(variables, limits, nominal, None))
            return nominal
        for nominal in reversed(INTEGER_BITS[1:]):
            try:
                bits = allocator(self.problem(variables, limits, nominal, None)).bits
            except BudgetError:
                continue
            if not bits or _rounded(_mean_bits(variables, bits)) >= nominal:
                return nominal
        allocator(self.problem(variables, limits, INTEGER_BITS[0], None))
        return INTEGER_BITS[0]

    def _limit(self, budget: Budget, unit: str) -> float:
        return self.timed.limit(budget, unit) if TimedCosts.has(unit) else budget.resolve(unit, self.costs[unit].full)

    def _widths(self, variable: Variable, limits: Mapping[str, float]) -> list[int]:
        """Widths that it may have, narrowest first; a linear may be in floating point where time is limited."""
        timed = any(map(TimedCosts.has, limits)) and not variable.site.is_matmul
        weight = variable.has_weight and not variable.whole
        return self.measurements.widths(variable.site, weight=weight) + ([FLOAT_BITS] if timed else [])

    def _taken_apart(
        self, cost: Cost, by_site: Mapping[str, Sequence[Variable]], widths: Mapping[str, Sequence[int]]
    ) -> tuple[dict[str, dict[int, float]], dict[tuple[str, str], Pair]]:
        """What each variable costs by its width, and what two of one site cost together beside that."""
        alone: dict[str, dict[int, float]] = {}
        together: dict[tuple[str, str], Pair] = {}
        for own in by_site.values():
            site = own[0].site

            def of(*bits: int, site: Site = site) -> float:
                return cost.of(site, self.measurements.formats(site, *bits))

            if len(own) == 1:
                alone[own[0].name] = {w: of(w) for w in widths[own[0].name]}
                continue
            one, two = (v.name for v in own)
            alone[one], alone[two], rest = _apart(of, widths[one], widths[two])
            if rest:
                together[one, two] = rest
        return alone, together


def implied(budget: Budget) -> Budget:
    """The budget with activations limited as weights are, where it says nothing of them: WbAb of published results."""
    if W in budget.limits and A not in budget.limits:
        return budget | Budget(**{A: budget.limits[W]})
    return budget


def _apart(
    of: Callable[[int, int], float], ones: Sequence[int], twos: Sequence[int]
) -> tuple[dict[int, float], dict[int, float], Pair]:
    """A cost of two widths as one of each, and what remains of both (empty where nothing does).

    Floating point goes with floating point alone; then all of the cost is the first one's.
    """
    least = of(ones[0], twos[0])
    one = {w: of(w, w if w == FLOAT_BITS else twos[0]) for w in ones}
    two = {a: 0.0 if a == FLOAT_BITS else of(ones[0], a) - least for a in twos}
    rest = {
        (w, a): 0.0 if FLOAT_BITS in (w, a) else of(w, a) - one[w] - two[a] for w, a in itertools.product(ones, twos)
    }
    size = max(map(abs, one.values()))
    return one, two, rest if any(abs(x) > NOTHING * size for x in rest.values()) else {}


def _mean_bits(variables: Sequence[Variable], bits: Mapping[str, int]) -> float:
    weights = [v for v in variables if v.has_weight]
    return sum(v.site.params * bits[v.name] for v in weights) / max(sum(v.site.params for v in weights), 1)


def _rounded(mean_bits: float) -> int:
    """`mean_bits` rounded, within the integer widths."""
    return min(max(round(mean_bits), INTEGER_BITS[0]), INTEGER_BITS[-1])
