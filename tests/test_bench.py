"""The benchmark's rows, ratios and names; timings themselves are the machine's business."""

import json
import sys

import pytest
import torch

from lampq_rt import bench as benchmark
from lampq_rt.bench import bench, variants
from lampq_rt.compiler import compile as compile_plan
from lampq_rt.errors import BackendError, FormatError, PlanError, UnknownNameError
from lampq_rt.memory import PeakMemory, keep_memory
from lampq_rt.models import weight_bytes
from lampq_rt.standin import stand_in_plan
from lampq_rt.variants import Contender
from tests.plans import tiny_vit

SIZE = (3, 32, 32)


@pytest.fixture(autouse=True)
def short_rounds(monkeypatch):
    monkeypatch.setattr(benchmark, "ROUND_SECONDS", 0.01)


@pytest.fixture(scope="module")
def model():
    return tiny_vit()


@pytest.fixture(scope="module")
def plan(model):
    return stand_in_plan(model, torch.randn(2, *SIZE), 8)


def test_rows(model, plan):
    result = bench(model, plan, batches=(1, 3), against=["eager"], rounds=2, name="tiny", input_size=SIZE)
    assert [(r["batch"], r["variant"]) for r in result.rows] == [
        (batch, variant) for batch in (1, 3) for variant in ("fp32-eager", "bf16-eager", "lampq")
    ]
    for row in result.rows:
        assert row["model"] == "tiny" and row["device"] == "cpu"
        assert 0 < row["latency_ms"]["p20"] <= row["latency_ms"]["median"] <= row["latency_ms"]["p80"]
        assert row["images_per_s"] == pytest.approx(1e3 * row["batch"] / row["latency_ms"]["median"], rel=0.01)
        assert {"lampq_rt", "torch", "timm", "python"} <= set(row["versions"])
    fp32, bf16, ours = result.rows[:3]
    assert fp32["weight_bytes"] == weight_bytes(model) == 2 * bf16["weight_bytes"] > 2 * ours["weight_bytes"]
    assert fp32["served_bytes"] == fp32["weight_bytes"] and bf16["served_bytes"] == bf16["weight_bytes"]
    assert ours["served_bytes"] > ours["weight_bytes"]  # on a CPU, weights are repacked beside the stored ones
    assert 1.0 in (fp32["speedup"], bf16["speedup"])  # over the faster one by median; a busy round may differ
    assert json.dumps(result.rows, allow_nan=False)


def test_original_and_threads_are_left_alone(model, plan):
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    threads = torch.get_num_threads()
    bench(model, plan, batches=(1,), against=["bf16"], rounds=1, input_size=SIZE)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert torch.get_num_threads() == threads and next(model.parameters()).dtype == torch.float32


def test_names():
    assert variants(["eager"]) == ["fp32-eager", "bf16-eager", "lampq"]
    assert variants(["bf16", "compile", "bf16-eager", "lampq"]) == ["bf16-eager", "bf16-compile", "lampq"]
    assert variants([]) == ["lampq"]
    with pytest.raises(UnknownNameError, match=r"unknown variant 'tensorrt'.*eager, bf16, compile"):
        variants(["tensorrt"])


def test_ratio_is_taken_within_rounds():
    noise = [1.0, 9.0, 1.0]  # a neighbour in the second round slows both alike
    times = {
        "fp32-eager": [8 * n for n in noise],
        "bf16-eager": [4 * n for n in noise],
        "lampq": [2 * n for n in noise],
    }
    assert benchmark._speedups(times) == {"fp32-eager": 0.5, "bf16-eager": 1.0, "lampq": 2.0}
    assert benchmark._speedups({"lampq": [1.0]}) == {"lampq": None}


def test_rival_that_cannot_run_is_left_out_with_its_reason(model, plan, monkeypatch):
    def build(job):
        def run(images):
            raise BackendError("no C++ compiler")

        return Contender(run, job.original, torch.float32, "float32")

    monkeypatch.setitem(benchmark.VARIANTS._entries, "bf16-compile", build)
    result = bench(model, plan, batches=(1, 2), against=["bf16", "compile"], rounds=1, input_size=SIZE)
    assert result.left_out == {"bf16-compile": "no C++ compiler"}
    assert {row["variant"] for row in result.rows} == {"bf16-eager", "lampq"}


@pytest.mark.slow
def test_compiled_rival(model, plan):
    result = bench(model, plan, batches=(1,), against=["compile"], rounds=1, input_size=SIZE)
    assert "bf16-compile" in result.left_out or result.rows[0]["variant"] == "bf16-compile"


def test_what_is_refused(model, plan):
    with pytest.raises(BackendError, match="unknown device"):
        bench(model, plan, batches=(1,), device="abacus", input_size=SIZE)
    with pytest.raises(PlanError, match="other|weights"):
        bench(tiny_vit(seed=1), plan, batches=(1,), against=[], rounds=1, input_size=SIZE)
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="no CUDA GPU"):
            bench(model, plan, batches=(1,), device="cuda", input_size=SIZE)


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_stand_in_plan_runs_at_every_width(model, bits):
    images = torch.randn(2, *SIZE)
    made = stand_in_plan(model, images, bits)
    assert made.mean_bits == bits
    with torch.inference_mode():
        answer, truth = compile_plan(model, made)(images), model(images)
    assert torch.isfinite(answer).all()
    if bits >= 8:
        assert (answer - truth).pow(2).mean() < 0.05 * truth.pow(2).mean()


def test_stand_in_plan_of_a_width_that_does_not_exist(model):
    with pytest.raises(FormatError, match="bits = 9"):
        stand_in_plan(model, torch.randn(1, *SIZE), 9)


@pytest.mark.skipif(sys.platform != "linux", reason="resident sets are read from /proc")
def test_peak_memory_sees_a_large_allocation():
    memory = PeakMemory(torch.device("cpu"))
    with memory.peak():
        torch.ones(16 << 20)  # 64 MiB for a moment
    assert memory.peak_bytes is None or 60 << 20 < memory.peak_bytes < 120 << 20


def test_allocator_can_be_asked_twice():
    assert keep_memory() == keep_memory()
