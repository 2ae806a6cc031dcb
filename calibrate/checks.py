"""What a calibration refuses before it measures: devices, budgets, processes and images that do not fit."""

from __future__ import annotations

import torch
from torch import Tensor

from lampq_rt.calibrate.costs import Budget
from lampq_rt.calibrate.costs.mean_activation_bits import MeanActivationBits
from lampq_rt.calibrate.recipes import RECIPES, Recipe
from lampq_rt.errors import BackendError, BudgetError, DataError
from lampq_rt.simulate import Simulation


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Where to measure; None is the CPU.

    Raises:
        BackendError: the device does not exist here.
    """
    try:
        chosen = torch.device("cpu" if device is None else device)
    except RuntimeError:
        raise BackendError(f"unknown device {device!r}; allowed: cpu, cuda") from None
    if chosen.type not in ("cpu", "cuda"):
        raise BackendError(f"calibration does not run on device {str(device)!r}; allowed: cpu, cuda")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise BackendError("device 'cuda' was asked for, but PyTorch finds no CUDA GPU on this machine; allowed: cpu")
    return chosen


def check_recipe(recipe: Recipe, budget: Budget, processes: int) -> None:
    """Pass where the recipe can keep such a budget, and its images may be spread over that many processes.

    Raises:
        BudgetError: a limit of activations below the width that the recipe gives all of them.
        DataError: a part of the recipe sees all images at once.
    """
    unit, width = "mean_activation_bits", recipe.preparation.activations
    if width and unit in budget and (limit := budget.resolve(unit, full=MeanActivationBits.full)) < width:
        allowed = ", ".join(name for name in RECIPES if not RECIPES.get(name).preparation.activations)
        raise BudgetError(
            f"{unit} = {limit:g} cannot be met by recipe {recipe.name}, whose activations have {width} bits; "
            f"recipes that can: {allowed}"
        )
    if processes > 1 and recipe.free:
        allowed = ", ".join(name for name in RECIPES.names() if not RECIPES.get(name).free)
        raise DataError(
            f"recipe {recipe.name} needs all images in one process (free widths); {processes} processes came; "
            f"allowed in several: {allowed}"
        )


@torch.no_grad()
def check_images(images: Tensor, simulation: Simulation) -> Tensor:
    """`images` as fp32, if the model takes them.

    Raises:
        DataError: not a tensor of floating point [n >= 1, C, H, W], not finite, or of a size that the model refuses.
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or not len(images) or not images.is_floating_point():
        came = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise DataError(
            f"calibration images are {came}; expected a floating-point tensor [n, channels, height, width], n >= 1"
        )
    finite = images.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        raise DataError(f"calibration image number {int((~finite).nonzero()[0])} is not finite (NaN or infinity)")
    images = (images.clone() if images.is_inference() else images.detach()).float()
    try:
        simulation(images[:1].to(next(simulation.parameters()).device))
    except (AssertionError, RuntimeError, ValueError) as error:  # what torch and timm raise for a wrong shape
        reason = str(error).strip().split("\n")[0]
        shape, name = tuple(images.shape[1:]), simulation.description.architecture
        raise DataError(f"{name} does not take images of shape {shape} [channels, height, width]: {reason}") from error
    return images


def check_labels(labels: Tensor | None, count: int, classes: int) -> Tensor | None:
    """`labels` as int64 on the CPU, or None.

    Raises:
        DataError: not one whole number from 0 to classes - 1 for each image.
    """
    if labels is None:
        return None
    labels = torch.as_tensor(labels).cpu()
    if labels.shape != (count,) or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DataError(
            f"labels are {labels.dtype} {tuple(labels.shape)}; expected {count} whole numbers, one for each image"
        )
    labels = labels.long()
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise DataError(
            f"labels lie in {int(labels.min())}..{int(labels.max())}; this model has classes 0..{classes - 1}"
        )
    return labels
