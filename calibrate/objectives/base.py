"""What an objective of training must be able to do, and the arithmetic that several of them share.

Whatever an objective counts, its value is of the size of `relative_error`: exactly that of `mse`, the same with weights
of mean 1 (`aph`; `tokens`, relative to what weighs as much), or brought to it at the first step (`fisher`, `suffix`).
So `Schedule.blocks`, which sets it against the divergence of the answers, means the same with each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lampq_rt.calibrate import stream
from lampq_rt.registry import Registry

TEMPERATURE = 20.0
"""Of the divergence whose gradients weigh a block's output (APHQ-ViT, FIMA-Q)."""

_SMALLEST = 1e-12
"""First value of a term that is 0: a block that has no error yet."""


class First:
    """Values of the first step, by which later ones are divided; part of the state of a training.

    Args:
        values: those already known, fp64 scalars by name.
    """

    def __init__(self, values: Mapping[str, Tensor] | None = None) -> None:
        self.values: dict[str, Tensor] = dict(values or {})

    def of(self, name: str, value: Tensor) -> float:
        """The first value that was given under that name, at least 1e-12."""
        if name not in self.values:
            self.values[name] = value.detach().double().cpu()
        return max(float(self.values[name]), _SMALLEST)

    def sized(self, block: int, terms: Mapping[str, tuple[float, Tensor]], y_hat: Tensor, y: Tensor) -> Tensor:
        """Weighted mean of terms, each divided by its first value, times the first relative error of the block.

        Args:
            block: number of the block.
            terms: weight and value (a scalar) by name.
            y_hat: see `BlockError`.
            y: see `BlockError`.
        """
        size = self.of(f"{block}.size", relative_error(y_hat.detach(), y))
        weights = sum(weight for weight, _ in terms.values())
        total = y_hat.new_zeros(())
        for name, (weight, value) in terms.items():
            total = total + weight * value / self.of(f"{block}.{name}", value)
        return total * (size / weights)


@dataclass(frozen=True)
class Study:
    """What statistics are measured on, once, before training.

    Attributes:
        exact: the floating-point model, frozen.
        quantised: the model to be trained, as it is before; objectives must not change it.
        images: fp32 [n, C, H, W], normalised.
        first: where first values are kept.
    """

    exact: VisionTransformer
    quantised: VisionTransformer
    images: Tensor
    first: First


class BlockError(Protocol):
    """The error of one block's output, with a gradient."""

    def __call__(self, block: int, y_hat: Tensor, y: Tensor) -> Tensor:
        """Scalar fp32 of what the block gives, y_hat, and what it should give, y; both fp32 [B, tokens, width]."""
        ...


class Objective(Protocol):
    """One way to count errors.

    Attributes:
        orders: names of the orders (`calibrate/orders`) in which it makes sense.
        why: why not in others; one line.
    """

    orders: tuple[str, ...]
    why: str

    def measure(self, study: Study) -> BlockError:
        """Measure what it needs. The same study gives the same answer, so a resumed training measures anew."""
        ...


OBJECTIVES: Registry[Objective] = Registry("objective of training")


def relative_error(y_hat: Tensor, y: Tensor) -> Tensor:
    """Scalar: mean square of y_hat - y over that of y less each token's mean; both fp32 [B, tokens, width]."""
    return F.mse_loss(y_hat, y) / spread(y)


def spread(y: Tensor) -> Tensor:
    """Scalar: mean square of y [B, tokens, width] less each token's mean."""
    return (y - y.mean(-1, keepdim=True)).square().mean()


def divergence(found: Tensor, wanted: Tensor) -> Tensor:
    """Scalar: the sum over images of KL(wanted || found) of logits [B, classes] at `TEMPERATURE`."""
    p, q = ((logits / TEMPERATURE).log_softmax(-1) for logits in (wanted, found))
    return F.kl_div(q, p, log_target=True, reduction="sum")


def divergence_gradient(exact: VisionTransformer, block: int, y: Tensor, wanted: Tensor) -> Tensor:
    """Gradient, at what leaves block number `block`, of the divergence of the floating-point model's answers.

    Args:
        exact: the floating-point model.
        block: whose output is y.
        y: [B, tokens, width], the output and what disturbs it.
        wanted: logits [B, classes] of the model that nothing disturbs.

    Returns:
        [B, tokens, width]: for small disturbances, the Fisher matrix of each image times the disturbance (FIMA-Q).
    """
    with torch.enable_grad():
        leaf = y.detach().requires_grad_(True)
        found = stream.answers(exact, stream.through(exact, leaf, block + 1))
        (gradient,) = torch.autograd.grad(divergence(found, wanted), leaf)
    return gradient
