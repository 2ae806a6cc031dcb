"""What calibrating costs: seconds and memory of every stage against the size of the model.

    python -m benchmarks.calibration_cost [--models deit_tiny_patch16_224,…] [--images 8,32] [--threads 1] [--brief]

Random weights and random images: time and memory do not depend on them (but for the iterative update, which tries at
most 30 swaps). Each model runs in a process of its own. Memory is the growth of the resident set since before the
model was built, so that 1 x is the fp32 model itself; "libraries" is what stays of that after a model of 0.2 MB was
calibrated. Steps are searched at all widths; with --brief at 4 bits alone, without the penalties that need them all:
a seventh of the time, and the same memory, since sites and widths are searched one by one. "fast" and the default
recipe are whole recipes, beside what the other stages keep; the latter searches all widths. Every row is kept in
benchmarks/results/calibration_cost.jsonl and not measured again; remove its line for that. The last row times the
allocation alone: 24 blocks, 8 widths, 3 budgets.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from timm.models.vision_transformer import VisionTransformer

import lampq_rt
from benchmarks.markdown import put_between
from lampq_rt.bench import machine
from lampq_rt.calibrate import Budget, calibrate
from lampq_rt.calibrate.allocate import ALLOCATORS, Problem
from lampq_rt.calibrate.metrics import PENALTIES
from lampq_rt.calibrate.recipes import DEFAULT_RECIPE
from lampq_rt.memory import PeakMemory, return_memory
from lampq_rt.models import load_model, weight_bytes

ROWS = Path(__file__).parent / "results" / "calibration_cost.jsonl"
MODELS = "deit_tiny_patch16_224,deit_small_patch16_224,vit_base_patch16_224,vit_large_patch16_224"
BITS = 4
MILP = "milp"
BLOCKS, WIDTHS = 24, range(1, 9)

console = Console()


def main(
    models: Annotated[str, typer.Option(help="timm names.")] = MODELS,
    images: Annotated[str, typer.Option(help="Numbers of calibration images.")] = "8,32",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    plans: Annotated[bool, typer.Option(help="Also compare and update plans, and the default recipe.")] = True,
    brief: Annotated[bool, typer.Option(help="Search steps at one width alone.")] = False,
    out: Annotated[Path, typer.Option(help="Markdown file with the two markers.")] = Path("docs/results.md"),
    measure: Annotated[bool, typer.Option("--measure", hidden=True, help="Measure here; print the row.")] = False,
) -> None:
    """Measure the rows that are missing and write the table."""
    torch.set_num_threads(threads)
    if measure:
        print(json.dumps(allocation() if models == MILP else cost(models, int(images), plans, brief)))
        return
    rows = {_key(row): row for row in _read()}
    wanted = [(MILP, 0), *((name, int(n)) for name in models.split(",") for n in images.split(","))]
    for name, count in wanted:
        if (name, count) in rows:
            continue
        console.print(f"{name}, {count} images")
        command = [sys.executable, "-m", "benchmarks.calibration_cost", "--measure", "--models", name]
        command += ["--images", str(count), "--threads", str(threads), "--plans" if plans else "--no-plans"]
        command += ["--brief"] if brief else []
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows[name, count] = json.loads(done.stdout.splitlines()[-1])
        console.print(rows[name, count])
        with ROWS.open("a") as file:
            file.write(json.dumps(rows[name, count]) + "\n")
    put_between(out, "cost", _table(list(rows.values())))


def cost(name: str, count: int, plans: bool, brief: bool) -> dict[str, Any]:
    """Calibrate in this process, stage by stage."""
    return_memory()  # as the command does
    memory = PeakMemory(torch.device("cpu"))
    libraries = _libraries(memory)
    stages: list[dict[str, Any]] = []

    def stage(what: str, work: Callable[[], Any]) -> Any:
        started, used = time.perf_counter(), time.process_time()
        with memory.peak():
            result = work()
        taken = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - used}
        taken = {key: round(value, 2) for key, value in taken.items()}
        stages.append({"stage": what, **taken, "peak_bytes": memory.peak_bytes})
        print(stages[-1], file=sys.stderr)
        return result

    model = stage("model", lambda: load_model(name, random=True))
    images = torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    calibration = stage("fp32 answers", lambda: calibrate(model, images))
    evidence = calibration.evidence("output-error", BITS)
    stage("observe", lambda: calibration.measurements.observations)
    stage("steps", lambda: (brief or evidence.table, calibration.plan(Budget(mean_bits=BITS), "uniform")))
    stage("Fisher", lambda: calibration.measurements.fisher)
    stage("Fisher at 4 bits", lambda: evidence.context)
    names = ("fisher-output", "fisher-context", "trace-dw")
    if not brief:
        stage("penalties", lambda: [PENALTIES.get(p)(evidence) for p in names] + [evidence.errors])
    stage("fast", lambda: calibration.plan(Budget(mean_bits=BITS), "fast"))
    if plans and not brief:
        stage("compare, update", lambda: calibration.plan(Budget(mean_bits=BITS), "lampq"))
    if plans:
        stage(DEFAULT_RECIPE, lambda: calibration.plan(Budget(mean_bits=BITS)))
    return {
        "model": name,
        "images": count,
        "fp32_bytes": weight_bytes(model),
        "stages": stages,
        "seconds": round(sum(s["seconds"] for s in stages[1:]), 1),
        "cpu_seconds": round(sum(s["cpu_seconds"] for s in stages[1:]), 1),
        "peak_bytes": max(s["peak_bytes"] or 0 for s in stages),
        "libraries_bytes": libraries,
        "widths": 1 if brief else len(calibration.measurements.widths(calibration.measurements.linears[0])),
        "threads": torch.get_num_threads(),
        "version": lampq_rt.__version__,
        "machine": machine(torch.device("cpu")),
    }


def _libraries(memory: PeakMemory) -> int | None:
    """Bytes that stay resident of a calibration of next to nothing: code and tables of the libraries."""
    toy = VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=1, num_heads=2, num_classes=10).eval()
    calibration = calibrate(toy, torch.randn(8, 3, 32, 32))
    for recipe in ("lampq", "fast", DEFAULT_RECIPE):
        calibration.plan(Budget(mean_bits=BITS), recipe)
    del calibration, toy
    with memory.peak():
        pass
    return memory.peak_bytes


def allocation() -> dict[str, Any]:
    """The slowest of several integer programs of 24 blocks, 8 widths and 3 budgets."""
    slowest, gap = 0.0, 0.0
    for seed in range(10):
        problem = synthetic(seed)
        started = time.perf_counter()
        found = ALLOCATORS.get("milp")(problem)
        slowest = max(slowest, time.perf_counter() - started)
        gap = max(gap, found.gap or 0.0)
    return {
        "model": MILP,
        "images": 0,
        "blocks": BLOCKS,
        "widths": len(WIDTHS),
        "budgets": 3,
        "seconds": round(slowest, 3),
        "gap": gap,
        "machine": machine(torch.device("cpu")),
    }


def synthetic(seed: int) -> Problem:
    """Penalties over several powers of ten that fall by about four a bit; mean bits, bytes in containers, bit-ops."""
    source = random.Random(seed)
    sizes = {"qkv": 3, "proj": 1, "fc1": 4, "fc2": 4}
    sites = {f"blocks.{b}.{kind}": size << 20 for b in range(BLOCKS) for kind, size in sizes.items()}
    penalties = {}
    for name in sites:
        level, penalties[name] = 10 ** source.uniform(-3, 2), {}
        for width in WIDTHS:
            penalties[name][width] = level * 4.0**-width * source.uniform(0.7, 1.3)
    total = sum(sites.values())
    costs = {
        "mean_bits": {n: {w: s * w / total for w in WIDTHS} for n, s in sites.items()},
        "weight_bytes": {n: {w: float(s // 2 if w <= 4 else s) for w in WIDTHS} for n, s in sites.items()},
        "bops": {n: {w: float(s) * w * w for w in WIDTHS} for n, s in sites.items()},
    }
    limits = {"mean_bits": 4.5, "weight_bytes": 0.7 * total, "bops": 21.0 * total}
    return Problem(penalties, costs, limits, {})


def _read() -> list[dict[str, Any]]:
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.is_file() else []


def _key(row: dict[str, Any]) -> tuple[str, int]:
    return row["model"], row["images"]


def _table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Seconds and peak memory by stage, then the allocation alone."""
    models = [row for row in rows if row["model"] != MILP]
    if models:
        first = models[0]
        stages = list(dict.fromkeys(s["stage"] for row in models for s in row["stages"][1:]))
        yield f"\n{first['machine']}, {first['threads']} thread(s). Seconds of the processor, and in brackets peak"
        yield "memory over the fp32 model's bytes, model and libraries included.\n"
        yield f"| model | images | widths | fp32 MB | libraries MB | {' | '.join(stages)} | all | peak |"
        yield "|---" * (len(stages) + 7) + "|"
    for row in sorted(models, key=lambda r: (r["fp32_bytes"], r["images"])):
        full, found = row["fp32_bytes"], {s["stage"]: s for s in row["stages"]}
        cells = [
            f"{found[s]['cpu_seconds']:.1f} ({(found[s]['peak_bytes'] or 0) / full:.1f})" if s in found else "–"
            for s in stages
        ]
        yield (
            f"| {row['model']} | {row['images']} | {row['widths']} | {full / 1e6:.0f} | "
            f"{(row['libraries_bytes'] or 0) / 1e6:.0f} | {' | '.join(cells)} | {row['cpu_seconds']:.0f} | "
            f"{row['peak_bytes'] / full:.2f} × |"
        )
    for row in (row for row in rows if row["model"] == MILP):
        yield f"\nAllocation alone, {row['blocks']} blocks × {row['widths']} widths × {row['budgets']} budgets, slowest"
        yield f"of ten: {row['seconds']:.2f} s (relative gap at most {row['gap']:.0e})."


if __name__ == "__main__":
    typer.run(main)
