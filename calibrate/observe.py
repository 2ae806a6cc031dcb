"""What flows through the floating-point model: samples and exact ranges of every site's operands.

One pass over the calibration images, in small batches, with a hook on each site of the simulation. Only samples are
kept, and those on disk (`spill`), so memory does not grow with the number of images: for a linear, rows of its input
drawn over images and tokens; for QK^T, whole images, because a logit needs all keys of its image; for PV, rows of v.
Ranges are exact: they cover every value. Which rows and images are drawn depends on the seed and on the number of
images and tokens alone.

The class token (any prefix token) is one row in two hundred, unlike all others, and the only one that the head
reads. Drawn like any other row it is as good as absent, and a search clips its outliers away: on DeiT-Tiny's qkv at
8 bits that cost 5 % of the class token's output and seven times the KL divergence. So prefix tokens are drawn apart
from patches, and each row carries a weight that gives prefix tokens a quarter of the say. With that, uniform 6-bit
DeiT-Tiny fell from a KL divergence of 0.107 to 0.044, ViT-Tiny from 0.51 to 0.30; shares from 0.1 to 0.5 did about
as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lampq_rt.calibrate.distributed import SINGLE, UNIT, Shard
from lampq_rt.calibrate.spill import Lazy, Spill
from lampq_rt.errors import DataError
from lampq_rt.memory import trim
from lampq_rt.simulate import SimulatedLinear, Simulation
from lampq_rt.sites import Kind, Site

BATCH = UNIT
"""Images that run at once."""

PREFIX_SHARE = 0.25
"""Share of prefix tokens in the weight of all rows of a linear inside a block."""

PREFIX_ROWS = 0.25
"""Share of prefix tokens in the rows drawn there, at most."""

LOGIT_IMAGES = 8
"""Whole images kept for QK^T, at most."""

LOGIT_TOKENS = 2048
"""Tokens of those images together, at most (one image is always kept)."""

Progress = Callable[[int, int], None]
"""Called with what is done and what there is to do in all."""


@dataclass(frozen=True)
class LinearObservation:
    """Input of a linear site.

    Attributes:
        rows: fp32 [R, K], drawn over images and tokens. K of a patch embedding runs over (channel, row, column) of a
            patch, as its weight does when flattened.
        low: smallest value of all inputs.
        high: largest value of all inputs.
        row_weight: fp32 [R], mean 1, what each row counts in an error; None where all count the same.
        channels: fp32 [2, K], smallest and largest value of every channel over all inputs; None: take those of `rows`.
    """

    rows: Tensor
    low: float
    high: float
    row_weight: Tensor | None = None
    channels: Tensor | None = None

    @property
    def peaks(self) -> Tensor:
        """fp32 [2, K]: smallest and largest value of every channel."""
        return torch.stack(self.rows.aminmax(dim=0)) if self.channels is None else self.channels


@dataclass(frozen=True)
class QKObservation:
    """Operands of QK^T.

    Attributes:
        q: fp32 [I, H, T, d], whole images.
        k: fp32 [I, H, T, d], of the same images.
        q_max: fp32 [H], largest absolute value over all images.
        k_max: fp32 [H], likewise.
    """

    q: Tensor
    k: Tensor
    q_max: Tensor
    k_max: Tensor


@dataclass(frozen=True)
class PVObservation:
    """The right operand of PV; the left one's format fixes its step.

    Attributes:
        v: fp32 [H, R, d], rows drawn uniformly over images and tokens.
        v_max: fp32 [H], largest absolute value over all images.
    """

    v: Tensor
    v_max: Tensor


Observation = LinearObservation | QKObservation | PVObservation


@torch.no_grad()
def observe(
    simulation: Simulation,
    images: Tensor,
    *,
    seed: int,
    rows: int = 1024,
    progress: Progress | None = None,
    shard: Shard = SINGLE,
) -> Mapping[str, Observation]:
    """Run the calibration images through the model in floating point and keep what a search of steps needs.

    Args:
        simulation: of the model; every site is returned to floating point and stays so.
        images: fp32 [n, C, H, W], normalised as for the model, on any device; this process's share of them.
        seed: of the sampling.
        rows: rows kept per site.
        progress: called with the number of images done and n after each batch.
        shard: the processes that have the other images.

    Returns:
        An observation per site name, on the simulation's device, read from disk each time.

    Raises:
        DataError: no images, or a NaN or infinity; the message names the site where it first appears.
    """
    if images.ndim != 4 or not len(images):
        shape = tuple(images.shape)
        raise DataError(f"calibration images have shape {shape}; expected [n, channels, height, width], n >= 1")
    simulation.reset()
    device = next(simulation.parameters()).device
    counts = shard.objects(len(images))
    part = _Part(sum(counts), sum(counts[: shard.rank]), rows, seed, Spill())
    watchers = {s.name: _watcher(s, simulation, part) for s in simulation.description.sites}

    def run() -> None:
        hooks = [simulation.module(name).register_forward_pre_hook(_hook(w)) for name, w in watchers.items()]
        try:
            for start in range(0, len(images), BATCH):
                logits = simulation(images[start : start + BATCH].to(device))
                if not bool(logits.isfinite().all()):
                    number = part.first + start
                    raise DataError(f"the model's output is not finite for calibration images from number {number} on")
                if progress is not None:
                    progress(min(start + BATCH, len(images)), len(images))
        finally:
            for hook in hooks:
                hook.remove()
        for watcher in watchers.values():
            watcher.check()

    shard.together(run)
    if shard.world > 1:
        for watcher in watchers.values():
            watcher.gather(shard)
    return Lazy(list(watchers), lambda name: watchers[name].result())


def patches(images: Tensor, conv: nn.Conv2d) -> Tensor:
    """[B, C, H, W] as rows [B, L, K]: what a convolution of disjoint patches multiplies with its flattened weight."""
    height, width = conv.kernel_size
    return F.unfold(images, (height, width), stride=(height, width)).transpose(1, 2)


@dataclass(frozen=True)
class _Part:
    """What all watchers share: the number of images, that of this process's first, rows to keep, seed, the disk."""

    images: int
    first: int
    wanted: int
    seed: int
    spill: Spill


class _Sampler:
    """Draws `wanted` of the rows of n images, uniformly and without replacement, whatever the size of the batches.

    The draw is made when the first batch shows how many rows an image has. Where the first `prefix` rows of an image
    are prefix tokens, they and the others are drawn apart.
    """

    def __init__(self, site: str, part: _Part, prefix: int = 0) -> None:
        self.site, self.part, self.prefix = site, part, prefix
        self.chosen: Tensor | None = None
        self.weight: Tensor | None = None
        self.start = 0

    def take(self, x: Tensor) -> None:
        """Keep the drawn rows of the next batch, [B, T, ...]."""
        per_image = x.shape[1]
        if self.chosen is None:
            self._draw(per_image)
            assert self.chosen is not None
            self.start = self.part.first * per_image
        stop = self.start + x.shape[0] * per_image
        here = self.chosen[(self.chosen >= self.start) & (self.chosen < stop)] - self.start
        self.part.spill.append(self.site, x.flatten(0, 1)[here.to(x.device)])
        self.start = stop

    def _draw(self, per_image: int) -> None:
        source = torch.Generator().manual_seed(self.part.seed)
        order, wanted = torch.randperm(self.part.images * per_image, generator=source), self.part.wanted
        if not 0 < self.prefix < per_image:
            self.chosen = order[:wanted].sort().values
            return
        special = order % per_image < self.prefix
        first = order[special][: max(1, int(PREFIX_ROWS * wanted))]
        self.chosen = torch.cat((first, order[~special][: max(1, wanted - len(first))])).sort().values
        special = self.chosen % per_image < self.prefix
        shares = torch.where(special, PREFIX_SHARE / special.sum(), (1.0 - PREFIX_SHARE) / (~special).sum())
        self.weight = (shares * len(shares)).float()

    def check(self) -> None:
        """Refuse a site that did not run."""
        if self.chosen is None:
            raise DataError(f"site {self.site!r} did not run: it has no part in the model's forward pass")

    def gather(self, shard: Shard) -> None:
        """Put all processes' rows together."""
        self.part.spill.replace(self.site, shard.gather(self.part.spill.read(self.site)))

    def result(self) -> Tensor:
        """All drawn rows, fp32 [R, ...], in order of images and tokens."""
        return self.part.spill.read(self.site)


class _LinearWatcher:
    """Gathers a `LinearObservation`."""

    def __init__(self, site: str, conv: nn.Conv2d | None, sampler: _Sampler) -> None:
        self.site, self.conv, self.sampler = site, conv, sampler
        self.channels: Tensor | None = None

    def see(self, x: Tensor) -> None:
        """A batch: [B, C, H, W] images of a patch embedding, or [B, ..., K]."""
        x = patches(x, self.conv) if self.conv is not None else x.reshape(x.shape[0], -1, x.shape[-1])
        low, high = x.flatten(0, 1).aminmax(dim=0)
        _check_finite(self.site, "input", float(low.min()), float(high.max()))
        if self.channels is not None:
            low, high = torch.minimum(low, self.channels[0]), torch.maximum(high, self.channels[1])
        self.channels = torch.stack((low, high)).float()
        self.sampler.take(x)

    def check(self) -> None:
        """See `_Sampler.check`."""
        self.sampler.check()

    def gather(self, shard: Shard) -> None:
        """Put all processes' observations together."""
        assert self.channels is not None
        parts = shard.gather(self.channels[None])
        self.channels = torch.stack((parts[:, 0].amin(0), parts[:, 1].amax(0)))
        self.sampler.gather(shard)

    def result(self) -> LinearObservation:
        """What was seen."""
        rows, weight = self.sampler.result(), self.sampler.weight
        assert self.channels is not None
        channels, weight = self.channels.to(rows.device), None if weight is None else weight.to(rows.device)
        return LinearObservation(rows, float(channels[0].min()), float(channels[1].max()), weight, channels)


class _QKWatcher:
    """Gathers a `QKObservation`: images spread evenly over the set."""

    def __init__(self, site: str, part: _Part) -> None:
        self.site, self.part, self.start = site, part, part.first
        self.q_max: Tensor | None = None
        self.k_max: Tensor | None = None

    def see(self, q: Tensor, k: Tensor) -> None:
        """A batch, [B, H, T, d] each."""
        self.q_max = _head_max(self.site, "q", q, self.q_max)
        self.k_max = _head_max(self.site, "k", k, self.k_max)
        images = self.part.images
        keep = min(LOGIT_IMAGES, max(1, LOGIT_TOKENS // q.shape[2]), images)
        chosen = {i * images // keep for i in range(keep)}
        here = [i for i in range(q.shape[0]) if self.start + i in chosen]
        for operand, x in (("q", q), ("k", k)):
            self.part.spill.append(f"{self.site} {operand}", x[here])
        self.start += q.shape[0]

    def check(self) -> None:
        """See `_Sampler.check`."""
        if self.q_max is None:
            raise DataError(f"site {self.site!r} did not run: it has no part in the model's forward pass")

    def gather(self, shard: Shard) -> None:
        """Put all processes' observations together."""
        assert self.q_max is not None and self.k_max is not None
        self.q_max, self.k_max = (shard.gather(x[None]).amax(0) for x in (self.q_max, self.k_max))
        for key in (f"{self.site} q", f"{self.site} k"):
            self.part.spill.replace(key, shard.gather(self.part.spill.read(key)))

    def result(self) -> QKObservation:
        """What was seen."""
        assert self.q_max is not None and self.k_max is not None
        q, k = (self.part.spill.read(f"{self.site} {operand}") for operand in "qk")
        return QKObservation(q, k, self.q_max, self.k_max)


class _PVWatcher:
    """Gathers a `PVObservation`."""

    def __init__(self, site: str, part: _Part) -> None:
        self.site, self.sampler = site, _Sampler(site, part)
        self.v_max: Tensor | None = None

    def see(self, logits: Tensor, v: Tensor) -> None:
        """A batch: logits [B, H, T, T] and v [B, H, T, d]."""
        self.v_max = _head_max(self.site, "v", v, self.v_max)
        self.sampler.take(v.transpose(1, 2))  # [B, T, H, d]

    def check(self) -> None:
        """See `_Sampler.check`."""
        self.sampler.check()

    def gather(self, shard: Shard) -> None:
        """Put all processes' observations together."""
        assert self.v_max is not None
        self.v_max = shard.gather(self.v_max[None]).amax(0)
        self.sampler.gather(shard)

    def result(self) -> PVObservation:
        """What was seen."""
        v = self.sampler.result().transpose(0, 1).contiguous()
        assert self.v_max is not None
        return PVObservation(v, self.v_max)


_Watcher = _LinearWatcher | _QKWatcher | _PVWatcher


def _watcher(site: Site, simulation: Simulation, part: _Part) -> _Watcher:
    module = simulation.module(site.name)
    if site.kind is Kind.QK:
        return _QKWatcher(site.name, part)
    if site.kind is Kind.PV:
        return _PVWatcher(site.name, part)
    assert isinstance(module, SimulatedLinear), site.name
    conv = module.original if isinstance(module.original, nn.Conv2d) else None
    prefix = getattr(simulation.model, "num_prefix_tokens", 0) if site.block is not None else 0
    return _LinearWatcher(site.name, conv, _Sampler(site.name, part, prefix))


def _hook(watcher: _Watcher) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def see(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        watcher.see(*inputs)
        trim()

    return see


def _head_max(site: str, operand: str, x: Tensor, before: Tensor | None) -> Tensor:
    """fp32 [H]: largest absolute value per head of [B, H, T, d] and of the batches before."""
    top = x.abs().amax((0, 2, 3)).float()
    _check_finite(site, operand, float(top.min()), float(top.max()))
    return top if before is None else torch.maximum(top, before)


def _check_finite(site: str, operand: str, low: float, high: float) -> None:
    """`low` and `high` are of a reduction that keeps NaN."""
    if not (low > float("-inf") and high < float("inf")):
        raise DataError(f"site {site!r}: its {operand} is not finite on the calibration images (NaN or infinity)")
