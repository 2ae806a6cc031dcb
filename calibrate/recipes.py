"""Recipes: a published method, or a baseline, as a few names. Data only; `pipeline` carries them out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lampq_rt.registry import Registry


@dataclass(frozen=True)
class Recipe:
    """How a plan is made.

    Attributes:
        name: what people call it.
        search: name of the range search (`calibrate/search`).
        penalties: names of penalties (`calibrate/metrics`). The allocator answers to each, and the answer of least KL
            divergence on the calibration images is taken. Empty where the allocator looks at no penalty.
        allocator: name of the allocator (`calibrate/allocate`).
        refine: True where the iterative update follows.
        description: one line for people.
    """

    name: str
    search: str
    penalties: tuple[str, ...]
    allocator: str
    refine: bool
    description: str

    def to_json(self) -> dict[str, Any]:
        """A plain dict, for the plan's provenance."""
        return {**asdict(self), "penalties": list(self.penalties)}


RECIPES: Registry[Recipe] = Registry("recipe")

for _recipe in (
    Recipe("uniform", "output-error", (), "uniform", False, "the same bits everywhere: the baseline"),
    Recipe(
        "lampq",
        "output-error",
        ("fisher-context", "fisher-output"),
        "milp",
        True,
        "LampQ with measured, Fisher-weighted output errors, which win on real data",
    ),
    Recipe("lampq-paper", "output-error", ("exponential",), "milp", True, "LampQ as printed: gamma^(-B) alpha_t tr(F)"),
):
    RECIPES.register(_recipe.name)(_recipe)
