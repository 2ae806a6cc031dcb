"""Recipes: a published method, or a baseline, as a few names. Data only; `pipeline` carries them out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lampq_rt.calibrate.reconstruct import Schedule
from lampq_rt.registry import Registry


@dataclass(frozen=True)
class Preparation:
    """What is done to the model and its number formats before bits are chosen; one calibration a preparation.

    Attributes:
        rewrites: names of function-preserving rewrites (`calibrate/transforms`), in this order.
        softmax: scheme of softmax output of at most 4 bits: "rowmax" or "log2".
        fc2_input: "tensor" or "channel": what shares a step of the input of fc2.
        scheme: of the inputs of the blocks' linears at 2..7 bits: "uniform" or "table".
        rounding: of weights while bits are chosen: "nearest" or "gptq".
    """

    rewrites: tuple[str, ...] = ()
    softmax: str = "rowmax"
    fc2_input: str = "tensor"
    scheme: str = "uniform"
    rounding: str = "nearest"


PLAIN = Preparation()

STRONG = Preparation(
    ("rotate-residual", "rotate-heads", "balance-norms"),
    softmax="log2",
    fc2_input="channel",
    scheme="table",
    rounding="gptq",
)
"""The base that `lampq+` chooses bits on; docs/calibration.md says what each part buys."""


STEPS = 240
"""Of the training of `lampq+rec`."""


@dataclass(frozen=True)
class Recipe:
    """How a plan is made.

    Attributes:
        name: what people call it.
        search: name of the range search (`calibrate/search`).
        penalties: names of penalties (`calibrate/metrics`). The allocator answers to each, and the answer of least
            divergence on the calibration images is taken. Empty where the allocator looks at no penalty.
        allocator: name of the allocator (`calibrate/allocate`).
        baseline: True where the same bits everywhere is one of the answers compared.
        refine: True where the iterative update follows.
        description: one line for people.
        preparation: of model and number formats.
        compensate: True where the plan's weights and biases are made good site after site (`compensate`).
        schedule: of the training that follows (`reconstruct`); of no steps where none does.
    """

    name: str
    search: str
    penalties: tuple[str, ...]
    allocator: str
    baseline: bool
    refine: bool
    description: str
    preparation: Preparation = PLAIN
    compensate: bool = False
    schedule: Schedule = Schedule(steps=0)

    def to_json(self) -> dict[str, Any]:
        """A plain dict, for the plan's provenance."""
        preparation = {**asdict(self.preparation), "rewrites": list(self.preparation.rewrites)}
        return {**asdict(self), "penalties": list(self.penalties), "preparation": preparation}


RECIPES: Registry[Recipe] = Registry("recipe")

for _recipe in (
    Recipe("uniform", "output-error", (), "uniform", False, False, "the same bits everywhere: the baseline"),
    Recipe(
        "lampq",
        "output-error",
        ("fisher-output", "fisher-context", "trace-dw"),
        "milp",
        True,
        True,
        "LampQ with measured errors; the penalty that wins on the calibration images",
    ),
    Recipe(
        "lampq-paper",
        "output-error",
        ("exponential",),
        "milp",
        False,
        True,
        "LampQ as printed: gamma^(-B) alpha_t tr(F)",
    ),
    Recipe(
        "repq",
        "output-error",
        (),
        "uniform",
        False,
        False,
        "RepQ-ViT's reparameterised norms and logarithmic softmax, the same bits everywhere",
        Preparation(("repq",), softmax="log2"),
    ),
    Recipe(
        "fast",
        "output-error",
        (),
        "uniform",
        False,
        False,
        "rewrites, tables and compensated errors, the same bits everywhere: under a minute",
        STRONG,
        compensate=True,
    ),
    Recipe(
        "lampq+",
        "output-error",
        ("fisher-output", "fisher-context"),
        "milp",
        True,
        False,
        "the most accurate: rewrites, tables, LampQ's allocation on measured errors, compensated errors",
        STRONG,
        compensate=True,
    ),
    Recipe(
        "lampq+rec",
        "output-error",
        ("fisher-output", "fisher-context"),
        "milp",
        True,
        False,
        "lampq+, then all blocks learn from images: minutes to hours, resumable",
        STRONG,
        compensate=True,
        schedule=Schedule(steps=STEPS),
    ),
):
    RECIPES.register(_recipe.name)(_recipe)
