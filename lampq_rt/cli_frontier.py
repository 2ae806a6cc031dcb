"""`lampq frontier`: one calibration, many budgets; accuracy against bytes and latency, beside uniform bits."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.table import Table

from lampq_rt.cli_common import (
    Images,
    Json,
    Model,
    Output,
    Seed,
    Target,
    Weights,
    check_destination,
    check_target,
    names,
    percent,
)
from lampq_rt.cli_frontier_bench import Bench
from lampq_rt.errors import DataError, UnknownNameError

if TYPE_CHECKING:
    from lampq_rt.frontier import Point, Quality, Sweep, Verdict


def frontier(
    model: Model,
    images: Images,
    eval_images: Annotated[
        Path, typer.Option("--eval-images", metavar="DIR", help="Images to evaluate on: others than --images.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the sweep; made, or gone on with.")],
    weights: Weights = None,
    labels: Annotated[
        Path | None, typer.Option("--labels", metavar="CSV", help="Classes of --eval-images: columns file and label.")
    ] = None,
    mean_bits: Annotated[
        str, typer.Option("--mean-bits", metavar="BITS,…", help="Budgets. Uniform bits take the whole ones.")
    ] = "3,3.5,4,4.5,5,6,7,8",
    recipes: Annotated[str, typer.Option(metavar="NAME,…", help="As of calibrate.")] = "fast+w,lampq+w",
    quality: Annotated[str, typer.Option("--y", help="What is drawn: kl, agreement or top1.")] = "kl",
    calib_images: Annotated[int, typer.Option(help="Images to calibrate on, drawn by the seed.", min=1)] = 32,
    train_images: Annotated[
        int, typer.Option(help="Images that recipes which train see, of the same folder.", min=1)
    ] = 512,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", help="Evaluate on only N images, evenly spaced.", min=1)
    ] = None,
    latency: Annotated[bool, typer.Option(help="Also measure latency, once for all plans of the same kernels.")] = True,
    batch: Annotated[int, typer.Option(help="Images at once when latency is measured.", min=1)] = 1,
    seed: Seed = 0,
    target: Target = "any",
    device: Annotated[str, typer.Option(help="Where to calibrate and to measure latency: cpu or cuda.")] = "cpu",
    json: Json = None,
) -> None:
    """Sweep budgets with one calibration; draw accuracy against bytes and latency, beside uniform bits.

    Writes frontier.png, frontier.svg and points.csv, and keeps plans and points in the folder: a sweep that was
    stopped goes on where it was, and more budgets or recipes can be added later.

    \b
    Examples:
      lampq frontier deit_tiny_patch16_224 --weights deit_tiny.safetensors \\
          --images photos --eval-images val --labels val/labels.csv --out deit_tiny.sweep
      lampq frontier deit_tiny_patch16_224 --weights deit_tiny.safetensors \\
          --images photos --eval-images val --mean-bits 3,4,5,6,8 --limit 300 --out quick.sweep
    """
    from lampq_rt import backends
    from lampq_rt import frontier as sweeps
    from lampq_rt.models import check_name

    output = Output(json)
    check_name(model)
    wanted = _wanted(output, mean_bits, recipes)
    chosen = _quality(quality, labels)
    check_target(target)
    backends.resolve(device)
    sweeps.check_folder(out)
    bench = Bench(
        output=output, model=model, weights=weights, images=images, eval_images=eval_images, labels=labels,
        calib_images=calib_images, train_images=train_images if _trains(wanted) else None,
        limit=limit, seed=seed, target=target, device=device, batch=batch,
    )  # fmt: skip
    sweep = sweeps.Sweep(out, bench.setting)
    _fill(bench, sweep, wanted, latency)
    points = sweeps.ordered(sweep.points[key] for key in wanted)
    found = [v for v in sweeps.verdicts(sweep, _baselines(wanted)) if (v.baseline, v.bits) in wanted]
    _write(output, sweep, points, model, chosen, f"{device}, batch {batch}")
    output.show(_table(points, model), *_conclusions(found), f"\n{out} written.")
    output.facts(
        {
            "model": model,
            "images": points[0].images,
            "fp32_top1": points[0].fp32_top1,
            "points": [asdict(p) for p in points],
            "front": [p.name for p in sweeps.front(points, "disk_bytes", chosen)],
            "verdicts": [{**asdict(v), "verdict": v.text} for v in found],
        }
    )


def _quality(quality: str, labels: Path | None) -> Quality:
    """What is drawn, if there is such a thing, and if it can be had."""
    from lampq_rt.frontier import QUALITIES

    chosen = next((q for q in QUALITIES if q == quality), None)
    if chosen is None:
        raise UnknownNameError(f"--y {quality!r}; known: {', '.join(QUALITIES)}")
    if chosen == "top1" and labels is None:
        raise DataError("--y top1 needs --labels")
    return chosen


def _wanted(output: Output, mean_bits: str, recipes: str) -> list[tuple[str, float]]:
    """Recipe and budget of every point, uniform ones first: they cost next to nothing."""
    from lampq_rt.calibrate import RECIPES
    from lampq_rt.formats import INTEGER_BITS

    narrowest, *_, widest = INTEGER_BITS  # activations are limited as weights are, and have no other widths
    try:
        bits = sorted({float(part) for part in names(mean_bits)})
    except ValueError:
        bits = []
    if not bits or not all(narrowest <= b <= widest for b in bits):
        raise DataError(
            f"--mean-bits {mean_bits!r}: numbers from {narrowest} to {widest} with commas between are needed, "
            "like 3,4.5"
        )
    found, skipped = [], set()
    for recipe in dict.fromkeys(names(recipes)):
        uniform = RECIPES.get(recipe).allocator == "uniform"
        found += [(recipe, b) for b in bits if not uniform or b == int(b)]
        skipped |= {f"{b:g}" for b in bits if uniform and b != int(b)}
    if skipped:
        output.note(f"uniform bits have no mean of {', '.join(sorted(skipped))}: left out there")
    if not found:
        raise DataError("nothing to do: --recipes names none, or only uniform bits with fractional budgets")
    return sorted(found, key=lambda key: (key[0] != "uniform", key[1]))


def _baselines(wanted: Iterable[tuple[str, float]]) -> list[str]:
    """Recipes of the same bits everywhere, which others are compared with; `uniform` first."""
    from lampq_rt.calibrate import RECIPES

    recipes = dict.fromkeys(recipe for recipe, _ in wanted)
    return [recipe for recipe in recipes if RECIPES.get(recipe).allocator == "uniform"]


def _trains(wanted: Iterable[tuple[str, float]]) -> bool:
    """Whether a recipe needs images to train on."""
    from lampq_rt.calibrate import RECIPES

    return any(RECIPES.get(recipe).schedule.steps for recipe, _ in wanted)


def _fill(bench: Bench, sweep: Sweep, wanted: Sequence[tuple[str, float]], timed: bool) -> None:
    """Compute the points that the sweep does not hold yet, then latencies that it lacks."""
    from lampq_rt import frontier_measure as measure
    from lampq_rt.memory import keep_memory
    from lampq_rt.plan import Plan

    original, digest = measure.Recorded(bench.network, bench.device), bench.setting["weights"]
    missing = [key for key in wanted if key not in sweep.points]
    if missing:
        original.record(bench.batches("evaluating fp32"))
    for recipe, bits in missing:
        started = time.perf_counter()
        plan = sweep.saved_plan(recipe, bits, digest)
        if plan is None:
            bench.load()
            sweep.make()
            state = sweep.training(recipe, bits)
            if _trains([(recipe, bits)]):
                check_destination(state, "state of the training")
            plan = bench.plan(recipe, bits, state)
            sweep.save_plan(plan, recipe, bits)
        seconds = time.perf_counter() - started
        answers = bench.batches()
        point, kl = measure.measure(plan, original, answers, bench.truth, bits, seconds, sweep.folder, bench.device)
        sweep.add(point, kl)
    if not timed:
        return
    keep_memory()
    size = tuple(bench.preprocess.config["input_size"])
    latency_of = measure.MeasuredLatency(bench.network, bench.device, bench.batch, size)
    with bench.output.working("measuring latency"):
        for point in sorted((sweep.points[key] for key in wanted), key=lambda p: p.latency_ms is None):
            plan = Plan.load(sweep.folder / point.plan)
            if point.latency_ms is None:
                sweep.add(replace(point, latency_ms=latency_of(plan)))
            else:
                latency_of.know(plan, point.latency_ms)


def _write(output: Output, sweep: Sweep, points: Sequence[Point], model: str, quality: Quality, note: str) -> None:
    from lampq_rt import files, frontier_plot
    from lampq_rt.frontier import table

    files.write_file(sweep.folder / "points.csv", table(points).encode(), what="CSV", error=DataError)
    with output.working("drawing"):
        pictures = [sweep.folder / f"frontier.{suffix}" for suffix in ("png", "svg")]
        frontier_plot.plot(points, model, quality, pictures, note)


def _table(points: Sequence[Point], model: str) -> Group:
    from lampq_rt.inspect_plan import size, titled

    table = Table()
    for column in ("budget", "recipe", "top-1 %", "agreement %", "KL (nats)", "on disk", "in memory", "ms"):
        table.add_column(column, justify="left" if column == "recipe" else "right")
    for index, p in enumerate(points):
        table.add_row(
            f"{p.asked_bits:g}",
            p.recipe,
            percent(p.top1),
            percent(p.agreement),
            f"{p.kl:.4f} ± {p.kl_error:.4f}",
            size(p.disk_bytes),
            size(p.weight_bytes),
            "–" if p.latency_ms is None else f"{p.latency_ms:.3g}",
            end_section=index + 1 == len(points) or points[index + 1].asked_bits != p.asked_bits,
        )
    fp32 = "" if points[0].fp32_top1 is None else f", fp32 top-1 {percent(points[0].fp32_top1)} %"
    return titled(f"{model}, {points[0].images} images{fp32}", table)


def _conclusions(found: Sequence[Verdict]) -> list[str]:
    """One line a comparison with the same bits everywhere."""
    return [
        f"{v.recipe} at {v.bits:g} bits or fewer against {v.baseline}: KL {v.kl:.4f} against {v.baseline_kl:.4f}, "
        f"difference {v.difference:+.4f} ± {v.error:.4f}: {v.text}"
        for v in found
    ]
