"""Fixtures of several files."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lampq_rt.calibrate import RECIPES


@pytest.fixture
def short_trainings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes that train do it for a few steps: for tests of what becomes of a plan, not of how good it is."""
    for name in RECIPES:
        recipe = RECIPES.get(name)
        if recipe.schedule.steps:
            schedule = replace(recipe.schedule, steps=4, batch=4)
            preparation = replace(recipe.preparation, relu=min(recipe.preparation.relu, 10))
            monkeypatch.setitem(RECIPES._entries, name, replace(recipe, schedule=schedule, preparation=preparation))
