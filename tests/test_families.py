"""Families of levels: each is the best of its published formula, by brute force over plain numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lampq_rt.calibrate import RECIPES
from lampq_rt.calibrate.recipes import PLAIN, Preparation, Recipe
from lampq_rt.calibrate.search.families import FAMILIES
from lampq_rt.calibrate.search.table import best_table
from lampq_rt.quantizers.table import flaw
from lampq_rt.sites import Kind

EDGE = {-128: 5.0, -126: 3.0, -125: 4.0, -90: 1.0, 20: 0.5}
"""A tail that ends at the grid's end, with 0 at code -122."""

SPARSE = {-20: 3.0, -19: 5.0, -18: 1.0, -15: 2.0, -4: 4.0, 9: 1.0, 61: 0.5, 100: 0.25}
"""Weight by code: what lies behind a GELU, with 0 at code -15."""

TWO_TAILED = {-90: 0.5, -33: 1.0, -7: 6.0, -2: 2.0, 0: 3.0, 4: 5.0, 25: 2.0, 70: 0.5}
"""The same with 0 at code 0."""

CASES = {"one tail": (SPARSE, -15), "two tails": (TWO_TAILED, 0), "edge": (EDGE, -122)}


def histogram_of(weights: dict[int, float]) -> Tensor:
    histogram = torch.zeros(256, dtype=torch.float64)
    for code, weight in weights.items():
        histogram[code + 128] = weight
    return histogram


def behind_gelu() -> Tensor:
    x = torch.nn.functional.gelu(2 * torch.randn(20000, generator=torch.Generator().manual_seed(0)))
    return torch.bincount((x * 20 - 100).round().clamp(-128, 127).long() + 128, minlength=256).double()


def on_grid(levels: list[float]) -> set[int]:
    return {round(level) for level in levels if -128 <= round(level) <= 127}


def error(weights: dict[int, float], levels: list[float]) -> float:
    """Every code goes to the nearest of the levels, which are rounded to the grid and left out beyond it."""
    whole = on_grid(levels)
    if not whole:
        return math.inf
    return sum(weight * min((code - level) ** 2 for level in whole) for code, weight in weights.items())


def log_formula(weights: dict[int, float], zero: int, bits: int, exponent: float) -> Iterator[list[float]]:
    """AdaLog's x_hat = s * 2^(-k q / r) - shift of the codes k, the largest of which may mean s * 0."""
    for s in range(1, 256):
        if zero != 0:
            shift = -min(weights)
            powers = [s * 2 ** (-k * exponent) - shift for k in range(2**bits)]
            yield powers
            yield [*powers[:-1], 0.0 - shift]
        else:
            yield [zero + sign * s * 2 ** (-k * exponent) for k in range(2 ** (bits - 1)) for sign in (-1, 1)]


def twin_formula(weights: dict[int, float], zero: int, bits: int) -> Iterator[list[float]]:
    """PTQ4ViT: codes of b - 1 bits for each sign, one step 2^m times the other."""
    top = 2 ** (bits - 1) - 1
    for m in range(-7, 8):
        for end in range(1, 256):
            small = end / top / 2.0 ** abs(m)
            negative, positive = (small, end / top) if m >= 0 else (end / top, small)
            yield [zero - k * negative for k in range(top + 1)] + [zero + k * positive for k in range(top + 1)]


def uniform_formula(weights: dict[int, float], zero: int, bits: int) -> Iterator[list[float]]:
    top = 2**bits - 1
    for zero_point in range(2**bits):
        for length in range(1, 256):
            yield [zero + (k - zero_point) * length / top for k in range(2**bits)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bits", [2, 3])
def test_logarithms_by_brute_force(case: str, bits: int) -> None:
    weights, zero = CASES[case]
    for name, exponents in {"log-sqrt2": [1 / 2], "adalog": [q / 37 for q in range(10, 139)]}.items():
        table = FAMILIES.get(name)(histogram_of(weights), zero, bits)
        every = (levels for e in exponents for levels in log_formula(weights, zero, bits, e))
        check(weights, table, bits, every)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bits", [2, 3])
def test_uniform_ranges_by_brute_force(case: str, bits: int) -> None:
    weights, zero = CASES[case]
    for name, formula in {"twin": twin_formula, "uniform": uniform_formula}.items():
        table = FAMILIES.get(name)(histogram_of(weights), zero, bits)
        check(weights, table, bits, formula(weights, zero, bits))


def check(weights: dict[int, float], table: Tensor, bits: int, formula: Iterator[list[float]]) -> None:
    """The table's levels are those of a member of the family, and no member has less error."""
    assert flaw(table, bits) is None
    members = [(error(weights, levels), on_grid(levels)) for levels in formula]
    least = min(e for e, _ in members)
    own = sum(weight * (code - int(table[code + 128])) ** 2 for code, weight in weights.items())
    assert own == pytest.approx(least, abs=1e-9)
    used = {int(level) for level in table}
    assert any(e == pytest.approx(least, abs=1e-9) and used <= levels for e, levels in members)


@pytest.mark.parametrize("bits", range(2, 8))
@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_family_fits_its_width_and_the_optimum_is_no_worse(name: str, bits: int) -> None:
    codes = torch.arange(-128, 128).double()
    for histogram, zero in [(behind_gelu(), -100), (histogram_of(TWO_TAILED), 0), (histogram_of({5: 1.0}), 5)]:
        tables = [FAMILIES.get(n)(histogram, zero, bits) for n in ("optimal", name)]
        assert flaw(tables[1], bits) is None
        errors = [float((histogram * (codes - t.double()).square()).sum()) for t in tables]
        assert errors[0] <= errors[1] * (1 + 1e-9) + 1e-9
    assert flaw(FAMILIES.get(name)(torch.zeros(256), 0, bits), bits) is None
    assert torch.equal(FAMILIES.get("optimal")(behind_gelu(), -100, bits), best_table(behind_gelu(), bits))


def test_more_freedom_costs_no_error() -> None:
    """adalog has the base of log-sqrt2 within a hundredth, and all others."""
    codes, histogram = torch.arange(-128, 128).double(), behind_gelu()
    found = {
        n: float((histogram * (codes - FAMILIES.get(n)(histogram, -100, 4).double()).square()).sum()) for n in FAMILIES
    }
    assert found["optimal"] <= found["adalog"] <= 1.05 * found["log-sqrt2"]


def test_preparations_name_families_by_kind() -> None:
    adalog = Preparation(families=(("fc2", "adalog"),))
    assert (adalog.scheme_of(Kind.FC2), adalog.family(Kind.FC2)) == ("table", "adalog")
    assert (adalog.scheme_of(Kind.QKV), adalog.scheme_of(Kind.HEAD)) == ("uniform", "uniform")
    tables = Preparation(scheme="table", families=(("fc2", "twin"),))
    assert (tables.scheme_of(Kind.QKV), tables.family(Kind.QKV), tables.family(Kind.FC2)) == (
        "table",
        "optimal",
        "twin",
    )
    assert "families" not in PLAIN.to_json() and adalog.to_json()["families"] == {"fc2": "adalog"}
    with pytest.raises(ValueError, match="head.*allowed: fc1, fc2, proj, qkv"):
        Preparation(families=(("head", "twin"),))
    with pytest.raises(ValueError, match="allowed without families"):
        Recipe("x", "minmax", (), "uniform", False, False, "", adalog, compensate=True)
    for name in RECIPES:
        assert {family for _, family in RECIPES.get(name).preparation.families} <= set(FAMILIES)
