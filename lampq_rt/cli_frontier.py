"""`lampq frontier`: one calibration, many budgets; accuracy against bytes and latency, beside uniform bits."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.table import Table

from lampq_rt.cli_common import Images, Json, Model, Output, Weights, check_destination, names, percent, plural
from lampq_rt.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lampq_rt.frontier import Point, Sweep, Verdict
    from lampq_rt.plan import Plan

WIDEST = 8.0
BATCH = 25


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
    recipes: Annotated[str, typer.Option(metavar="NAME,…", help="As of calibrate.")] = "uniform,lampq",
    quality: Annotated[str, typer.Option("--y", help="What is drawn: kl, agreement or top1.")] = "kl",
    calib_images: Annotated[int, typer.Option(help="Images to calibrate on, drawn by the seed.", min=1)] = 32,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", help="Evaluate on only N images, evenly spaced.", min=1)
    ] = None,
    latency: Annotated[bool, typer.Option(help="Also measure latency, once for all plans of the same kernels.")] = True,
    batch: Annotated[int, typer.Option(help="Images at once when latency is measured.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    target: Annotated[str, typer.Option(help="Whose formats may be used: any, cpu or cuda.")] = "any",
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
    from lampq_rt import frontier as sweeps
    from lampq_rt.errors import UnknownNameError
    from lampq_rt.models import check_name

    output = Output(json)
    check_name(model)
    wanted = _wanted(output, mean_bits, recipes)
    chosen = next((q for q in sweeps.QUALITIES if q == quality), None)
    if chosen is None:
        raise UnknownNameError(f"--y {quality!r}; known: {', '.join(sweeps.QUALITIES)}")
    if chosen == "top1" and labels is None:
        raise DataError("--y top1 needs --labels")
    check_destination(out, "sweep")
    bench = _Bench(
        output, model, weights, images, eval_images, labels, calib_images, limit, seed, target, device, batch
    )
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


def _wanted(output: Output, mean_bits: str, recipes: str) -> list[tuple[str, float]]:
    """Recipe and budget of every point, uniform ones first: they cost next to nothing."""
    from lampq_rt.calibrate import RECIPES

    try:
        bits = sorted({float(part) for part in names(mean_bits)})
    except ValueError:
        bits = []
    if not bits or not 1.0 <= bits[0] <= bits[-1] <= WIDEST:
        raise DataError(f"--mean-bits {mean_bits!r}: numbers from 1 to 8 with commas between are needed, like 3,4.5")
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


@dataclass
class _Bench:
    """The model with its images, each loaded when it is first needed: a sweep that is complete needs none."""

    output: Output
    model: str
    weights: Path | None
    images: Path
    eval_images: Path
    labels: Path | None
    calib_images: int
    limit: int | None
    seed: int
    target: str
    device: str
    batch: int

    def __post_init__(self) -> None:
        from lampq_rt import images as pictures

        self.report: Callable[[str, int, int], None] = lambda stage, done, total: None
        files = pictures.list_images(self.images)
        self.calibration_files = pictures.choose(files, self.calib_images, self.seed)
        if len(self.calibration_files) < self.calib_images:
            count = plural(len(self.calibration_files), "image")
            self.output.note(f"{self.images} holds {count}, fewer than the {self.calib_images} asked for")
        self.every_file = pictures.list_images(self.eval_images)
        self.evaluation_files = pictures.spread(self.every_file, self.limit)
        self.preprocess = pictures.preprocessing(self.model)

    @cached_property
    def network(self) -> nn.Module:
        """The floating-point model."""
        from lampq_rt.models import load_model

        return load_model(self.model, self.weights)

    @cached_property
    def truth(self) -> Tensor | None:
        """int64 [images], the classes of the evaluation images."""
        import torch

        from lampq_rt import images as pictures
        from lampq_rt.models import classes

        if self.labels is None:
            return None
        found = pictures.read_labels(self.labels, self.eval_images, self.every_file, classes(self.network))
        return torch.tensor([found[path] for path in self.evaluation_files])

    @property
    def setting(self) -> dict[str, Any]:
        """What all points of a sweep share."""
        from lampq_rt.plan import weights_digest
        from lampq_rt.version import __version__

        truth = self.truth
        return {
            "model": self.model,
            "version": __version__,
            "seed": self.seed,
            "weights": weights_digest(self.network),
            "calibration images": _digest(self.images, self.calibration_files),
            "evaluation images": _digest(self.eval_images, self.evaluation_files),
            "labels": None if truth is None else hashlib.sha256(repr(truth.tolist()).encode()).hexdigest(),
            "target": self.target,
            "device": self.device,
            "latency batch": self.batch,
        }

    @cached_property
    def calibration(self) -> Any:
        """Measured once; plans of all budgets are made from it."""
        from lampq_rt import images as pictures
        from lampq_rt.calibrate import calibrate

        return calibrate(
            self.network,
            pictures.load_images(self.calibration_files, self.preprocess),
            target=self.target,
            seed=self.seed,
            device=self.device,
            model_name=self.model,
            report=lambda stage, done, total: self.report(stage, done, total),
        )

    def plan(self, recipe: str, bits: float) -> Plan:
        """The plan of that recipe at that budget, with bars on standard error."""
        from lampq_rt.calibrate import Budget
        from lampq_rt.calibrate.progress import reporting

        self.output.aside.print(f"[bold]{recipe} at {bits:g} bits[/bold]")
        with reporting(True) as self.report:
            return self.calibration.plan(Budget(mean_bits=bits), recipe)

    def batches(self) -> Iterator[Tensor]:
        """The evaluation images, with a bar."""
        from lampq_rt import images as pictures

        batches: Iterable[Tensor] = pictures.batches(self.evaluation_files, self.preprocess, BATCH)
        return self.output.track(batches, len(self.evaluation_files), "evaluating")


def _fill(bench: _Bench, sweep: Sweep, wanted: Sequence[tuple[str, float]], timed: bool) -> None:
    """Compute the points that the sweep does not hold yet, then latencies that it lacks."""
    from lampq_rt import frontier_measure as measure
    from lampq_rt.memory import keep_memory
    from lampq_rt.plan import Plan

    original, digest = measure.Recorded(bench.network, bench.device), bench.setting["weights"]
    for recipe, bits in wanted:
        if (recipe, bits) in sweep.points:
            continue
        started = time.perf_counter()
        plan = sweep.saved_plan(recipe, bits, digest)
        if plan is None:
            plan = bench.plan(recipe, bits)
            plan.save(sweep.plan_path(recipe, bits))
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


def _digest(folder: Path, files: Sequence[Path]) -> str:
    """SHA-256 over names and sizes."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(folder).as_posix()}|{path.stat().st_size}\n".encode())
    return f"{len(files)} files, {digest.hexdigest()[:32]}"


def _write(output: Output, sweep: Sweep, points: Sequence[Point], model: str, quality: Any, note: str) -> None:
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
