"""The simulation: the floating-point model with its sites quantised and dequantised in place (docs/numerics.md).

The calibrator measures with it and `lampq eval --backend simulate` serves it. It follows the same contract as the
kernels: the same codes, the same row-maximum softmax; only sums of products run in fp32. Sites can be switched one by
one, so that a sensitivity sweep builds the model once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from lampq_rt.edits import edited
from lampq_rt.inputs import quantized_input
from lampq_rt.plan import Plan, SiteParams
from lampq_rt.quantizers import QUANTIZERS
from lampq_rt.sites import Description
from lampq_rt.weights import dequantized, weight_codes


class SimulatedSite(nn.Module):
    """Base of the switchable sites; `params` is None where the site runs in floating point."""

    params: SiteParams | None = None

    def set_params(self, params: SiteParams | None) -> None:
        """Quantise this site as `params` says, or return it to floating point."""
        self.params = None if params is None or params.is_float else params

    def fake(self, operand: str, x: Tensor, *, per_head: bool = False) -> Tensor:
        """`x` quantised and dequantised in the operand's format; unchanged where that is floating point."""
        assert self.params is not None
        fmt = self.params.formats[operand]
        if fmt.is_float:
            return x
        scale = self.params.tensors[f"{operand}.scale"].to(x.device)
        zero_point = self.params.tensors.get(f"{operand}.zero_point")
        if per_head:
            scale = scale.view(-1, 1, 1)  # [H, 1, 1] against [B, H, N, d]
        zero_point = None if zero_point is None else zero_point.to(x.device)
        return QUANTIZERS.get(fmt.scheme).fake_quantize(x, scale, zero_point, fmt.bits)


class SimulatedLinear(SimulatedSite):
    """A Linear, or a Conv2d whose patches do not overlap, with quantised weight and input."""

    def __init__(self, original: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.original = original
        self._codes: tuple[Tensor, SiteParams] | None = None
        self._held: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The weight in use: where the site is quantised, made from its codes (a second model in fp32 is not held)."""
        if self._codes is None:
            return self.original.weight
        if self._held is not None:
            return self._held
        return dequantized(*self._codes).view_as(self.original.weight)

    def hold(self) -> None:
        """Make the weight once for all uses up to `release`."""
        self._held = self.weight

    def release(self) -> None:
        """Make the weight anew for each use."""
        self._held = None

    @property
    def bias(self) -> Tensor | None:
        """The bias, always in floating point."""
        return self.original.bias

    def set_params(self, params: SiteParams | None) -> None:
        """See `SimulatedSite.set_params`; the weight is quantised here, once."""
        super().set_params(params)
        self._codes, self._held = None, None
        if self.params is not None and not self.params.formats["weight"].is_float:
            self._codes = weight_codes(self.original.weight.detach().flatten(1), self.params), self.params

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N]; NCHW images to NCHW features for a patch embedding."""
        if self.params is not None:
            x = quantized_input(x, self.params)
        if isinstance(self.original, nn.Conv2d):
            return F.conv2d(x, self.weight, self.bias, stride=self.original.stride)
        return F.linear(x, self.weight, self.bias)


class SimulatedQK(SimulatedSite):
    """QK^T / sqrt(d), logits in units of natural exponents."""

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        """[B, H, N, d] twice to [B, H, N, N]."""
        if self.params is not None:
            q, k = self.fake("q", q, per_head=True), self.fake("k", k, per_head=True)
        return (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(q.shape[-1]))


class SimulatedPV(SimulatedSite):
    """softmax(logits) V."""

    def forward(self, logits: Tensor, v: Tensor) -> Tensor:
        """[B, H, N, N] and [B, H, N, d] to [B, H, N, d]."""
        if self.params is None:
            return logits.softmax(-1) @ v
        e = (logits - logits.amax(-1, keepdim=True)).exp_()
        return (self.fake("p", e) @ self.fake("v", v, per_head=True)) / e.sum(-1, keepdim=True)

    def fake(self, operand: str, x: Tensor, *, per_head: bool = False) -> Tensor:
        """See `SimulatedSite.fake`; the step of P is fixed by its format."""
        assert self.params is not None
        fmt = self.params.formats[operand]
        if operand == "p" and not fmt.is_float:
            return QUANTIZERS.get(fmt.scheme).fake_quantize(x, x.new_ones(()), None, fmt.bits)
        return super().fake(operand, x, per_head=per_head)


class Simulation(nn.Module):
    """A model in which every site can be quantised or left alone, one by one.

    Args:
        model: the floating-point model, never changed; the weights are shared with it, the rest is copied.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        from lampq_rt.adapters import adapter_for

        adapter = adapter_for(model)
        self.description: Description = adapter.describe(model)
        self.model = adapter.simulate(model).eval().requires_grad_(False)
        self._sites: dict[str, SimulatedSite] = {}
        for site in self.description.sites:
            module = self.model.get_submodule(site.name)
            assert isinstance(module, SimulatedSite), site.name
            self._sites[site.name] = module

    def module(self, name: str) -> SimulatedSite:
        """The module of the site called `name`, for hooks."""
        return self._sites[name]

    def set(self, sites: Mapping[str, SiteParams | None]) -> None:
        """Quantise these sites as given (None: floating point); others stay as they are."""
        for name, params in sites.items():
            self._sites[name].set_params(params)

    def reset(self) -> None:
        """Return every site to floating point."""
        self.set(dict.fromkeys(self._sites))

    def forward(self, images: Tensor) -> Tensor:
        """fp32 images [B, C, H, W] to logits."""
        return self.model(images)


def simulate(model: nn.Module, plan: Plan) -> Simulation:
    """The simulation of `model` under `plan`.

    Raises:
        PlanError: the plan was made for other weights, or names a site that the model lacks.
    """
    from lampq_rt.compiler import check_plan

    check_plan(model, plan)
    simulation = Simulation(edited(model, plan.edits, plan.activations))
    simulation.set(plan.sites)
    return simulation
