"""What each part of recipe `lampq+` buys, added one after the other, on real weights.

    python -m benchmarks.ablation --data DIR [--bits 4] [--out docs/calibration.md]

Judged by KL to fp32 on images of `calib1000` that calibrate nothing, on the integer runtime: `imagenet_dev1000` is for
results, not for choices.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import lampq_rt
from benchmarks.markdown import put_between
from benchmarks.results import MODELS, answers
from lampq_rt import images, models
from lampq_rt.calibrate import RECIPES, Budget, calibrate
from lampq_rt.calibrate.recipes import PLAIN, Recipe
from lampq_rt.evaluate import kl_divergence

CALIBRATION = 32
HELD_OUT = 400

ROWS = Path(__file__).parent / "results" / "ablation.jsonl"

console = Console()


def steps() -> Iterator[tuple[str, Recipe]]:
    """Label and recipe, each with what the one before has and something more; registered under the label."""
    plain, strong = RECIPES.get("uniform"), RECIPES.get("lampq+")
    preparation, compensate = PLAIN, "+ compensation in order"
    changes: list[tuple[str, dict[str, Any]]] = [
        ("uniform bits, nearest", {}),
        ("+ cubic softmax", {"softmax": "cubic"}),
        ("+ tables of levels", {"scheme": "table"}),
        ("+ rotate-residual", {"rewrites": ("rotate-residual",)}),
        ("+ rotate-heads", {"rewrites": ("rotate-residual", "rotate-heads")}),
        ("+ balance-norms", {"rewrites": strong.preparation.rewrites}),
        ("+ GPTQ, site by site", {"rounding": "gptq"}),
        (compensate, {}),
        ("+ levels of weights", {"weights": "levels"}),
    ]
    labels = [label for label, _ in changes]
    for number, (label, change) in enumerate(changes):
        preparation = replace(preparation, **change)
        recipe = replace(plain, name=label, preparation=preparation, compensate=number >= labels.index(compensate))
        RECIPES.register(label)(recipe)
        yield label, recipe
    yield "+ allocation: lampq+", strong


def main(
    data: Annotated[Path, typer.Option(help="Folder with weights/ and calib1000/.")],
    out: Annotated[Path | None, typer.Option(help="Markdown file with the two markers.")] = None,
    bits: Annotated[int, typer.Option(help="Mean bits.")] = 4,
    again: Annotated[bool, typer.Option("--again", help="Measure also what has been measured.")] = False,
) -> None:
    """Measure every step on both models and write the table."""
    recipes = list(steps())
    found = trials(data, recipes, bits, again=again)
    if out is not None:
        put_between(out, "ablation", table([label for label, _ in recipes], found, bits))


def trials(
    data: Path, recipes: Sequence[tuple[str, Recipe]], bits: int, *, again: bool = False
) -> dict[tuple[str, str], tuple[float, float]]:
    """KL in nats and agreement in percent, by model and label; the recipes are registered ones.

    Each is kept in `ROWS` as it comes, so that a run that was stopped goes on where it was.
    """
    lines = ROWS.read_text().splitlines() if ROWS.is_file() and not again else []
    kept = {(row["model"], row["bits"], row["sha256"]): row for row in map(json.loads, lines)}
    found: dict[tuple[str, str], tuple[float, float]] = {}
    for name in MODELS:
        keys = {label: (name, bits, digest(recipe)) for label, recipe in recipes}
        missing = [(label, recipe) for label, recipe in recipes if keys[label] not in kept]
        for label, row in measured(data, name, missing, bits) if missing else ():
            row = {"model": name, "bits": bits, "label": label, **row, "sha256": keys[label][2]}
            kept[keys[label]] = row
            with ROWS.open("a") as file:
                file.write(json.dumps(row) + "\n")
            console.print(row)
        found |= {(name, label): (kept[key]["kl"], kept[key]["agreement"]) for label, key in keys.items()}
    return found


def digest(recipe: Recipe) -> str:
    """What tells a recipe from others: all that it says, but for its name and description."""
    facts = {key: value for key, value in recipe.to_json().items() if key not in ("name", "description")}
    return hashlib.sha256(json.dumps([CALIBRATION, HELD_OUT, facts], sort_keys=True).encode()).hexdigest()


def measured(
    data: Path, name: str, recipes: Sequence[tuple[str, Recipe]], bits: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """By label, what a recipe's plan answers on the integer runtime."""
    model = models.load_model(name, data / "weights" / f"{name}.safetensors")
    every = images.list_images(data / "calib1000")
    chosen = images.choose(every, CALIBRATION, seed=0)
    others = images.spread([path for path in every if path not in set(chosen)], HELD_OUT)
    pixels = images.load_images(others, images.preprocessing(name))
    exact = answers(model, pixels)
    calibration = calibrate(model, images.load_images(chosen, images.preprocessing(name)))
    for label, recipe in recipes:
        start = time.perf_counter()
        plan = calibration.plan(Budget(mean_bits=bits), recipe.name)
        seconds = time.perf_counter() - start
        found = answers(lampq_rt.compile(model, plan), pixels)
        agreement = float((found.argmax(1) == exact.argmax(1)).double().mean()) * 100
        kl = float(kl_divergence(exact, found).mean())
        yield label, {"kl": round(kl, 5), "agreement": round(agreement, 2), "seconds": round(seconds, 1)}


def table(labels: Sequence[str], found: Mapping[tuple[str, str], tuple[float, float]], bits: int) -> Iterator[str]:
    """Markdown of `trials`, a row a label."""
    yield f"\nKL to fp32 in nats (agreement in %), mean {bits} bits, {HELD_OUT} images that calibrated nothing:\n"
    yield "| | " + " | ".join(MODELS) + " |"
    yield "|---" * (1 + len(MODELS)) + "|"
    for label in labels:
        cells = (f"{found[name, label][0]:.3f} ({found[name, label][1]:.0f})" for name in MODELS)
        yield f"| {label} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    typer.run(main)
