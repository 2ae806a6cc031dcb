"""The parts of `python -m benchmarks.gpu`: each a function that gives JSON-able facts and a line of summary."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.gpu import checks, kernels, speed
from benchmarks.gpu.job import Facts, Job

FUNCTIONS: dict[str, Callable[[Job], Facts]] = {
    "compile": kernels.compile_ahead, "correctness": checks.correctness, "logits": checks.logits,
    "ceilings": kernels.ceilings, "gemm": kernels.gemm, "attention": kernels.attention, "tune": kernels.tune_model,
    "model": speed.model_speed, "peers": speed.peers, "gemlite": speed.gemlite,
    "sageattention": speed.sageattention,
}  # fmt: skip


def main(
    name: str,
    result: Annotated[Path, typer.Option(help="File for the facts, rewritten as they come.")],
    tables: Annotated[Path, typer.Option(help="Folder for tuning tables.")],
    until: Annotated[float, typer.Option(help="When this process is stopped, seconds since the epoch.")] = math.inf,
    weights: Annotated[Path | None, typer.Option(help="Of DeiT-Tiny.")] = None,
    earlier: Annotated[Path | None, typer.Option(help="Facts of an earlier run, to go on from.")] = None,
) -> None:
    """Run one part and write its facts."""
    function, *args = name.split(":")
    job = Job(tuple(args), tables, result, weights, until, json.loads(earlier.read_text()) if earlier else {})
    facts = FUNCTIONS[function](job)
    assert all(math.isfinite(v) for v in facts.values() if isinstance(v, float))
    job.save(facts)


if __name__ == "__main__":
    typer.run(main)
