"""Accuracy on real weights and images: every recipe against uniform bits at the same budget, paired with fp32.

    python -m benchmarks.results --data DIR --out docs/results.md [--readme README.md] [--only deit]

DIR holds `weights/NAME.safetensors`, `calib1000/`, `imagenet_dev1000/` and its `labels.csv`. Calibration and
evaluation images are disjoint. Models run on the integer runtime, as `lampq eval` runs them. Every finished row is
kept in benchmarks/results/accuracy.jsonl and not computed again, so a run that was stopped goes on where it was; the
tables of all rows (`accuracy_tables.py`) are written between markers of the Markdown files.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

import lampq_rt
from benchmarks import accuracy_tables
from benchmarks.markdown import put_between
from lampq_rt import images, models
from lampq_rt.bench import machine
from lampq_rt.calibrate import RECIPES, Budget, Material, calibrate
from lampq_rt.evaluate import kl_divergence

ROWS = Path(__file__).parent / "results" / "accuracy.jsonl"
MODELS = ("deit_tiny_patch16_224", "vit_tiny_patch16_224")
RECIPES_SHOWN = ",".join(
    ("lampq", "lampq-paper", "repq", "adalog", "lampq-adalog")
    + ("fast", "fast+w", "lampq+", "lampq+a", "lampq+w", "lampq+f")
    + ("lampq+rec", "lampq+w+rec", "lampq+relu")
)
UNIFORM_WIDTHS = (8, 6, 5, 4, 3)
MIXED_WIDTHS = (6, 5, 4, 3)
TRAINED_WIDTHS = (4, 3)
"""Of recipes that train: where there is something to win, and what an hour allows."""

TRAINED_COUNTS = {"lampq+w+rec": (32, 128)}
"""Sizes of the calibration set that recipes which train are measured with; 32 alone where none are named."""

BATCH = 25

console = Console()


@dataclass(frozen=True)
class Evaluated:
    """A model's evaluation set, with what fp32 answers to it."""

    images: Tensor
    labels: Tensor
    logits: Tensor


def main(
    data: Annotated[Path, typer.Option(help="Folder with weights/, calib1000/ and imagenet_dev1000/.")],
    out: Annotated[Path, typer.Option(help="Markdown file with the two markers.")] = Path("docs/results.md"),
    only: Annotated[str, typer.Option(help="Only models whose name starts with this.")] = "",
    readme: Annotated[Path | None, typer.Option(help="Page for the short table, README.md.")] = None,
    calib_images: Annotated[str, typer.Option(help="Sizes of the calibration set, in this order.")] = "32,128",
    recipes: Annotated[
        str, typer.Option(help="Recipes beside uniform; with none, only tables are written.")
    ] = RECIPES_SHOWN,
    train_images: Annotated[int, typer.Option(help="Images of calib1000/ that recipes which train see.")] = 1000,
    limit: Annotated[int, typer.Option(help="Evaluation images.")] = 1000,
) -> None:
    """Fill in the rows that are missing and write the tables."""
    done = {_key(row): row for row in _read()}
    for count in map(int, calib_images.split(",")):
        for name in (n for n in MODELS if n.startswith(only)):
            work = _work([recipe for recipe in recipes.split(",") if recipe], count)
            wanted = [(r, b) for r, b in work if (name, r, b, count, limit) not in done]
            if wanted:
                for row in _rows(data, name, count, train_images, limit, wanted):
                    done[_key(row)] = row
                    with ROWS.open("a") as file:
                        file.write(json.dumps(row) + "\n")
    rows = list(done.values())
    put_between(out, "aims", accuracy_tables.aims(rows))
    put_between(out, "training", accuracy_tables.training(rows))
    put_between(out, "accuracy", accuracy_tables.everything(rows))
    if readme is not None:
        put_between(readme, "recipes", accuracy_tables.recipes(rows))
        put_between(readme, "accuracy", accuracy_tables.short(rows))


def _work(recipes: list[str], count: int) -> Iterator[tuple[str, int]]:
    yield from (("uniform", bits) for bits in UNIFORM_WIDTHS)
    for recipe in recipes:
        widths = UNIFORM_WIDTHS if RECIPES.get(recipe).allocator == "uniform" else MIXED_WIDTHS
        if RECIPES.get(recipe).schedule.steps:
            widths = TRAINED_WIDTHS if count in TRAINED_COUNTS.get(recipe, (32,)) else ()
        yield from ((recipe, bits) for bits in widths)


def _rows(
    data: Path, name: str, count: int, train: int, limit: int, wanted: list[tuple[str, int]]
) -> Iterator[dict[str, Any]]:
    """One row a recipe and budget, of one model calibrated on `count` images and trained on `train`."""
    model = models.load_model(name, data / "weights" / f"{name}.safetensors")
    truth = evaluated(data, name, model, limit)
    preprocessing = images.preprocessing(name)
    every = images.list_images(data / "calib1000")
    trains = {recipe: RECIPES.get(recipe).schedule.steps > 0 for recipe, _ in wanted}
    more = images.load_images(images.choose(every, train, seed=0), preprocessing) if any(trains.values()) else None
    files = images.choose(every, count, seed=0)
    calibration = calibrate(model, images.load_images(files, preprocessing), material=Material(more))
    fp32_bytes = models.weight_bytes(model)
    for recipe, bits in wanted:
        start = time.perf_counter()
        plan = calibration.plan(Budget(mean_bits=bits), recipe)
        seconds = time.perf_counter() - start
        fast = lampq_rt.compile(model, plan)
        with tempfile.TemporaryDirectory() as folder:
            fast.save(Path(folder) / "model.lampq")
            disk = (Path(folder) / "model.lampq").stat().st_size
        row = {
            "model": name, "recipe": recipe, "bits": bits, "calib_images": count, "images": limit,
            "train_images": train if trains[recipe] else 0,
            **compare(fast, truth), "mean_bits": round(plan.mean_bits, 4), "seconds": round(seconds, 1),
            "disk_percent": round(100 * disk / fp32_bytes, 2),
            "memory_percent": round(100 * fast.weight_bytes / fp32_bytes, 2),
            "version": lampq_rt.__version__, "machine": machine(torch.device("cpu")),
        }  # fmt: skip
        console.print(row)
        yield row


def evaluated(data: Path, name: str, model: nn.Module, limit: int) -> Evaluated:
    """`limit` images of `imagenet_dev1000` below `data`, evenly spaced, and what the floating-point model answers."""
    folder = data / "imagenet_dev1000"
    every = images.list_images(folder)
    files = images.spread(every, limit)
    labels = images.read_labels(folder / "labels.csv", folder, every, 1000)
    pixels = images.load_images(files, images.preprocessing(name))
    return Evaluated(pixels, torch.tensor([labels[f] for f in files]), answers(model, pixels))


def answers(run: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
    """fp32 logits [n, classes] of all the images, in batches."""
    with torch.inference_mode():
        return torch.cat([run(batch) for batch in pixels.split(BATCH)])


def compare(run: Callable[[Tensor], Tensor], on: Evaluated) -> dict[str, float]:
    """Percent right, percent lost to fp32, percent that agree with it, and KL in nats."""
    found = answers(run, on.images)

    def percent(right: Tensor) -> float:
        return round(float(right.double().mean()) * 100, 2)

    top1, fp32 = percent(found.argmax(1) == on.labels), percent(on.logits.argmax(1) == on.labels)
    return {
        "top1": top1,
        "fp32_top1": fp32,
        "lost": round(fp32 - top1, 2),
        "agreement": percent(found.argmax(1) == on.logits.argmax(1)),
        "kl": round(float(kl_divergence(on.logits, found).mean()), 4),
    }


def _key(row: dict[str, Any]) -> tuple[str, str, int, int, int]:
    return row["model"], row["recipe"], row["bits"], row["calib_images"], row["images"]


def _read() -> list[dict[str, Any]]:
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.is_file() else []


if __name__ == "__main__":
    typer.run(main)
