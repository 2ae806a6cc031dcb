"""Allocators against exhaustive search, at their limits, and beyond them."""

from __future__ import annotations

import itertools
import os
from typing import Any

import numpy as np
import pytest
import scipy.optimize
from scipy.optimize import linprog

from lampq_rt.calibrate.allocate import ALLOCATORS, Problem, milp
from lampq_rt.errors import BudgetError

WIDTHS = (2, 3, 4, 5, 6, 7, 8)


def problem(
    sites: int, seed: int = 0, limits: dict[str, float] | None = None, widths: tuple[int, ...] = WIDTHS
) -> Problem:
    """Sites of ViT-like sizes, penalties that fall about fourfold a bit, three costs."""
    rng = np.random.default_rng(seed)
    names = [f"site{i}" for i in range(sites)]
    size = {n: (3, 1, 4, 4)[i % 4] for i, n in enumerate(names)}
    all_ = sum(size.values())
    omega = {n: float(10 ** rng.uniform(-3, 2)) for n in names}
    noise = {n: rng.uniform(0.7, 1.4, len(widths)) for n in names}
    penalties = {n: {b: float(omega[n] * 4.0**-b * noise[n][i]) for i, b in enumerate(widths)} for n in names}
    costs = {
        "mean_bits": {n: {b: size[n] * b / all_ for b in widths} for n in names},
        "weight_bytes": {n: {b: size[n] * (32 if b <= 4 else 64) for b in widths} for n in names},
        "bops": {n: {b: float(size[n] * b * b) for b in widths} for n in names},
    }
    limits = limits or {"mean_bits": 4.0}
    return Problem(penalties, {u: costs[u] for u in limits}, limits, {"weight_bytes": 100.0})


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "limits",
    [{"mean_bits": 4.0}, {"mean_bits": 3.3, "bops": 190.0}, {"weight_bytes": 800.0, "bops": 300.0, "mean_bits": 4.5}],
)
def test_milp_finds_the_best_of_all_assignments(limits: dict[str, float], seed: int) -> None:
    given = problem(5, seed, limits, widths=(2, 3, 4, 6, 8))
    names = list(given.penalties)
    plans = (dict(zip(names, bits, strict=True)) for bits in itertools.product((2, 3, 4, 6, 8), repeat=5))
    best = min(given.penalty(bits) for bits in plans if given.fits(bits))
    found = ALLOCATORS.get("milp")(given)
    assert given.fits(found.bits)
    assert found.objective == pytest.approx(best, rel=1e-6)
    assert found.gap == pytest.approx(0.0, abs=1e-4)


def test_milp_solves_24_blocks_with_8_widths_and_three_budgets() -> None:
    """How long it takes, benchmarks/calibration_cost.py says."""
    limits = {"mean_bits": 4.25, "weight_bytes": 15000.0, "bops": 5600.0}
    given = problem(96, limits=limits, widths=tuple(range(1, 9)))
    found = ALLOCATORS.get("milp")(given)
    assert given.fits(found.bits) and found.gap is not None and found.gap < 1e-3
    assert any(given.cost(u, found.bits) > 0.97 * limit for u, limit in limits.items())
    least = relaxed(given)
    assert least * (1 - 1e-6) <= found.objective <= least * 1.01


def relaxed(given: Problem) -> float:
    """The least penalty where a site may take a bit of several widths: no plan is better."""
    columns = [(site, width) for site, row in given.penalties.items() for width in row]
    sums = np.array([[float(site == name) for site, _ in columns] for name in given.penalties])
    costs = np.array([[given.costs[u][site][width] for site, width in columns] for u in given.limits])
    room = [limit - given.constants.get(unit, 0.0) for unit, limit in given.limits.items()]
    penalties = [given.penalties[site][width] for site, width in columns]
    found = linprog(penalties, A_ub=costs, b_ub=room, A_eq=sums, b_eq=np.ones(len(sums)), bounds=(0, 1))
    assert found.status == 0
    return float(found.fun)


@pytest.mark.parametrize("name", ["milp", "uniform"])
def test_a_budget_that_the_widest_plan_meets_gives_the_widest_plan(name: str) -> None:
    given = problem(8, limits={"mean_bits": 8.0})
    assert set(ALLOCATORS.get(name)(given).bits.values()) == {8}


@pytest.mark.parametrize(("limit", "width"), [(2.0, 2), (4.0, 4), (4.9999, 4), (5.0, 5), (31.0, 8)])
def test_uniform_takes_the_largest_width_that_fits(limit: float, width: int) -> None:
    found = ALLOCATORS.get("uniform")(problem(8, limits={"mean_bits": limit}))
    assert set(found.bits.values()) == {width} and found.gap is None


@pytest.mark.parametrize("name", ["milp", "uniform"])
def test_an_infeasible_budget_names_the_smallest_feasible_one(name: str) -> None:
    with pytest.raises(BudgetError, match=r"mean_bits = 0\.5 cannot be met.* 2$") as error:
        ALLOCATORS.get(name)(problem(8, limits={"mean_bits": 0.5, "bops": 1e9}))
    assert "bops" not in str(error.value) and "\n" not in str(error.value)
    least = 24 * 32 + 100
    with pytest.raises(BudgetError, match=f"weight_bytes = 500 .* {least}$"):
        ALLOCATORS.get(name)(problem(8, limits={"mean_bits": 8, "weight_bytes": 500.0}))
    found = ALLOCATORS.get(name)(problem(8, limits={"weight_bytes": float(least)}))
    assert max(found.bits.values()) == 4  # 3 and 4 bits share a container with 2
    with pytest.raises(BudgetError, match="mean_bits = 1 .*bops = 1 "):
        ALLOCATORS.get(name)(problem(8, limits={"mean_bits": 1.0, "bops": 1.0}))


def test_the_smallest_feasible_value_respects_the_other_budgets() -> None:
    """Two costs that pull in opposite directions, as a latency table's may."""
    penalties = {"a": {2: 1.0, 8: 0.1}}
    costs = {"mean_bits": {"a": {2: 2.0, 8: 8.0}}, "latency": {"a": {2: 9.0, 8: 3.0}}}
    with pytest.raises(BudgetError, match="mean_bits = 4 .* 8; latency = 5 .* 9"):
        ALLOCATORS.get("milp")(Problem(penalties, costs, {"mean_bits": 4.0, "latency": 5.0}, {}))


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_milp_does_not_depend_on_the_unit_of_the_penalty(scale: float) -> None:
    given = problem(48, 3)
    scaled = Problem(
        {n: {b: p * scale for b, p in row.items()} for n, row in given.penalties.items()},
        given.costs,
        given.limits,
        given.constants,
    )
    assert ALLOCATORS.get("milp")(scaled).bits == ALLOCATORS.get("milp")(given).bits


def test_nothing_to_decide() -> None:
    empty = Problem({}, {"mean_bits": {}}, {"mean_bits": 4.0}, {})
    for name in ALLOCATORS:
        assert dict(ALLOCATORS.get(name)(empty).bits) == {}
    with pytest.raises(BudgetError):
        ALLOCATORS.get("milp")(Problem({}, {"bops": {}}, {"bops": 4.0}, {"bops": 5.0}))


def with_edges(sites: int, seed: int, limit: float, groups: tuple[tuple[int, ...], ...], sign: float) -> Problem:
    """A latency whose neighbours cost more together (or less, for a negative sign) where their groups differ."""
    given = problem(sites, seed, {"mean_bits": 4.5}, widths=(2, 4, 8))
    rng = np.random.default_rng(seed)
    group = {b: index for index, widths in enumerate(groups) for b in widths}
    names = list(given.penalties)
    latency = {n: {b: float(rng.uniform(0.5, 1.0) + 0.3 * group[b]) for b in (2, 4, 8)} for n in names}
    edges = {
        pair: {(a, b): sign * float(w) if group[a] != group[b] else 0.0 for a in (2, 4, 8) for b in (2, 4, 8)}
        for pair, w in zip(itertools.pairwise(names), rng.uniform(0.2, 0.6, sites), strict=False)
    }
    return Problem(
        given.penalties,
        {**given.costs, "latency_ms@1": latency},
        {"mean_bits": 4.5, "latency_ms@1": limit},
        {"latency_ms@1": 1.0},
        {"latency_ms@1": edges},
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("groups", [((2, 4), (8,)), ((2,), (4,), (8,))])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_milp_finds_the_best_where_neighbours_decide_together(
    seed: int, groups: tuple[tuple[int, ...], ...], sign: float
) -> None:
    free = with_edges(6, seed, 100.0, groups, sign)
    names = list(free.penalties)
    plans = [dict(zip(names, bits, strict=True)) for bits in itertools.product((2, 4, 8), repeat=6)]
    costs = sorted(free.cost("latency_ms@1", bits) for bits in plans)
    given = with_edges(6, seed, costs[len(costs) // 8], groups, sign)
    best = min(given.penalty(bits) for bits in plans if given.fits(bits))
    found = ALLOCATORS.get("milp")(given)
    assert given.fits(found.bits) and found.objective == pytest.approx(best, rel=1e-6)
    with pytest.raises(BudgetError, match="latency_ms@1 = ") as error:
        ALLOCATORS.get("milp")(with_edges(6, seed, 0.5 * costs[0], groups, sign))
    least = min(
        c for c, bits in ((free.cost("latency_ms@1", b), b) for b in plans) if not free.excess("mean_bits", bits)
    )
    assert float(str(error.value).rsplit(" ", 1)[1]) == pytest.approx(least, rel=2e-5)


def test_a_speed_up_that_cannot_be_had_is_answered_with_the_largest() -> None:
    given = with_edges(6, 0, 0.5, ((2, 4), (8,)), 1.0)
    twice = Problem(
        given.penalties, given.costs, given.limits, given.constants, given.edges, {"latency_ms@1": 30.0}
    )  # fmt: skip
    with pytest.raises(BudgetError, match=r"latency_ms@1 = 60 cannot be met; the largest possible here is \d") as error:
        ALLOCATORS.get("milp")(twice)
    asked = float(str(error.value).rsplit(" ", 1)[1])
    kept = Problem(given.penalties, given.costs, {**given.limits, "latency_ms@1": 30.0 / asked}, given.constants,
                   given.edges)  # fmt: skip
    assert kept.fits(ALLOCATORS.get("milp")(kept).bits)


def test_milp_with_edges_solves_24_blocks_with_three_budgets_in_a_second() -> None:
    """Three kinds of container, every pair of neighbours with a cost of its own, negative ones too: a GPU's table."""
    given = problem(96, limits={"mean_bits": 4.4, "weight_bytes": 15600.0})
    rng = np.random.default_rng(1)
    names = list(given.penalties)
    kind = {b: "packed" if b <= 4 else "int8" for b in WIDTHS}
    node = {n: {"packed": float(rng.uniform(0.5, 0.8)), "int8": 1.0} for n in names}
    drawn = {pair: rng.uniform(-0.05, 0.15, 2) for pair in itertools.pairwise(names)}
    edges = {
        pair: {
            (a, b): 0.0 if kind[a] == kind[b] else float(two[int(kind[a] == "int8")]) for a in WIDTHS for b in WIDTHS
        }
        for pair, two in drawn.items()
    }
    costs = {**given.costs, "latency_ms@1": {n: {b: node[n][kind[b]] for b in WIDTHS} for n in names}}
    limits = {**given.limits, "latency_ms@1": 82.0}
    hard = Problem(given.penalties, costs, limits, given.constants, {"latency_ms@1": edges})
    found = ALLOCATORS.get("milp")(hard)
    assert hard.fits(found.bits) and found.gap is not None and found.gap < 1e-3
    assert hard.cost("latency_ms@1", found.bits) > 0.98 * 82.0


def test_the_solver_prints_nothing_among_a_commands_output(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As C code prints: to the file descriptor."""

    def chatty(*args: Any, **more: Any) -> Any:
        os.write(1, b"a word of the solver's own")
        return scipy.optimize.milp(*args, **more)

    monkeypatch.setattr(milp, "milp", chatty)
    print("before")
    assert ALLOCATORS.get("milp")(problem(3)).bits
    print("after")
    out, err = capfd.readouterr()
    assert out == "before\nafter\n" and "solver" in err
