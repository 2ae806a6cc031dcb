"""Round the weights of a whole model, site after site, so that each makes good what can be made good there.

In order of execution every site sees the inputs that the quantised model really gives it, beside those of the
floating-point model. Its steps are searched on the former. Then, over rows weighted as in `search.output_error`:

1. the weight that gives W x from the site's quantised input best, by ridge regression:
   dW = (W x - W x_hat) x_hat^T (x_hat x_hat^T + lambda)^-1  (ERQ, Zhong et al. 2407.06794, section 4.1);
2. its rounding with compensation among columns (`rounding.gptq`), with the moment of the quantised inputs;
3. the bias that makes the site's mean output that of the floating-point model.

The regression aims at what this site would give without its own quantisation, not at the floating-point model's
output: the errors gathered before it look like noise to it, against which least squares can only shrink the weight,
and twelve blocks of shrunken outputs are worse than the noise (tried: KL 0.9 instead of 0.5 on DeiT-Tiny at 4 bits).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lampq_rt import channels
from lampq_rt.calibrate.observe import (
    BATCH,
    LOGIT_IMAGES,
    PREFIX_SHARE,
    LinearObservation,
    Progress,
    PVObservation,
    QKObservation,
    patches,
)
from lampq_rt.calibrate.rounding import gptq, weighted_moment
from lampq_rt.calibrate.search import weight_scale
from lampq_rt.calibrate.search.output_error import row_worth
from lampq_rt.calibrate.steps import DEFAULT_SEARCH, site_params
from lampq_rt.inputs import quantized_input
from lampq_rt.plan import SiteParams
from lampq_rt.simulate import SimulatedLinear, Simulation
from lampq_rt.sites import Kind, Site

ROWS = 1536
"""Rows of a site's input on which its steps are searched."""

EXTREMES = 32
EXTREME_SHARE = 0.05
"""The rows of largest magnitude are looked at, too, and have this say together: massive activations are rare (one token
of an image, or of ten), but all other tokens attend to them, and a step that clips them is felt everywhere."""

RIDGE = 0.1
"""Share of the moment's mean diagonal that keeps the regression near the given weight."""


@torch.no_grad()
def compensate(
    exact: Simulation,
    quantised: Simulation,
    images: Tensor,
    sites: Mapping[str, SiteParams],
    *,
    search: str = DEFAULT_SEARCH,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[dict[str, SiteParams], dict[str, Tensor]]:
    """Steps, codes and biases of all integer sites in the formats they have.

    Args:
        exact: of the model, every site in floating point.
        quantised: of the same model, sharing no module with `exact`; left set to the result, with its biases.
        images: fp32 [n, C, H, W], normalised, on the simulations' device.
        sites: formats, in order of execution; steps are chosen anew.
        search: name of the range search.
        seed: of the rows drawn.
        progress: called with the number of sites done and their number.

    Returns:
        Sites with "weight.codes", and fp32 biases by parameter name.
    """
    quantised.reset()
    walk = _Walk(exact, quantised, images)
    found: dict[str, SiteParams] = {}
    biases: dict[str, Tensor] = {}
    for done, site in enumerate(exact.description.sites, 1):
        params = sites[site.name]
        if not params.is_float:
            x, x_hat = walk.inputs(site)
            if site.is_matmul:
                params = site_params(site, params.formats, _matmul(site, x_hat), None, search)
            else:
                linear = quantised.module(site.name)
                assert isinstance(linear, SimulatedLinear), site.name
                prefix = getattr(exact.model, "num_prefix_tokens", 0)
                work = _Linear(site, linear.original, x[0], x_hat[0], prefix, seed)
                params, bias = work.solve(params, search)
                if bias is not None:
                    linear.original.bias = nn.Parameter(bias, requires_grad=False)
                    biases[f"{site.name}.bias"] = bias
            quantised.set({site.name: params})
        found[site.name] = params
        if progress is not None:
            progress(done, len(sites))
    return found, biases


class _Walk:
    """Goes through both models block by block, and hands over the inputs of each site."""

    def __init__(self, exact: Simulation, quantised: Simulation, images: Tensor) -> None:
        self.models, self.images = (exact, quantised), images
        self.blocks: list[Any] = [model.model.blocks for model in self.models]
        self.block: int | None = None
        self.streams: list[Tensor] = []

    def inputs(self, site: Site) -> tuple[list[Tensor], list[Tensor]]:
        """Operands of the site in the floating-point and in the quantised model."""
        if site.block is None:
            found = [_capture(m.module(site.name), m, self.images) for m in self.models]
        else:
            self._advance(site.block)
            found = [
                _capture(m.module(site.name), blocks[site.block], stream)
                for m, blocks, stream in zip(self.models, self.blocks, self.streams, strict=True)
            ]
        return found[0], found[1]

    def _advance(self, block: int) -> None:
        """Move both residual streams to the input of `block`."""
        if self.block is None:
            self.streams = [_capture(b[0], m, self.images)[0] for m, b in zip(self.models, self.blocks, strict=True)]
            self.block = 0
        while self.block < block:
            self.streams = [
                torch.cat([blocks[self.block](part) for part in stream.split(BATCH)])
                for blocks, stream in zip(self.blocks, self.streams, strict=True)
            ]
            self.block += 1


class _Linear:
    """One linear with its inputs, [R, K] each, and what every row counts."""

    def __init__(self, site: Site, linear: nn.Module, x: Tensor, x_hat: Tensor, prefix: int, seed: int) -> None:
        assert isinstance(linear, (nn.Linear, nn.Conv2d))
        self.site, self.seed = site, seed
        self.weight, self.bias = linear.weight.detach().flatten(1), linear.bias
        tokens = x.shape[1] if site.block is not None and x.ndim == 3 else 0
        self.share = _shares(tokens, prefix, len(x), x) if 0 < prefix < tokens else None
        self.x, self.x_hat = (_rows(t, linear) for t in (x, x_hat))
        worth = row_worth(LinearObservation(self.x, 0.0, 0.0, self.share), self.weight)
        self.worth = worth / worth.sum()

    def solve(self, params: SiteParams, search: str) -> tuple[SiteParams, Tensor | None]:
        """Steps and codes, and the new bias where the linear has one."""
        params = site_params(self.site, params.formats, self._sample(), self.weight, search)
        x = channels.scaled_input(quantized_input(self.x_hat, params), params)
        weight = channels.scaled_weight(self.weight, params)
        moment = weighted_moment(x, self.worth)
        weight = weight + self._regression(x, weight, moment)
        bits = params.formats["weight"].bits
        scale = weight_scale(weight, bits)
        codes = gptq(weight, scale, moment, bits)
        bias = None
        if self.bias is not None:
            missing = self.worth @ self.x @ self.weight.t() - self.worth @ x @ (codes * scale[:, None]).t()
            bias = (self.bias.detach() + missing).float()
        tensors = {**params.tensors, "weight.scale": scale.cpu(), "weight.codes": codes.cpu()}
        return replace(params, tensors=tensors), bias

    def _regression(self, x: Tensor, weight: Tensor, moment: Tensor) -> Tensor:
        """What is added to `weight` [N, K], which reads the quantised `x` [R, K]."""
        error = F.linear(self.x_hat, self.weight) - F.linear(x, weight)
        error = error - self.worth @ error
        cross = (error * self.worth[:, None]).t() @ x
        eye = torch.eye(len(moment), dtype=torch.float64, device=moment.device)
        floor = (RIDGE * moment.diagonal().mean().double()).clamp_min(1e-12)
        return torch.linalg.solve(moment.double() + floor * eye, cross.double().t()).t().float()

    def _sample(self) -> LinearObservation:
        """Rows drawn at random and those of largest magnitude, with exact ranges."""
        source = torch.Generator().manual_seed(self.seed)
        drawn = torch.randperm(len(self.x_hat), generator=source)[:ROWS].sort().values.to(self.x_hat.device)
        extreme = self.x_hat.abs().amax(1).topk(min(EXTREMES, len(self.x_hat))).indices
        share = self.x_hat.new_ones(len(drawn)) if self.share is None else self.share[drawn]
        own = EXTREME_SHARE / (1.0 - EXTREME_SHARE) * float(share.sum()) / len(extreme)
        share = torch.cat((share, share.new_full((len(extreme),), own)))
        peaks = torch.stack(self.x_hat.aminmax(dim=0))
        rows = self.x_hat[torch.cat((drawn, extreme))].contiguous()
        return LinearObservation(rows, float(peaks[0].min()), float(peaks[1].max()), share / share.mean(), peaks)


def _shares(tokens: int, prefix: int, images: int, like: Tensor) -> Tensor:
    """fp32 [images * tokens], mean 1: prefix tokens have `PREFIX_SHARE` of the say (see `observe`)."""
    share = like.new_full((tokens,), (1.0 - PREFIX_SHARE) / (tokens - prefix))
    share[:prefix] = PREFIX_SHARE / prefix
    return (share * tokens).repeat(images)


def _matmul(site: Site, operands: list[Tensor]) -> QKObservation | PVObservation:
    """What a search of a matmul's steps needs, of its operands [B, H, N, ...]."""
    if site.kind is Kind.QK:
        q, k = operands
        keep = min(LOGIT_IMAGES, len(q))
        chosen = [i * len(q) // keep for i in range(keep)]
        q_max, k_max = (x.abs().amax((0, 2, 3)) for x in (q, k))
        return QKObservation(q[chosen], k[chosen], q_max, k_max)
    v = operands[1].transpose(0, 1).flatten(1, 2)  # [H, B*N, d]
    stride = max(1, v.shape[1] // ROWS)
    return PVObservation(v[:, ::stride].contiguous(), v.abs().amax((1, 2)))


def _rows(x: Tensor, linear: nn.Linear | nn.Conv2d) -> Tensor:
    x = patches(x, linear) if isinstance(linear, nn.Conv2d) else x
    return x.reshape(-1, x.shape[-1])


class _Enough(Exception):
    """What was looked for has been seen."""


def _capture(module: nn.Module, runner: nn.Module, x: Tensor) -> list[Tensor]:
    """All operands that `module` is given while `runner` runs on `x`; nothing after it runs."""
    kept: list[tuple[Tensor, ...]] = []

    def stop(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        kept.append(inputs)
        raise _Enough

    handle = module.register_forward_pre_hook(stop)
    try:
        for part in x.split(BATCH):
            try:
                runner(part)
            except _Enough:
                pass
    finally:
        handle.remove()
    return [torch.cat(operand) for operand in zip(*kept, strict=True)]
