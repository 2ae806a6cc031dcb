"""Budgets of latency and speed-up, from a table made by hand to a plan."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lampq_rt.calibrate import Budget, Calibration, calibrate, make_plan
from lampq_rt.compiler import check_plan
from lampq_rt.errors import BudgetError, TableError
from lampq_rt.latency import check
from lampq_rt.latency.calls import Call
from lampq_rt.latency.predict import Predictor
from lampq_rt.plan import Plan
from lampq_rt.simulate import simulate
from lampq_rt.sites import BLOCK_LINEARS
from tests.latency_tables import gpu_price, hand_made
from tests.plans import tiny_vit

SIZE = (3, 32, 32)


def cpu_price(call: Call, batch: int) -> float:
    """Floating point costs four times as much; every op a little of its own."""
    own = 0.1 + zlib.crc32(call.key.encode()) % 100 / 1000
    return own * (4.0 if call.op.startswith("aten::linear") else 1.0)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_vit(depth=3)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(6, *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def calibration(model: nn.Module, images: Tensor) -> Calibration:
    table = hand_made(model, SIZE, [1, 8], cpu_price, baselines={"fp32-eager": 40.0, "bf16-eager": 20.0})
    return calibrate(model, images, latency_table=table)


def predicted(calibration: Calibration, model: nn.Module, plan: Plan, batch: int) -> float:
    """The latency that a whole forward pass of the plan is predicted to take."""
    chosen = {name: params.formats for name, params in plan.sites.items()}
    return Predictor(calibration.timed.table, model, SIZE, batch).latency_ms(chosen)


def linears(plan: Plan) -> set[int]:
    return {site.bits for site in plan.sites.values() if site.kind in BLOCK_LINEARS}


@pytest.mark.parametrize("recipe", ["lampq", "lampq+", "uniform"])
def test_one_plan_keeps_latency_and_size(
    calibration: Calibration, model: nn.Module, images: Tensor, recipe: str
) -> None:
    w8a8 = calibration.timed["latency_ms@8"].constant
    budget = Budget.parse(f"latency_ms={1.1 * w8a8}@8", "weight_bytes=60%", f"latency_ms={1.2 * w8a8}@1")
    plan = calibration.plan(budget, recipe)
    check_plan(model, plan)
    for batch, share in ((8, 1.1), (1, 1.2)):
        reached = plan.provenance["budget"][f"latency_ms@{batch}"]["reached"]
        assert reached == pytest.approx(predicted(calibration, model, plan, batch)) and reached <= share * w8a8 + 1e-9
    assert plan.provenance["costs"]["weight_bytes"] <= 0.6 * plan.provenance["full_costs"]["weight_bytes"]
    assert simulate(model, plan)(images).shape == (6, 10)
    json.dumps(dict(plan.provenance), allow_nan=False)


def test_floating_point_is_used_where_there_is_time_for_it(calibration: Calibration) -> None:
    assert linears(calibration.plan(Budget(latency_ms="1000@8"), "lampq")) == {16}
    w8a8 = calibration.timed["latency_ms@8"].constant
    tight = calibration.plan(Budget(latency_ms=f"{1.001 * w8a8}@8"), "lampq")
    between = calibration.plan(Budget(latency_ms=f"{1.3 * w8a8}@8"), "lampq")
    assert 16 not in linears(calibration.plan(Budget(mean_bits=8), "lampq")) and max(linears(between)) == 16
    assert between.mean_bits > tight.mean_bits


def test_speedup_is_over_the_fastest_baseline(calibration: Calibration) -> None:
    w8a8 = calibration.timed["speedup@8"].constant
    most = 20.0 / w8a8
    plan = calibration.plan(Budget.parse(f"speedup={0.95 * most}@8"), "lampq")
    facts = plan.provenance["budget"]["speedup@8"]
    assert facts["limit"] == pytest.approx(w8a8 / 0.95) and facts["reached"] <= facts["limit"]
    row = plan.provenance["latency"]["rows"][0]
    assert (row["batch"], row["baseline"], row["baseline_ms"]) == (8, "bf16-eager", 20.0)
    with pytest.raises(BudgetError, match=r"speedup@8 = 100 cannot be met; the largest possible here is \d"):
        calibration.plan(Budget.parse("speedup=100@8"), "lampq")
    with pytest.raises(BudgetError, match=r"latency_ms@1 = 0.1 cannot be met; the smallest possible here is \d"):
        calibration.plan(Budget.parse("latency_ms=0.1@1", "mean_bits=4"), "lampq")


def test_percentages_are_of_fp32(calibration: Calibration) -> None:
    plan = calibration.plan(Budget(latency_ms="30%@8"), "lampq")
    assert plan.provenance["budget"]["latency_ms@8"] | {"reached": 0} == {"asked": "30%", "limit": 12.0, "reached": 0}


def test_a_gpu_whose_4_bits_are_faster_at_batch_1_gets_4_bits_there(model: nn.Module, images: Tensor) -> None:
    table = hand_made(model, SIZE, [1, 8], gpu_price, device="cuda", threads=0)
    found = calibrate(model, images, target="cuda", latency_table=table)
    shares = {batch: Predictor(table, model, SIZE, batch).shares() for batch in (1, 8)}
    assert any(shares[1].edges.values())
    low = {b: found.timed[f"latency_ms@{b}"].constant for b in (1, 8)}
    hurried = found.plan(Budget(latency_ms=f"{0.88 * low[1]}@1", mean_bits=8), "lampq")
    assert min(linears(hurried)) <= 4 and predicted(found, model, hurried, 1) <= 0.88 * low[1] + 1e-9
    at_ease = found.plan(Budget(latency_ms=f"{1.02 * low[8]}@8", mean_bits=8), "lampq")
    assert at_ease.mean_bits > hurried.mean_bits


def test_units_and_batch_sizes_in_budgets() -> None:
    budget = Budget.parse("latency_ms=2@8", "latency_ms = 0.5 @ 1", "speedup=2@8", "mean_bits=4")
    assert budget.limits == {"latency_ms@1": 0.5, "latency_ms@8": 2.0, "mean_bits": 4.0, "speedup@8": 2.0}
    assert budget.batches == [1, 8] and Budget(latency_ms="2@8") == Budget(**{"latency_ms@8": 2})
    for text in ("latency_ms=2", "speedup=2", "latency_ms=2@", "latency_ms=2@0", "speedup=2@many"):
        with pytest.raises(BudgetError, match="a limit and a batch size are needed, like .*=2@8"):
            Budget.parse(text)
    for text, why in (("speedup=50%@8", "number of times"), ("latency_ms=-1@8", "positive"), ("mean_bits=4@8", "posi")):
        with pytest.raises(BudgetError, match=why):
            Budget.parse(text)
    with pytest.raises(BudgetError, match="given twice"):
        Budget.parse("latency_ms=2@8", "latency_ms=3@8")


def test_what_is_wrong_with_the_table_is_said(
    model: nn.Module, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAMPQ_CACHE", str(tmp_path))
    monkeypatch.setattr("lampq_rt.latency.table.SHIPPED", tmp_path)
    budget = Budget(latency_ms="2@8")
    with pytest.raises(TableError, match="no latency table for"):
        make_plan(model, images, budget=budget, recipe="uniform")
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(TableError, match="t.json: schema is None"):
        make_plan(model, images, budget=budget, recipe="uniform", latency_table=tmp_path / "t.json")
    gpu = hand_made(model, SIZE, [8], gpu_price, device="cuda", threads=0)
    with pytest.raises(TableError, match="the latency table is of abacus; the plan's target is cpu"):
        make_plan(model, images, budget=budget, recipe="uniform", target="cpu", latency_table=gpu)
    with pytest.raises(TableError, match="no latencies of VisionTransformer at batch 2"):
        make_plan(model, images, budget=Budget(latency_ms="2@2"), recipe="uniform", latency_table=gpu)


def test_predicted_and_measured_side_by_side(
    calibration: Calibration, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = calibration.plan(Budget(latency_ms="50%@8"), "uniform")
    assert "abacus" in str(check.obstacle(plan))
    monkeypatch.setattr("lampq_rt.bench.machine", lambda device: "abacus")
    monkeypatch.setattr("lampq_rt.bench.ROUND_SECONDS", 0.001)
    threads = torch.get_num_threads()
    obstacle = check.obstacle(plan)
    assert obstacle is None if threads == 1 else "threads" in str(obstacle)
    measured = check.measure(model, plan, rounds=1)
    (row,) = check.facts(plan, measured)
    assert row["measured_ms"] == measured[8] > 0 and row["error"] is not None
    assert check.facts(plan, {})[0]["measured_ms"] is None
