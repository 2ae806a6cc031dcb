"""Recipes: a published method, or a baseline, as a few names. Data only; `pipeline` carries them out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from lampq_rt.backends import TABLE_KINDS
from lampq_rt.calibrate.rounding import DAMPING
from lampq_rt.calibrate.schedule import Schedule
from lampq_rt.registry import Registry
from lampq_rt.sites import Kind

SOFTMAX: dict[str, tuple[tuple[str, int], ...]] = {
    "rowmax": (),
    "log2": (("log2", 4),),
    "cubic": (("log2", 3), ("cubic", 7)),
}
"""What a preparation may ask for softmax output: schemes with the width that each serves up to; "rowmax" beyond. Of 3
bits powers of two are nearer than cubes, of 2 neither is nearer everywhere (docs/numerics.md)."""


@dataclass(frozen=True)
class Preparation:
    """What is done to the model and its number formats before bits are chosen; one calibration a preparation.

    Attributes:
        rewrites: names of function-preserving rewrites (`calibrate/transforms`), in this order.
        softmax: scheme of softmax output where its width allows, a name of `SOFTMAX`; `softmax_at` says which it is.
        fc2_input: "tensor", or "channel" for a step a channel of fc2's input where it has 8 bits; a recipe that
            compensates tries one step, too (`prepare`).
        scheme: of the inputs of the blocks' linears at 2..7 bits: "uniform" or "table".
        weights: scheme of all linears' weights at 2..7 bits: "uniform" or "levels". With "levels" and free widths
            (`Recipe.free`), weights of the blocks may have 1 bit, too.
        relu: steps in which each MLP learns to do with ReLU what it does with GELU (`relu`), after the rewrites; 0: it
            keeps its GELU.
        families: kinds of the blocks' linears whose inputs have tables whatever `scheme` says, each with the family of
            its levels (`calibrate/search/families`). The other kinds' tables are of family "optimal".
        rounding: of weights while bits are chosen: "nearest" or "gptq".
        activations: width of the linears' inputs; None: that of the weight beside it (LampQ).
        attention: width of q, k, v and softmax output; None: the nominal one (LampQ).
        damping: of GPTQ when errors of weights below 8 bits are compensated (`rounding.gptq`).
    """

    rewrites: tuple[str, ...] = ()
    softmax: str = "rowmax"
    fc2_input: str = "tensor"
    scheme: str = "uniform"
    rounding: str = "nearest"
    families: tuple[tuple[str, str], ...] = ()
    activations: int | None = None
    attention: int | None = None
    weights: str = "uniform"
    relu: int = 0
    damping: float = DAMPING

    def __post_init__(self) -> None:
        if self.softmax not in SOFTMAX:
            raise ValueError(f"softmax {self.softmax!r}; allowed: {', '.join(SOFTMAX)}")
        unknown = {kind for kind, _ in self.families} - set(map(str, TABLE_KINDS))
        if unknown:
            raise ValueError(f"families of levels for {sorted(unknown)}; allowed: {', '.join(sorted(TABLE_KINDS))}")

    def softmax_at(self, bits: int) -> str:
        """Scheme of softmax output of that width."""
        return next((scheme for scheme, widest in SOFTMAX[self.softmax] if bits <= widest), "rowmax")

    def family(self, kind: Kind) -> str:
        """Family of the levels where inputs of that kind have tables."""
        return dict(self.families).get(str(kind), "optimal")

    def scheme_of(self, kind: Kind) -> str:
        """Scheme of the inputs of that kind at 2..7 bits."""
        if kind not in TABLE_KINDS:
            return "uniform"
        return "table" if str(kind) in dict(self.families) else self.scheme

    def to_json(self) -> dict[str, Any]:
        """A plain dict; families, widths of activations and steps of `relu` only where there are any."""
        facts = {**asdict(self), "rewrites": list(self.rewrites), "families": dict(self.families)}
        optional = ("families", "activations", "attention", "relu")
        return {key: value for key, value in facts.items() if value or key not in optional}


PLAIN = Preparation()

STRONG = Preparation(
    ("rotate-residual", "rotate-heads", "balance-norms"),
    softmax="cubic",
    fc2_input="channel",
    scheme="table",
    rounding="gptq",
    weights="levels",
)
"""The base that `lampq+` chooses bits on; docs/calibration.md says what each part buys."""

FREE_ATTENTION = replace(STRONG, attention=8)
"""q, k, v and softmax output have no weights: no budget of mean bits or bytes sees them, and integer units gain nothing
from fewer than 8 bits there."""

WEIGHTS_ONLY = replace(STRONG, activations=8, attention=8, damping=0.2)
"""What integer hardware gains from: activations are computed on as 8 bits anyway, weights of few bits save memory. The
noise of few-bit inputs keeps GPTQ from fitting the calibration images alone; here damping has to."""

RELU = replace(STRONG, relu=200)
"""The MLPs of APHQ-ViT (2504.02508) and GLF-Q: no GELU to compute, at the price of a model that answers otherwise."""

ADALOG = Preparation(("repq",), softmax="log2", families=(("fc2", "adalog"),))
"""AdaLog's base (2407.12951), which LampQ's results were published on, but softmax output in powers of two: no backend
executes a searched base there."""

FREE_PENALTIES = ("fisher-output", "fisher-context", "measured")
"""Penalties that tell the operands of a site apart."""

TRAINING = Schedule(steps=200, order="blocks", objective="fisher", finish=300)
"""Of `lampq+rec`: block after block, errors weighed by what they do to the answers, then all together towards the
answers; at 3 bits each gains where the other has ended (docs/calibration.md)."""

WEIGHTS_TRAINING = replace(TRAINING, full_rates=0.5)
"""Of `lampq+w+rec`. Where little is to be mended, rates that suit narrow activations scatter codes that were right."""

RELU_TRAINING = Schedule(steps=300, codes=0.003, factors=5e-4, rest=1e-4, blocks=0.0, answers=1.0, edge=0.0)
"""Of `lampq+relu`: towards the answers alone, so slowly that others than the images trained on gain."""


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
        compensate: True where the plan's weights and biases are made good site after site (`compensate`). Of several
            answers each is, and they are compared once more.
        schedule: of the training that follows (`reconstruct`); of no steps where none does.
        free: names of penalties that the allocator answers to with free widths (`variables.free`), beside its tied
            answers to `penalties`. Activations are then limited as weights are, unless the budget limits them.
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
    schedule: Schedule = Schedule()
    free: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.free:
            unknown = set(self.free) - set(FREE_PENALTIES)
            if unknown:
                raise ValueError(f"free widths by {sorted(unknown)}; allowed: {', '.join(FREE_PENALTIES)}")
            if self.refine or self.preparation.activations or self.preparation.attention:
                raise ValueError(
                    f"recipe {self.name!r} has free widths: allowed without the iterative update, and without "
                    "a width of activations or attention"
                )
        if self.compensate and self.preparation.families:
            raise ValueError(f"recipe {self.name!r} compensates, which makes tables anew: allowed without families")

    def to_json(self) -> dict[str, Any]:
        """A plain dict, for the plan's provenance."""
        facts = {**asdict(self), "penalties": list(self.penalties), "preparation": self.preparation.to_json()}
        free = facts.pop("free")
        return {**facts, "free": list(free)} if free else facts


RECIPES: Registry[Recipe] = Registry("recipe")

DEFAULT_RECIPE = "lampq+w"
"""What is used where nobody names one. Of plans of equal bytes and speed it loses least, by far: integer units compute
on 8 bits whatever an activation has."""

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
        "adalog",
        "fpcs",
        (),
        "uniform",
        False,
        False,
        "AdaLog: levels of a searched base before fc2, reparameterised norms, FPCS; softmax output in powers of two",
        ADALOG,
    ),
    Recipe(
        "lampq-adalog",
        "fpcs",
        ("exponential",),
        "milp",
        False,
        True,
        "LampQ as printed on AdaLog's base, the setting of the paper's tables",
        ADALOG,
    ),
    Recipe(
        "fast",
        "output-error",
        (),
        "uniform",
        False,
        False,
        "rewrites, tables and compensated errors, the same bits everywhere",
        STRONG,
        compensate=True,
    ),
    Recipe(
        "fast+w",
        "output-error",
        (),
        "uniform",
        False,
        False,
        "fast for the weights alone: all activations have 8 bits",
        WEIGHTS_ONLY,
        compensate=True,
    ),
    Recipe(
        "lampq+",
        "output-error",
        ("fisher-output", "fisher-context"),
        "milp",
        True,
        False,
        "rewrites, tables, LampQ's allocation on measured errors, compensated errors",
        STRONG,
        compensate=True,
    ),
    Recipe(
        "lampq+a",
        "output-error",
        ("fisher-output", "fisher-context"),
        "milp",
        True,
        False,
        "lampq+ with 8 bits for q, k, v and softmax output, which have no weights",
        FREE_ATTENTION,
        compensate=True,
    ),
    Recipe(
        "lampq+w",
        "output-error",
        ("alone",),
        "milp",
        True,
        False,
        "lampq+ for the weights alone: all activations have 8 bits",
        WEIGHTS_ONLY,
        compensate=True,
    ),
    Recipe(
        "lampq+f",
        "output-error",
        ("fisher-output",),
        "milp",
        True,
        False,
        "lampq+ with widths of their own for weights, inputs and attention",
        STRONG,
        compensate=True,
        free=("fisher-output",),
    ),
    Recipe(
        "lampq+rec",
        "output-error",
        ("fisher-output", "fisher-context"),
        "milp",
        True,
        False,
        "lampq+, then weights, steps, norms and biases learn from images: minutes, resumable",
        STRONG,
        compensate=True,
        schedule=TRAINING,
    ),
    Recipe(
        "lampq+w+rec",
        "output-error",
        ("alone",),
        "milp",
        True,
        False,
        "lampq+w, then a like training, at lower rates where it lost little",
        WEIGHTS_ONLY,
        compensate=True,
        schedule=WEIGHTS_TRAINING,
    ),
    Recipe(
        "lampq+relu",
        "output-error",
        ("fisher-output", "fisher-context"),
        "milp",
        True,
        False,
        "lampq+ of a model whose GELUs have become ReLUs, which cost no time, then training",
        RELU,
        compensate=True,
        schedule=RELU_TRAINING,
    ),
):
    RECIPES.register(_recipe.name)(_recipe)
