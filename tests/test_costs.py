"""Costs against counts by hand, and what budgets accept."""

from __future__ import annotations

import math

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import lampq_rt
from lampq_rt import adapters, backends
from lampq_rt.calibrate import make_plan
from lampq_rt.calibrate.costs import COSTS, Budget, Cost
from lampq_rt.errors import BudgetError
from lampq_rt.formats import INTEGER_BITS
from lampq_rt.sites import BLOCK_LINEARS, Description

DIM, TOKENS = 64, 17
LINEAR_PARAMS = 2 * (3 + 1 + 4 + 4) * DIM * DIM
HEAD, PATCH = 10 * DIM, 3 * 8 * 8 * DIM

UNITS = "bops, latency_ms, mean_activation_bits, mean_bits, speedup, weight_bytes"


@pytest.fixture(scope="module")
def model() -> VisionTransformer:
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=DIM, depth=2, num_heads=2, num_classes=10).eval()


@pytest.fixture(scope="module")
def description(model: VisionTransformer) -> Description:
    return adapters.describe(model)


def total(cost: Cost, description: Description, bits: int) -> float:
    return cost.constant + sum(cost.of(s, backends.formats(s.kind, bits)) for s in description.sites)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8, 16])
def test_mean_bits_of_a_uniform_plan_is_its_width(
    model: VisionTransformer, description: Description, bits: int
) -> None:
    assert total(COSTS.get("mean_bits")(model, description), description, bits) == pytest.approx(bits)


@pytest.mark.parametrize(("bits", "per_weight"), [(2, 0.5), (4, 0.5), (5, 1), (8, 1), (16, 4)])
def test_weight_bytes_count_containers(
    model: VisionTransformer, description: Description, bits: int, per_weight: float
) -> None:
    cost = COSTS.get("weight_bytes")(model, description)
    elements = sum(p.numel() for p in model.parameters())
    weights = LINEAR_PARAMS + HEAD + PATCH
    channels = sum(s.out_features for s in description.sites if s.params)
    steps = 0 if bits == 16 else 8 * channels + 2 * 4 * (3 * DIM + 2 + 2)
    assert cost.full == 4 * elements
    assert total(cost, description, bits) == 4 * (elements - weights) + 32 + per_weight * weights + steps


@pytest.mark.parametrize("bits", [4, 6])
def test_weight_bytes_are_those_of_the_compiled_model(bits: int) -> None:
    for kwargs, exact in (({"qk_norm": True}, True), ({"embed_dim": 96}, True), ({"init_values": 0.1}, False)):
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": DIM, "depth": 2, "num_heads": 2, "num_classes": 10}
        model = VisionTransformer(**{**sizes, **kwargs}).eval()
        plan = make_plan(model, torch.randn(2, 3, 32, 32), budget=Budget(mean_bits=bits), recipe="uniform")
        found, counted = lampq_rt.compile(model, plan).weight_bytes, plan.provenance["costs"]["weight_bytes"]
        assert found == counted if exact else 0.97 * counted < found < counted


def test_odd_input_widths_are_not_packed() -> None:
    model = VisionTransformer(img_size=28, patch_size=14, embed_dim=96, depth=1, num_heads=2, num_classes=0)
    description = adapters.describe(model)
    cost = COSTS.get("weight_bytes")(model, description)
    for name, packed in (("patch_embed.proj", False), ("blocks.0.attn.qkv", False), ("blocks.0.mlp.fc2", True)):
        site = description.site(name)
        codes = cost.of(site, backends.formats(site.kind, 4)) - 8 * site.out_features
        assert codes == (site.params // 2 if packed else site.params), name


def test_bops_count_every_product(model: VisionTransformer, description: Description) -> None:
    cost = COSTS.get("bops")(model, description)
    linear = LINEAR_PARAMS * TOKENS + HEAD
    matmul = 2 * 2 * TOKENS * TOKENS * DIM
    patch = PATCH * (TOKENS - 1)
    assert cost.full == (linear + matmul + patch) * 32 * 32
    assert total(cost, description, 4) == (linear + matmul) * 16 + patch * 4 * 8
    assert total(cost, description, 8) == (linear + matmul + patch) * 64


def test_costs_never_fall_with_wider_integers(model: VisionTransformer, description: Description) -> None:
    for unit in COSTS:
        cost = COSTS.get(unit)(model, description)
        for site in description.sites:
            values = [cost.of(site, backends.formats(site.kind, bits)) for bits in INTEGER_BITS]
            assert values == sorted(values), (unit, site.name)
        if unit == "mean_bits":
            assert all(cost.of(s, backends.menu(s)[0]) == 0 for s in description.sites if s.kind not in BLOCK_LINEARS)


def test_budgets_hold_several_limits() -> None:
    budget = Budget(mean_bits=4, weight_bytes="15 %", bops=None)
    assert list(budget) == ["mean_bits", "weight_bytes"]
    assert budget.resolve("mean_bits", 32.0) == 4.0
    assert budget.resolve("weight_bytes", 200.0) == pytest.approx(30.0)
    assert Budget.parse("weight_bytes = 15%", "mean_bits=4") == budget
    assert Budget.parse("weight_bytes=15%") | Budget(mean_bits=4) == budget
    assert (Budget(mean_bits=3) | Budget(mean_bits=4)).limits == {"mean_bits": 4.0}
    assert str(budget) == "mean_bits 4, weight_bytes 15%"


@pytest.mark.parametrize("limit", [0, -1, math.nan, math.inf, "", "%", "four", "-3%", "nan%", True, [4], torch.nan])
def test_limits_that_are_not_positive_numbers_are_refused(limit: object) -> None:
    with pytest.raises(BudgetError, match=f"mean_bits.*positive number.*{UNITS}") as error:
        Budget(mean_bits=limit)
    assert "\n" not in str(error.value)


def test_unknown_units_and_malformed_texts_are_refused() -> None:
    for make in (lambda: Budget(energy=3), lambda: Budget.parse("energy=3")):
        with pytest.raises(BudgetError, match=f"unknown budget unit 'energy'; units: {UNITS}"):
            make()
    for text in ("mean_bits", "mean_bits=", "=4", "4"):
        with pytest.raises(BudgetError, match=f"units: {UNITS}"):
            Budget.parse(text)
    with pytest.raises(BudgetError, match="given twice"):
        Budget.parse("mean_bits=4", "mean_bits=5")
    with pytest.raises(BudgetError, match="at least one limit"):
        Budget()
