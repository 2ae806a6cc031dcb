"""A plan's edits: what it replaces of the model, so that the model it was made for and the one that is served are the
same. Parameters (rewrites of docs/calibration.md, biases of compensated layers) and activation functions.

The weight of an integer site is not among them: its codes are in the plan.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lampq_rt.errors import PlanError

ACTIVATIONS: Mapping[str, type[nn.Module]] = {"relu": nn.ReLU}
"""Activation functions that a plan may ask for."""


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of modules and buffers whose parameters are new, frozen, and share the memory of the original's."""
    memo = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def edited(model: nn.Module, edits: Mapping[str, Tensor], activations: Mapping[str, str] | None = None) -> nn.Module:
    """A copy of `model` with these parameters and activations in place of its own; what is left shares its memory.

    Args:
        model: as it was calibrated; returned as it is where there is nothing to replace.
        edits: fp32 tensors by parameter name.
        activations: names of `ACTIVATIONS` by module name.

    Raises:
        PlanError: the model has no such parameter or activation, or the parameter has another shape.
    """
    if not edits and not activations:
        return model
    twin = shared_copy(model)
    parameters = dict(twin.named_parameters())
    for name, tensor in edits.items():
        parameter = parameters.get(name)
        if parameter is None:
            raise PlanError(f"the plan edits the parameter {name!r:.80}, which {type(model).__name__} does not have")
        if parameter.shape != tensor.shape:
            came, wanted = tuple(tensor.shape), tuple(parameter.shape)
            raise PlanError(f"the plan's edit of {name} has shape {came}; the model's has {wanted}")
        parameter.data = tensor.to(parameter.device, torch.float32).clone()
    replace_activations(twin, activations or {})
    return twin


def replace_activations(model: nn.Module, activations: Mapping[str, str]) -> None:
    """Put other activation functions in place, in `model` itself.

    Args:
        activations: names of `ACTIVATIONS` by module name.

    Raises:
        PlanError: the model has no MLP with an activation of that name.
    """
    modules = dict(model.named_modules())
    for name, activation in activations.items():
        mlp, _, attribute = name.rpartition(".")
        if attribute != "act" or name not in modules or next(modules[name].parameters(), None) is not None:
            owner = type(model).__name__
            raise PlanError(f"the plan replaces the activation {name!r:.80}, which {owner} does not have")
        setattr(modules[mlp], attribute, ACTIVATIONS[activation]())


def differences(before: nn.Module, after: nn.Module, left_out: frozenset[str]) -> dict[str, Tensor]:
    """The edits that make `before` into `after`, of the same architecture; parameters `left_out` do not count."""
    old = dict(before.named_parameters())
    return {
        name: parameter.detach().float().cpu().clone()
        for name, parameter in after.named_parameters()
        if name not in left_out and not torch.equal(parameter.detach().float().cpu(), old[name].detach().float().cpu())
    }


def replaced_activations(before: nn.Module, after: nn.Module) -> dict[str, str]:
    """The activations of a plan that make those of `before` into those of `after`."""
    old, names = dict(before.named_modules()), {kind: name for name, kind in ACTIVATIONS.items()}
    return {
        name: names[type(module)]
        for name, module in after.named_modules()
        if type(module) in names and type(old[name]) is not type(module)
    }
