"""What each part of recipe `lampq+` buys, added one after the other, on real weights.

    python -m benchmarks.ablation --data DIR [--bits 4] [--out docs/calibration.md]

Judged by KL to fp32 on images of `calib1000` that calibrate nothing, on the integer runtime: `imagenet_dev1000` is for
results, not for choices.
"""

from __future__ import annotations

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
) -> None:
    """Measure every step on both models and write the table."""
    recipes = list(steps())
    found = trials(data, recipes, bits)
    if out is not None:
        put_between(out, "ablation", table([label for label, _ in recipes], found, bits))


def trials(data: Path, recipes: Sequence[tuple[str, Recipe]], bits: int) -> dict[tuple[str, str], tuple[float, float]]:
    """KL in nats and agreement in percent, by model and label; the recipes are registered ones."""
    found: dict[tuple[str, str], tuple[float, float]] = {}
    for name in MODELS:
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
            found_here = answers(lampq_rt.compile(model, plan), pixels)
            agreement = float((found_here.argmax(1) == exact.argmax(1)).double().mean()) * 100
            found[name, label] = float(kl_divergence(exact, found_here).mean()), agreement
            console.print(name, label, *(f"{value:.4g}" for value in (*found[name, label], seconds)))
    return found


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
