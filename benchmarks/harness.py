"""What every benchmark here shares: where rows are kept, memory in a process of its own.

`lampq_rt.bench` times: warm-up, median with 20th and 80th percentile, variants taking turns in one process so that
their ratios survive a noisy machine, inputs that rotate. This adds what a committed result needs. `Store` appends
rows to benchmarks/results/<machine>.jsonl and never changes one: a row measured again stands after the old one, with
its date, and the later one counts. `fresh_memory` asks a new process for a variant's peak resident set, since in one
that has built nine models a tenth one finds memory that others left.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from lampq_rt import bench, peers
from lampq_rt.errors import BackendError, DataError, LampqError
from lampq_rt.memory import PeakMemory, keep_memory, resident_bytes
from lampq_rt.models import load_model
from lampq_rt.standin import stand_in_plan
from lampq_rt.variants import VARIANTS, Job

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MEMORY_SECONDS = 300
"""A process that measures memory is given up after this."""

Row = dict[str, Any]


def rows_file(device: str = "cpu", folder: Path = RESULTS) -> Path:
    """Where rows of this machine are kept: its processor's or GPU's name as a file name."""
    name = re.sub(r"\(.*?\)", "", bench.machine(torch.device(device))).lower()
    return folder / f"{re.sub(r'[^a-z0-9]+', '-', name).strip('-')}.jsonl"


@dataclass
class Store:
    """Rows of one machine, appended to a file as soon as they are measured.

    Attributes:
        path: of the JSON lines.
        key: the fields by which a row is found again.
    """

    path: Path
    key: tuple[str, ...] = ("kind", "model", "batch", "variant", "threads")
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        for number, line in enumerate(lines, 1):
            try:
                self.rows.append(json.loads(line))
            except json.JSONDecodeError:
                raise DataError(f"{self.path}, line {number}: not JSON; was a run stopped there? Delete it") from None

    def append(self, rows: Iterable[Row]) -> None:
        """Add rows with the moment and the machine's load; those of the same key stay, and count no longer."""
        moment = datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ")
        stamped = [{**row, "measured": moment, "load": round(os.getloadavg()[0], 1)} for row in rows]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in stamped))
        self.rows += stamped

    def latest(self, **fields: Any) -> list[Row]:
        """The last row of each key among those with these fields, in the order of their first measurement."""
        found = {
            tuple(row.get(part) for part in self.key): row
            for row in self.rows
            if all(row.get(name) == value for name, value in fields.items())
        }
        return list(found.values())


class Clock:
    """Wall-clock time that a command may use.

    Args:
        minutes: None for no limit.
    """

    def __init__(self, minutes: float | None) -> None:
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes

    def left(self) -> float:
        """Seconds that remain, never negative."""
        return float("inf") if self.deadline is None else max(0.0, self.deadline - time.monotonic())


def fresh_memory(model: str, batch: int, variant: str, threads: int, folder: Path) -> Row:
    """Peak memory of a forward pass on the CPU in a process that builds nothing but this variant.

    Args:
        model: timm name; the weights are random.
        folder: where peers keep quantised models; one found there is loaded, as in production.

    Returns:
        A row with `peak_memory_bytes` (growth of the resident set from before building to the peak of a forward pass)
        and `resident_bytes` (the whole process at that peak, with PyTorch itself).

    Raises:
        BackendError: the variant cannot run here; the reason.
    """
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "row.json"
        arguments = [model, str(batch), variant, str(threads), str(folder), str(answer)]
        command = [sys.executable, "-m", "benchmarks.harness", *arguments]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=MEMORY_SECONDS)
        except subprocess.TimeoutExpired:
            raise BackendError(f"not done within {MEMORY_SECONDS} s") from None
        if done.returncode or not answer.is_file():
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise BackendError(last[:200])
        row: Row = json.loads(answer.read_text())
        return row


def three(value: float) -> str:
    """Three significant digits, all of a larger number's integer part."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def main(
    model: Annotated[str, typer.Argument()],
    batch: Annotated[int, typer.Argument()],
    variant: Annotated[str, typer.Argument()],
    threads: Annotated[int, typer.Argument()],
    folder: Annotated[Path, typer.Argument()],
    answer: Annotated[Path, typer.Argument()],
) -> None:
    """The process that `fresh_memory` starts: one variant, its memory as JSON in a file."""
    torch.set_num_threads(threads)
    keep_memory()
    device = torch.device("cpu")
    original = load_model(model, random=True)
    size = tuple(original.pretrained_cfg["input_size"])
    plan = stand_in_plan(original, torch.randn(1, *size), 8)
    job = Job(original, plan, device, bench.random_calibration(size), folder)
    if variant in peers.PEERS:  # the library's own code is no model's memory, ours neither
        runtime = peers.PEERS[variant].packages[0]
        if peers.installed(runtime):
            import_module(runtime)
    images = torch.randn(batch, *size)
    memory = PeakMemory(device)
    try:
        with torch.inference_mode():
            contender = VARIANTS.get(variant)(job)
            sample = images.to(contender.dtype)
            bench.warm_up(contender, [sample])
            with memory.peak():
                contender.run(sample)
    except LampqError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    facts = {
        "kind": "memory", "model": model, "batch": batch, "variant": variant, "threads": threads,
        "peak_memory_bytes": memory.peak_bytes, "resident_bytes": resident_bytes(),
        "weight_bytes": contender.weight_bytes, "versions": bench.versions(variant), "machine": bench.machine(device),
    }  # fmt: skip
    answer.write_text(json.dumps(facts))


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)  # so that the last line on standard error says what it was
    app.command()(main)
    app()
