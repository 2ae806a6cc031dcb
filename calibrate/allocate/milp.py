"""Bits by integer programming (LampQ, AAAI-26, section 4.3), with any number of linear budgets at once.

One binary x[i, b] per site and width:  minimise sum penalty[i, b] x[i, b]  subject to  sum_b x[i, b] = 1 for every
site i and sum cost_u[i, b] x[i, b] <= limit_u for every budget u. HiGHS solves it in milliseconds. Its tolerances are
absolute (1e-6 on rows and on the objective), so both are scaled here, and its answer is checked with exact sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from lampq_rt.calibrate.allocate.base import ALLOCATORS, Allocation, Problem, infeasible

Vector = NDArray[np.float64]

TIME_LIMIT_S = 60.0
OPTIMAL, TIMED_OUT, NO_SOLUTION = 0, 1, 2  # scipy's status codes
ROUNDS = 4
"""How often a limit is drawn in by a millionth, should the solver's tolerance let an answer slip past it."""


@ALLOCATORS.register("milp")
def allocate(problem: Problem) -> Allocation:
    """See `Allocator`; the best widths, with the gap that HiGHS reports (0 where it proves them best).

    Raises:
        BudgetError: no widths keep all budgets.
    """
    if not problem.penalties:
        if not problem.fits({}):
            raise infeasible(problem, {u: problem.cost(u, {}) for u in problem.limits if problem.excess(u, {})})
        return Allocation({}, 0.0, 0.0)
    program = _Program(problem)
    penalties = program.vector(problem.penalties)
    limits = dict(problem.limits)
    for _ in range(ROUNDS):
        result = program.solve(penalties, limits)
        if result.x is None:
            break
        bits = program.bits(result.x)
        broken = [unit for unit in limits if problem.excess(unit, bits)]
        if not broken:
            return Allocation(bits, problem.penalty(bits), max(float(result.mip_gap or 0.0), 0.0))
        limits = {u: limit * (1 - 1e-6) if u in broken else limit for u, limit in limits.items()}
    raise infeasible(problem, _smallest(problem, program))


def _smallest(problem: Problem, program: _Program) -> dict[str, float]:
    """The least value of each broken budget: with the others kept where that is possible, alone otherwise."""
    least = {}
    for unit in problem.limits:
        others = {u: limit for u, limit in problem.limits.items() if u != unit}
        costs = program.vector(problem.costs[unit])
        result = program.solve(costs, others)
        if result.x is None:
            result = program.solve(costs, {})
        bits = program.bits(result.x)
        if problem.excess(unit, bits):
            least[unit] = problem.cost(unit, bits)
    if not least:  # each could be met alone, but not all at once
        return {
            unit: problem.cost(unit, program.bits(program.solve(program.vector(c), {}).x))
            for unit, c in problem.costs.items()
        }
    return least


class _Program:
    """The one-hot program: its columns are the pairs (site, width), in the order of `Problem.penalties`."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.columns = [(site, width) for site, widths in problem.penalties.items() for width in widths]
        rows = {site: row for row, site in enumerate(problem.penalties)}
        self.one_hot = np.zeros((len(rows), len(self.columns)))
        for column, (site, _) in enumerate(self.columns):
            self.one_hot[rows[site], column] = 1.0

    def vector(self, values: Mapping[str, Mapping[int, float]]) -> Vector:
        """One number per column."""
        return np.array([values[site][width] for site, width in self.columns])

    def solve(self, objective: Vector, limits: Mapping[str, float]) -> Any:
        """scipy's result; its `x` is None where no widths keep the limits."""
        constraints = [LinearConstraint(self.one_hot, 1.0, 1.0)]
        for unit, limit in limits.items():
            room = limit - self.problem.constants.get(unit, 0.0)
            constraints.append(
                LinearConstraint(self.vector(self.problem.costs[unit])[None] / limit, -np.inf, room / limit)
            )
        # Penalties span many powers of ten; in this unit an answer that is off by HiGHS's absolute 1e-6 is as good.
        scale = 1e3 / max(float(np.median(np.abs(objective))), 1e-300) / len(self.one_hot)
        result = milp(
            objective * scale,
            integrality=np.ones_like(objective),
            bounds=Bounds(0.0, 1.0),
            constraints=constraints,
            options={"mip_rel_gap": 1e-6, "time_limit": TIME_LIMIT_S},
        )
        assert result.status in (OPTIMAL, TIMED_OUT, NO_SOLUTION), result.message
        return result

    def bits(self, x: Vector) -> dict[str, int]:
        """The width of each site: the column with the largest share."""
        best: dict[str, tuple[float, int]] = {}
        for (site, width), share in zip(self.columns, x, strict=True):
            if site not in best or share > best[site][0]:
                best[site] = (float(share), width)
        return {site: width for site, (_, width) in best.items()}
