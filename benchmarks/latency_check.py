"""Predicted against measured latency of compiled models, and this machine's latency table made anew for it.

    python -m benchmarks.latency_check --models deit_small_patch16_224,vit_base_patch16_224 --batch 1,8

Nothing of the plans that are measured enters the table: it holds single ops, and each model with 8 bits everywhere and
in floating point. Plans mix 4 and 8 bits, floating-point islands of several kinds, and all three at random. All models
of one batch size take turns. Weights are random: latency depends on shapes and formats. The table is written to the
package's own (`--table` names another) and the rows between two markers of docs/results.md.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import nn
from torch.utils.benchmark import Timer

from lampq_rt.adapters import describe
from lampq_rt.cli_common import names, numbers
from lampq_rt.compiler import compile as compile_plan
from lampq_rt.images import preprocessing
from lampq_rt.latency import table as tables
from lampq_rt.latency.predict import Predictor
from lampq_rt.latency.profile import Profile
from lampq_rt.memory import keep_memory
from lampq_rt.models import load_model
from lampq_rt.plan import Plan
from lampq_rt.sites import Site
from lampq_rt.standin import stand_in_plan

BEGIN, END = "<!-- latency:begin -->", "<!-- latency:end -->"
TURN_SECONDS = 0.3

console = Console()


def _block(site: Site) -> int:
    return -1 if site.block is None else site.block


def _random_width(site: Site) -> int:
    return 8 if site.is_matmul or site.block is None else random.Random(site.name).choice((4, 8, 16))


PLANS: dict[str, Callable[[Site], int]] = {
    "4 bits, every other block 8": lambda s: 4 if _block(s) % 2 == 0 else 8,
    "fc2 of every other block in floating point": lambda s: 16 if s.kind == "fc2" and _block(s) % 2 else 8,
    "attention of every third block in floating point": lambda s: 16 if s.is_matmul and _block(s) % 3 == 0 else 8,
    "a whole block in four in floating point": lambda s: 16 if _block(s) % 4 == 1 else 8,
    "linears at 4, 8 or 16 bits at random": _random_width,
}
"""Width of a site, by the plan's name."""


def main(
    models: Annotated[str, typer.Option(help="timm names.")] = "deit_small_patch16_224,vit_base_patch16_224",
    batch: Annotated[str, typer.Option(help="Batch sizes.")] = "1,8",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    rounds: Annotated[int, typer.Option(help="Turns of each model.")] = 5,
    against: Annotated[str, typer.Option(help="Baselines to keep in the table, as of bench.")] = "eager",
    table: Annotated[Path | None, typer.Option(help="Latency table to make; the package's by default.")] = None,
    again: Annotated[bool, typer.Option(help="Time every op anew.")] = True,
    out: Annotated[Path, typer.Option(help="Markdown file with the two markers.")] = Path("docs/results.md"),
) -> None:
    """Make the table, measure the plans, write the rows."""
    if threads is not None:
        torch.set_num_threads(threads)
    keep_memory()
    target = torch.device(device)
    path = table or tables.SHIPPED / tables.empty(target).file_name
    rows = []
    for name in names(models):
        rows += _rows(name, numbers(batch, "--batch"), target, path, names(against), rounds, again)
    found = tables.LatencyTable.load(path)
    where = f"{found.where}, torch {found.versions['torch']}, {found.written}"
    _write(out, rows, where)


def _rows(
    name: str, batches: Sequence[int], device: torch.device, path: Path, against: list[str], rounds: int, again: bool
) -> list[dict[str, Any]]:
    """A row a batch size and plan, of one model."""
    started = time.perf_counter()
    model = load_model(name, None, random=True)
    size = tuple(preprocessing(name).config["input_size"])
    profile = Profile(model, name, size, batches, device, path, again=again)
    for timed in profile.calls():
        console.print(f"{timed.latency_ms:10.4f} ms  {timed.key}", highlight=False, soft_wrap=True)
    profile.models(against, rounds, lambda text: None)
    table = tables.LatencyTable.load(path)
    plans = _plans(model, size)
    fast = {label: compile_plan(model, plan, device) for label, plan in plans.items()}
    console.print(f"{name}: table and plans after {time.perf_counter() - started:.0f} s")
    rows = []
    for batch in batches:
        predictor = Predictor(table, model, size, batch)
        images = torch.randn((batch, *size), device=device)
        measured = _turns(fast, images, rounds)
        for label, plan in plans.items():
            chosen = {site: params.formats for site, params in plan.sites.items()}
            predicted = predictor.latency_ms(chosen)
            row = {"model": name, "batch": batch, "plan": label, "predicted": predicted, "measured": measured[label]}
            console.print(row)
            rows.append(row)
    console.print(f"{name}: done after {time.perf_counter() - started:.0f} s")
    return rows


def _plans(model: nn.Module, size: Sequence[int]) -> dict[str, Plan]:
    """Stand-ins with the widths that `PLANS` says, and with 8 bits everywhere for comparison."""
    images = torch.randn((2, *size), generator=torch.Generator().manual_seed(0))
    by_width = {w: stand_in_plan(model, images, w) for w in (4, 8, 16)}
    sites = describe(model).sites
    mixed = {
        label: by_width[8].with_sites({site.name: by_width[width(site)].sites[site.name] for site in sites})
        for label, width in PLANS.items()
    }
    return {"8 bits everywhere": by_width[8], **mixed}


def _turns(models: Mapping[str, nn.Module], images: torch.Tensor, rounds: int) -> dict[str, float]:
    """Median milliseconds of each model, all taking turns."""
    timers, counts = {}, {}
    with torch.inference_mode():
        for label, model in models.items():
            timers[label] = Timer(
                "run(images)", globals={"run": model, "images": images}, num_threads=torch.get_num_threads()
            )
            timers[label].timeit(2)
            counts[label] = max(1, round(TURN_SECONDS / timers[label].timeit(1).mean))
        times: dict[str, list[float]] = {label: [] for label in models}
        for _ in range(rounds):
            for label, timer in timers.items():
                times[label].append(timer.timeit(counts[label]).mean * 1e3)
    return {label: statistics.median(found) for label, found in times.items()}


def _write(out: Path, rows: list[dict[str, Any]], where: str) -> None:
    """Put the rows between the markers of `out`, or behind its end where it has none."""
    lines = [f"\nOn {where}. Largest error {max(abs(_error(r)) for r in rows):.1f} %.\n"]
    lines += ["| model | batch | plan | predicted ms | measured ms | error |", "|---|---|---|---|---|---|"]
    for row in rows:
        times = f"{row['predicted']:.4g} | {row['measured']:.4g} | {_error(row):+.1f} %"
        lines.append(f"| {row['model']} | {row['batch']} | {row['plan']} | {times} |")
    text = out.read_text() if out.is_file() else "# Results\n"
    if BEGIN not in text:
        text += f"\n{BEGIN}\n{END}\n"
    before, rest = text.split(BEGIN, 1)
    out.write_text(before + BEGIN + "\n".join(lines) + "\n" + END + rest.split(END, 1)[1])
    console.print("\n".join(lines))


def _error(row: Mapping[str, Any]) -> float:
    return 100.0 * (row["predicted"] / row["measured"] - 1.0)


if __name__ == "__main__":
    typer.run(main)
