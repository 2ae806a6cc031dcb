"""Fixtures of several files."""

from __future__ import annotations

import pytest

from tests.trainings import shorten_trainings


@pytest.fixture
def short_trainings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes that train do it for a few steps: for tests of what becomes of a plan, not of how good it is."""
    shorten_trainings(monkeypatch)
