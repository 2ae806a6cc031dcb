"""What surrounds the choice of bits where a recipe rewrites the model or compensates its errors."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lampq_rt.adapters import describe
from lampq_rt.calibrate.contest import best_compensated
from lampq_rt.calibrate.evidence import Measurements
from lampq_rt.calibrate.progress import Report
from lampq_rt.calibrate.recipes import Preparation, Recipe
from lampq_rt.calibrate.reconstruct import reconstruct
from lampq_rt.calibrate.relu import to_relu
from lampq_rt.calibrate.transforms import TRANSFORMS, Context
from lampq_rt.edits import differences, edited
from lampq_rt.memory import paged, trim
from lampq_rt.plan import SiteParams
from lampq_rt.simulate import SimulatedLinear, Simulation
from lampq_rt.weights import weight_codes


@dataclass(frozen=True)
class Prepared:
    """A model before bits are chosen.

    Attributes:
        model: what is quantised; the original where nothing was to be done.
        teacher: what it is compared with: the same, but for MLPs that had to give up their GELUs.
        refused: by rewrite, the reason why it does not fit this model.
    """

    model: nn.Module
    teacher: nn.Module
    refused: dict[str, str]


def prepared(
    model: nn.Module,
    images: Tensor,
    preparation: Preparation,
    seed: int,
    more: Tensor | None = None,
    report: Report | None = None,
) -> Prepared:
    """The model as the preparation leaves it.

    Args:
        model: in floating point; not changed.
        images: fp32 [n, C, H, W], normalised.
        preparation: what to do.
        seed: of random rotations, and of what MLPs learn from.
        more: images that MLPs learn from; None: `images`.
        report: told of progress.
    """
    if not preparation.rewrites and not preparation.relu:
        return Prepared(model, model, {})
    twin = paged(copy.deepcopy(model).float().eval().requires_grad_(False))
    trim()
    context = Context(describe(twin), images, seed)
    answers = {}
    for name in preparation.rewrites:
        answers[name] = TRANSFORMS.get(name)(twin, context)
        trim()
    teacher = twin
    if preparation.relu:
        twin = copy.deepcopy(teacher)
        answers["relu"] = to_relu(
            twin,
            context.description,
            images if more is None else more,
            preparation.relu,
            seed=seed,
            progress=None if report is None else lambda done, count: report("learning ReLU", done, count),
        )
        paged(twin)
    return Prepared(twin, teacher, {name: reason for name, reason in answers.items() if reason is not None})


@dataclass(frozen=True)
class Material:
    """What the training of a plan has beside the calibration images.

    Attributes:
        images: fp32 [n, C, H, W], normalised, to train on; None: the calibration images.
        resume: file that keeps the state of the training (`reconstruct`).
    """

    images: Tensor | None = None
    resume: Path | None = None


NO_MORE = Material()
"""Nothing beside the calibration images."""


def finished(
    measurements: Measurements,
    original: nn.Module,
    ready: Prepared,
    candidates: Sequence[Mapping[str, SiteParams]],
    recipe: Recipe,
    material: Material = NO_MORE,
) -> tuple[dict[str, SiteParams], dict[str, Tensor], int]:
    """Sites and edits of a plan, and the number of its candidate: the only one, or the best after compensation.

    Of several processes each compensates some of the candidates, and the first trains; all get what one would.

    Args:
        measurements: of the prepared model.
        original: the model that the plan will be applied to.
        ready: `original` as prepared.
        candidates: formats and steps of all sites; where the recipe compensates, formats suffice, and there may be
            several.
        recipe: says whether to compensate, with which range search, and whether to train.
        material: to train with.

    Raises:
        DataError: see `reconstruct`.
    """
    found, biases, chosen, model = dict(candidates[0]), dict[str, Tensor](), 0, ready.model
    if recipe.compensate:
        found, biases, chosen = best_compensated(measurements, model, candidates, recipe.search)
    elif model is not original:
        found = {name: _with_codes(measurements, name, params) for name, params in found.items()}
    integer = frozenset(f"{name}.weight" for name, params in found.items() if not params.is_float)
    edits = {} if model is original else differences(original, model, integer)
    edits.update({name: bias.float().cpu() for name, bias in biases.items()})
    if recipe.schedule.steps:
        shard = measurements.shard

        def train() -> tuple[dict[str, SiteParams], dict[str, Tensor]]:
            if shard.first:  # the others wait: every step sees images of all
                return _reconstructed(measurements, ready, found, biases, recipe, material)
            return {}, {}

        found, learned = shard.objects(shard.together(train))[0]
        edits.update(learned)
    return found, edits, chosen


def _reconstructed(
    measurements: Measurements,
    ready: Prepared,
    sites: Mapping[str, SiteParams],
    biases: Mapping[str, Tensor],
    recipe: Recipe,
    material: Material,
) -> tuple[dict[str, SiteParams], dict[str, Tensor]]:
    """Sites and edits after training."""
    device = next(measurements.simulation.parameters()).device
    images = measurements.every_image if material.images is None else material.images
    quantised = Simulation(copy.deepcopy(edited(ready.model, biases))).float().to(device)
    quantised.set(sites)
    learned, parameters = reconstruct(
        ready.model,
        quantised,
        images.to(device),
        recipe.schedule,
        seed=measurements.seed,
        progress=lambda done, total: measurements.report("learning back", done, total),
        resume=material.resume,
        teacher=ready.teacher,
    )
    return {name: learned.get(name, params) for name, params in sites.items()}, parameters


def _with_codes(measurements: Measurements, name: str, params: SiteParams) -> SiteParams:
    """The codes of the rewritten weight, which the original does not have."""
    module = measurements.simulation.module(name)
    if params.is_float or not isinstance(module, SimulatedLinear) or "weight.codes" in params.tensors:
        return params
    codes = weight_codes(module.original.weight.detach().flatten(1).float(), params)
    return replace(params, tensors={**params.tensors, "weight.codes": codes.to(torch.int8).cpu()})
