"""Round the weights of a whole model, site after site, so that each makes good what came before it.

In order of execution every site sees the inputs that the quantised model really gives it, x_hat, beside those of the
floating-point model, x. Its steps are searched on x_hat. Then, over rows weighted as in `search.output_error`:

1. the weight that maps quantised inputs to the floating-point model's outputs best, by ridge regression
   (W + dW) with dW = (Y - W X_hat) X_hat^T (X_hat X_hat^T + lambda)^-1  (ERQ, Zhong et al. 2407.06794, section 4.1);
2. its rounding with compensation among columns (`rounding.gptq`), with the moment of the quantised inputs;
3. the bias that makes the mean error 0.

A linear that writes to the residual stream aims at the floating-point stream after its sum, not at its own
floating-point output: it also makes good what the stream has gathered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lampq_rt.calibrate.observe import (
    LOGIT_IMAGES,
    PREFIX_SHARE,
    LinearObservation,
    Progress,
    PVObservation,
    QKObservation,
    patches,
)
from lampq_rt.calibrate.rounding import gptq
from lampq_rt.calibrate.search import SEARCHES, weight_scale
from lampq_rt.calibrate.search.output_error import row_worth
from lampq_rt.calibrate.steps import site_params
from lampq_rt.inputs import quantized_input
from lampq_rt.plan import SiteParams
from lampq_rt.simulate import SimulatedLinear, Simulation
from lampq_rt.sites import Kind, Site

BATCH = 8
ROWS = 1536
"""Rows of a site's input on which its steps are searched."""

EXTREMES = 32
EXTREME_SHARE = 0.05
"""The rows of largest magnitude are looked at, too, and have this say together: massive activations are rare (one token
of an image, or of ten), but all other tokens attend to them, and a step that clips them is felt everywhere."""

RIDGE = 0.1
"""Share of the moment's mean diagonal that keeps the regression near the given weight."""

RESIDUAL_WRITERS = (Kind.PROJ, Kind.FC2)


@dataclass
class Options:
    ridge: float = RIDGE
    damping: float = 0.01
    stream: float = 1.0
    rounding: bool = True
    resteps: bool = True


@torch.no_grad()
def compensate(
    exact: Simulation,
    quantised: Simulation,
    images: Tensor,
    sites: Mapping[str, SiteParams],
    *,
    search: str = "output-error",
    options: Options = Options(),
    progress: Progress | None = None,
) -> tuple[dict[str, SiteParams], dict[str, Tensor]]:
    """Steps, codes and biases of all `sites`; `quantised` is left set to them.

    Returns:
        Sites with "weight.codes", and new biases by parameter name.
    """
    quantised.reset()
    work = _Work(exact, quantised, images, search, options)
    done: dict[str, SiteParams] = {}
    for count, site in enumerate(exact.description.sites, 1):
        params = sites[site.name]
        if not params.is_float:
            params = work.solve(site, params)
            quantised.set({site.name: params})
        done[site.name] = params
        if progress is not None:
            progress(count, len(sites))
    return done, work.biases


class _Work:
    def __init__(self, exact: Simulation, quantised: Simulation, images: Tensor, search: str, options: Options) -> None:
        self.exact, self.quantised, self.images = exact, quantised, images
        self.search, self.options = search, options
        self.biases: dict[str, Tensor] = {}
        self.block: int | None = None
        self.stream: tuple[Tensor, Tensor] | None = None  # exact and quantised input of the current block
        self.prefix = getattr(exact.model, "num_prefix_tokens", 0)

    def solve(self, site: Site, params: SiteParams) -> SiteParams:
        if site.block is not None and site.block != self.block:
            self._advance(site.block)
        if site.kind is Kind.QK:
            return self._qk(site, params)
        if site.kind is Kind.PV:
            return self._pv(site, params)
        return self._linear(site, params)

    def _advance(self, block: int) -> None:
        """Move both streams to the input of `block`."""
        if self.stream is None or self.block is None:
            self.stream = tuple(
                torch.cat([_first_input(s, batch) for batch in self.images.split(BATCH)])
                for s in (self.exact, self.quantised)
            )  # type: ignore[assignment]
            start = 0
        else:
            start = self.block
        assert self.stream is not None
        moved = []
        for simulation, x in zip((self.exact, self.quantised), self.stream, strict=True):
            for index in range(start, block):
                x = torch.cat([simulation.model.blocks[index](part) for part in x.split(BATCH)])
            moved.append(x)
        self.stream, self.block = (moved[0], moved[1]), block

    def _inputs(self, site: Site) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs of the site in both models, each a list of operands."""
        found = []
        if site.block is None:
            for simulation in (self.exact, self.quantised):
                runs = self.images if site.kind is Kind.PATCH_EMBED else None
                found.append(_capture(simulation, site.name, simulation, self.images if runs is None else runs))
        else:
            assert self.stream is not None
            for simulation, x in zip((self.exact, self.quantised), self.stream, strict=True):
                found.append(_capture(simulation, site.name, simulation.model.blocks[site.block], x))
        return found[0], found[1]

    def _qk(self, site: Site, params: SiteParams) -> SiteParams:
        q, k = self._inputs(site)[1]
        count = len(q)
        keep = [i * count // min(LOGIT_IMAGES, count) for i in range(min(LOGIT_IMAGES, count))]
        top = [x.abs().amax((0, 2, 3)) for x in (q, k)]
        return site_params(site, params.formats, QKObservation(q[keep], k[keep], *top), None, self.search)

    def _pv(self, site: Site, params: SiteParams) -> SiteParams:
        v = self._inputs(site)[1][1].transpose(0, 1).flatten(1, 2)  # [H, B*N, d]
        top = v.abs().amax((1, 2))
        stride = max(1, v.shape[1] // ROWS)
        return site_params(site, params.formats, PVObservation(v[:, ::stride].contiguous(), top), None, self.search)

    def _linear(self, site: Site, params: SiteParams) -> SiteParams:
        options = self.options
        module = self.quantised.module(site.name)
        assert isinstance(module, SimulatedLinear)
        (x,), (x_hat,) = self._inputs(site)
        weight = module.original.weight.flatten(1)
        given = module.original.bias
        bias = weight.new_zeros(len(weight)) if given is None else given
        share = self._shares(site, x)
        x, x_hat = (_rows(t, module.original) for t in (x, x_hat))
        worth = row_worth(LinearObservation(x, 0.0, 0.0, share), weight)
        if options.resteps:
            params = self._steps(site, params, x_hat, share, weight)
        quantised_x = _quantised(x_hat, params)
        target = F.linear(x, weight, bias)
        if site.kind in RESIDUAL_WRITERS and options.stream:
            target = target + options.stream * self._gathered(site)
        channels = params.tensors["input.scale"]
        transformed = weight * channels if channels.ndim else weight
        bits = params.formats["weight"].bits
        moment = (quantised_x * worth[:, None]).t() @ quantised_x / worth.sum()
        total = worth.sum()
        error = target - F.linear(quantised_x, transformed, bias)
        mean_x, mean_error = (torch.einsum("r,rk->k", worth, t) / total for t in (quantised_x, error))
        central = moment - torch.outer(mean_x, mean_x)
        if options.ridge < 1e6:
            error = F.linear(x_hat, weight) - F.linear(quantised_x, transformed)
            mean_error = torch.einsum("r,rk->k", worth, error) / total
            cross = (error * worth[:, None]).t() @ quantised_x / total - torch.outer(mean_error, mean_x)
            damped = central.double() + options.ridge * central.diagonal().mean().double() * torch.eye(len(central), dtype=torch.float64)
            change = torch.linalg.solve(damped, cross.double().t()).t().float()
            transformed = transformed + change
        scale = weight_scale(transformed, bits)
        if options.rounding:
            codes = gptq(transformed, scale, central, bits, options.damping)
        else:
            limit = (1 << (bits - 1)) - 1
            codes = (transformed / scale[:, None]).round().clamp(-limit - (bits < 8), limit).to(torch.int8)
        hat = codes.float() * scale[:, None]
        if given is not None:
            residual = target - F.linear(quantised_x, hat, bias)
            given.data = bias + torch.einsum("r,rn->n", worth, residual) / total
            self.biases[f"{site.name}.bias"] = given.data
        return replace(params, tensors={**params.tensors, "weight.scale": scale, "weight.codes": codes})

    def _steps(self, site: Site, params: SiteParams, x_hat: Tensor, share: Tensor | None, weight: Tensor) -> SiteParams:
        stride = max(1, len(x_hat) // ROWS)
        source = torch.Generator().manual_seed(0)
        chosen = torch.randperm(len(x_hat), generator=source)[:ROWS].sort().values
        extreme = x_hat.abs().amax(1).topk(min(EXTREMES, len(x_hat))).indices
        peaks = torch.stack(x_hat.aminmax(dim=0))
        share = x_hat.new_ones(len(x_hat)) if share is None else share
        weight_of = EXTREME_SHARE / (1.0 - EXTREME_SHARE) * float(share[chosen].sum()) / len(extreme)
        share = torch.cat((share[chosen], share.new_full((len(extreme),), weight_of)))
        share = share / share.mean()
        rows = x_hat[torch.cat((chosen, extreme))].contiguous()
        seen = LinearObservation(rows, float(peaks[0].min()), float(peaks[1].max()), share, peaks)
        return site_params(site, params.formats, seen, weight, self.search)

    def _shares(self, site: Site, x: Tensor) -> Tensor | None:
        """What each row counts, mean 1: prefix tokens together a quarter."""
        if site.block is None or not 0 < self.prefix < x.shape[1]:
            return None
        tokens = x.shape[1]
        share = x.new_full((tokens,), (1.0 - PREFIX_SHARE) / (tokens - self.prefix))
        share[: self.prefix] = PREFIX_SHARE / self.prefix
        return (share * tokens).repeat(len(x))

    def _gathered(self, site: Site) -> Tensor:
        """What the quantised stream lacks before the site's sum, [R, D]."""
        assert self.stream is not None and site.block is not None
        exact, quantised = self.stream
        if site.kind is Kind.FC2:
            exact, quantised = (
                torch.cat([_after_attention(s.model.blocks[site.block], part) for part in x.split(BATCH)])
                for s, x in zip((self.exact, self.quantised), self.stream, strict=True)
            )
        return (exact - quantised).flatten(0, 1)


def _quantised(x: Tensor, params: SiteParams) -> Tensor:
    """What multiplies the weight's codes: x_hat, or codes less zero-points where every channel has its step."""
    scale = params.tensors["input.scale"]
    x_hat = quantized_input(x, params)
    return x_hat / scale if scale.ndim else x_hat


def _after_attention(block: Any, x: Tensor) -> Tensor:
    return x + block.ls1(block.attn(block.norm1(x)))


def _rows(x: Tensor, linear: nn.Module) -> Tensor:
    x = patches(x, linear) if isinstance(linear, nn.Conv2d) else x
    return x.flatten(0, -2)


class _Stop(Exception):
    pass


def _first_input(simulation: Simulation, images: Tensor) -> Tensor:
    return _capture_one(simulation.model.blocks[0], simulation, images)[0]


def _capture(simulation: Simulation, name: str, runner: nn.Module, x: Tensor) -> list[Tensor]:
    """All operands that the site called `name` is given while `runner` runs, by batches."""
    parts = [_capture_one(simulation.module(name), runner, part) for part in x.split(BATCH)]
    return [torch.cat(operand) for operand in zip(*parts, strict=True)]


def _capture_one(module: nn.Module, runner: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    kept: list[tuple[Tensor, ...]] = []

    def stop(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        kept.append(inputs)
        raise _Stop

    handle = module.register_forward_pre_hook(stop)
    try:
        runner(x)
    except _Stop:
        pass
    finally:
        handle.remove()
    return kept[0]
