"""Runs what has been waiting for a GPU: checks every kernel, tunes, times models against `torch.compile` and other
packages.

    python -m benchmarks.gpu --minutes 9 --out DIR [--resume FILE] [--weights FILE]

The most valuable comes first. Every part is a process of its own with a time limit; what it finds is kept row by row,
a part that fails or is stopped is recorded with its rows and the end of its output, and the rest goes on. A second
call with `--resume` (by default the results kept in benchmarks/results) goes on where the first stopped, with the
tuning of the first, also within a part that ran out of time, does again what the kernels' sources have outdated, and
last what has a row that failed.
DIR then holds results.json, tuning tables and a log: at most eight files.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.gpu.plan import PARTS, PER_MACHINE, Part, sources_digest
from lampq_rt.kernels.gpu import tables

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "benchmarks" / "results" / "gpu.json"
RESERVE_S = 5
"""Left at the end for writing."""


def main(
    out: Annotated[Path, typer.Option(help="Folder for results.json and tables.")],
    minutes: Annotated[float, typer.Option(help="Wall-clock time to use, minutes.")] = 9.0,
    resume: Annotated[Path, typer.Option(help="Results of an earlier call, to go on from.")] = KEPT,
    weights: Annotated[Path | None, typer.Option(help="DeiT-Tiny weights (.safetensors), to compare logits.")] = None,
    only: Annotated[str, typer.Option(help="Run only parts whose name starts with this.")] = "",
) -> None:
    """Check, tune and time the kernels on this machine's GPU."""
    if not torch.cuda.is_available():
        typer.echo("error: this benchmark needs a CUDA GPU, and PyTorch finds none here", err=True)
        raise typer.Exit(2)
    deadline = time.monotonic() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    digest = sources_digest()
    done: dict[str, Any] = json.loads(resume.read_text())["parts"] if resume.is_file() else {}
    done = {name: entry for name, entry in done.items() if name not in PER_MACHINE}
    restore_tables(done, digest)
    for part in sorted(PARTS, key=lambda part: has_errors(done.get(part.name))):
        if not part.name.startswith(only) or is_done(done.get(part.name), digest):
            continue
        left = deadline - time.monotonic() - RESERVE_S
        if part.needs and importlib.util.find_spec(part.needs) is None:
            typer.echo(f"{part.name}: left out, {part.needs} is not installed")
        elif left < part.least_s:
            typer.echo(f"{part.name}: left for the next call ({left:.0f} s remain, {part.least_s} s needed)")
        else:
            earlier = earlier_facts(done.get(part.name), digest)
            earlier = earlier if earlier.get("left") else {}
            done[part.name] = {**_run(part, min(left, part.limit_s), out, weights, earlier), "sources": digest}
            _write(out / "results.json", done)
    _write(out / "results.json", done)
    _show(done)


def is_done(entry: dict[str, Any] | None, digest: str) -> bool:
    """True for the result of a part that ended well, with these sources, and left nothing for a next call."""
    whole = entry and entry["ok"] and entry["sources"] == digest and not (entry["data"] or {}).get("left")
    return bool(whole) and not has_errors(entry)


def has_errors(entry: dict[str, Any] | None) -> bool:
    """True for the result of a part of which a row failed: it is tried again, behind all that was never run."""
    rows = (entry and entry["data"] or {}).get("rows") or ()
    return any("error" in row for row in (rows.values() if isinstance(rows, dict) else rows))


def earlier_facts(entry: dict[str, Any] | None, digest: str) -> dict[str, Any]:
    """What a part found with these sources, whether or not it came to its end."""
    return entry["data"] or {} if entry and entry["sources"] == digest else {}


def restore_tables(done: dict[str, Any], digest: str) -> None:
    """Tuning of an earlier call into this machine's own table, which models run with; a stopped part's, too."""
    for entry in done.values():
        data = earlier_facts(entry, digest)
        if data.get("entries"):
            tables.save(data["arch"], tables.parsed(data["entries"]))


def _write(path: Path, done: dict[str, Any]) -> None:
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps({"parts": done}, indent=1))
    os.replace(beside, path)


def _run(part: Part, limit_s: float, out: Path, weights: Path | None, earlier: dict[str, Any]) -> dict[str, Any]:
    """One part in its own process; it goes on from what it found `earlier`, which is kept where it finds nothing."""
    result, before = out / "part.json", out / "earlier.json"
    result.unlink(missing_ok=True)
    before.write_text(json.dumps(earlier))
    command = [sys.executable, "-m", "benchmarks.gpu.parts", part.name, "--result", str(result), "--tables", str(out)]
    command += ["--until", f"{time.time() + limit_s:.1f}", "--earlier", str(before)]
    if weights:
        command += ["--weights", str(weights)]
    start = time.monotonic()
    with (out / "log.txt").open("ab") as log:
        first = log.tell()
        status = run_limited(command, log, limit_s)
    seconds = round(time.monotonic() - start, 1)
    data = json.loads(result.read_text()) if result.is_file() else earlier or None
    result.unlink(missing_ok=True)
    before.unlink()
    ok = status == 0 and data is not None and not data.get("wrong")
    summary = (data or {}).get("summary", "nothing kept")
    print(f"{part.name}: {'ok' if ok else 'failed'} in {seconds} s: {summary}", flush=True)
    entry: dict[str, Any] = {"ok": ok, "seconds": seconds, "data": data}
    if not ok:
        tail = (out / "log.txt").read_bytes()[first:][-3000:].decode(errors="replace")
        entry["error"] = f"time limit of {limit_s:.0f} s" if status is None else tail if status else "wrong results"
    return entry


def run_limited(command: list[str], log: BinaryIO, limit_s: float) -> int | None:
    """Exit status of `command`; None where time ran out, and then it is stopped with all that it started.

    Processes that compile, for one, would go on beside the next part's timings.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        return process.wait(limit_s)
    except BaseException as error:  # an interrupt, too: it does not reach another session
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return None


def _show(done: dict[str, Any]) -> None:
    """A table for people."""
    table = Table("part", "", "seconds", "summary", title="GPU")
    for name, entry in done.items():
        summary = (entry["data"] or {}).get("summary", "")
        if not entry["ok"]:
            summary += f" [{entry.get('error', '')[-160:].strip()}]"
        table.add_row(name, "ok" if entry["ok"] else "failed", str(entry["seconds"]), summary)
    Console(width=160).print(table)


if __name__ == "__main__":
    typer.run(main)
