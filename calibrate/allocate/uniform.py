"""The same width everywhere: the baseline that every other plan must beat."""

from __future__ import annotations

from lampq_rt.calibrate.allocate.base import ALLOCATORS, Allocation, Problem, infeasible


@ALLOCATORS.register("uniform")
def allocate(problem: Problem) -> Allocation:
    """The largest width, common to all sites, that keeps every budget.

    Raises:
        BudgetError: not even the narrowest does.
    """
    sites = problem.penalties
    common = sorted(set.intersection(*(set(widths) for widths in sites.values()))) if sites else []
    plans = [dict.fromkeys(sites, width) for width in common] or [{}]
    feasible = [bits for bits in plans if problem.fits(bits)]
    if not feasible:
        broken = {u: min(problem.cost(u, b) for b in plans) for u in problem.limits if problem.excess(u, plans[0])}
        raise infeasible(problem, broken)
    return Allocation(feasible[-1], problem.penalty(feasible[-1]), None)
