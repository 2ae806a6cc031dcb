"""The model that learns computes what the simulation computes, bit by bit; its gradients are those of the papers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lampq_rt.calibrate.straight_through import (
    _LearningPV,
    _LearningQK,
    _Patches,
    _QuantizedHeads,
    _QuantizedInput,
    _QuantizedWeight,
)
from lampq_rt.formats import Format
from lampq_rt.inputs import quantized_input
from lampq_rt.kernels.reference import code_range
from lampq_rt.plan import SiteParams
from lampq_rt.quantizers import QUANTIZERS
from lampq_rt.simulate import SimulatedPV, SimulatedQK
from lampq_rt.sites import Kind
from tests.plans import uneven_table


def input_params(scheme: str, granularity: str = "tensor", channels: int = 24) -> SiteParams:
    draws = torch.Generator().manual_seed(3)
    scale, zero_point = torch.tensor(0.02), torch.tensor(-37, dtype=torch.int32)
    if granularity == "channel":
        scale = torch.rand(channels, generator=draws) * 0.03 + 0.01
        zero_point = torch.randn(channels, generator=draws) * 20
    tensors = {"input.scale": scale, "input.zero_point": zero_point}
    if scheme == "table":
        tensors["input.table"] = uneven_table(4, -37)
    fmt = Format(4 if scheme == "table" else 8, scheme, granularity, False)
    return SiteParams(Kind.FC2, {"input": fmt, "weight": Format(4, "uniform", "channel")}, tensors)


def rows(channels: int = 24) -> Tensor:
    return torch.randn(7, 33, channels, generator=torch.Generator().manual_seed(5)) * 2.5


CASES = [("uniform", "tensor"), ("uniform", "channel"), ("table", "tensor"), ("table", "channel")]


@pytest.mark.parametrize(("scheme", "granularity"), CASES)
def test_an_input_that_learns_is_the_simulated_one(scheme: str, granularity: str) -> None:
    params, x = input_params(scheme, granularity), rows()
    step = params.tensors["input.scale"].clone() if granularity == "tensor" else None
    came: Any = _QuantizedInput.apply(x.clone().requires_grad_(True), step, params)
    assert torch.equal(came, quantized_input(x, params))


@pytest.mark.parametrize("zero_point", [None, -37, 127])
def test_levels_dequantised_before_they_are_looked_up_are_the_same(zero_point: int | None) -> None:
    quantizer: Any = QUANTIZERS.get("table")
    x, table, scale = rows(), uneven_table(4, zero_point or 0), torch.tensor(0.0213)
    offset = None if zero_point is None else torch.tensor(zero_point, dtype=torch.int32)
    levels = quantizer.quantize(x, scale, offset, 4, table=table)
    assert torch.equal(
        quantizer.fake_quantize(x, scale, offset, 4, table=table), quantizer.dequantize(levels, scale, offset)
    )


@pytest.mark.parametrize(("scheme", "granularity"), CASES)
def test_gradients_pass_where_nothing_is_clipped(scheme: str, granularity: str) -> None:
    params, x = input_params(scheme, granularity), rows().requires_grad_(True)
    step = params.tensors["input.scale"].clone().requires_grad_(True) if granularity == "tensor" else None
    came: Any = _QuantizedInput.apply(x, step, params)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(6))
    (came * weight).sum().backward()
    scale, zero_point = params.tensors["input.scale"], params.tensors["input.zero_point"]
    low, high = code_range(8)
    place = x.detach() / scale + zero_point
    inside = (place > low - 0.5) & (place < high + 0.5)
    assert 0.01 < float((~inside).float().mean()) < 0.9
    assert torch.equal(x.grad, weight * inside)
    if step is not None:
        slope = (came.detach() - x.detach() * inside) / scale  # 1902.08153, section 2.1
        torch.testing.assert_close(step.grad, (weight * slope).sum(), rtol=1e-3, atol=1e-2)


def test_gradients_of_weights() -> None:
    codes = (torch.randn(5, 9) * 4).requires_grad_(True)
    step = (torch.rand(5) + 0.5).requires_grad_(True)
    came: Any = _QuantizedWeight.apply(codes, step, torch.arange(-4.0, 4.0))
    weight = torch.randn(5, 9)
    (came * weight).sum().backward()
    inside = (codes > -4.5) & (codes < 3.5)
    torch.testing.assert_close(codes.grad, weight * inside * step[:, None])
    torch.testing.assert_close(step.grad, (weight * codes.round().clamp(-4, 3)).sum(1))


@pytest.mark.parametrize("bias", [True, False])
def test_patches_have_the_gradients_of_the_convolution(bias: bool) -> None:
    draws = torch.Generator().manual_seed(1)
    leaves = [torch.randn(2, 3, 8, 12, generator=draws), torch.randn(5, 3, 4, 4, generator=draws)]
    leaves += [torch.randn(5, generator=draws)] if bias else []
    ours, theirs = ([t.clone().requires_grad_(True) for t in leaves] for _ in range(2))
    a: Any = _Patches.apply(ours[0], ours[1], ours[2] if bias else None, (4, 4))
    b = F.conv2d(theirs[0], theirs[1], theirs[2] if bias else None, stride=4)
    assert torch.equal(a, b)
    weight = torch.randn(b.shape, generator=draws)
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", ["rowmax", "log2", "cubic"])
def test_attention_that_learns_is_the_simulated_one(scheme: str) -> None:
    draws = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, 3, 9, 16, generator=draws) for _ in range(3))
    head = Format(4, "uniform", "head")
    scale = torch.tensor([0.2, 0.3, 0.4])
    qk, pv = SimulatedQK(), SimulatedPV()
    qk.set_params(SiteParams(Kind.QK, {"q": head, "k": head}, {"q.scale": scale, "k.scale": scale}))
    pv.set_params(SiteParams(Kind.PV, {"p": Format(4, scheme, "row"), "v": head}, {"v.scale": scale}))
    logits = _LearningQK(qk)(q, k)
    torch.testing.assert_close(logits, qk(q, k), rtol=1e-5, atol=1e-5)  # a step is the exponential of its logarithm
    torch.testing.assert_close(_LearningPV(pv)(logits, v), pv(logits, v), rtol=1e-5, atol=1e-5)


def test_steps_of_heads_have_the_gradient_of_lsq() -> None:
    draws = torch.Generator().manual_seed(8)
    x = (torch.randn(2, 3, 17, 8, generator=draws) * 2).requires_grad_(True)
    step, bits = torch.tensor([0.3, 0.5, 0.9]), 3
    learnt = step.clone().requires_grad_(True)
    came: Any = _QuantizedHeads.apply(x, learnt, bits)
    code = (x.detach() / step.view(-1, 1, 1)).round().clamp(-4, 3)
    assert torch.equal(came, code * step.view(-1, 1, 1))
    weight = torch.randn(x.shape, generator=draws)
    (came * weight).sum().backward()
    place = x.detach() / step.view(-1, 1, 1)
    inside = (place > -4.5) & (place < 3.5)
    assert 0.01 < float((~inside).float().mean()) < 0.9
    assert torch.equal(x.grad, weight * inside)
    slope = torch.where(inside, code - place, code)
    torch.testing.assert_close(learnt.grad, (slope * weight).sum((0, 2, 3)), rtol=1e-4, atol=1e-4)


def test_a_weight_held_for_a_step_gives_the_gradients_of_one_made_each_time() -> None:
    from lampq_rt.calibrate.straight_through import LearningLinear
    from lampq_rt.simulate import SimulatedLinear
    from tests.plans import uneven_levels

    torch.manual_seed(2)
    linear = torch.nn.Linear(24, 12)
    params = input_params("table")
    formats = {**params.formats, "weight": Format(3, "levels", "channel")}
    codes = torch.randint(-4, 4, (12, 24), dtype=torch.int8)
    tensors = {"weight.scale": torch.rand(12) * 0.01 + 0.001, "weight.levels": uneven_levels(3), "weight.codes": codes}
    simulated = SimulatedLinear(linear)
    simulated.set_params(SiteParams(Kind.FC2, formats, {**params.tensors, **tensors}, 12 * 24))
    x, found = rows(), []
    for held in (False, True):
        learner = LearningLinear(simulated)
        torch.testing.assert_close(learner(x), simulated(x))
        assert torch.equal(learner.learned().tensors["weight.codes"], codes)
        if held:
            learner.hold()
        for part in x.split(3):
            learner(part).square().sum().backward()
        if held:
            learner.release()
        found.append([p.grad for p in learner.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    start = learner.learned().tensors["weight.codes"]
    learner.start_near(torch.randn(12, 24), 0.45)
    assert torch.equal(learner.learned().tensors["weight.codes"], start), "it moved, but still rounds to its code"
    in_half = LearningLinear(simulated, torch.bfloat16)
    torch.testing.assert_close(in_half(x), simulated(x), rtol=0.02, atol=0.02)
