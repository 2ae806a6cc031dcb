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
        penalty: name of the penalty (`calibrate/metrics`); None where the allocator looks at no penalty.
        allocator: name of the allocator (`calibrate/allocate`).
        refine: True where the iterative update follows.
        description: one line for people.
    """

    name: str
    search: str
    penalty: str | None
    allocator: str
    refine: bool
    description: str

    def to_json(self) -> dict[str, Any]:
        """A plain dict, for the plan's provenance."""
        return asdict(self)


RECIPES: Registry[Recipe] = Registry("recipe")

for _recipe in (
    Recipe("uniform", "output-error", None, "uniform", False, "the same bits everywhere: the baseline"),
    Recipe("lampq", "output-error", "fisher-context", "milp", True, "LampQ with the penalty that wins on real data"),
    Recipe("lampq-paper", "output-error", "exponential", "milp", True, "LampQ as printed: gamma^(-B) alpha_t tr(F)"),
):
    RECIPES.register(_recipe.name)(_recipe)
