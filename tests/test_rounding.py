"""GPTQ: codes in range, never worse than rounding to nearest where inputs are correlated, sane on dead channels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lampq_rt.calibrate.rounding import gptq, weighted_moment
from lampq_rt.calibrate.search import weight_scale
from lampq_rt.kernels import reference


def layer(rows: int = 400, features: int = 70, channels: int = 20) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    mix = torch.randn(features, features, generator=source) * (torch.rand(features, generator=source) * 3)
    return torch.randn(rows, features, generator=source) @ mix, torch.randn(channels, features, generator=source)


def error(x: Tensor, weight: Tensor, codes: Tensor, scale: Tensor) -> float:
    return float(((codes * scale[:, None] - weight) @ x.t()).square().sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_it_beats_rounding_to_nearest(bits: int) -> None:
    x, weight = layer()
    x = x - x.mean(0)
    scale = weight_scale(weight, bits)
    low, high = reference.code_range(bits, weight=True)
    nearest = (weight / scale[:, None]).round().clamp(low, high)
    codes = gptq(weight, scale, weighted_moment(x, torch.ones(len(x))), bits)
    assert codes.dtype == torch.int8 and codes.shape == weight.shape
    assert low <= int(codes.min()) and int(codes.max()) <= high
    assert error(x, weight, codes, scale) < 0.75 * error(x, weight, nearest, scale)


def test_uncorrelated_inputs_leave_nothing_to_make_good() -> None:
    _, weight = layer()
    scale = weight_scale(weight, 4)
    codes = gptq(weight, scale, torch.eye(weight.shape[1]), 4)
    assert torch.equal(codes, (weight / scale[:, None]).round().clamp(-8, 7).to(torch.int8))


def test_channels_without_energy_are_rounded_to_nearest() -> None:
    x, weight = layer()
    x[:, 3] = 0.0
    scale = weight_scale(weight, 4)
    codes = gptq(weight, scale, weighted_moment(x, torch.ones(len(x))), 4)
    assert torch.equal(codes[:, 3], (weight[:, 3] / scale).round().clamp(-8, 7).to(torch.int8))
    everything_dead = gptq(weight, scale, torch.zeros(70, 70), 4)
    assert torch.equal(everything_dead, (weight / scale[:, None]).round().clamp(-8, 7).to(torch.int8))


def test_moment_counts_rows_as_told() -> None:
    x, _ = layer(rows=6)
    worth = torch.tensor([1.0, 1.0, 2.0, 0.0, 1.0, 1.0])
    repeated = x[[0, 1, 2, 2, 4, 5]]
    wanted = torch.cov(repeated.t(), correction=0)
    assert torch.allclose(weighted_moment(x, worth), wanted, rtol=1e-4, atol=1e-3)
