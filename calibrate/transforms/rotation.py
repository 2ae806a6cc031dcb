"""Rotate the residual stream (QuaRot 2404.00456, SpinQuant 2405.16406; for ViTs GLF-Q 2026).

x becomes x R^T everywhere, folded into what writes to the stream (embeddings, proj, fc2) and what reads it (qkv, fc1,
head). A LayerNorm between them subtracts the mean over channels, which an arbitrary rotation would destroy; the
published way is to turn it into an RMSNorm. Here R keeps the vector of ones, so the mean, and LayerNorm(x R^T) =
LayerNorm(x) R^T holds as it is: no new kernel. R is random in the space orthogonal to it, of entries of about equal
size, so that the few large channels of a ViT are spread over all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lampq_rt.calibrate.transforms.base import (
    TRANSFORMS,
    Attention,
    Context,
    Mlp,
    attentions,
    mlps,
    random_orthogonal,
    set_parameter,
)
from lampq_rt.calibrate.transforms.norms import fold_layer_scale, fold_norm


@torch.no_grad()
def rotate_residual(model: Any, context: Context) -> str | None:
    """See `Transform`."""
    reason = _obstacle(model, context)
    if reason is not None:
        return reason
    fold_layer_scale(model, context)
    rotation = mean_preserving_rotation(model.embed_dim, context.seed)
    parts: list[Attention | Mlp] = [*attentions(model, context.description), *mlps(model, context.description)]
    for part in parts:
        reader, writer = part.ends
        fold_norm(part.norm, [reader])
        _read(reader, rotation)
        _write(writer, rotation)
    heads = _heads(model)
    last = _last_norm(model)
    assert isinstance(last, nn.LayerNorm)
    fold_norm(last, heads)
    for head in heads:
        _read(head, rotation)
    conv = model.patch_embed.proj
    rows = rotation @ conv.weight.double().flatten(1)
    set_parameter(conv.weight, rows.view_as(conv.weight))
    if conv.bias is not None:
        set_parameter(conv.bias, rotation @ conv.bias.double())
    for name in ("cls_token", "dist_token", "reg_token", "pos_embed"):
        parameter = getattr(model, name, None)
        if isinstance(parameter, nn.Parameter):
            set_parameter(parameter, parameter.double() @ rotation.t())
    return None


def mean_preserving_rotation(size: int, seed: int) -> Tensor:
    """fp64 [size, size]: orthogonal, and the vector of ones is its own image."""
    mean = torch.full((size,), size**-0.5, dtype=torch.float64)
    matrix = random_orthogonal(size, seed)
    # A reflection that takes the image of the mean back to it; entries stay of about equal size.
    image = matrix @ mean
    normal = image - mean
    if float(normal.norm()) < 1e-12:
        return matrix
    normal /= normal.norm()
    return matrix - 2.0 * torch.outer(normal, normal @ matrix)


def _obstacle(model: Any, context: Context) -> str | None:
    """Why the stream of this model cannot be rotated."""
    whole = [len(list(parts(model, context.description))) for parts in (attentions, mlps)]
    if whole != [len(model.blocks)] * 2:
        return "a block is not a standard one with affine LayerNorms and biases"
    if not isinstance(model.norm_pre, nn.Identity):
        return "a norm precedes the blocks"
    norm = _last_norm(model)
    if not isinstance(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None or not _heads(model):
        return "no affine LayerNorm with a linear head follows the blocks"
    if any(head.bias is None for head in _heads(model)):
        return "the head has no bias"
    patch = model.patch_embed
    if not isinstance(patch.proj, nn.Conv2d) or not isinstance(getattr(patch, "norm", nn.Identity()), nn.Identity):
        return "a norm follows the patch embedding"
    if getattr(model, "attn_pool", None) is not None:
        return "attention pooling"
    return None


def _last_norm(model: Any) -> nn.Module:
    return model.fc_norm if isinstance(model.norm, nn.Identity) else model.norm


def _heads(model: Any) -> list[nn.Linear]:
    found = (getattr(model, name, None) for name in ("head", "head_dist"))
    return [head for head in found if isinstance(head, nn.Linear)]


def _read(linear: nn.Linear, rotation: Tensor) -> None:
    set_parameter(linear.weight, linear.weight.double() @ rotation.t())


def _write(linear: nn.Linear, rotation: Tensor) -> None:
    set_parameter(linear.weight, rotation @ linear.weight.double())
    set_parameter(linear.bias, rotation @ linear.bias.double())


TRANSFORMS.register("rotate-residual")(rotate_residual)
