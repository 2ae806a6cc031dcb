"""An ablation that was stopped goes on where it was, and measures anew what a recipe's change has outdated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ablation
from lampq_rt.calibrate import RECIPES


def test_what_was_measured_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def measured(data: Path, name: str, recipes: Any, bits: int) -> Iterator[tuple[str, dict[str, float]]]:
        for label, _ in recipes:
            asked.append(f"{name[:3]} {label} {bits}")
            if len(asked) == 4:
                raise KeyboardInterrupt
            yield label, {"kl": 0.1 * len(asked), "agreement": 90.0, "seconds": 1.0}

    monkeypatch.setattr(ablation, "ROWS", tmp_path / "ablation.jsonl")
    monkeypatch.setattr(ablation, "measured", measured)
    recipes = [("a", RECIPES.get("uniform")), ("b", RECIPES.get("fast"))]
    with pytest.raises(KeyboardInterrupt):
        ablation.trials(tmp_path, recipes, 4)
    found = ablation.trials(tmp_path, recipes, 4)
    assert asked == ["dei a 4", "dei b 4", "vit a 4", "vit b 4", "vit b 4"]
    assert found["deit_tiny_patch16_224", "b"] == (0.2, 90.0) and found["vit_tiny_patch16_224", "b"] == (0.5, 90.0)
    assert ablation.trials(tmp_path, recipes, 4) == found and len(asked) == 5
    recipes[1] = ("b", replace(recipes[1][1], search="fpcs"))
    ablation.trials(tmp_path, recipes, 4)
    assert asked[5:] == ["dei b 4", "vit b 4"]
    ablation.trials(tmp_path, recipes, 4, again=True)
    assert len(asked) == 11
