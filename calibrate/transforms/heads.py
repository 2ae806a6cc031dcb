"""Rewrites inside attention: what q.k and the mean over v leave free.

* The logits of a row may all move by the same number: k loses its mean over tokens, through its bias.
* The weights of a row sum to 1: v loses its mean, and proj's bias takes what that did.
* q.k stays when both are rotated alike, and proj(v) when v is rotated and proj's columns of the head are rotated back.
  A Hadamard rotation (QuaRot 2404.00456, section 4) spreads the large channels of a head over all, so that they do not
  set its one step.

Tried and left out: instead of a rotation, the matrices that make the second moments of q and k (and of the attention's
output and proj's columns) equal and diagonal, which have the least product of traces. On real weights they are worse
than nothing (KL at 4 bits, DeiT-Tiny 0.50 against 0.27, ViT-Tiny 1.48 against 0.77): they flatten what few
directions of k carry, and a head's step then serves tails, not variances.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lampq_rt.calibrate.transforms.base import (
    TRANSFORMS,
    Attention,
    Context,
    attentions,
    random_orthogonal,
    set_parameter,
    watch,
)


class _Means:
    """Sums over tokens of one attention's k and v, fp64 [H, d]."""

    def __init__(self) -> None:
        self.count = 0
        self.k = self.v = torch.zeros((), dtype=torch.float64)

    def see_qk(self, q: Tensor, k: Tensor) -> None:
        """[B, H, N, d] twice."""
        self.count += k.shape[0] * k.shape[2]
        self.k = self.k + k.double().sum((0, 2))

    def see_pv(self, logits: Tensor, v: Tensor) -> None:
        """[B, H, N, N] and [B, H, N, d]."""
        self.v = self.v + v.double().sum((0, 2))


@torch.no_grad()
def rotate_heads(model: Any, context: Context) -> str | None:
    """See `Transform`."""
    found = list(attentions(model, context.description))
    if not found:
        return "no standard attention with biases"
    means = {attention.name: _Means() for attention in found}
    watchers: dict[str, Any] = {}
    for name, seen in means.items():
        watchers[f"{name}.qk"], watchers[f"{name}.pv"] = seen.see_qk, seen.see_pv
    watch(model, context.images, watchers)
    for number, attention in enumerate(found):
        _rewrite(attention, means[attention.name], context.seed + number)
    return None


def _rewrite(attention: Attention, seen: _Means, seed: int) -> None:
    heads, (width, features) = attention.heads, attention.qkv.weight.shape
    d = width // 3 // heads
    weight = attention.qkv.weight.double().view(3, heads, d, features).clone()
    bias = attention.qkv.bias.double().view(3, heads, d).clone()
    proj = attention.proj.weight.double().view(-1, heads, d)
    v_mean = seen.v / seen.count
    set_parameter(attention.proj.bias, attention.proj.bias.double() + torch.einsum("nhd,hd->n", proj, v_mean))
    bias[2] -= v_mean
    rotation = random_orthogonal(d, seed).to(weight.device)
    rotated = [2]
    if not attention.normalises_heads:  # a LayerNorm of q and k would see the difference
        bias[1] -= seen.k / seen.count
        rotated = [0, 1, 2]
    weight[rotated], bias[rotated] = rotation @ weight[rotated], bias[rotated] @ rotation.t()
    set_parameter(attention.proj.weight, (proj @ rotation.t()).flatten(1))
    set_parameter(attention.qkv.weight, weight.view(width, features))
    set_parameter(attention.qkv.bias, bias.view(width))


TRANSFORMS.register("rotate-heads")(rotate_heads)
