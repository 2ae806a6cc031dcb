"""What a search of activation steps must be able to do, and the arithmetic that all of them share.

real = (code - zero_point) * scale with signed codes of b bits. A range always contains 0 and the zero-point is one of
the codes, so zero is exact: padding, dead channels and ReLU-like zeros cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lampq_rt.calibrate.observe import LinearObservation, PVObservation, QKObservation
from lampq_rt.formats import Format
from lampq_rt.kernels import reference
from lampq_rt.registry import Registry

_SMALLEST = torch.finfo(torch.float32).tiny
"""Smallest step: its reciprocal is still finite."""


@dataclass(frozen=True)
class Steps:
    """Step and zero-point of one operand.

    Attributes:
        scale: fp32, [] per tensor or [H] per head; positive and finite.
        zero_point: int32 [], of the signed code; None for a symmetric format.
    """

    scale: Tensor
    zero_point: Tensor | None = None


LinearSolver = Callable[[Format, Tensor], Steps]
"""Input format and quantised weight fp32 [N, K] to the input's steps."""

QKSolver = Callable[[Format], tuple[Steps, Steps]]
"""Format of both operands to the steps of q and k."""

PVSolver = Callable[[Format], Steps]
"""Format of v to its steps."""


class RangeSearch(Protocol):
    """A rule that chooses steps from observations.

    Each method prepares what does not depend on the width, once a site, and returns a function to call once a width.
    """

    def linear(self, seen: LinearObservation, weight: Tensor) -> LinearSolver:
        """For a linear's input; `weight` is fp32 [N, K], not quantised."""
        ...

    def qk(self, seen: QKObservation) -> QKSolver:
        """For both operands of QK^T, per head."""
        ...

    def pv(self, seen: PVObservation) -> PVSolver:
        """For v, per head."""
        ...


SEARCHES: Registry[RangeSearch] = Registry("range search")


def affine_steps(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Step and zero-point of ranges [low, high], widened to contain 0.

    Args:
        low: fp64, any shape.
        high: fp64, same shape.
        bits: width of a code.

    Returns:
        scale fp32 and zero_point int32 of that shape. An empty range gets step 1.
    """
    bottom, top = reference.code_range(bits)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = positive((high - low) / (top - bottom))
    zero_point = (bottom - low / scale.double()).round().clamp(bottom, top)
    return scale, zero_point.to(torch.int32)


def symmetric_scale(max_abs: Tensor, bits: int) -> Tensor:
    """fp32 steps for which `max_abs` (fp64, any shape) has the highest code. A maximum of 0 gets step 1."""
    return positive(max_abs / reference.code_range(bits)[1])


def range_steps(low: float, high: float, fmt: Format) -> Steps:
    """Per-tensor steps of the range [low, high] in a format with or without zero-point."""
    if fmt.symmetric:
        return Steps(symmetric_scale(torch.tensor(max(-low, high), dtype=torch.float64), fmt.bits))
    ends = torch.tensor([low, high], dtype=torch.float64)
    return Steps(*affine_steps(ends[0], ends[1], fmt.bits))


def positive(scale: Tensor) -> Tensor:
    """fp32 steps: 1 where the range is empty, never so small that the reciprocal overflows."""
    return torch.where(scale > 0, scale.clamp(min=_SMALLEST), torch.ones_like(scale)).float()
