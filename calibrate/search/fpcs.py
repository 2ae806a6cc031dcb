"""Fast progressive combining search (AdaLog, 2407.12951, section 3.3): scale and zero-point, from coarse to fine.

Start with every pair of a few scales, those of the ranges between the percentiles 1 - p and p for p = 0.9 ... 1, and a
few zero-points; keep the best pairs; look around each of them at half the distance, and so on. Unlike the ends of a
range that shrinks ("output-error"), scale and zero-point are free of the observed range, and several valleys are
followed at once. A candidate is judged by the squared error of the layer's output, rows counting what they are worth
(`output_error`). The published zero-points are 16 neighbours of the middle, which at 8 bits serves symmetric inputs
only: here they lie about each range's own, spread over all codes, and are refined with the scale.

Operands of the attention matmuls have a scale a head and no zero-point here: the same search with one parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lampq_rt.calibrate.observe import LinearObservation
from lampq_rt.calibrate.search.base import SEARCHES, LinearSolver, Steps, positive, range_steps, symmetric_scale
from lampq_rt.calibrate.search.output_error import LayerError, OutputError, head_errors, row_worth
from lampq_rt.calibrate.search.percentile import quantile
from lampq_rt.formats import Format
from lampq_rt.kernels import reference

PERCENTILES = (0.9, 1.0)
"""First and last p of the scales that are started from."""

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
        ordered = seen.rows.flatten().sort().values
        shares = torch.linspace(*PERCENTILES, SCALES, dtype=torch.float64).tolist()
        ranges = [(quantile(ordered, 1.0 - p), quantile(ordered, p)) for p in shares[:-1]]
        ranges.append((seen.low, seen.high))

        def solve(fmt: Format, weight_hat: Tensor) -> Steps:
            search = _Search(LayerError(rows, sampled, fmt, weight_hat), [range_steps(*ends, fmt) for ends in ranges])
            for number in range(1, STEPS + 1):
                search.refine(number)
            last = search.best(KEEP)
            if stride > 1:
                exact = LayerError(seen.rows, worth, fmt, weight_hat)
                last = sorted(last + search.best_starts, key=lambda c: exact.measure(search.steps(c)))
            return search.steps(last[0])

        return solve

    def heads(self, x: Tensor, max_abs: Tensor, fmt: Format, error: Callable[[Tensor], Tensor]) -> Steps:
        """See `OutputError.heads`."""
        ordered = x.abs().movedim(-3, 0).flatten(1).sort(1).values
        shares = torch.linspace(*PERCENTILES, HEAD_SCALES, dtype=torch.float64)
        places = (shares * (ordered.shape[1] - 1)).long().to(x.device)
        tops = torch.cat((ordered[:, places[:-1]].t(), max_abs[None]))
        scales = symmetric_scale(tops.double(), fmt.bits)  # [candidates, H]
        errors = head_errors(x, scales, fmt, error)
        spacing = (scales[-1] - scales[0]) / (HEAD_SCALES - 1)
        for number in range(1, STEPS + 1):
            kept = errors.argsort(dim=0, stable=True)[:HEAD_KEEP]
            scales, errors = scales.gather(0, kept), errors.gather(0, kept)
            near = positive(torch.cat((scales - spacing / 2**number, scales + spacing / 2**number)))
            scales = torch.cat((scales, near))
            errors = torch.cat((errors, head_errors(x, near, fmt, error)))
        return Steps(scales.gather(0, errors.argmin(0, keepdim=True)).squeeze(0))


class _Search:
    """Candidates of one linear at one width; each is measured once."""

    def __init__(self, error: LayerError, starts: list[Steps]) -> None:
        self.error = error
        self.symmetric = error.fmt.symmetric
        self.codes = reference.code_range(error.fmt.bits)
        self.known: dict[Candidate, float] = {}
        scales = [float(steps.scale) for steps in starts]
        self.spacing = (max(scales) - min(scales)) / max(1, len(scales) - 1)
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
            for scale_move, move in self._moves(number):
                self._measure(scale + scale_move, zero_point + move)

    def _see(self, steps: Steps) -> None:
        """Measure the range's own zero-point, then those about it."""
        own = 0 if steps.zero_point is None else int(steps.zero_point)
        self._measure(float(steps.scale), own)
        if not self.symmetric:
            for j in range(-ZERO_POINTS // 2, ZERO_POINTS // 2):
                self._measure(float(steps.scale), own + j * self.stride)

    def _moves(self, number: int) -> Iterator[tuple[float, int]]:
        distance, stride = self.spacing / 2**number, max(1, self.stride >> number)
        for move in (0,) if self.symmetric else (-stride, 0, stride):
            for scale_move in (-distance, 0.0, distance):
                yield scale_move, move

    def _measure(self, scale: float, zero_point: int) -> None:
        candidate = float(positive(torch.tensor(scale))), min(max(zero_point, self.codes[0]), self.codes[1])
        if candidate not in self.known:
            error = self.error.measure(self.steps(candidate))
            self.known[candidate] = error if error == error else float("inf")


SEARCHES.register("fpcs")(FPCS())
