"""The GPU benchmark as far as it goes without one: what it keeps, what it calls wrong, what it compiles ahead."""

from __future__ import annotations

import json
import time
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
from lampq_rt.kernels.gpu import configs, tables  # noqa: E402


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
                if first is not None and (mistake == "codes" or len(calls) % 2):
                    first.view(-1)[0] ^= 64 if first.dtype != torch.float16 else 0
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
    entry = {"ok": True, "sources": "new", "data": {"arch": "sm90", "entries": {"linear requant 1": config}}}
    command.restore_tables(
        {"tune:a:1": entry, "tune:b:1": {**entry, "sources": "old"}, "x": {"ok": False, "data": None}}, "new"
    )
    assert list(tables.read(tmp_path / "sm90.json")) == ["linear requant 1"]
    assert command.is_done(entry, "new") and not command.is_done(entry, "newer") and not command.is_done(None, "new")


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    app = typer.Typer()
    app.command()(command.main)
    result = CliRunner().invoke(app, ["--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
