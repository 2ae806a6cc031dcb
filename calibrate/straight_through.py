"""A simulated model that learns: rounding lets gradients pass where nothing is clipped (straight-through estimator,
Bengio et al., 1308.3432), and the step of an input has the gradient of LSQ (Esser et al., 1902.08153, section 2.1).

What learns of a linear are its weight in units of the step, its steps, the step of its input and its bias. Codes come
out as those of the plan it started from until a weight has crossed the middle between two of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lampq_rt import channels
from lampq_rt.calibrate.drop import Drop
from lampq_rt.inputs import quantized_input
from lampq_rt.kernels import reference
from lampq_rt.plan import SiteParams
from lampq_rt.simulate import SimulatedLinear, SimulatedPV, SimulatedQK, SimulatedSite, Simulation


class LearningLinear(nn.Module):
    """A quantised linear or patch embedding whose codes, steps and bias learn.

    Attributes:
        codes: fp32 [N, K], the weight in units of `weight_step`, not rounded.
        log_weight_step: fp32 [N], natural logarithm of the weight's steps.
        log_input_step: fp32 [], natural logarithm of the input's step; None where every channel has its own, which
            the weight's codes stand for.
        bias: fp32 [N], or None.
        soft: codes that are not rounded, fp32 [N, K], where a module gives them in place of `codes`
            (`learned_rounding`).
        drop: leaves elements of the input in floating point; None: none.
    """

    def __init__(self, linear: SimulatedLinear) -> None:
        super().__init__()
        assert linear.params is not None
        self.params, self.original = (
            linear.params,
            [linear.original],
        )  # a list: not a submodule, whose weight would count
        tensors = self.params.tensors
        weight = linear.original.weight
        fmt = self.params.formats["weight"]
        self.range = reference.code_range(fmt.bits, weight=True)
        codes = tensors["weight.codes"].to(weight.device, torch.float32)
        self.codes = nn.Parameter(codes.clone())
        self.log_weight_step = nn.Parameter(tensors["weight.scale"].to(weight.device).log())
        own = None if channels.by_channel(self.params) else tensors["input.scale"].to(weight.device).log()
        self.log_input_step = None if own is None else nn.Parameter(own)
        bias = linear.original.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.soft: nn.Module | None = None
        self.drop: Drop | None = None

    def forward(self, x: Tensor) -> Tensor:
        """As `SimulatedLinear.forward`."""
        if not self.params.formats["input"].is_float:
            step = None if self.log_input_step is None else self.log_input_step.exp()
            x_hat = cast(Tensor, _QuantizedInput.apply(x, step, self.params))
            x = x_hat if self.drop is None else self.drop(x, x_hat)
        if self.soft is None:
            rows = cast(Tensor, _QuantizedWeight.apply(self.codes, self.log_weight_step.exp(), *self.range))
        else:
            rows = self.soft() * self.log_weight_step.exp()[:, None]
        rows = channels.unscaled_weight(rows, self.params)
        original = self.original[0]
        if isinstance(original, nn.Conv2d):
            return cast(Tensor, _Patches.apply(x, rows.view_as(original.weight), self.bias, original.stride))
        return F.linear(x, rows, self.bias)

    @torch.no_grad()
    def learned(self) -> SiteParams:
        """The site's formats with what was learned, on the CPU."""
        codes = self.codes.round().clamp(*self.range).to(torch.int8).cpu()
        tensors = {"weight.codes": codes, "weight.scale": self.log_weight_step.exp().cpu()}
        if self.log_input_step is not None:
            tensors["input.scale"] = self.log_input_step.exp().cpu()
        return replace(self.params, tensors={**self.params.tensors, **tensors})


class _LearningQK(nn.Module):
    """`SimulatedQK` that lets gradients pass."""

    def __init__(self, matmul: SimulatedQK) -> None:
        super().__init__()
        self.matmul = matmul

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        """As `SimulatedQK.forward`."""
        if self.matmul.params is None:
            return cast(Tensor, self.matmul(q, k))
        q = _straight(lambda x: self.matmul.fake("q", x, per_head=True), q)
        k = _straight(lambda x: self.matmul.fake("k", x, per_head=True), k)
        return q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5


class _LearningPV(nn.Module):
    """`SimulatedPV` that lets gradients pass."""

    def __init__(self, matmul: SimulatedPV) -> None:
        super().__init__()
        self.matmul = matmul

    def forward(self, logits: Tensor, v: Tensor) -> Tensor:
        """As `SimulatedPV.forward`."""
        if self.matmul.params is None:
            return cast(Tensor, self.matmul(logits, v))
        e = (logits - logits.detach().amax(-1, keepdim=True)).exp()
        p = _straight(lambda x: self.matmul.fake("p", x), e)
        v = _straight(lambda x: self.matmul.fake("v", x, per_head=True), v)
        return p @ v / e.sum(-1, keepdim=True)


def learning(simulation: Simulation) -> dict[str, LearningLinear]:
    """Make the sites of `simulation` learn, in place; those of integer linears, by name.

    Args:
        simulation: set to a plan; its model must share no parameter with one that is still needed.
    """
    found: dict[str, LearningLinear] = {}
    for site in simulation.description.sites:
        module, new = simulation.module(site.name), cast(nn.Module | None, None)
        if isinstance(module, SimulatedQK):
            new = _LearningQK(module)
        elif isinstance(module, SimulatedPV):
            new = _LearningPV(module)
        elif isinstance(module, SimulatedLinear) and module.params is not None:
            new = found[site.name] = LearningLinear(module)
        if new is not None:
            _replace(simulation.model, site.name, module, new)
    return found


def _replace(model: nn.Module, name: str, old: SimulatedSite, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    assert getattr(owner, leaf) is old, name
    setattr(owner, leaf, new)


class _Straight(torch.autograd.Function):
    """function(x), with the gradient of x; the sum x + (function(x) - x) would be rounded once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None


def _straight(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), with the gradient of x."""
    return cast(Tensor, _Straight.apply(x, function))


def _inside(gradient: Tensor, place: Tensor, low: int, high: int) -> Tensor:
    """`gradient` where `place` rounds to a code without being clipped, else 0; six times as fast as a boolean mask."""
    return torch.ops.aten.hardtanh_backward(gradient, place, low - 0.5, high + 0.5)


class _QuantizedInput(torch.autograd.Function):
    """`quantized_input` with gradients of x and of the input's one step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor | None, params: SiteParams) -> Tensor:
        if step is not None:
            params = replace(params, tensors={**params.tensors, "input.scale": step.detach()})
        x_hat, ctx.params = quantized_input(x, params), params
        # The linear keeps x_hat as well; nothing else of the size of x is kept, nor computed before it is needed.
        ctx.save_for_backward(x, None if step is None else x_hat)
        return x_hat

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (x, x_hat), params = gradients, ctx.saved_tensors, ctx.params
        scale, zero_point = params.tensors["input.scale"].to(x.device), params.tensors.get("input.zero_point")
        place = x * scale.reciprocal()
        if zero_point is not None:
            place.add_(zero_point.to(x.device, torch.float32))
        inner = _inside(gradient, place, *reference.code_range(params.formats["input"].code_bits))
        if x_hat is None:
            return inner, None, None
        # LSQ: (x_hat - x) / step inside, x_hat / step where x is clipped. Two inner products need no third tensor.
        slope = torch.dot(gradient.flatten(), x_hat.flatten()) - torch.dot(inner.flatten(), x.flatten())
        return inner, slope / scale, None


class _Patches(torch.autograd.Function):
    """F.conv2d of patches that do not overlap, whose gradients are two matrix products (a fifth of oneDNN's time)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, stride=stride)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (x, weight) = gradients, ctx.saved_tensors
        rows = gradient.flatten(2).transpose(1, 2).flatten(0, 1)  # [B * patches, N]
        size, (height, width) = weight.shape[2:], x.shape[2:]
        columns = F.unfold(x, size, stride=size).transpose(1, 2).flatten(0, 1)  # [B * patches, K]
        own = None
        if ctx.needs_input_grad[0]:
            back = (rows @ weight.flatten(1)).unflatten(0, (len(x), -1)).transpose(1, 2)
            own = F.fold(back, (height, width), size, stride=size)
        return own, (rows.t() @ columns).view_as(weight), rows.sum(0) if ctx.needs_input_grad[2] else None, None


class _QuantizedWeight(torch.autograd.Function):
    """Rounded codes times steps, with gradients of both."""

    @staticmethod
    def forward(ctx: Any, codes: Tensor, step: Tensor, low: int, high: int) -> Tensor:
        rounded = codes.round().clamp_(low, high)
        ctx.save_for_backward(codes, step, rounded)
        ctx.range = low, high
        return rounded * step[:, None]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        codes, step, rounded = ctx.saved_tensors
        (gradient,) = gradients
        inner = _inside(gradient, codes, *ctx.range).mul_(step[:, None])
        return inner, (gradient * rounded).sum(1), None, None
