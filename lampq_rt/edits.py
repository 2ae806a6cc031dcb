"""A plan's edits: parameters of the model that it replaces, so that the model it was made for and the one that is
served are the same (rewrites of docs/calibration.md, biases of compensated layers).

The weight of an integer site is not among them: its codes are in the plan.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lampq_rt.errors import PlanError


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of modules and buffers whose parameters are new, frozen, and share the memory of the original's."""
    memo = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def edited(model: nn.Module, edits: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `model` with these parameters in place of its own; the others share the model's memory.

    Args:
        model: as it was calibrated; returned as it is where there are no edits.
        edits: fp32 tensors by parameter name.

    Raises:
        PlanError: the model has no such parameter, or it has another shape.
    """
    if not edits:
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
    return twin


def differences(before: nn.Module, after: nn.Module, left_out: frozenset[str]) -> dict[str, Tensor]:
    """The edits that make `before` into `after`, of the same architecture; parameters `left_out` do not count."""
    old = dict(before.named_parameters())
    return {
        name: parameter.detach().float().cpu().clone()
        for name, parameter in after.named_parameters()
        if name not in left_out and not torch.equal(parameter.detach().float().cpu(), old[name].detach().float().cpu())
    }
