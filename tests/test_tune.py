"""Which launches are tuned, what is kept, and `lampq tune`; the timer is a fake, for there is no GPU here."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lampq_rt import tuning
from lampq_rt.cli import main
from lampq_rt.errors import FormatError
from lampq_rt.kernels.gpu import configs, offline, scratch, tables, tune
from lampq_rt.kernels.gpu.work import LinearWork, Recorder
from tests.plans import VARIANTS, tiny_vit

MODEL = "test_vit"
SIZE = (3, 32, 32)


class Timer:
    """Stands for `tune_linear`: notes what it is asked, and fails at the n-th shape where it is told to."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.fail_at: int | None = None

    def __call__(self, work: LinearWork, *, stop: Callable[[], bool]) -> tune.Tuned:
        if len(self.asked) == self.fail_at:
            raise KeyboardInterrupt
        if stop():
            raise tune.Stopped(work.key)
        self.asked.append(work.key)
        return tune.Tuned(configs.LinearConfig(64, 64, 128, warps=4), 0.01, 0.02)


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Timer:
    """A GPU of architecture sm90 with an empty user's table."""
    fake = Timer()
    monkeypatch.setattr(tune, "tune_linear", fake)
    monkeypatch.setattr(tuning, "gpu_architecture", lambda: "sm90")
    monkeypatch.setenv("LAMPQ_CACHE", str(tmp_path / "cache"))
    tables._table.cache_clear()
    return fake


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)


def facts(*arguments: object) -> dict[str, Any]:
    result = run("tune", MODEL, "--json", "-", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def meta_vit(**changes: object) -> torch.nn.Module:
    return tiny_vit(**changes).to("meta")


def test_levels_of_a_weight_change_no_key() -> None:
    x_q, w_q, levels = torch.empty(1, 5, 64), torch.empty(8, 32, dtype=torch.uint8), torch.empty(16, dtype=torch.int8)
    vectors = (x_q, w_q, *[torch.empty(8)] * 3)
    for name, args in (
        ("linear_float", (*vectors, "gelu", torch.bfloat16)),
        ("linear_requant", (*vectors, "gelu", 1.0, 0, 4, torch.int4, None)),
        ("linear_residual", (torch.empty(1, 5, 8), *vectors)),
    ):
        work = LinearWork.of_call(name, args)
        assert work.w_bits == 4 and LinearWork.of_call(name, (*args, levels)) == work
        assert work.out_dtype == {"linear_float": torch.bfloat16, "linear_residual": torch.float32}.get(
            name, torch.float16
        )


def test_launches_are_those_of_the_whole_model() -> None:
    works = tuning.launches(meta_vit(), SIZE, [2], ["w8a8"])
    assert [w.operations for w in works] == sorted((w.operations for w in works), reverse=True)
    kinds = {(w.epilogue, w.m, w.n, w.k, w.gelu) for w in works}
    assert kinds == {
        ("float", 32, 64, 192, False),  # patch embedding: 16 patches an image
        ("heads", 34, 192, 64, False),
        ("residual", 34, 64, 64, False),
        ("requant", 34, 256, 64, True),
        ("residual", 34, 64, 256, False),
        ("rows", 34, 64, 64, False),  # with the LayerNorm that follows
        ("rows", 34, 64, 256, False),
        ("float", 2, 10, 64, False),  # head
    }
    assert all(w.out_dtype == torch.float16 for w in works if w.epilogue == "residual")
    heads = next(w for w in works if w.epilogue == "heads")
    assert (heads.heads, heads.tokens) == (2, 17)


def test_launches_follow_the_formats() -> None:
    by_format = {name: tuning.launches(meta_vit(), SIZE, [1], [name]) for name in tuning.FORMATS}
    containers = {name: Counter((w.a_bits, w.w_bits) for w in works) for name, works in by_format.items()}
    assert containers["w8a8"] == {(8, 8): 8} and containers["w4a8"] == {(8, 4): 8}
    assert containers["w4a4"] == {(4, 4): 5, (8, 4): 3}, "images stay at 8 bits; a head of 32 channels cannot pack"
    fc1 = next(w for w in by_format["w4a4"] if w.gelu)
    assert fc1.out_bits == 4 and fc1.key.endswith("o4 gelu")
    assert len(tuning.launches(meta_vit(), SIZE, [1])) == 21


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_has_launches(name: str) -> None:
    model = meta_vit(**VARIANTS[name])
    size = (model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    works = tuning.launches(model, size, [1, 3], ["w8a8"])
    assert len({w.key for w in works}) == len(works) >= 5
    if name == "qk_norm":  # qkv leaves in floating point
        assert not any(w.epilogue == "heads" for w in works)


def test_a_recorder_reads_calls_of_the_real_ops() -> None:
    from lampq_rt import compile as compile_plan
    from tests.plans import range_plan

    model, images = tiny_vit(), torch.randn(2, *SIZE)
    fast = compile_plan(model, range_plan(model, images))
    with torch.inference_mode(), Recorder() as recorder:
        came = fast(images)
        assert torch.equal(came, fast(images))
    assert recorder.works.keys() == {w.key for w in tuning.launches(model, SIZE, [2], ["w8a8"])}


def test_launches_are_those_of_buckets_and_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    def batches(batch: int) -> set[int]:
        return {w.m for w in tuning.launches(meta_vit(), SIZE, [batch], ["w8a8"]) if w.n == 10}

    assert [batches(b) for b in (1, 3, 64, 256, 257, 512)] == [{1}, {4}, {64}, {256}, {1, 256}, {256}]
    monkeypatch.setattr(tuning, "l2_bytes", lambda: int(64 * 17 * 5 * 64 / 0.6) + 1)
    assert [batches(b) for b in (3, 64, 200, 512)] == [{4}, {64}, {64}, {64}]


def test_candidates_hold_and_fit() -> None:
    found = list(tune.candidates(12608, 3072, 768, "sm90", 132, 8, 8))
    assert len(found) >= 8 and all(configs.feasible(c, "sm90") and c.split_k == 1 for c in found)
    assert any(c.split_k > 1 for c in tune.candidates(197, 768, 3072, "sm90", 132, 8, 8))


def test_no_candidate_starts_the_same_kernel_as_another() -> None:
    """Columns of q, k and v never split K, whatever a configuration says; at batch 1 the rule says so."""
    for work in (LinearWork("heads", 50, 2304, 768, heads=12, tokens=50), LinearWork("residual", 50, 768, 3072)):
        with offline.recording("sm90") as launches:
            configs_ = [config for config, start in tune.starts(work) if start() is None]
        assert len({(launch.key, launch.grid) for launch in launches}) == len(launches) == len(configs_)
        assert (max(config.split_k for config in configs_) > 1) == (work.epilogue != "heads")


def test_a_launch_is_timed_from_a_graph_that_clears_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What split K shares is made before the capture: a fill inside would count as the kernel's."""
    state, made, replayed = {"capturing": False}, [], []

    class Graph:
        def replay(self) -> None:
            replayed.append(True)

    @contextmanager
    def capture(graph: Graph, **options: Any) -> Iterator[None]:
        state["capturing"] = True
        yield
        state["capturing"] = False

    def launch() -> None:
        sums, _ = scratch.split_scratch(torch.empty(1), 64, 1)
        made.append((state["capturing"], sums.data_ptr()))

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    launch()  # with memory that is kept, so no other can have its address
    with scratch.captured(launch) as replay:
        replay()
    assert [capturing for capturing, _ in made] == [False, False, True] and replayed == [True]
    assert made[0][1] != made[1][1] == made[2][1], "memory of its own, the same for both"


def test_two_kernels_are_timed_as_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the residual's tuned tile and nothing but their launches."""
    work, tile = LinearWork("rows", 34, 64, 256, 8, 4), configs.LinearConfig(64, 128, 128, warps=4)
    asked: list[str] = []
    monkeypatch.setattr(tables, "linear", lambda arch, key: asked.append(key) or tile)
    case = tune._case(work, "meta")
    ((config, two), *_) = tune.starts(work, case)
    assert config is None and asked == [LinearWork("residual", 34, 64, 256, 8, 4).key]
    monkeypatch.setattr(tables, "linear", None)
    for name in ("empty", "zeros", "empty_like"):
        monkeypatch.setattr(torch, name, None)
    with offline.recording("sm90") as launches:
        two()
    assert [launch.name for launch in launches] == ["linear_kernel", "layernorm_quantize_kernel"]
    assert [launches[0].values[name] for name in ("EPILOGUE", "BLOCK_M", "BLOCK_N")] == [2, 64, 128]


def test_tune_writes_a_table_that_launches_read(timer: Timer, tmp_path: Path) -> None:
    out = facts("--batch", "1,8", "--formats", "w8a8")
    assert out["architecture"] == "sm90" and out["table"] == str(tmp_path / "cache" / "sm90.json")
    keys = [row["key"] for row in out["rows"]]
    assert timer.asked == keys and len(set(keys)) == len(keys) == 16
    assert all(row["latency_ms"] == 0.01 and row["rule_ms"] == 0.02 for row in out["rows"])
    assert all(tables.linear("sm90", key) == configs.LinearConfig(64, 64, 128, warps=4) for key in keys)


def test_a_stopped_run_goes_on_where_it_was(timer: Timer, tmp_path: Path) -> None:
    table = tmp_path / "t.json"
    timer.fail_at = 3
    run("tune", MODEL, "--batch", 1, "--out", table)
    assert len(tables.read(table)) == 3
    timer.fail_at = None
    out = facts("--batch", 1, "--out", table)
    assert [row["config"] is None for row in out["rows"]] == [True] * 3 + [False] * (len(out["rows"]) - 3)
    assert len(timer.asked) == len(set(timer.asked)) == len(out["rows"]) == len(tables.read(table))
    assert not tables.user_table("sm90").exists(), "--out leaves the user's table alone"
    timer.asked.clear()
    result = run("tune", MODEL, "--batch", 1, "--out", table)
    assert not timer.asked and "0 shapes tuned" in result.stdout and "--again" in result.stdout
    assert all(row["config"] for row in facts("--batch", 1, "--out", table, "--again")["rows"])


def test_a_tuner_asks_before_every_candidate_whether_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[object] = []
    monkeypatch.setattr(tune, "_timed", lambda launch: timed.append(launch) or 1.0)
    monkeypatch.setattr(tune, "_case", lambda work, device, case=tune._case: case(work, "meta"))
    with pytest.raises(tune.Stopped):
        tune.tune_linear(LinearWork("requant", 34, 256, 64), stop=lambda: len(timed) == 3)
    assert len(timed) == 3


def test_a_table_says_where_two_kernels_are_faster_than_one(tmp_path: Path) -> None:
    key, table = LinearWork("rows", 34, 64, 64).key, tmp_path / "t.json"
    tables.save("sm90", {key: None}, table)
    assert tables.read(table) == {key: None}
    tables.save("sm90", {LinearWork("float", 34, 64, 64).key: None}, table)
    assert tables.read(table) == {}, "any other launch needs a configuration"


def test_tables_are_for_people(timer: Timer) -> None:
    result = run("tune", MODEL, "--batch", 1, "--formats", "w4a8")
    assert "64×64×128" in result.stdout and "requant w4a8" in result.stdout and "2.00" in result.stdout


def test_missing_launches_are_tuned_once(timer: Timer) -> None:
    from lampq_rt import compile as compile_plan
    from tests.plans import range_plan

    model, images = tiny_vit(), torch.randn(2, *SIZE)
    fast = compile_plan(model, range_plan(model, images))
    tuning.tune_missing(fast, images)
    assert len(timer.asked) == 8
    tuning.tune_missing(fast, images)
    assert len(timer.asked) == 8
    tuning.tune_missing(fast, images.repeat(4, 1, 1, 1))
    assert len(timer.asked) == 16


def test_a_compiled_model_tunes_before_a_capture_if_asked(timer: Timer) -> None:
    from lampq_rt import compile as compile_plan
    from tests.plans import range_plan
    from tests.test_runner import FakeCapture

    model, images = tiny_vit(), torch.randn(3, *SIZE)
    for tuned in (False, True):
        fast = compile_plan(model, range_plan(model, images), tune=tuned)
        runner = fast._new_runner(images.device)
        runner._capture = FakeCapture()
        torch.testing.assert_close(runner(images), fast(images))
        asked = {int(key.split()[2][1:]) for key in timer.asked}
        assert asked == ({4, 64, 128} if tuned else set()), "rows of 4 images: head, patches, tokens"
        assert runner.micro_batch is None


def test_mistakes_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="unknown format 'w3a3'; allowed: w8a8, w4a8, w4a4"):
        tuning.check_format("w3a3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, why in (
        (("--formats", "w3a3"), "unknown format 'w3a3'"),
        (("--batch", "0"), "--batch '0'"),
        (("--out", tmp_path / "none" / "t.json"), "no folder"),
        ((), "tuning times kernels on a CUDA GPU, and PyTorch finds none on this machine"),
    ):
        result = run("tune", MODEL, *arguments)
        lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert result.exit_code == 2 and len(lines) == 1 and why in lines[0], result.output
