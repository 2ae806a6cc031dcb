"""What the calibrator measures of one model, each part once: the store that several plans are made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn

from lampq_rt import backends
from lampq_rt.calibrate.checks import check_images, check_labels
from lampq_rt.calibrate.distributed import SINGLE, UNIT, Shard
from lampq_rt.calibrate.judge import Judge, answer, views
from lampq_rt.calibrate.metrics import fisher
from lampq_rt.calibrate.metrics.base import Table
from lampq_rt.calibrate.metrics.fisher import Fisher
from lampq_rt.calibrate.observe import Observation, observe
from lampq_rt.calibrate.prefix import prefix_shares
from lampq_rt.calibrate.progress import Report
from lampq_rt.calibrate.recipes import PLAIN, Preparation
from lampq_rt.calibrate.spill import Lazy, Shelf
from lampq_rt.calibrate.steps import searched
from lampq_rt.errors import DataError
from lampq_rt.formats import FLOAT_BITS, INTEGER_BITS, LEVEL_BITS, TABLE_BITS
from lampq_rt.memory import drop_pages, drop_pages_behind, trim
from lampq_rt.plan import SiteParams
from lampq_rt.simulate import SimulatedLinear, Simulation
from lampq_rt.sites import BLOCK_LINEARS, Kind, Site

HALF_RANGE = 65504.0 / 4
"""Largest absolute value of the residual stream that fp16 is trusted with: a quarter of its range."""

CHANNEL_BITS = 8
"""Width of an fc2's input that may have a step a channel; narrower ones gain nothing (docs/calibration.md)."""


class Measurements:
    """One model, its calibration images, and what has been measured of both so far.

    Args:
        model: the floating-point model; copied, never changed.
        images: fp32 [n, C, H, W], normalised as for the model; this process's share of them.
        labels: int64 [n] of the same images, or None.
        target: what the menu of formats is for (`backends.TARGETS`).
        seed: of everything that is sampled.
        device: where the measuring runs.
        report: told of progress.
        shard: the processes that have the other images.
        preparation: number formats and rounding; its rewrites were applied to `model`.
        teacher: whose answers plans are to keep, where that is not `model` (`prepare.Prepared`).

    Raises:
        ModelError, DataError, BackendError: see `check_images`, `check_labels`, `resolve_device`.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor | None,
        *,
        target: str,
        seed: int,
        device: torch.device,
        report: Report,
        shard: Shard = SINGLE,
        preparation: Preparation = PLAIN,
        teacher: nn.Module | None = None,
    ) -> None:
        self.model = model
        self.simulation = Simulation(model).float().to(device)
        self.description = self.simulation.description
        self.linears = tuple(site for site in self.description.sites if site.kind in BLOCK_LINEARS)
        drop_pages_behind(map(self.simulation.model.get_submodule, self.blocks))
        self.preparation = preparation
        self.menu = {
            site.name: {
                width: _styled(site, width, preparation.activations, preparation)
                for width in map(_width, backends.menu(site, target))
            }
            for site in self.description.sites
        }
        for site in self.description.sites:
            if preparation.weights == "levels" and site.kind in BLOCK_LINEARS:
                self.menu[site.name][1] = _styled(site, 1, INTEGER_BITS[0], preparation)
        self.shard, self.seed, self.report = shard, seed, report
        self.images = shard.together(lambda: check_images(images, self.simulation))
        counts = shard.objects(len(self.images))
        assert not any(count % UNIT for count in counts[:-1]), f"shares of {counts} images: not in whole units"
        self.count = sum(counts)
        logits, self.residual_max = self._run()
        self._teacher = self.simulation
        if teacher is not None and teacher is not model:
            self._teacher = Simulation(teacher).float().to(device)
            drop_pages_behind(map(self._teacher.model.get_submodule, self.blocks))
            logits = answer(self._teacher, self.images, 0, shard)
        self.labels = shard.together(lambda: check_labels(labels, len(images), logits.shape[1]))
        truth = None if self.labels is None else shard.gather(self.labels)
        self.judge = Judge(self.images, logits, truth, self.count, shard)
        self._steps = Shelf()

    @property
    def residual_dtype(self) -> str:
        """What the residual stream may be stored in on a GPU."""
        return "float16" if self.residual_max <= HALF_RANGE else "bfloat16"

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the blocks that have linears among the sites, in order of execution."""
        return tuple(dict.fromkeys(site.name.rsplit(".", 2)[0] for site in self.linears))

    @cached_property
    def plan_judge(self) -> Judge:
        """What plans are compared by: the images and shifted views of them."""
        self.simulation.reset()
        height, width = self.images.shape[-2:]
        others = range(1, views(self.count, (height, width)))
        logits = [answer(self._teacher, self.images, view, self.shard) for view in others]
        return replace(self.judge, logits=torch.cat([self.judge.logits, *logits]))

    @cached_property
    def every_image(self) -> Tensor:
        """fp32 [count, C, H, W]: all processes' images, in their order."""
        return self.shard.gather(self.images)

    @cached_property
    def observations(self) -> Mapping[str, Observation]:
        """Samples and ranges of every site's operands."""
        return observe(
            self.simulation,
            self.images,
            seed=self.seed,
            progress=lambda d, n: self.report("observing activations", d, n),
            shard=self.shard,
        )

    @cached_property
    def fisher(self) -> Mapping[str, Fisher]:
        """Gradient statistics of the blocks' linears."""
        self.simulation.reset()
        names = [site.name for site in self.linears]
        return fisher.score(
            self.simulation.model,
            self.images,
            names,
            blocks=self.blocks,
            labels=self.labels,
            seed=self.seed,
            progress=lambda d, n: self.report("Fisher information", d, n),
            shard=self.shard,
        )

    @cached_property
    def prefix_shares(self) -> Mapping[str, float]:
        """By linear of the blocks, what the prefix tokens have of the squared gradients."""
        self.simulation.reset()
        model = self.simulation.model
        return prefix_shares(
            model,
            self.every_image.to(next(model.parameters()).device),
            [site.name for site in self.linears],
            prefix=getattr(model, "num_prefix_tokens", 0),
            blocks=self.blocks,
            labels=self.judge.labels,
            seed=self.seed,
            progress=lambda d, n: self.report("what the class token counts", d, n),
        )

    @cached_property
    def weights(self) -> Mapping[str, Tensor]:
        """Weights of the blocks' linears, fp32 [N, K]; of a `paged` model, one at a time is in memory."""
        modules = {site.name: self.simulation.module(site.name) for site in self.linears}

        def read(name: str) -> Tensor:
            module = modules[name]
            assert isinstance(module, SimulatedLinear), name
            drop_pages()
            return module.original.weight.detach()

        return Lazy(list(modules), read)

    def widths(self, site: Site, *, weight: bool = False) -> list[int]:
        """Integer widths of `site`'s menu, narrowest first; of its weight alone, 1 bit may be among them."""
        least = 1 if weight else INTEGER_BITS[0]
        return sorted(width for width in self.menu[site.name] if least <= width <= INTEGER_BITS[-1])

    def nearest(self, site: Site, wanted: int) -> int:
        """The narrowest width of the menu that is not narrower than `wanted`; the widest where there is none.

        A matmul has the width that the preparation gives attention, if it does.
        """
        if site.is_matmul and self.preparation.attention is not None:
            wanted = self.preparation.attention
        widths = sorted(self.menu[site.name])
        return min((w for w in widths if w >= wanted), default=widths[-1])

    def formats(self, site: Site, bits: int, input_bits: int | None = None) -> backends.Formats:
        """The site's formats at that width; `input_bits` is the width of a linear's input where it has its own."""
        if input_bits is None or FLOAT_BITS in (bits, input_bits):
            return self.menu[site.name][bits]
        return _styled(site, bits, input_bits, self.preparation)

    def params(self, search: str, wanted: Mapping[str, Sequence[int]]) -> Table:
        """Formats and steps of these sites at these widths, found with the range search of that name."""
        self._find(search, {name: [self.menu[name][width] for width in widths] for name, widths in wanted.items()})

        def row_of(name: str) -> Mapping[int, SiteParams]:
            return Lazy(wanted[name], lambda width: self._steps.get(_key(search, name, self.menu[name][width])))

        return {name: row_of(name) for name in wanted}

    def chosen(self, search: str, wanted: Mapping[str, backends.Formats]) -> dict[str, SiteParams]:
        """Formats and steps of these sites in these formats, found with the range search of that name."""
        self._find(search, {name: [formats] for name, formats in wanted.items()})
        return {name: self._steps.get(_key(search, name, formats)) for name, formats in wanted.items()}

    def _find(self, search: str, wanted: Mapping[str, Sequence[backends.Formats]]) -> None:
        """Search the steps of these sites in these formats, where that has not been done; no width twice a site."""
        missing = {
            name: [formats for formats in choices if _key(search, name, formats) not in self._steps]
            for name, choices in wanted.items()
        }
        missing = {name: choices for name, choices in missing.items() if choices}
        if not missing:
            return
        observations, total = self.observations, len(missing)
        own = list(missing)[self.shard.rank :: self.shard.world]

        def solve() -> tuple[Shelf, list[str]]:
            shelf, keys = Shelf(), list[str]()
            for name, params in searched(
                self.simulation,
                observations,
                {name: missing[name] for name in own},
                search,
                progress=lambda d, n: self.report(f"steps of {total} sites", d * total // n, total),
                rounding=self.preparation.rounding,
                family=self.preparation.family,
            ):
                keys.append(_key(search, name, params.formats))
                shelf.put(keys[-1], params)
            return shelf, keys

        found, keys = self.shard.together(solve)
        for at in range(max(map(len, self.shard.objects(keys)))):  # one at a time: together they outweigh the model
            mine = {key: found.get(key) for key in keys[at : at + 1]}
            for part in self.shard.objects(mine):
                for key, params in part.items():
                    self._steps.put(key, params)

    @torch.no_grad()
    def _run(self) -> tuple[Tensor, float]:
        """Logits [n, classes] of the floating-point model, and the residual stream's largest absolute value."""
        peaks = [torch.zeros((), device=next(self.simulation.parameters()).device)]

        def see(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
            peaks.append(out.abs().max())
            trim()

        hooks = [self.simulation.model.get_submodule(name).register_forward_hook(see) for name in self.blocks]
        logits, done = [], 0
        try:
            for batch in self.images.split(UNIT):
                logits.append(self.simulation(batch.to(peaks[0].device)).flatten(1).float())
                done += len(batch)
                self.report("floating-point answers", done, len(self.images))
        finally:
            for hook in hooks:
                hook.remove()
        found = self.shard.gather(torch.cat(logits))
        peak = max(self.shard.objects(float(torch.stack(peaks).max())))
        if not bool(found.isfinite().all()) or not peak < float("inf"):
            raise DataError(
                "the model's answers to the calibration images are not finite (NaN or infinity in its weights?)"
            )
        return found, peak


def _styled(site: Site, bits: int, input_bits: int | None, preparation: Preparation) -> backends.Formats:
    """Formats of that width with the preparation's schemes and steps; `input_bits` of a linear's input, if given."""
    if bits == FLOAT_BITS:
        return backends.formats(site.kind, bits)
    by_channel = site.kind is Kind.FC2 and (input_bits or bits) == CHANNEL_BITS
    granularity = preparation.fc2_input if by_channel else "tensor"
    scheme = preparation.scheme_of(site.kind) if (input_bits or bits) in TABLE_BITS else "uniform"
    return backends.formats(
        site.kind,
        bits,
        input_bits=input_bits,
        p_scheme=preparation.softmax_at(bits),
        input_granularity=granularity,
        input_scheme=scheme,
        weight_scheme=preparation.weights if bits in LEVEL_BITS else "uniform",
    )


def _width(formats: backends.Formats) -> int:
    return formats["weight"].bits if "weight" in formats else max(f.bits for f in formats.values())


def _key(search: str, name: str, formats: backends.Formats) -> str:
    """Where the steps of a site in these formats are kept."""
    return f"{search} {name} {'-'.join(str(fmt.bits) for fmt in formats.values())}"
