"""What surrounds the choice of bits where a recipe rewrites the model or compensates its errors."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from lampq_rt.adapters import describe
from lampq_rt.calibrate.compensate import compensate
from lampq_rt.calibrate.evidence import Measurements
from lampq_rt.calibrate.recipes import Preparation, Recipe
from lampq_rt.calibrate.transforms import TRANSFORMS, Context
from lampq_rt.edits import differences
from lampq_rt.errors import DataError
from lampq_rt.modules import weight_codes
from lampq_rt.plan import SiteParams
from lampq_rt.simulate import SimulatedLinear, Simulation


def prepared(model: nn.Module, images: Tensor, preparation: Preparation, seed: int) -> tuple[nn.Module, dict[str, str]]:
    """The model as the preparation's rewrites leave it, and by rewrite the reason why it does not fit this model.

    Args:
        model: in floating point; not changed, and returned as it is where there are no rewrites.
        images: fp32 [n, C, H, W], normalised.
        preparation: whose rewrites to apply.
        seed: of random rotations.
    """
    if not preparation.rewrites:
        return model, {}
    twin = copy.deepcopy(model).float().eval().requires_grad_(False)
    context = Context(describe(twin), images, seed)
    answers = {name: TRANSFORMS.get(name)(twin, context) for name in preparation.rewrites}
    return twin, {name: reason for name, reason in answers.items() if reason is not None}


def finished(
    measurements: Measurements, original: nn.Module, model: nn.Module, sites: Mapping[str, SiteParams], recipe: Recipe
) -> tuple[dict[str, SiteParams], dict[str, Tensor]]:
    """Sites and edits of a plan whose formats are decided: `sites` as they are, or compensated.

    Args:
        measurements: of `model`.
        original: the model that the plan will be applied to.
        model: `original` as prepared.
        sites: formats and steps.
        recipe: says whether to compensate.

    Raises:
        DataError: the images are spread over several processes, and the recipe compensates.
    """
    found, biases = dict(sites), {}
    if recipe.compensate:
        if measurements.shard.world > 1:
            raise DataError(f"recipe {recipe.name} sees all images in one process; allowed under torchrun: lampq")
        device = next(measurements.simulation.parameters()).device
        measurements.simulation.reset()
        found, biases = compensate(
            measurements.simulation,
            Simulation(model).float().to(device),
            measurements.images.to(device),
            sites,
            seed=measurements.seed,
            progress=lambda d, n: measurements.report("compensating errors", d, n),
        )
    elif model is not original:
        found = {name: _with_codes(measurements, name, params) for name, params in sites.items()}
    integer = frozenset(f"{name}.weight" for name, params in found.items() if not params.is_float)
    edits = {} if model is original else differences(original, model, integer)
    return found, {**edits, **{name: bias.float().cpu() for name, bias in biases.items()}}


def _with_codes(measurements: Measurements, name: str, params: SiteParams) -> SiteParams:
    """The codes of the rewritten weight, which the original does not have."""
    module = measurements.simulation.module(name)
    if params.is_float or not isinstance(module, SimulatedLinear) or "weight.codes" in params.tensors:
        return params
    codes = weight_codes(module.original.weight.detach().flatten(1).float(), params)
    return replace(params, tensors={**params.tensors, "weight.codes": codes.to(torch.int8).cpu()})
