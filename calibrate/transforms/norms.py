"""Fold LayerScale into the linear before it and a LayerNorm's weight and bias into the linear after it.

The LayerNorm keeps weight 1 and bias 0, which makes what follows (rotation, equalisation) one formula. Channels whose
LayerNorm weight is 0 (DeiT-Tiny has two) become columns of zeros, which need no care.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lampq_rt.calibrate.transforms.base import TRANSFORMS, Context, attentions, mlps, set_parameter


@torch.no_grad()
def fold_norms(model: Any, context: Context) -> str | None:
    """See `Transform`."""
    fold_layer_scale(model, context)
    for attention in attentions(model, context.description):
        fold_norm(attention.norm, [attention.qkv])
    for mlp in mlps(model, context.description):
        fold_norm(mlp.norm, [mlp.fc1])
    return None


def fold_layer_scale(model: Any, context: Context) -> None:
    """Multiply the rows of proj and fc2 with LayerScale's gamma, which becomes 1."""
    for block in model.blocks:
        attn, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
        for name, linear in (("ls1", getattr(attn, "proj", None)), ("ls2", getattr(mlp, "fc2", None))):
            gamma = getattr(getattr(block, name, None), "gamma", None)
            if gamma is None or not isinstance(linear, nn.Linear):
                continue
            set_parameter(linear.weight, linear.weight.double() * gamma.double()[:, None])
            if linear.bias is not None:
                set_parameter(linear.bias, linear.bias.double() * gamma.double())
            set_parameter(gamma, torch.ones_like(gamma))


def fold_norm(norm: nn.LayerNorm, readers: list[nn.Linear]) -> None:
    """Move the weight and bias of `norm` into the linears that read it; they must have biases."""
    gamma, beta = norm.weight.double(), norm.bias.double()
    for linear in readers:
        weight = linear.weight.double()
        set_parameter(linear.bias, linear.bias.double() + weight @ beta)
        set_parameter(linear.weight, weight * gamma)
    set_parameter(norm.weight, torch.ones_like(norm.weight))
    set_parameter(norm.bias, torch.zeros_like(norm.bias))


TRANSFORMS.register("fold-norms")(fold_norms)
