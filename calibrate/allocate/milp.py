"""Bits by integer programming (LampQ, AAAI-26, section 4.3), with any number of linear budgets at once.

One binary x[i, b] per site and width:  minimise sum penalty[i, b] x[i, b]  subject to  sum_b x[i, b] = 1 for every
site i and sum cost_u[i, b] x[i, b] <= limit_u for every budget u. HiGHS solves it in milliseconds. Its tolerances are
absolute (1e-6 on rows and on the objective), so both are scaled here, and its answer is checked with exact sums.

What two neighbours i, j cost together is a product of two binaries, and enters as y[i, A, j, B] in [0, 1] with
sum_B y[i, A, j, B] = sum of x[i, b] over b in A, and the same for j: exact for binary x, whatever the sign of the cost,
and y needs no integrality. A and B are groups of widths that no cost of the pair tells apart: on a CPU, where all
integers take the same time, two a site in place of eight.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

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
    penalties = program.penalties
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
        costs = program.cost(unit)
        result = program.solve(costs, others)
        if result.x is None:
            result = program.solve(costs, {})
        bits = program.bits(result.x)
        if problem.excess(unit, bits):
            least[unit] = problem.cost(unit, bits)
    if not least:  # each could be met alone, but not all at once
        return {
            unit: problem.cost(unit, program.bits(program.solve(program.cost(unit), {}).x)) for unit in problem.costs
        }
    return least


@dataclass(frozen=True)
class _Pair:
    """Two neighbours whose costs depend on each other: groups of their widths, and the first column of their y."""

    sites: tuple[str, str]
    groups: tuple[list[list[int]], list[list[int]]]
    first: int

    def column(self, a: int, b: int) -> int:
        """The column of the pair of groups a and b."""
        return self.first + a * len(self.groups[1]) + b


class _Program:
    """Columns: x by site and width, in the order of `Problem.penalties`, then y by pair and groups."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        keys = [(site, width) for site, widths in problem.penalties.items() for width in widths]
        self.columns = {key: column for column, key in enumerate(keys)}
        self.size = len(keys)
        self.pairs = [self._pair(sites) for sites in dict.fromkeys(s for e in problem.edges.values() for s in e)]
        self.rows, self.right = self._equalities()
        self.penalties = self._vector(problem.penalties)

    def cost(self, unit: str) -> Vector:
        """One number per column."""
        values = self._vector(self.problem.costs[unit])
        edges = self.problem.edges.get(unit, {})
        for pair in self.pairs:
            costs = edges.get(pair.sites)
            if costs is not None:
                for (a, one), (b, two) in itertools.product(*map(enumerate, pair.groups)):
                    values[pair.column(a, b)] = costs[one[0], two[0]]
        return values

    def solve(self, objective: Vector, limits: Mapping[str, float]) -> Any:
        """scipy's result; its `x` is None where no widths keep the limits."""
        constraints = [LinearConstraint(self.rows, self.right, self.right)]
        for unit, limit in limits.items():
            room = limit - self.problem.constants.get(unit, 0.0)
            constraints.append(LinearConstraint(self.cost(unit)[None] / limit, -np.inf, room / limit))
        # Penalties span many powers of ten; in this unit an answer that is off by HiGHS's absolute 1e-6 is as good.
        binaries = np.abs(objective[: len(self.columns)])
        scale = 1e3 / max(float(np.median(binaries)) or float(binaries.max()), 1e-300) / len(self.problem.penalties)
        with _aside():
            result = milp(
                objective * scale,
                integrality=np.arange(self.size) < len(self.columns),
                bounds=Bounds(0.0, 1.0),
                constraints=constraints,
                options={"mip_rel_gap": 1e-6, "time_limit": TIME_LIMIT_S},
            )
        assert result.status in (OPTIMAL, TIMED_OUT, NO_SOLUTION), result.message
        return result

    def bits(self, x: Vector) -> dict[str, int]:
        """The width of each site: the column with the largest share."""
        best: dict[str, tuple[float, int]] = {}
        for (site, width), column in self.columns.items():
            if site not in best or x[column] > best[site][0]:
                best[site] = (float(x[column]), width)
        return {site: width for site, (_, width) in best.items()}

    def _vector(self, values: Mapping[str, Mapping[int, float]]) -> Vector:
        """One number per column; zero for pairs."""
        found = np.zeros(self.size)
        for (site, width), column in self.columns.items():
            found[column] = values[site][width]
        return found

    def _pair(self, sites: tuple[str, str]) -> _Pair:
        """Reserve the columns of a pair, one for every two groups of widths that some unit tells apart."""
        tables = [edges[sites] for edges in self.problem.edges.values() if sites in edges]
        one, two = (list(self.problem.penalties[site]) for site in sites)
        groups = (
            _groups(one, lambda a: tuple(t[a, b] for t in tables for b in two)),
            _groups(two, lambda b: tuple(t[a, b] for t in tables for a in one)),
        )
        pair = _Pair(sites, groups, self.size)
        self.size += len(groups[0]) * len(groups[1])
        return pair

    def _equalities(self) -> tuple[Any, Vector]:
        """Rows of "one width a site" (= 1), then of "the pairs agree with the sites" and of the ties (= 0)."""
        entries: list[tuple[int, int, float]] = []
        row = {site: i for i, site in enumerate(self.problem.penalties)}
        entries += [(row[site], column, 1.0) for (site, _), column in self.columns.items()]
        count = len(row)
        for pair in self.pairs:
            for side, site in enumerate(pair.sites):
                for index, widths in enumerate(pair.groups[side]):
                    others = range(len(pair.groups[1 - side]))
                    columns = [pair.column(*((index, o) if side == 0 else (o, index))) for o in others]
                    entries += [(count, column, 1.0) for column in columns]
                    entries += [(count, self.columns[site, width], -1.0) for width in widths]
                    count += 1
        for (a, b), tied in self.problem.ties.items():
            for width in tied:
                entries += [(count, self.columns[a, width], 1.0), (count, self.columns[b, width], -1.0)]
                count += 1
        rows, columns_, values = zip(*entries, strict=True)
        matrix = csr_array((values, (rows, columns_)), shape=(count, self.size))
        right = np.zeros(count)
        right[: len(row)] = 1.0
        return matrix, right


def _groups(widths: list[int], costs: Callable[[int], tuple[float, ...]]) -> list[list[int]]:
    """Widths with equal costs together."""
    found: dict[tuple[float, ...], list[int]] = {}
    for width in widths:
        found.setdefault(costs(width), []).append(width)
    return list(found.values())


@contextmanager
def _aside() -> Iterator[None]:
    """What the process writes to its standard output goes to standard error: HiGHS, told to be silent, still prints a
    line of its own on some problems, and a command's output may be one JSON document."""
    try:
        sys.stdout.flush()
        kept = os.dup(1)
        os.dup2(2, 1)
    except (AttributeError, OSError):  # a service without standard output, or error
        yield
        return
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
