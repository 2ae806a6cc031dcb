"""Round the weights of a whole model, site after site, so that each makes good what can be made good there.

In order of execution every site sees the inputs that the quantised model really gives it, beside those of the
floating-point model. Its steps are searched on the former. Then, over rows weighted as in `search.output_error`, and
prefix tokens as the gradients say (of DeiT-Tiny's proj they make 2 % in the first block and all in the last):

1. the weight that gives W x from the site's quantised input best, by ridge regression:
   dW = (W x - W x_hat) x_hat^T (x_hat x_hat^T + lambda)^-1  (ERQ, Zhong et al. 2407.06794, section 4.1);
2. its rounding with compensation among columns (`rounding.gptq`), with the moment of the quantised inputs;
3. the bias that makes the site's mean output that of the floating-point model.

The regression aims at what this site would give without its own quantisation, not at the floating-point model's
output: the errors gathered before it look like noise to it, against which least squares can only shrink the weight,
and twelve blocks of shrunken outputs are worse than the noise (tried: KL 0.9 instead of 0.5 on DeiT-Tiny at 4 bits).

Of a site's inputs those of 32 images are held at a time; more wait on disk, and moments are summed. Between sites
only the two residual streams stay. An output's error is never formed: with x_hat and delta = x - x_hat in units of the
columns, all that 1. needs is M = cov(x_hat, x_hat) and cov(delta, x_hat), for dW = W cov(delta, x_hat) (M + lambda)^-1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from lampq_rt import channels
from lampq_rt.calibrate import parts, spd
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
from lampq_rt.calibrate.rounding import DAMPING
from lampq_rt.calibrate.rounding import rounded as rounded_weight
from lampq_rt.calibrate.search.output_error import energy_worth, row_energy
from lampq_rt.calibrate.spill import Batches
from lampq_rt.calibrate.steps import DEFAULT_SEARCH, site_params
from lampq_rt.formats import INTEGER_BITS
from lampq_rt.inputs import quantized_input
from lampq_rt.memory import trim
from lampq_rt.plan import SiteParams
from lampq_rt.simulate import SimulatedLinear, Simulation
from lampq_rt.sites import Kind, Site
from lampq_rt.weights import values

ROWS = 1536
"""Rows of a site's input on which its steps are searched."""

EXTREMES = 32
EXTREME_SHARE = 0.05
"""The rows of largest magnitude are looked at, too, and have this say together: massive activations are rare (one token
of an image, or of ten), but all other tokens attend to them, and a step that clips them is felt everywhere."""

TOGETHER = 32
"""Images whose inputs of a site are in memory together, and whose rows are summed in one product."""

LEAST_SHARE, MOST_SHARE = 0.02, 0.7
"""Of the prefix tokens in what all rows count. In the last block nothing else is read, but these are one row an image,
too few to solve for a weight with: with a most of 0.25, 0.5, 0.7 and 0.9, KL of DeiT-Tiny at 4 bits is 0.235, 0.234,
0.231 and 0.243; of ViT-Tiny at 3 bits 3.73, 3.40 and 3.41 with the last three, and 4.19 with a quarter everywhere."""

NO_SHARES: Mapping[str, float] = {}

Rounded = Callable[[Site, SiteParams, Tensor, Tensor], None]
"""Told of a linear that was rounded."""

RIDGE = 0.1
"""Share of the moment's mean diagonal that keeps the regression near the given weight."""


@torch.no_grad()
def compensate(
    exact: Simulation,
    quantised: Simulation,
    images: Tensor,
    sites: Mapping[str, SiteParams],
    *,
    prefix_shares: Mapping[str, float] = NO_SHARES,
    search: str = DEFAULT_SEARCH,
    seed: int = 0,
    damping: float = DAMPING,
    progress: Progress | None = None,
    rounded: Rounded | None = None,
) -> tuple[dict[str, SiteParams], dict[str, Tensor]]:
    """Steps, codes and biases of all integer sites in the formats they have.

    Args:
        exact: of the model, every site in floating point.
        quantised: of the same model, sharing no module with `exact`; left set to the result, with its biases.
        images: fp32 [n, C, H, W], normalised, on the simulations' device.
        sites: formats, in order of execution; steps are chosen anew.
        prefix_shares: what the prefix tokens of a linear count beside all of its rows, 0..1 (`prefix_shares`); by
            default `PREFIX_SHARE`.
        search: name of the range search.
        seed: of the rows drawn.
        damping: of the rounding below 8 bits (`rounding.gptq`).
        progress: called with the number of sites done and their number.
        rounded: called with each linear as it is left, the weight that was rounded, fp32 [N, K], and the second moment
            [K, K] of its input.

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
            if site.is_matmul:
                seen = _matmul(site, walk.inputs(site, 1), len(images))
                params = site_params(site, params.formats, seen, None, search)
            else:
                linear = quantised.module(site.name)
                assert isinstance(linear, SimulatedLinear), site.name
                prefix = getattr(exact.model, "num_prefix_tokens", 0)
                share = prefix_shares.get(site.name, PREFIX_SHARE)
                fewer = params.formats["weight"].bits < INTEGER_BITS[-1]
                work = _Linear(site, linear.original, walk, _Prefix(prefix, share), seed, damping if fewer else DAMPING)
                params, bias = work.solve(params, search, rounded)
                del work
                if bias is not None:
                    linear.original.bias = nn.Parameter(bias, requires_grad=False)
                    biases[f"{site.name}.bias"] = bias
            quantised.set({site.name: params})
        found[site.name] = params
        trim()
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

    def inputs(self, site: Site, which: int) -> Iterator[tuple[Tensor, ...]]:
        """Operands of the site in the floating-point (0) or the quantised model (1), a batch of images at a time."""
        model = self.models[which]
        if site.block is None:
            return _capture(model.module(site.name), model, self.images)
        self._advance(site.block)
        return _capture(model.module(site.name), self.blocks[which][site.block], self.streams[which])

    def _advance(self, block: int) -> None:
        """Move both residual streams to the input of `block`."""
        if self.block is None:
            self.streams = [
                torch.cat([x for (x,) in _capture(b[0], m, self.images)])
                for m, b in zip(self.models, self.blocks, strict=True)
            ]
            self.block = 0
        while self.block < block:
            self.streams = [
                torch.cat([blocks[self.block](part) for part in stream.split(BATCH)])
                for blocks, stream in zip(self.blocks, self.streams, strict=True)
            ]
            self.block += 1


@dataclass(frozen=True)
class _Prefix:
    """The prefix tokens of an image, and what they count together beside all of its tokens, 0..1."""

    tokens: int
    share: float

    def shares(self, tokens: int, images: int, like: Tensor) -> Tensor:
        """fp32 [images * tokens], mean 1."""
        own = min(max(self.share, LEAST_SHARE), MOST_SHARE)
        found = like.new_full((tokens,), (1.0 - own) / (tokens - self.tokens))
        found[: self.tokens] = own / self.tokens
        return (found * tokens).repeat(images)


class _Linear:
    """One linear with its input in the quantised model, [R, K] by batches of images, and what every row counts."""

    def __init__(self, site: Site, linear: nn.Module, walk: _Walk, prefix: _Prefix, seed: int, damping: float) -> None:
        assert isinstance(linear, (nn.Linear, nn.Conv2d))
        self.site, self.linear, self.seed, self.damping = site, linear, seed, damping
        self.weight, self.bias = linear.weight.detach().flatten(1), linear.bias
        self.share: Tensor | None = None
        self.walk, self.inputs = walk, Batches()
        tokens, images, energies = 0, len(walk.images), []
        for x in _together(walk.inputs(site, 1)):
            tokens = x.shape[1] if site.block is not None and x.ndim == 3 else 0
            rows = _rows(x, linear)
            self.inputs.append(rows, whole=len(x) == images)
            energies.append(row_energy(rows, self.weight))
        energy = torch.cat(energies)
        if 0 < prefix.tokens < tokens:
            self.share = prefix.shares(tokens, images, energy)
        worth = energy_worth(energy, self.share)
        self.worth = worth / worth.sum()

    def solve(
        self, params: SiteParams, search: str, rounded: Rounded | None = None
    ) -> tuple[SiteParams, Tensor | None]:
        """Steps and codes, and the new bias where the linear has one."""
        mean = self._exact_mean()
        params = site_params(self.site, params.formats, self._sample(), self.weight, search)
        trim()
        weight = channels.scaled_weight(self.weight, params)
        moment, cross, mean_hat = self._moments(params, weight)
        self.inputs.clear()
        trim()
        weight = weight + spd.ridge(moment, cross, RIDGE)
        del cross
        found = rounded_weight(weight, params.formats["weight"], moment, self.damping)
        params = replace(params, tensors={**params.tensors, **{key: tensor.cpu() for key, tensor in found.items()}})
        bias = None
        if self.bias is not None:
            weight_hat = values(found["weight.codes"], params) * found["weight.scale"][:, None]
            missing = mean @ self.weight.t() - mean_hat @ weight_hat.t()
            bias = (self.bias.detach() + missing).float()
        if rounded is not None:
            rounded(self.site, params, weight, moment)
        return params, bias

    def _exact_mean(self) -> Tensor:
        """fp32 [K]: mean of the input in the floating-point model, rows counting what they are worth."""
        mean, start = self.weight.new_zeros(self.weight.shape[1]), 0
        for x in _together(self.walk.inputs(self.site, 0)):
            rows = _rows(x, self.linear)
            mean += self.worth[start : start + len(rows)] @ rows
            start += len(rows)
        return mean

    def _moments(self, params: SiteParams, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """cov(x_hat, x_hat), fp32 [K, K], `weight` [N, K] times cov(delta, x_hat), and the mean of x_hat, [K].

        Sums are about a centre near the mean, so that little cancels.
        """
        features, centre = self.weight.shape[1], torch.empty(0)
        mean, mean_lost = self.weight.new_zeros(2, features)
        moment, cross = (self.weight.new_zeros(features, features) for _ in range(2))  # one outlives the other
        for rows, worth in self._parts(self.inputs, self.worth, size=parts.rows(features, parts.LONG)):
            x = quantized_input(rows, params)
            lost = channels.scaled_input(rows - x, params)
            x = channels.scaled_input(x, params)
            centre = centre if centre.numel() else x.mean(0)
            x = x - centre
            weighed = x * worth[:, None]
            mean += weighed.sum(0)
            mean_lost += worth @ lost
            moment.addmm_(x.t(), weighed)
            cross.addmm_(lost.t(), weighed)
        moment.addr_(mean, mean, alpha=-1)
        cross.addr_(mean_lost, mean, alpha=-1)
        return moment, weight @ cross, mean + centre

    @staticmethod
    def _parts(batches: Batches, *values: Tensor, size: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """Rows of each batch, at most `size` (0: all) at once, with their part of each of the values [R]."""
        start = 0
        for batch in batches:
            for rows in batch.split(size or len(batch)):
                yield rows, *(v[start : start + len(rows)] for v in values)
                start += len(rows)

    def _sample(self) -> LinearObservation:
        """Rows drawn at random and those of largest magnitude, with exact ranges."""
        source = torch.Generator().manual_seed(self.seed)
        tops = torch.cat([torch.maximum(rows.amax(1), -rows.amin(1)) for rows in self.inputs])
        drawn = torch.randperm(len(tops), generator=source)[:ROWS].sort().values.to(tops.device)
        extreme = tops.topk(min(EXTREMES, len(tops))).indices
        share = tops.new_ones(len(drawn)) if self.share is None else self.share[drawn]
        own = EXTREME_SHARE / (1.0 - EXTREME_SHARE) * float(share.sum()) / len(extreme)
        share = torch.cat((share, share.new_full((len(extreme),), own)))
        chosen = torch.cat((drawn, extreme))
        places = torch.arange(len(tops), device=tops.device)
        sample, peaks = tops.new_empty(len(chosen), self.weight.shape[1]), list[Tensor]()
        for rows, numbers in self._parts(self.inputs, places):
            here = (chosen >= numbers[0]) & (chosen <= numbers[-1])
            sample[here] = rows[chosen[here] - numbers[0]]
            peaks.append(torch.stack(rows.aminmax(dim=0)))
        ends = torch.stack((torch.stack(peaks)[:, 0].amin(0), torch.stack(peaks)[:, 1].amax(0)))
        return LinearObservation(sample, float(ends[0].min()), float(ends[1].max()), share / share.mean(), ends)


def _together(batches: Iterator[tuple[Tensor, ...]]) -> Iterator[Tensor]:
    """A linear's inputs, several batches put together."""
    while some := list(islice(batches, TOGETHER // BATCH)):
        yield torch.cat([x for (x,) in some]) if len(some) > 1 else some[0][0]


def _matmul(site: Site, batches: Iterator[tuple[Tensor, ...]], images: int) -> QKObservation | PVObservation:
    """What a search of a matmul's steps needs, of its operands [B, H, N, ...]."""
    if site.kind is Kind.QK:
        keep = min(LOGIT_IMAGES, images)
        chosen = {i * images // keep for i in range(keep)}
        kept: tuple[list[Tensor], list[Tensor]] = ([], [])
        tops: tuple[list[Tensor], list[Tensor]] = ([], [])
        start = 0
        for operands in batches:
            here = [i for i in range(len(operands[0])) if start + i in chosen]
            start += len(operands[0])
            for x, k, top in zip(operands, kept, tops, strict=True):
                k.append(x[here])
                top.append(x.abs().amax((0, 2, 3)))
        q, k_ = (torch.cat(x) for x in kept)
        q_max, k_max = (torch.stack(x).amax(0) for x in tops)
        return QKObservation(q, k_, q_max, k_max)
    v = torch.cat([v.transpose(0, 1).flatten(1, 2) for _, v in batches], 1)  # [H, B*N, d]
    stride = max(1, v.shape[1] // ROWS)
    return PVObservation(v[:, ::stride].contiguous(), v.abs().amax((1, 2)))


def _rows(x: Tensor, linear: nn.Linear | nn.Conv2d) -> Tensor:
    x = patches(x, linear) if isinstance(linear, nn.Conv2d) else x
    return x.reshape(-1, x.shape[-1])


class _Enough(Exception):
    """What was looked for has been seen."""


def _capture(module: nn.Module, runner: nn.Module, x: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """All operands that `module` is given while `runner` runs on `x`, by batch; nothing after it runs."""
    kept: list[tuple[Tensor, ...]] = []

    def stop(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        kept.append(inputs)
        raise _Enough

    for part in x.split(BATCH):
        handle = module.register_forward_pre_hook(stop)
        try:
            runner(part)
        except _Enough:
            pass
        finally:
            handle.remove()
        yield kept.pop()
