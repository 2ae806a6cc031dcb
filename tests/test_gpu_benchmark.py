"""The GPU benchmark as far as it goes without one: what it keeps, what it calls wrong, what it compiles ahead."""

from __future__ import annotations

import json
import os
import select
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("triton")

import typer  # noqa: E402

from benchmarks.gpu import __main__ as command  # noqa: E402
from benchmarks.gpu import cases, checks, kernels, parts, plan, speed  # noqa: E402
from benchmarks.gpu.job import Job, attempt  # noqa: E402
from lampq_rt.kernels import reference  # noqa: E402
from lampq_rt.kernels.gpu import configs, tables, tune  # noqa: E402
from lampq_rt.kernels.gpu.work import LinearWork  # noqa: E402


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job((), tmp_path, tmp_path / "part.json")


def test_every_part_has_a_function_and_a_time() -> None:
    assert {part.function for part in plan.PARTS} == set(parts.FUNCTIONS)
    assert all(part.least_s < part.limit_s for part in plan.PARTS)
    assert len({part.name for part in plan.PARTS}) == len(plan.PARTS)


def test_what_is_known_is_kept_when_a_row_fails(job: Job) -> None:
    def fails() -> dict[str, Any]:
        raise RuntimeError("no such kernel")

    rows = [attempt(fails), attempt(lambda: {"ms": 1.0})]
    job.save({"rows": rows})
    assert json.loads(job.result.read_text())["rows"] == [{"error": "RuntimeError: no such kernel"}, {"ms": 1.0}]
    assert [path.name for path in job.folder.iterdir()] == ["part.json"]


def packed(args: tuple[Any, ...]) -> bool:
    """True of 4-bit containers, which GPUs alone have."""
    return torch.int4 in args or any(isinstance(a, torch.Tensor) and a.dtype == torch.uint8 for a in args)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's kernels in the place of the GPU's."""
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(checks, "REPEATS", 2)
    some = [c for c in cases.cases() if c[1] != "linear_residual_layernorm" and not packed(c[2])]
    some = [case for n, case in enumerate(some) if n % 4 == 0 or case[1] == "linear_float"]
    monkeypatch.setattr(cases, "cases", lambda: iter(some))
    monkeypatch.setattr(checks, "SCHEMAS", dict.fromkeys(name for _, name, _ in some))


@pytest.mark.usefixtures("on_cpu")
def test_right_results_are_called_right(job: Job) -> None:
    facts = checks.correctness(job)
    assert len(facts["rows"]) > 10 and facts["wrong"] == [], facts["summary"]


@pytest.mark.parametrize("right", [True, False])
def test_whole_rows_are_tried_where_a_tile_holds_them(job: Job, monkeypatch: pytest.MonkeyPatch, right: bool) -> None:
    some = [case for case in cases.cases() if case[1] == "linear_residual_layernorm"]
    tried = []

    def rows(config: Any, *args: Any) -> None:
        """Stands for the kernel."""
        *operands, out = args[:7]
        tried.append((len(operands[2]), operands[2].dtype))
        out.copy_(reference.linear_residual_layernorm(*operands, *args[7:12], 8, torch.int8, *args[13:]))
        out += 0 if right else 2

    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(cases, "cases", lambda: iter(some))
    monkeypatch.setattr(checks, "REPEATS", 1)
    monkeypatch.setattr(checks, "SCHEMAS", ("linear_residual_layernorm",))
    monkeypatch.setattr(checks, "NATIVE", reference)
    monkeypatch.setattr(checks.start, "rows", rows)
    facts = checks.correctness(job)
    packed = [(192, torch.uint8)] * 4
    assert tried == [(384, torch.int8), (192, torch.int8), *packed], "no tile holds 384 columns of packed operands"
    assert len(facts["rows"]) == 10 and len(facts["wrong"]) == (0 if right else 6), facts["summary"]


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("mistake", ["codes", "nan", "race", "crash"])
def test_wrong_results_are_called_wrong(job: Job, monkeypatch: pytest.MonkeyPatch, mistake: str) -> None:
    calls = []

    class Wrong:
        def __getattr__(self, name: str) -> Any:
            def call(*args: Any) -> Any:
                calls.append(name)
                if mistake == "crash":
                    raise RuntimeError("illegal memory access")
                found = getattr(reference, name)(*args)
                if mistake == "nan":
                    return torch.full_like(found, torch.nan) if name == "linear_float" else found
                first = found[0] if isinstance(found, tuple) else found
                codes = first is not None and not first.is_floating_point()
                if codes and (mistake == "codes" or len(calls) % 2):
                    first.view(-1)[0] ^= 64
                return found

            return call

    if mistake in ("codes", "race"):
        some = [c for c in cases.cases() if c[1] != "linear_float"]
        monkeypatch.setattr(cases, "cases", lambda: iter(some))
        monkeypatch.setattr(checks, "SCHEMAS", dict.fromkeys(name for _, name, _ in some))
    monkeypatch.setattr(checks, "NATIVE", Wrong())
    facts = checks.correctness(job)
    assert facts["wrong"] and "wrong: " in facts["summary"]
    assert mistake == "crash" or not any("error" in row for row in facts["rows"]), facts["rows"]
    if mistake == "race":
        assert any(row.get("unstable") for row in facts["rows"])


def test_a_share_of_the_kernels_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    some = [c for c in cases.cases() if c[0].startswith("quantize")]
    monkeypatch.setattr(cases, "cases", lambda: iter(some))
    monkeypatch.setattr(kernels, "AHEAD", ())
    monkeypatch.setattr(kernels, "GEMM_EPILOGUES", (("requant", 768, 768, True),))
    launches = {launch.key for launch in kernels.launches_ahead("sm90")}
    assert len(launches) > len(some)
    made = kernels.compile_share("sm90", 0, len(launches) // 3, time.time() + 60)
    assert made[0] >= 3 and made[1:] == (0, 0)
    assert kernels.compile_share("sm90", 0, 1, 0.0) == (0, 0, len(launches))


def test_a_ratio_needs_both() -> None:
    rows: dict[str, Any] = {"w8a8": {"median": 2.0}, "bf16-compile": {"error": "out of memory"}}
    facts = speed._facts(rows, 64, "default")
    assert "ratio" not in facts and "failed: bf16-compile" in facts["summary"]
    rows["bf16-compile"] = {"median": 5.0}
    assert speed._facts(rows, 64, "default")["ratio"] == 2.5


def test_a_second_call_has_the_tuning_of_the_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tables, "cache_folder", lambda: tmp_path)
    config = configs.LinearConfig(64, 64, 128).to_json()

    def entry(key: str, **changes: Any) -> dict[str, Any]:
        return {"ok": True, "sources": "new", "data": {"arch": "sm90", "entries": {key: config}}, **changes}

    done = {
        "tune:a:1": entry("linear requant 1"), "tune:b:1": entry("linear requant 2", sources="old"),
        "tune:c:1": entry("linear requant 3", ok=False), "x": entry("", ok=False, data=None),
    }  # fmt: skip
    command.restore_tables(done, "new")
    assert list(tables.read(tmp_path / "sm90.json")) == ["linear requant 1", "linear requant 3"]
    first = done["tune:a:1"]
    assert command.is_done(first, "new") and not command.is_done(first, "newer") and not command.is_done(None, "new")
    assert not command.is_done(done["tune:c:1"], "new") and not command.is_done(done["x"], "new")
    first["data"]["left"] = 2
    assert not command.is_done(first, "new"), "a part that stopped itself goes on in the next call"
    first["data"]["left"] = 0
    assert command.is_done(first, "new")
    for failed in ({"w8a8": {"median": 1.0}, "bf16": {"error": "memory"}}, [{"error": "memory"}]):
        first["data"]["rows"] = failed
        assert not command.is_done(first, "new") and command.has_errors(first), "what failed is tried again"
    first["data"]["rows"] = {"w8a8": {"median": 1.0}}
    assert command.is_done(first, "new") and not command.has_errors(done["x"]) and not command.has_errors(None)


def test_what_failed_is_tried_again_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[str] = []

    def run(part: plan.Part, *rest: Any) -> dict[str, Any]:
        ran.append(part.name)
        return {"ok": True, "seconds": 1.0, "data": {"rows": [{"ms": 1.0}], "summary": ""}}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "_run", run)
    monkeypatch.setattr(command, "PARTS", tuple(plan.Part(name) for name in ("failed", "right", "new")))
    entry = {"ok": True, "seconds": 1.0, "sources": plan.sources_digest()}
    rows = {"failed": [{"error": "memory"}], "right": [{"ms": 1.0}]}
    kept = {name: {**entry, "data": {"rows": found, "summary": ""}} for name, found in rows.items()}
    (tmp_path / "kept.json").write_text(json.dumps({"parts": kept}))
    app = typer.Typer()
    app.command()(command.main)
    given = ["--out", str(tmp_path / "out"), "--resume", str(tmp_path / "kept.json")]
    assert CliRunner().invoke(app, given, catch_exceptions=False).exit_code == 0
    assert ran == ["new", "failed"]


@pytest.mark.usefixtures("on_cpu")
def test_checks_go_on_where_they_ran_out_of_time(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = checks.correctness(job)
    assert whole["left"] == 0
    half = {**whole, "rows": [{**whole["rows"][0], "wrong": True}, *whole["rows"][1:7]], "left": len(whole["rows"]) - 7}
    compared, inner = [], checks._compared
    monkeypatch.setattr(checks, "_compared", lambda name, args: compared.append(name) or inner(name, args))
    again = checks.correctness(replace(job, earlier=half))
    assert len(compared) == len(whole["rows"]) - 6, "what was right stands, what was wrong is looked at again"
    assert again["wrong"] == [] and {r["case"] for r in again["rows"]} == {r["case"] for r in whole["rows"]}


def test_cases_have_names_of_their_own() -> None:
    labels = [label for label, _, _ in cases.cases()]
    assert len(set(labels)) == len(labels)


class Tuner:
    """Stands for `tune_linear`; from the `most`-th linear on there is no time. Attribute `asked`: keys."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, most: int) -> None:
        self.asked: list[str] = []
        self.most = most
        monkeypatch.setattr(tables, "cache_folder", lambda: tmp_path / "cache")
        monkeypatch.setattr(kernels.tuning, "gpu_architecture", lambda: "sm90")
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
        monkeypatch.setattr(tune, "tune_linear", self)

    def __call__(self, work: LinearWork, *, levels: bool = False, stop: Any) -> tune.Tuned:
        assert not stop(), "there is time"
        if len(self.asked) == self.most:
            raise tune.Stopped(work.key)
        self.asked.append(work.key + (" weight levels" if levels else ""))
        return tune.Tuned(configs.LinearConfig(), 1.0, 2.0)


def test_gemm_goes_on_where_it_ran_out_of_time(job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = len(list(kernels.gemm_works()))
    tuner = Tuner(monkeypatch, tmp_path, 5)
    first = kernels.gemm(job)
    assert (len(first["rows"]), first["left"]) == (5, asked - 5) and f"{asked - 5} left" in first["summary"]
    tuner.most = 1000
    whole = kernels.gemm(replace(job, earlier=first))
    assert whole["left"] == 0 and len(tuner.asked) == len(set(tuner.asked)) == len(whole["rows"]) == asked
    assert len(whole["entries"]) == asked - sum("levels" in row["key"] for row in whole["rows"])
    tuner.asked.clear()
    kernels.gemm(replace(job, earlier={**first, "gpu": "another"}))
    assert len(tuner.asked) == asked, "times of another GPU say nothing of this one"


def test_a_tuned_model_goes_on_where_it_ran_out_of_time(
    job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    works = [LinearWork("requant", 197, 64 * n, 64) for n in range(1, 7)]
    monkeypatch.setattr(kernels, "model_works", lambda name, batch: works)
    job, tuner = replace(job, args=("vit", "1")), Tuner(monkeypatch, tmp_path, 4)
    first = kernels.tune_model(job)
    assert first["left"] == 2 and list(first["entries"]) == [work.key for work in works[:4]]
    tables.user_table("sm90").unlink()
    command.restore_tables({"tune": {"ok": True, "sources": "new", "data": first}}, "new")  # on the next machine
    tuner.most = 1000
    second = kernels.tune_model(job)
    assert second["left"] == 0 and tuner.asked == list(second["entries"]) == [work.key for work in works]
    assert tables.read(job.folder / "sm90.json").keys() == second["entries"].keys()


def test_a_part_knows_when_it_is_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the clock of who started it: what is imported before it begins counts."""
    jobs: list[Job] = []

    def part(job: Job) -> dict[str, Any]:
        jobs.append(job)
        return {"summary": "done"}

    def run(arguments: list[str], log: Any, limit_s: float) -> int:
        assert limit_s == 60 and arguments[1:3] == ["-m", "benchmarks.gpu.parts"]
        time.sleep(0.3)  # imports
        app = typer.Typer()
        app.command()(parts.main)
        return CliRunner().invoke(app, arguments[3:], catch_exceptions=False).exit_code

    monkeypatch.setitem(parts.FUNCTIONS, "gemm", part)
    monkeypatch.setattr(command, "run_limited", run)
    entry = command._run(plan.Part("gemm"), 60.0, tmp_path, None, {"left": 3})
    assert entry["ok"] and entry["data"] == {"summary": "done"}
    assert 50 < jobs[0].left() < 59.8 and jobs[0].earlier == {"left": 3}
    monkeypatch.setattr(command, "run_limited", lambda *args: None)
    entry = command._run(plan.Part("gemm"), 60.0, tmp_path, None, {"left": 3})
    assert (entry["ok"], entry["data"], entry["error"]) == (False, {"left": 3}, "time limit of 60 s")
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]


def test_a_time_limit_ends_all_that_a_part_started() -> None:
    """Whoever holds the pipe's other end is still there; so a read that ends says that nobody is."""
    child = "import subprocess, time; subprocess.Popen(['sleep', '100']); time.sleep(100)"
    reading, writing = os.pipe()
    with open(reading, "rb") as end:
        with open(writing, "wb") as log:
            assert command.run_limited([sys.executable, "-c", child], log, 1.0) is None
            assert command.run_limited([sys.executable, "-c", "raise SystemExit(3)"], log, 30.0) == 3
        assert select.select([end], [], [], 10.0)[0] == [end] and end.read() == b""


def test_workers_are_as_many_as_the_cores_they_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 256)
    for cores, workers in ((256, 16), (16, 14), (4, 2), (1, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cores=cores: set(range(cores)))
        assert kernels.compile_workers() == workers


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    app = typer.Typer()
    app.command()(command.main)
    result = CliRunner().invoke(app, ["--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
