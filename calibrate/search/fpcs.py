"""Fast progressive combining search (AdaLog, 2407.12951, section 3.3): scale and zero-point, from coarse to fine.

Start with every pair of a few scales, from that of the range between the percentiles 0.1 and 0.9 to that of the whole
range, and a few zero-points; keep the best pairs; look around each of them at half the distance, and so on. A candidate
is judged by the squared error of the layer's output, rows counting what they are worth (`output_error`).

Two things differ from what is published, both for inputs with outliers. Scales lie at equal ratios, not differences: a
range 90 times as long as the middle of the values leaves else no two scales near the best. Zero-points lie about
each range's own, spread over all codes, and are refined with the scale; published are 16 neighbours of the middle code,
which at 8 bits serves symmetric inputs only, and only the scale is refined.

Operands of the attention matmuls have a scale a head and no zero-point here: the same search with one parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lampq_rt.calibrate.observe import LinearObservation
from lampq_rt.calibrate.search.base import SEARCHES, LinearSolver, Steps, positive, range_steps, symmetric_scale
from lampq_rt.calibrate.search.output_error import LayerError, OutputError, head_errors, row_worth
from lampq_rt.calibrate.search.percentile import quantile
from lampq_rt.formats import Format
from lampq_rt.kernels import reference

PERCENTILE = 0.9
"""The narrowest range that is started from has its ends there, and 1 minus it; the widest is whole."""

NARROWEST = 0.01
"""Its length is at least this share of the whole: most of a dead input is 0."""

SCALES, ZERO_POINTS = 8, 16
"""How many there are: 128 starts."""

KEEP = 16
"""Candidates that are followed."""

STEPS = 5
"""Refinements after the starts; each halves the distances."""

ROWS = 256
"""Rows of a linear's input that candidates are judged on, about; those kept in the end are judged on all."""

HEAD_SCALES, HEAD_KEEP = 32, 4
"""The same for a head's scale alone."""

Candidate = tuple[float, int]
"""Scale and zero-point."""


class FPCS(OutputError):
    """See the module."""

    def linear(self, seen: LinearObservation, weight: Tensor) -> LinearSolver:
        """See `RangeSearch.linear`."""
        worth = row_worth(seen, weight)
        stride = max(1, round(len(worth) / ROWS))
        rows, sampled = seen.rows[::stride].contiguous(), worth[::stride]
        starts = _ranges(seen)

        def solve(fmt: Format, weight_hat: Tensor) -> Steps:
            search = _Search(LayerError(rows, sampled, fmt, weight_hat), [range_steps(*ends, fmt) for ends in starts])
            for number in range(1, STEPS + 1):
                search.refine(number)
            last = search.best(KEEP)
            if stride > 1:
                exact = LayerError(seen.rows, worth, fmt, weight_hat)
                last = [min(last + search.best_starts, key=lambda c: _error(exact, search.steps(c)))]
            return search.steps(last[0])

        return solve

    def heads(self, x: Tensor, max_abs: Tensor, fmt: Format, error: Callable[[Tensor], Tensor]) -> Steps:
        """See `OutputError.heads`."""
        ordered = x.abs().movedim(-3, 0).flatten(1).sort(1).values
        narrow = ordered[:, int(PERCENTILE * (ordered.shape[1] - 1))].clamp(min=NARROWEST * max_abs).double()
        shares = torch.linspace(0.0, 1.0, HEAD_SCALES, dtype=torch.float64, device=x.device)[:, None]
        scales = symmetric_scale(narrow ** (1.0 - shares) * max_abs.double() ** shares, fmt.bits)  # [candidates, H]
        errors = head_errors(x, scales, fmt, error)
        ratio = (scales[-1] / scales[0]).double() ** (1 / (HEAD_SCALES - 1))
        for number in range(1, STEPS + 1):
            kept = errors.argsort(dim=0, stable=True)[:HEAD_KEEP]
            scales, errors = scales.gather(0, kept), errors.gather(0, kept)
            move = (ratio ** (0.5**number)).float()
            near = positive(torch.cat((scales / move, scales * move)))
            scales = torch.cat((scales, near))
            errors = torch.cat((errors, head_errors(x, near, fmt, error)))
        return Steps(scales.gather(0, errors.argmin(0, keepdim=True)).squeeze(0))


def _ranges(seen: LinearObservation) -> list[tuple[float, float]]:
    """Ends of the ranges that are started from, narrowest first, at equal ratios of their lengths."""
    ordered = seen.rows.flatten().sort().values
    low, high = quantile(ordered, 1.0 - PERCENTILE), quantile(ordered, PERCENTILE)
    whole = seen.high - seen.low
    narrow = max(high - low, NARROWEST * whole)
    ends = []
    for number in range(SCALES - 1):
        length = narrow * (whole / narrow) ** (number / (SCALES - 1)) if narrow > 0 else 0.0
        share = (length - narrow) / (whole - narrow) if whole > narrow else 0.0
        ends.append((low + share * (seen.low - low), high + share * (seen.high - high)))
    return [*ends, (seen.low, seen.high)]


class _Search:
    """Candidates of one linear at one width; each is measured once."""

    def __init__(self, error: LayerError, starts: list[Steps]) -> None:
        self.error = error
        self.symmetric = error.fmt.symmetric
        self.codes = reference.code_range(error.fmt.bits)
        self.known: dict[Candidate, float] = {}
        scales = [float(steps.scale) for steps in starts]
        self.ratio = (max(scales) / min(scales)) ** (1 / (len(scales) - 1))
        self.stride = max(1, (1 << error.fmt.bits) // ZERO_POINTS)
        for steps in reversed(starts):  # the widest among equals
            self._see(steps)
        self.best_starts = self.best(KEEP)

    def steps(self, candidate: Candidate) -> Steps:
        """As a plan holds them."""
        scale = torch.tensor(candidate[0], dtype=torch.float32)
        return Steps(scale, None if self.symmetric else torch.tensor(candidate[1], dtype=torch.int32))

    def best(self, count: int) -> list[Candidate]:
        """The best of all so far, best first."""
        return sorted(self.known, key=self.known.__getitem__)[:count]

    def refine(self, number: int) -> None:
        """Measure what lies about the best at 2^-number of the first distances."""
        for scale, zero_point in self.best(KEEP):
            for factor, move in self._moves(number):
                self._measure(scale * factor, zero_point + move)

    def _see(self, steps: Steps) -> None:
        """Measure the range's own zero-point, then those about it."""
        own = 0 if steps.zero_point is None else int(steps.zero_point)
        self._measure(float(steps.scale), own)
        if not self.symmetric:
            for j in range(-ZERO_POINTS // 2, ZERO_POINTS // 2):
                self._measure(float(steps.scale), own + j * self.stride)

    def _moves(self, number: int) -> Iterator[tuple[float, int]]:
        factor, stride = self.ratio ** (0.5**number), max(1, self.stride >> number)
        for move in (0,) if self.symmetric else (-stride, 0, stride):
            for scale_factor in (1.0 / factor, 1.0, factor):
                yield scale_factor, move

    def _measure(self, scale: float, zero_point: int) -> None:
        candidate = float(positive(torch.tensor(scale))), min(max(zero_point, self.codes[0]), self.codes[1])
        if candidate not in self.known:
            self.known[candidate] = _error(self.error, self.steps(candidate))


def _error(layer: LayerError, steps: Steps) -> float:
    """Infinite where it is no number."""
    error = layer.measure(steps)
    return float("inf") if math.isnan(error) else error


SEARCHES.register("fpcs")(FPCS())
