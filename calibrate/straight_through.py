"""A simulated model that learns: rounding lets gradients pass where nothing is clipped (straight-through estimator,
Bengio et al., 1308.3432), and the step of an input has the gradient of LSQ (Esser et al., 1902.08153, section 2.1).

What learns of a linear are its weight in units of the step, its steps, the step of its input and its bias; of an
attention matmul the steps of q, k and v, one a head. Codes come out as those of the plan it started from until a
weight has crossed the middle between two of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
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
from lampq_rt.quantizers import QUANTIZERS
from lampq_rt.quantizers.levels import nearest
from lampq_rt.simulate import SimulatedLinear, SimulatedPV, SimulatedQK, SimulatedSite, Simulation
from lampq_rt.weights import levels_of


class LearningLinear(nn.Module):
    """A quantised linear or patch embedding whose codes, steps and bias learn.

    Attributes:
        codes: fp32 [N, K], the weight in units of `weight_step`, not rounded.
        log_weight_step: fp32 [N], natural logarithm of the weight's steps, the mean distance of two levels.
        values: fp32 [2^bits], what the codes round to, rising: whole numbers, or levels in mean distances.
        log_input_step: fp32 [], natural logarithm of the input's step; None where every channel has its own, which
            the weight's codes stand for.
        bias: fp32 [N], or None.
        soft: codes that are not rounded, fp32 [N, K], where a module gives them in place of `codes`
            (`learned_rounding`).
        drop: leaves elements of the input in floating point; None: none.
    """

    def __init__(self, linear: SimulatedLinear, precision: torch.dtype = torch.float32) -> None:
        super().__init__()
        assert linear.params is not None
        self.params, self.precision = linear.params, precision
        self.original = [linear.original]  # a list: not a submodule, whose weight would count
        self._made: tuple[Tensor, Tensor] | None = None
        self._kept: Tensor | None = None
        tensors = self.params.tensors
        weight = linear.original.weight
        fmt, levels = self.params.formats["weight"], levels_of(self.params)
        self.lowest, highest = reference.code_range(fmt.bits, weight=True)
        grid = torch.arange(self.lowest, highest + 1) if levels is None else levels
        self.unit = 1.0 if levels is None else float(levels[-1] - levels[0].float()) / (len(levels) - 1)
        self.values = grid.to(weight.device, torch.float32) / self.unit
        places = tensors["weight.codes"].to(weight.device, torch.int64) - self.lowest
        self.codes = nn.Parameter(self.values[places])
        self.log_weight_step = nn.Parameter((tensors["weight.scale"].to(weight.device) * self.unit).log())
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
        original = self.original[0]
        if self._kept is not None and not isinstance(original, nn.Conv2d):
            y = _product(x, self._kept.t(), self.precision) * self.log_weight_step.exp()
            return y if self.bias is None else y + self.bias
        rows = self._rows() if self._made is None else self._made[1]
        if isinstance(original, nn.Conv2d):
            return cast(Tensor, _Patches.apply(x, rows.view_as(original.weight), self.bias, original.stride))
        if self.precision == torch.float32:
            return F.linear(x, rows, self.bias)
        y = _product(x, rows.t(), self.precision)
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def keep(self) -> None:
        """Let codes stay as they are: a step then scales what comes out, and no weight needs a gradient."""
        self.codes.copy_(self.values[nearest(self.codes, self.values)])
        self.codes.requires_grad_(False)
        self._kept = channels.unscaled_weight(self.codes.detach(), self.params).to(self.precision)

    def _rows(self) -> Tensor:
        """fp32 [N, K]: the quantised weight."""
        if self.soft is None:
            rows = cast(Tensor, _QuantizedWeight.apply(self.codes, self.log_weight_step.exp(), self.values))
        else:
            rows = self.soft() * self.log_weight_step.exp()[:, None]
        return channels.unscaled_weight(rows, self.params)

    def hold(self) -> None:
        """Quantise the weight once for all forward passes up to `release`."""
        if self._kept is not None and not isinstance(self.original[0], nn.Conv2d):
            return
        made = self._rows()
        self._made = made, made.detach().requires_grad_(True)

    def release(self) -> None:
        """Hand the gradients gathered since `hold` on to codes and steps."""
        if self._made is None:
            return
        made, used = self._made
        self._made = None
        if used.grad is not None:
            made.backward(used.grad)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def start_near(self, weight: Tensor, edge: float) -> None:
        """Move from the codes towards `weight`, fp32 [N, K], by at most `edge` of the way to each neighbour."""
        wanted = channels.scaled_weight(weight, self.params) / self.log_weight_step.exp()[:, None]
        gaps = F.pad(self.values.diff(), (1, 1), value=1.0)
        places = nearest(self.codes, self.values).long()
        own = self.values[places]
        self.codes.copy_(torch.minimum(torch.maximum(wanted, own - edge * gaps[places]), own + edge * gaps[places + 1]))

    @torch.no_grad()
    def learned(self) -> SiteParams:
        """The site's formats with what was learned, on the CPU."""
        codes = (nearest(self.codes, self.values) + self.lowest).to(torch.int8).cpu()
        tensors = {"weight.codes": codes, "weight.scale": (self.log_weight_step.exp() / self.unit).cpu()}
        if self.log_input_step is not None:
            tensors["input.scale"] = self.log_input_step.exp().cpu()
        return replace(self.params, tensors={**self.params.tensors, **tensors})


@contextmanager
def held(linears: Collection[LearningLinear]) -> Iterator[None]:
    """In it every weight is quantised once; behind it, gradients are handed on."""
    for linear in linears:
        linear.hold()
    yield
    for linear in linears:
        linear.release()


class LearningMatmul(nn.Module):
    """Base of the attention matmuls: the steps of their operands learn, one a head.

    Attributes:
        log_steps: fp32 [H] natural logarithms of steps, by operand; empty where the site is in floating point.
    """

    operands: tuple[str, ...]

    def __init__(self, matmul: SimulatedQK | SimulatedPV, precision: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.params, self.precision = matmul.params, precision
        self.matmul = matmul
        steps = {} if self.params is None else {o: self.params.tensors[f"{o}.scale"] for o in self.operands}
        self.log_steps = nn.ParameterDict({o: nn.Parameter(scale.clone().log()) for o, scale in steps.items()})

    def quantized(self, operand: str, x: Tensor) -> Tensor:
        """`x` [B, H, N, d] in its format and back."""
        assert self.params is not None
        bits = self.params.formats[operand].bits
        return cast(Tensor, _QuantizedHeads.apply(x, self.log_steps[operand].exp(), bits))

    @torch.no_grad()
    def learned(self) -> SiteParams:
        """The site's formats with what was learned, on the CPU."""
        assert self.params is not None
        tensors = {f"{operand}.scale": step.exp().cpu() for operand, step in self.log_steps.items()}
        return replace(self.params, tensors={**self.params.tensors, **tensors})


class _LearningQK(LearningMatmul):
    """`SimulatedQK` that lets gradients pass."""

    operands = ("q", "k")

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        """As `SimulatedQK.forward`."""
        if self.params is None:
            return cast(Tensor, self.matmul(q, k))
        q, k = self.quantized("q", q), self.quantized("k", k)
        return _product(q, k.transpose(-2, -1), self.precision) * q.shape[-1] ** -0.5


class _LearningPV(LearningMatmul):
    """`SimulatedPV` that lets gradients pass."""

    operands = ("v",)

    def forward(self, logits: Tensor, v: Tensor) -> Tensor:
        """As `SimulatedPV.forward`."""
        if self.params is None:
            return cast(Tensor, self.matmul(logits, v))
        e = (logits - logits.detach().amax(-1, keepdim=True)).exp()
        p = _straight(lambda x: self.matmul.fake("p", x), e)
        return _product(p, self.quantized("v", v), self.precision) / e.sum(-1, keepdim=True)


def _product(a: Tensor, b: Tensor, precision: torch.dtype) -> Tensor:
    """fp32 a @ b, of factors rounded to `precision`."""
    return a @ b if precision == torch.float32 else (a.to(precision) @ b.to(precision)).float()


def learning(simulation: Simulation, precision: torch.dtype = torch.float32) -> dict[str, LearningLinear]:
    """Make the sites of `simulation` learn, in place; those of integer linears, by name.

    Args:
        simulation: set to a plan; its model must share no parameter with one that is still needed.
        precision: of the factors of products, forward and backward; sums and all else are fp32.
    """
    found: dict[str, LearningLinear] = {}
    device = next(simulation.parameters()).device
    for site in simulation.description.sites:
        module, new = simulation.module(site.name), cast(nn.Module | None, None)
        if isinstance(module, SimulatedQK):
            new = _LearningQK(module, precision).to(device)
        elif isinstance(module, SimulatedPV):
            new = _LearningPV(module, precision).to(device)
        elif isinstance(module, SimulatedLinear) and module.params is not None:
            new = found[site.name] = LearningLinear(module, precision)
        if new is not None:
            _replace(simulation.model, site.name, module, new)
    return found


def learning_matmuls(simulation: Simulation) -> dict[str, LearningMatmul]:
    """Integer attention matmuls by name, once `learning` has made them learn."""
    named = {site.name: simulation.model.get_submodule(site.name) for site in simulation.description.sites}
    return {n: m for n, m in named.items() if isinstance(m, LearningMatmul) and m.params is not None}


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


def _inside(gradient: Tensor, place: Tensor, low: float, high: float) -> Tensor:
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


class _QuantizedHeads(torch.autograd.Function):
    """Symmetric codes of [B, H, N, d] with a step a head, and back, with gradients of x and of the steps (LSQ)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, bits: int) -> Tensor:
        x_hat = QUANTIZERS.get("uniform").fake_quantize(x, step.view(-1, 1, 1), None, bits)
        ctx.save_for_backward(x, x_hat, step)
        ctx.bits = bits
        return x_hat

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (x, x_hat, step) = gradients, ctx.saved_tensors
        inner = _inside(gradient, x / step.view(-1, 1, 1), *reference.code_range(ctx.bits))
        slope = ((gradient * x_hat).sum((0, 2, 3)) - (inner * x).sum((0, 2, 3))) / step
        return inner, slope, None


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
    """The nearest values times steps, with gradients of codes and steps."""

    @staticmethod
    def forward(ctx: Any, codes: Tensor, step: Tensor, values: Tensor) -> Tensor:
        rounded = values[nearest(codes, values)]
        ctx.save_for_backward(codes, step, rounded)
        ctx.ends = float(values[0]), float(values[-1])
        return rounded * step[:, None]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        codes, step, rounded = ctx.saved_tensors
        (gradient,) = gradients
        inner = _inside(gradient, codes, *ctx.ends).mul_(step[:, None])
        return inner, (gradient * rounded).sum(1), None
