"""Recipes that train, made short: for tests of what becomes of a plan, not of how good it is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lampq_rt.calibrate import RECIPES


def shorten_trainings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let recipes that train do it for a few steps."""
    for name in RECIPES:
        recipe = RECIPES.get(name)
        if recipe.schedule.steps:
            schedule = replace(recipe.schedule, steps=4, batch=4, finish=min(recipe.schedule.finish, 4))
            preparation = replace(recipe.preparation, relu=min(recipe.preparation.relu, 10))
            monkeypatch.setitem(RECIPES._entries, name, replace(recipe, schedule=schedule, preparation=preparation))
