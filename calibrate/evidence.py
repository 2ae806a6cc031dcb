"""What the calibrator measures of one model, each part once: the store that several plans are made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn

from lampq_rt import backends
from lampq_rt.calibrate.distributed import SINGLE, UNIT, Shard
from lampq_rt.calibrate.judge import Judge, answer, views
from lampq_rt.calibrate.metrics import alpha, fisher
from lampq_rt.calibrate.metrics.alpha import TypeDrops
from lampq_rt.calibrate.metrics.base import Table
from lampq_rt.calibrate.metrics.context import straight_through
from lampq_rt.calibrate.metrics.fisher import Fisher
from lampq_rt.calibrate.metrics.fisher_output import output
from lampq_rt.calibrate.observe import LinearObservation, Observation, observe
from lampq_rt.calibrate.progress import Report
from lampq_rt.calibrate.recipes import PLAIN, Preparation
from lampq_rt.calibrate.spill import Lazy, Shelf
from lampq_rt.calibrate.steps import step_table
from lampq_rt.errors import BackendError, DataError
from lampq_rt.formats import FLOAT_BITS, INTEGER_BITS, TABLE_BITS
from lampq_rt.memory import trim
from lampq_rt.plan import SiteParams
from lampq_rt.simulate import SimulatedLinear, Simulation
from lampq_rt.sites import BLOCK_LINEARS, Kind, Site

HALF_RANGE = 65504.0 / 4
"""Largest absolute value of the residual stream that fp16 is trusted with: a quarter of its range."""


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
    ) -> None:
        self.simulation = Simulation(model).float().to(device)
        self.description = self.simulation.description
        self.preparation = preparation
        self.menu = {
            site.name: {_width(formats): _styled(site, formats, preparation) for formats in backends.menu(site, target)}
            for site in self.description.sites
        }
        self.shard, self.seed, self.report = shard, seed, report
        self.images = shard.together(lambda: check_images(images, self.simulation))
        counts = shard.objects(len(self.images))
        assert not any(count % UNIT for count in counts[:-1]), f"shares of {counts} images: not in whole units"
        self.count = sum(counts)
        self.linears = tuple(site for site in self.description.sites if site.kind in BLOCK_LINEARS)
        logits, self.residual_max = self._run()
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
        logits = [answer(self.simulation, self.images, view, self.shard) for view in others]
        return replace(self.judge, logits=torch.cat([self.judge.logits, *logits]))

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
            prefix=getattr(self.simulation.model, "num_prefix_tokens", 0),
            labels=self.labels,
            seed=self.seed,
            progress=lambda d, n: self.report("Fisher information", d, n),
            shard=self.shard,
        )

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Weights of the blocks' linears, fp32 [N, K]."""
        modules = {site.name: self.simulation.module(site.name) for site in self.linears}
        return {name: m.original.weight.detach() for name, m in modules.items() if isinstance(m, SimulatedLinear)}

    def widths(self, site: Site) -> list[int]:
        """Integer widths of `site`'s menu, narrowest first."""
        return sorted(width for width in self.menu[site.name] if width in INTEGER_BITS)

    def nearest(self, site: Site, wanted: int) -> int:
        """The narrowest width of the menu that is not narrower than `wanted`; the widest where there is none.

        A matmul has the width that the preparation gives attention, if it does.
        """
        if site.is_matmul and self.preparation.attention is not None:
            wanted = self.preparation.attention
        widths = sorted(self.menu[site.name])
        return min((w for w in widths if w >= wanted), default=widths[-1])

    def bare(self, site: Site, width: int) -> SiteParams:
        """The site's formats at that width, without steps."""
        return SiteParams(site.kind, dict(self.menu[site.name][width]), {}, site.params)

    def params(self, search: str, wanted: Mapping[str, Sequence[int]]) -> Table:
        """Formats and steps of these sites at these widths, found with the range search of that name."""
        missing = {
            name: [self.menu[name][width] for width in widths if f"{search} {name} {width}" not in self._steps]
            for name, widths in wanted.items()
        }
        missing = {name: formats for name, formats in missing.items() if formats}
        if missing:
            observations, total = self.observations, len(missing)
            own = list(missing)[self.shard.rank :: self.shard.world]

            def solve() -> dict[str, dict[int, SiteParams]]:
                return step_table(
                    self.simulation,
                    observations,
                    {name: missing[name] for name in own},
                    search,
                    progress=lambda d, n: self.report(f"steps of {total} sites", d * total // n, total),
                    rounding=self.preparation.rounding,
                    family=self.preparation.family,
                )

            found = self.shard.together(solve)
            for part in self.shard.objects(found):
                for name, row in part.items():
                    for bits, params in row.items():
                        self._steps.put(f"{search} {name} {bits}", params)

        def row_of(name: str) -> Mapping[int, SiteParams]:
            return Lazy(wanted[name], lambda width: self._steps.get(f"{search} {name} {width}"))

        return {name: row_of(name) for name in wanted}

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


class SearchEvidence:
    """`metrics.Evidence` of one model with one range search, and one nominal width of all sites."""

    def __init__(self, measurements: Measurements, search: str, nominal: int) -> None:
        self.measurements, self.search, self.nominal = measurements, search, nominal

    @property
    def sites(self) -> tuple[Site, ...]:
        """See `Evidence.sites`."""
        return self.measurements.linears

    @cached_property
    def table(self) -> Table:
        """See `Evidence.table`."""
        return self.measurements.params(self.search, {s.name: self.measurements.widths(s) for s in self.sites})

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """See `Evidence.weights`."""
        return self.measurements.weights

    @property
    def fisher(self) -> Mapping[str, Fisher]:
        """See `Evidence.fisher`."""
        return self.measurements.fisher

    @cached_property
    def context(self) -> Mapping[str, Fisher]:
        """See `Evidence.context`. Labels are drawn from the quantised model: there, Fisher's matrix is that of KL."""
        m = self.measurements
        widths = {site.name: m.nearest(site, self.nominal) for site in m.description.sites}
        params = m.params(self.search, {name: [width] for name, width in widths.items()})
        m.simulation.set({name: params[name][width] for name, width in widths.items()})
        trim()
        try:
            with straight_through(m.simulation):
                return fisher.score(
                    m.simulation.model,
                    m.images,
                    [site.name for site in self.sites],
                    blocks=m.blocks,
                    seed=m.seed,
                    progress=lambda d, n: m.report(f"Fisher information at {self.nominal} bits", d, n),
                    shard=m.shard,
                )
        finally:
            m.simulation.reset()

    @cached_property
    def drops(self) -> TypeDrops:
        """See `Evidence.drops`."""
        m = self.measurements
        return alpha.measure(
            m.simulation,
            self.sites,
            self.table,
            m.judge,
            seed=m.seed,
            progress=lambda d, n: m.report("accuracy by layer type", d, n),
        )

    @cached_property
    def errors(self) -> dict[str, dict[int, float]]:
        """||W_hat x_hat - W x||^2 / ||W x||^2 of each linear by width, x in floating point."""
        found: dict[str, dict[int, float]] = {}
        for site in self.sites:
            seen, weight = self.measurements.observations[site.name], self.weights[site.name]
            assert isinstance(seen, LinearObservation)
            exact = seen.rows @ weight.t()
            size = max(float(exact.square().sum()), 1e-300)
            found[site.name] = {
                bits: float((output(seen.rows, weight, params) - exact).square().sum()) / size
                for bits, params in self.table[site.name].items()
            }
        return found


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Where to measure; None is the CPU.

    Raises:
        BackendError: the device does not exist here.
    """
    try:
        chosen = torch.device("cpu" if device is None else device)
    except RuntimeError:
        raise BackendError(f"unknown device {device!r}; allowed: cpu, cuda") from None
    if chosen.type not in ("cpu", "cuda"):
        raise BackendError(f"calibration does not run on device {str(device)!r}; allowed: cpu, cuda")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise BackendError("device 'cuda' was asked for, but PyTorch finds no CUDA GPU on this machine; allowed: cpu")
    return chosen


@torch.no_grad()
def check_images(images: Tensor, simulation: Simulation) -> Tensor:
    """`images` as fp32, if the model takes them.

    Raises:
        DataError: not a tensor of floating point [n >= 1, C, H, W], not finite, or of a size that the model refuses.
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or not len(images) or not images.is_floating_point():
        came = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise DataError(
            f"calibration images are {came}; expected a floating-point tensor [n, channels, height, width], n >= 1"
        )
    finite = images.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        raise DataError(f"calibration image number {int((~finite).nonzero()[0])} is not finite (NaN or infinity)")
    images = (images.clone() if images.is_inference() else images.detach()).float()
    try:
        simulation(images[:1].to(next(simulation.parameters()).device))
    except (AssertionError, RuntimeError, ValueError) as error:  # what torch and timm raise for a wrong shape
        reason = str(error).strip().split("\n")[0]
        shape, name = tuple(images.shape[1:]), simulation.description.architecture
        raise DataError(f"{name} does not take images of shape {shape} [channels, height, width]: {reason}") from error
    return images


def check_labels(labels: Tensor | None, count: int, classes: int) -> Tensor | None:
    """`labels` as int64 on the CPU, or None.

    Raises:
        DataError: not one whole number from 0 to classes - 1 for each image.
    """
    if labels is None:
        return None
    labels = torch.as_tensor(labels).cpu()
    if labels.shape != (count,) or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DataError(
            f"labels are {labels.dtype} {tuple(labels.shape)}; expected {count} whole numbers, one for each image"
        )
    labels = labels.long()
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise DataError(
            f"labels lie in {int(labels.min())}..{int(labels.max())}; this model has classes 0..{classes - 1}"
        )
    return labels


def _styled(site: Site, formats: backends.Formats, preparation: Preparation) -> backends.Formats:
    """`formats` with the preparation's scheme of softmax output and steps of fc2's input."""
    width = _width(formats)
    if width == FLOAT_BITS:
        return formats
    granularity = preparation.fc2_input if site.kind is Kind.FC2 else "tensor"
    input_bits = preparation.activations
    scheme = preparation.scheme_of(site.kind) if (input_bits or width) in TABLE_BITS else "uniform"
    return backends.formats(
        site.kind,
        width,
        input_bits=input_bits,
        p_scheme=preparation.softmax_at(width),
        input_granularity=granularity,
        input_scheme=scheme,
        weight_scheme=preparation.weights if width in TABLE_BITS else "uniform",
    )


def _width(formats: backends.Formats) -> int:
    return formats["weight"].bits if "weight" in formats else max(f.bits for f in formats.values())
