"""What each published format of activations buys, alone, on otherwise uniform bits and real weights.

    python -m benchmarks.formats_ablation --data DIR [--bits 4] [--out docs/calibration.md]

Base: recipe `uniform`, rounding to nearest. Families of levels (`calibrate/search/families`) stand at the inputs of
fc2, or of all linears of the blocks; softmax output is `rowmax`, `log2` or `cubic`. All run on the same kernels. Judged
as `benchmarks.ablation` does, by KL to fp32 on images of `calib1000` that calibrate nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.ablation import table, trials
from benchmarks.markdown import put_between
from lampq_rt.backends import TABLE_KINDS
from lampq_rt.calibrate import RECIPES
from lampq_rt.calibrate.recipes import PLAIN, Preparation, Recipe
from lampq_rt.calibrate.search.families import FAMILIES

PLACES = {"fc2": ("fc2",), "all inputs": tuple(map(str, TABLE_KINDS))}
"""Kinds of linears whose inputs get levels from a family, by what the table calls them."""

SOFTMAX = ("log2", "cubic")
"""In the place of `rowmax`."""


def trial(place: str, family: str, softmax: str = "rowmax") -> Preparation:
    """`family` at `place`, and that scheme of softmax output."""
    return replace(PLAIN, softmax=softmax, families=tuple((kind, family) for kind in PLACES[place]))


def rows() -> Iterator[tuple[str, Recipe]]:
    """Label and recipe of every row; registered under the label where it is none of those that exist."""
    preparations = {"uniform bits, rowmax": PLAIN}
    preparations |= {f"{softmax} softmax": replace(PLAIN, softmax=softmax) for softmax in SOFTMAX}
    for place in PLACES:
        preparations |= {f"{family} at {place}": trial(place, family) for family in FAMILIES}
    for place, family in (("fc2", "adalog"), ("all inputs", "optimal")):
        for softmax in SOFTMAX:
            preparations[f"{family} at {place}, {softmax} softmax"] = trial(place, family, softmax)
    for label, preparation in preparations.items():
        recipe = replace(RECIPES.get("uniform"), name=label, preparation=preparation)
        RECIPES.register(label)(recipe)
        yield label, recipe
    for name in ("repq", "adalog"):
        yield f"recipe {name}", RECIPES.get(name)


def main(
    data: Annotated[Path, typer.Option(help="Folder with weights/ and calib1000/.")],
    out: Annotated[Path | None, typer.Option(help="Markdown file with the two markers.")] = None,
    bits: Annotated[int, typer.Option(help="Of weights and activations.")] = 4,
    again: Annotated[bool, typer.Option("--again", help="Measure also what has been measured.")] = False,
) -> None:
    """Measure every row on both models and write the table."""
    recipes = list(rows())
    found = trials(data, recipes, bits, again=again)
    if out is not None:
        put_between(out, "formats", table([label for label, _ in recipes], found, bits))


if __name__ == "__main__":
    typer.run(main)
