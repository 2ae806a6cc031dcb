"""Give each channel of a LayerNorm's output its own scale and shift, taken back by the next linear.

RepQ-ViT (2212.08254, section 3.2) scales and shifts every channel to the same range, so that one step per tensor
serves all ("repq"). "balance-norms" shifts by the mean and scales by sqrt(sigma_k / ||w_k||) instead: what a step per
tensor costs is the sum of the channels' noise, weighted by the columns that read them, sum_k s_k^2 ||w_k||^2 * sum_k
(sigma_k / s_k)^2, and that is least there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lampq_rt.calibrate.transforms.base import TRANSFORMS, Context, attentions, mlps, set_parameter, watch

SMALLEST = 1e-3
"""A channel's scale is at least this share of the largest: constant channels must not blow up."""


class _Channels:
    """Mean, variance and range of every channel of a LayerNorm's output, fp64 [K]."""

    def __init__(self) -> None:
        self.count = 0
        self.sum = self.squares = torch.zeros(())
        self.low, self.high = torch.tensor(float("inf")), torch.tensor(float("-inf"))

    def see(self, x: Tensor) -> None:
        """[..., K]."""
        rows = x.flatten(0, -2).double()
        self.count += len(rows)
        self.sum = self.sum + rows.sum(0)
        self.squares = self.squares + rows.square().sum(0)
        self.low, self.high = torch.minimum(rows.amin(0), self.low), torch.maximum(rows.amax(0), self.high)


class Equalize:
    """Rewrites every LayerNorm before qkv and fc1.

    Args:
        by_range: RepQ-ViT's choice; otherwise the balanced one.
    """

    def __init__(self, by_range: bool) -> None:
        self.by_range = by_range

    @torch.no_grad()
    def __call__(self, model: Any, context: Context) -> str | None:
        """See `Transform`."""
        readers = [(f"{a.name}.qkv", a.norm, a.qkv) for a in attentions(model, context.description)]
        readers += [(f"{m.name}.fc1", m.norm, m.fc1) for m in mlps(model, context.description)]
        seen = {name: _Channels() for name, _, _ in readers}
        watch(model, context.images, {name: channels.see for name, channels in seen.items()})
        for name, norm, linear in readers:
            shift, scale = self._choose(seen[name], linear.weight.double())
            rescale(norm, linear, shift, scale)
        return None

    def _choose(self, seen: _Channels, weight: Tensor) -> tuple[Tensor, Tensor]:
        if self.by_range:
            shift, scale = (seen.low + seen.high) / 2, (seen.high - seen.low) / 2
        else:
            shift = seen.sum / seen.count
            sigma = (seen.squares / seen.count - shift.square()).clamp_min(0.0).sqrt()
            scale = (sigma / weight.norm(dim=0).clamp_min(1e-12)).sqrt()
        scale = scale.clamp_min(SMALLEST * float(scale.max()))
        return shift, scale / scale.log().mean().exp()


def rescale(norm: nn.LayerNorm, linear: nn.Linear, shift: Tensor, scale: Tensor) -> None:
    """x becomes (x - shift) / scale between `norm` and `linear`, fp64 [K] each."""
    weight = linear.weight.double()
    set_parameter(linear.bias, linear.bias.double() + weight @ shift)
    set_parameter(linear.weight, weight * scale)
    set_parameter(norm.weight, norm.weight.double() / scale)
    set_parameter(norm.bias, (norm.bias.double() - shift) / scale)


TRANSFORMS.register("repq")(Equalize(by_range=True))
TRANSFORMS.register("balance-norms")(Equalize(by_range=False))
