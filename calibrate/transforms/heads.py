"""Rewrites inside attention: what q.k and the mean over v leave free.

* The logits of a row may all move by the same number: k loses its mean over tokens, through its bias.
* The weights of a row sum to 1: v loses its mean, and proj's bias takes what that did.
* q.k stays when q becomes A q and k becomes A^-T k, and proj(v) when v becomes A v and proj's columns of the head are
  multiplied by A^-1.

A quantiser with one step a head adds noise in proportion to the trace of its operand's second moment, and the other
operand multiplies it: the error of q.k is in proportion to tr(Sq) tr(Sk). Among all A that product is least where both
moments become the same diagonal matrix (the balanced realisation of control theory, Moore 1981), and equals the
squared sum of the square roots of the eigenvalues of Sq Sk. A Hadamard rotation (QuaRot 2404.00456) then spreads it
evenly over the channels, without which the largest channel would set the step of all. For proj the partner of the
attention's output is W^T W, and the same product also governs the rounding error of its weights.
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

DAMPING = 1e-4
"""Share of the mean eigenvalue that is added to every second moment."""


class _Moments:
    """Sums over tokens of one attention: [H, d] and [H, d, d], fp64."""

    def __init__(self) -> None:
        self.count = 0
        self.k_sum = self.kk = self.qq = self.v_sum = self.oo = self.o_sum = torch.zeros((), dtype=torch.float64)

    def see_qk(self, q: Tensor, k: Tensor) -> None:
        """[B, H, N, d] twice."""
        q, k = (x.transpose(0, 1).flatten(1, 2).double() for x in (q, k))  # [H, B*N, d]
        self.count += q.shape[1]
        self.k_sum = self.k_sum + k.sum(1)
        self.kk = self.kk + k.mT @ k
        self.qq = self.qq + q.mT @ q

    def see_pv(self, logits: Tensor, v: Tensor) -> None:
        """[B, H, N, N] and [B, H, N, d]."""
        self.v_sum = self.v_sum + v.double().sum((0, 2))

    def see_proj(self, x: Tensor, heads: int) -> None:
        """[B, N, H*d]."""
        out = x.flatten(0, 1).unflatten(-1, (heads, -1)).transpose(0, 1).double()
        self.oo = self.oo + out.mT @ out
        self.o_sum = self.o_sum + out.sum(1)


@torch.no_grad()
def balance_heads(model: Any, context: Context) -> str | None:
    """See `Transform`."""
    found = list(attentions(model, context.description))
    if not found:
        return "no standard attention with biases"
    moments = {attention.name: _Moments() for attention in found}
    watchers: dict[str, Any] = {}
    for attention in found:
        seen = moments[attention.name]
        watchers[f"{attention.name}.qk"] = seen.see_qk
        watchers[f"{attention.name}.pv"] = seen.see_pv
        watchers[f"{attention.name}.proj"] = lambda x, s=seen, a=attention: s.see_proj(x, a.heads)
    watch(model, context.images, watchers)
    for number, attention in enumerate(found):
        _rewrite(attention, moments[attention.name], context.seed + number)
    return None


def _rewrite(attention: Attention, seen: _Moments, seed: int) -> None:
    heads, (width, features) = attention.heads, attention.qkv.weight.shape
    d = width // 3 // heads
    weight = attention.qkv.weight.double().view(3, heads, d, features).clone()
    bias = attention.qkv.bias.double().view(3, heads, d).clone()
    spread = random_orthogonal(d, seed).to(weight.device)
    if not attention.normalises_heads:  # a LayerNorm of q and k would see the difference
        k_mean = seen.k_sum / seen.count
        bias[1] -= k_mean
        k_moment = seen.kk / seen.count - k_mean[:, :, None] * k_mean[:, None, :]
        to_q, from_q = balanced(seen.qq / seen.count, k_moment)
        to_q, from_q = spread @ to_q, from_q @ spread.t()
        weight[0], bias[0] = to_q @ weight[0], (to_q @ bias[0][..., None])[..., 0]
        weight[1], bias[1] = from_q.mT @ weight[1], (from_q.mT @ bias[1][..., None])[..., 0]
    v_mean = seen.v_sum / seen.count
    proj = attention.proj.weight.double().view(-1, heads, d)
    out_mean = seen.o_sum / seen.count
    moved = torch.einsum("nhd,hd->n", proj, v_mean)
    out_moment = seen.oo / seen.count
    cross = out_mean[:, :, None] * v_mean[:, None, :]
    out_moment = out_moment - cross - cross.mT + v_mean[:, :, None] * v_mean[:, None, :]
    bias[2] -= v_mean
    to_v, from_v = balanced(out_moment, torch.einsum("nhd,nhe->hde", proj, proj))
    to_v, from_v = spread @ to_v, from_v @ spread.t()
    weight[2], bias[2] = to_v @ weight[2], (to_v @ bias[2][..., None])[..., 0]
    set_parameter(attention.proj.weight, torch.einsum("nhd,hde->nhe", proj, from_v).flatten(1))
    set_parameter(attention.proj.bias, attention.proj.bias.double() + moved)
    set_parameter(attention.qkv.weight, weight.view(width, features))
    set_parameter(attention.qkv.bias, bias.view(width))


def balanced(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """A and A^-1 with A first A^T = A^-T second A^-1 = a diagonal matrix.

    Args:
        first: fp64 [..., d, d], symmetric, of what becomes A x.
        second: likewise, of what becomes A^-T y.
    """
    first, second = _damped(first), _damped(second)
    lower = torch.linalg.cholesky(first)
    other = torch.linalg.cholesky(second)
    u, s, vh = torch.linalg.svd(other.mT @ lower)
    root = s.rsqrt()
    to = root[..., :, None] * (u.mT @ other.mT)
    back = (lower @ vh.mT) * root[..., None, :]
    return to, back


def _damped(moment: Tensor) -> Tensor:
    size = moment.shape[-1]
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(1e-12)
    return moment + DAMPING * mean * torch.eye(size, dtype=moment.dtype, device=moment.device)


TRANSFORMS.register("balance-heads")(balance_heads)
