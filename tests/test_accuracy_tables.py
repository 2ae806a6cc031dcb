"""Tables of accuracy rows: what is missed is said, what is missing is not made up."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.accuracy_tables import FOR_WHOM, Aim, aims, everything, recipes, short, training
from lampq_rt.calibrate import RECIPES


def row(model: str, recipe: str, bits: int, lost: float, agreement: float, count: int = 32) -> dict[str, Any]:
    facts = {"model": f"{model}_tiny_patch16_224", "recipe": recipe, "bits": bits, "calib_images": count}
    facts |= {"lost": lost, "agreement": agreement, "top1": 78.8 - lost, "fp32_top1": 78.8, "kl": 0.1, "images": 1000}
    return facts | {"mean_bits": bits, "seconds": 1.0, "disk_percent": 15.0, "memory_percent": 15.0, "machine": "m"}


ROWS = [
    row("deit", "fast", 8, -0.5, 97.3), row("deit", "lampq+", 4, 4.9, 84.0), row("vit", "fast", 4, 10.3, 77.8),
    row("vit", "lampq+", 4, 8.8, 77.9, 128),
]  # fmt: skip


@pytest.mark.parametrize(("lost", "agreement", "missed"), [(0.3, 98, False), (0.31, 98, True), (-1, 97.9, True)])
def test_an_aim_has_two_sides(lost: float, agreement: float, missed: bool) -> None:
    assert Aim(0.3, 98).missed({"lost": lost, "agreement": agreement}) is missed


def test_aims_stand_beside_what_was_measured() -> None:
    lines = list(aims(ROWS))
    same = "as `fast` | as `fast`"
    assert f"| 8 | 0.3 (98) | -0.5 (97.3), missed | {same} | 0.5 (97) | – | {same} |" in lines
    assert "| 4 | 5 | – | 4.9 (84.0) | – | 10 | 10.3 (77.8), missed | – | – |" in lines
    assert "| 4 | 5 | – | – | – | 10 | – | 8.8 (77.9) | – |" in lines  # the other size of calibration set


def test_the_short_table_has_every_budget() -> None:
    lines = list(short(ROWS))
    assert "| ViT-Tiny | 4 | – | – | 10.3 (77.8) | – | – | – |" in lines and len(lines) == 2 + 10 + 1


def test_every_row_is_shown() -> None:
    assert sum(line.startswith("| ") and "%" in line and "top-1" not in line for line in everything(ROWS)) == len(ROWS)


def test_recipes_are_those_that_there_are_with_what_was_measured() -> None:
    lines = list(recipes(ROWS))
    assert set(FOR_WHOM) < set(RECIPES)
    assert any(line.startswith("| `lampq+` |") and line.endswith("| 4.9 | – | – | – | 1, – |") for line in lines)
    assert any(line.startswith("| `lampq+w` |") and line.endswith("| – | – | – | – | –, – |") for line in lines)


def test_training_stands_beside_its_aims() -> None:
    trained = [row("deit", "lampq+rec", 4, 3.4, 86.7), row("vit", "lampq+rec", 4, 3.0, 90.0)]
    weights = [row("vit", "lampq+w", 3, 13.1, 74.0), row("vit", "lampq+w+rec", 3, 10.0, 77.0)]
    lines = list(training([*ROWS, *trained, *weights]))
    assert lines[2:-1] == [  # ViT-Tiny has no row of `lampq+` at 32 images to be compared with
        "| `lampq+rec` | 32 | 4 | DeiT-Tiny | 4.9 (84.0) | 3.4 (86.7), missed | 3.3 | 0.100, 0.100 | 0 % | 0 |",
        "| `lampq+w+rec` | 32 | 3 | ViT-Tiny | 13.1 (74.0) | 10.0 (77.0) | – | 0.100, 0.100 | 0 % | 0 |",
    ]
