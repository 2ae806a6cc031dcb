"""Steps, tables and codes of one linear: the input's range, its channels' spread, its levels, the weight's rounding.

With a step a channel the search sees x / spread and a weight whose columns are multiplied by spread: there one step
serves all channels. Evening out the channels' ranges (spread = range^exponent) saves the small channels from an
outlier's step, but moves error from the input into the weight, whose columns it spreads. Which exponent is best
differs from layer to layer and width to width, so each is tried, and the least error of the layer's output decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lampq_rt import channels
from lampq_rt.calibrate import parts
from lampq_rt.calibrate.observe import LinearObservation
from lampq_rt.calibrate.rounding import gptq, weighted_moment
from lampq_rt.calibrate.search import RangeSearch, Steps, weight_steps
from lampq_rt.calibrate.search.base import LinearSolver
from lampq_rt.calibrate.search.families import FAMILIES
from lampq_rt.calibrate.search.output_error import row_worth
from lampq_rt.calibrate.search.table import CODES, code_histogram
from lampq_rt.formats import Format
from lampq_rt.inputs import quantized_input
from lampq_rt.plan import SiteParams
from lampq_rt.quantizers import QUANTIZERS
from lampq_rt.quantizers.table import GRID_BITS
from lampq_rt.sites import Site
from lampq_rt.weights import nearest_weight, quantized_weight

EXPONENTS = (0.0, 0.25, 0.5)
"""Of a channel's largest magnitude in its spread. Steeper ones leave less error on the images that are seen, and less
room for what others bring (docs/calibration.md)."""

ENOUGH = 0.5
"""A spread must bring the error below this share of the error without: the rows it is measured on are a sample, and the
rare rows of massive activations, which no sample holds, pay for it (DeiT-Tiny at 8 bits: KL 0.022 instead of 0.005)."""

SMALLEST = 1e-2
"""A channel's spread is at least this share of the largest: constant channels must do no harm."""


@dataclass(frozen=True)
class _View:
    """The linear with its input's channels divided by `spread` (None: as they are)."""

    spread: Tensor | None
    seen: LinearObservation
    weight: Tensor
    solve: LinearSolver


class LinearSteps:
    """Prepared once for all widths of a site.

    Args:
        search: of the input's range.
        seen: the input.
        weight: fp32 [N, K].
        by_channel: True for a step a channel of the input.
        rounding: "nearest" or "gptq".
        family: of levels, where the input has a table.
    """

    def __init__(
        self,
        search: RangeSearch,
        seen: LinearObservation,
        weight: Tensor,
        by_channel: bool,
        rounding: str,
        family: str = "optimal",
    ) -> None:
        self.search, self.seen, self.weight, self.rounding = search, seen, weight, rounding
        self.levels = FAMILIES.get(family)
        self.worth = row_worth(seen, weight)
        self.exponents: tuple[float | None, ...] = EXPONENTS if by_channel else (None,)
        self.views: dict[float | None, _View] = {}

    def __call__(self, site: Site, formats: Mapping[str, Format]) -> dict[str, Tensor]:
        """Tensors of the site in these formats, as `SiteParams` names them, on the CPU."""
        found = [self._tensors(self._view(exponent), formats) for exponent in self.exponents]
        if len(found) > 1:
            errors = [self._error(SiteParams(site.kind, formats, tensors)) for tensors in found]
            best = min(range(len(found)), key=errors.__getitem__)
            found = [found[best if errors[best] < ENOUGH * errors[0] else 0]]
        tensors = found[0]
        if self.rounding == "gptq":
            tensors = {**tensors, "weight.codes": self._codes(SiteParams(site.kind, formats, tensors))}
        return {key: tensor.cpu() for key, tensor in tensors.items()}

    def _codes(self, params: SiteParams) -> Tensor:
        """int8 [N, K], rounded by GPTQ."""
        moment = weighted_moment(channels.scaled_input(quantized_input(self.seen.rows, params), params), self.worth)
        weight, scale = channels.scaled_weight(self.weight, params), params.tensors["weight.scale"].to(moment.device)
        return gptq(weight, scale, moment, params.formats["weight"].bits, params.tensors.get("weight.levels"))

    def _view(self, exponent: float | None) -> _View:
        """The linear with its input's channels evened out with that exponent; None: with one step for all."""
        if exponent in self.views:
            return self.views[exponent]
        if exponent:  # made anew for each width: its rows are as many as those that were observed
            return _evened(self.search, self.seen, self.weight, exponent)
        spread = None if exponent is None else torch.ones_like(self.seen.peaks[0])
        self.views[exponent] = _View(spread, self.seen, self.weight, self.search.linear(self.seen, self.weight))
        return self.views[exponent]

    def _tensors(self, view: _View, formats: Mapping[str, Format]) -> dict[str, Tensor]:
        tensors, wanted = weight_steps(view.weight, formats["weight"]), formats["input"]
        weight_hat = nearest_weight(view.weight, formats["weight"], tensors)
        grid = replace(wanted, granularity="tensor", scheme="uniform", bits=wanted.code_bits)
        steps = view.solve(grid, weight_hat)
        if wanted.scheme == "table":
            tensors["input.table"] = self._table(view, steps, weight_hat, wanted.bits)
        zero_point = torch.zeros((), dtype=torch.int32) if steps.zero_point is None else steps.zero_point
        if view.spread is None:
            tensors["input.scale"] = steps.scale
            if steps.zero_point is not None:
                tensors["input.zero_point"] = zero_point
        else:
            tensors["weight.scale"] = tensors["weight.scale"] * steps.scale
            tensors["input.scale"] = steps.scale * view.spread
            tensors["input.zero_point"] = zero_point.float().expand(len(view.spread)).clone()
        return tensors

    def _table(self, view: _View, steps: Steps, weight_hat: Tensor, bits: int) -> Tensor:
        histogram, columns = torch.zeros(CODES, dtype=torch.float64), weight_hat.square().sum(0)
        for rows, worth in self._parts(view.seen):
            codes = QUANTIZERS.get("uniform").quantize(rows, steps.scale, steps.zero_point, GRID_BITS)
            histogram += code_histogram(codes, worth, columns)
        return self.levels(histogram, 0 if steps.zero_point is None else int(steps.zero_point), bits)

    def _error(self, params: SiteParams) -> float:
        """Squared error of the layer's output, rows counting what they are worth."""
        weight_hat, total = quantized_weight(self.weight, params), 0.0
        for rows, worth in self._parts(self.seen):
            error = quantized_input(rows, params) @ weight_hat.t() - rows @ self.weight.t()
            total += float((error.square_().sum(1) * worth).sum())
        return total

    def _parts(self, seen: LinearObservation) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows and what they count, some at a time: quantising makes four arrays of their size."""
        size = parts.rows(seen.rows.shape[1])
        return zip(seen.rows.split(size), self.worth.split(size), strict=True)


def _evened(search: RangeSearch, seen: LinearObservation, weight: Tensor, exponent: float) -> _View:
    peaks = seen.peaks
    spread = peaks.abs().amax(0) ** exponent
    spread = spread.clamp_min(SMALLEST * float(spread.max()) + 1e-30)
    rows = seen.rows / spread
    ends = peaks / spread
    evened = LinearObservation(rows, float(ends[0].min()), float(ends[1].max()), seen.row_weight, ends)
    return _View(spread, evened, weight * spread, search.linear(evened, weight * spread))
