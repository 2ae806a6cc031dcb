"""Least error of the layer's output, not of the operand: what a channel is worth is what the weight makes of it.

For a linear with input rows X and the weight already quantised at the site's width, the error of a candidate is

    sum_r  worth_r || (X_hat - X)_r W_hat^T ||^2  =  sum of diag(worth) (E G) * E,   E = X_hat - X,   G = W_hat^T W_hat,

taken through G or through W_hat, whichever is smaller. Candidates shrink the observed range [low, high]: both ends
together and each alone, by factors on a geometric grid. All pairs of a coarse grid are compared by a histogram of X
in which every value is weighted with its row's worth and its channel's entry of diag(G), which costs the same
whatever the size of X; the best few, and the unshrunk range, are then compared by their exact error, and the best
of those walks over the fine grid until no neighbour is better.

A row counts at most as much as the median row would with the same relative error: worth_r = min(1, median / ||X_r
W^T||^2), times the observation's own weight of the row. LayerNorm takes out a row's magnitude before anything else
reads it, and a plain sum is owned by the few rows of massive activations that ViTs have: on ViT-Tiny one token in
eighty drives the step of one fc2 so far up that all others lose a fifth of their output at 8 bits (KL divergence
0.12; 0.05 with this worth).

For QK^T the output is the logits, up to a constant per row that softmax does not see; q is judged with k in
floating point, and k with q. The output of PV weighs rows of v by attention that varies from image to image, so v
is judged by its own squared error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lampq_rt.calibrate import parts
from lampq_rt.calibrate.observe import LinearObservation, PVObservation, QKObservation
from lampq_rt.calibrate.search.base import (
    SEARCHES,
    LinearSolver,
    PVSolver,
    QKSolver,
    Steps,
    affine_steps,
    range_steps,
    symmetric_scale,
)
from lampq_rt.formats import Format
from lampq_rt.kernels import reference
from lampq_rt.quantizers import QUANTIZERS

LOWEST = 0.05
"""Smallest factor that an end of the range is shrunk by."""

FINE = 96
"""Factors of the fine grid: factor i is LOWEST^(i / FINE), so factor 0 is 1."""

COARSE = 4
"""The coarse grid takes every so many factors of the fine one."""

FINALISTS = 4
"""Coarse candidates that get an exact error."""

STRIDES = (8, 2)
"""Lengths of the walk's steps, in cells of the fine grid."""

BINS = 8192
"""Bins of the histogram; empty ones cost nothing later."""

BLOCK = 1 << 15
"""Elements compared at once: few enough for the cache, and for torch not to wake its other threads."""

HEAD_FACTORS = 48
"""Factors tried per head of a matmul's operand."""

HEAD_ROWS = 512
"""Rows per head on which they are tried, about."""

Cell = tuple[int, int]
"""Indices of the factors of the range's low and high end."""


class OutputError:
    """Least squared error of the site's output over the observed rows."""

    def heads(self, x: Tensor, max_abs: Tensor, fmt: Format, error: Callable[[Tensor], Tensor]) -> Steps:
        """Per head, the step of least `error`.

        Args:
            x: fp32 [..., H, R, d].
            max_abs: fp32 [H].
            fmt: of the operand.
            error: from x_hat - x to fp32 [H].
        """
        factors = LOWEST ** torch.linspace(0.0, 1.0, HEAD_FACTORS, dtype=torch.float64, device=x.device)
        scales = symmetric_scale(max_abs.double() * factors[:, None], fmt.bits)  # [factors, H]
        best = head_errors(x, scales, fmt, error).argmin(0, keepdim=True)  # the widest among equals
        return Steps(scales.gather(0, best).squeeze(0))

    def linear(self, seen: LinearObservation, weight: Tensor) -> LinearSolver:
        """See `RangeSearch.linear`."""
        worth = row_worth(seen, weight)
        values, masses = _histogram(seen.rows, weight.square().sum(0), worth)

        def solve(fmt: Format, weight_hat: Tensor) -> Steps:
            error = _ExactError(seen, worth, fmt, weight_hat)
            for cell in _best_cells(values, masses, error):
                error(cell)
            for stride in STRIDES:
                _walk(error, stride)
            return error.steps(error.best)

        return solve

    def qk(self, seen: QKObservation) -> QKSolver:
        """See `RangeSearch.qk`."""
        centred = seen.k - seen.k.mean(2, keepdim=True)
        gram_k = centred.mT @ centred  # [I, H, d, d]
        gram_q = seen.q.mT @ seen.q
        stride = max(1, round(seen.q.shape[0] * seen.q.shape[2] / HEAD_ROWS))
        q, k = (x[:, :, ::stride].contiguous() for x in (seen.q, seen.k))

        def error_q(e: Tensor) -> Tensor:
            return ((e @ gram_k) * e).sum((0, 2, 3))

        def error_k(e: Tensor) -> Tensor:
            e = e - e.mean(2, keepdim=True)
            return ((e @ gram_q) * e).sum((0, 2, 3))

        def solve(fmt: Format) -> tuple[Steps, Steps]:
            return self.heads(q, seen.q_max, fmt, error_q), self.heads(k, seen.k_max, fmt, error_k)

        return solve

    def pv(self, seen: PVObservation) -> PVSolver:
        """See `RangeSearch.pv`."""
        stride = max(1, round(seen.v.shape[1] / HEAD_ROWS))
        v = seen.v[:, ::stride].contiguous()
        return lambda fmt: self.heads(v, seen.v_max, fmt, lambda e: e.square().sum((1, 2)))


class LayerError:
    """Squared error of a linear's output.

    Args:
        rows: fp32 [R, K], of its input.
        worth: fp32 [R], what each row counts.
        fmt: of the input.
        weight_hat: fp32 [N, K], quantised.
    """

    def __init__(self, rows: Tensor, worth: Tensor, fmt: Format, weight_hat: Tensor) -> None:
        self.rows, self.fmt = rows, fmt
        self.root_worth = worth.sqrt()[:, None]
        self.quantizer = QUANTIZERS.get(fmt.scheme)
        channels, features = weight_hat.shape
        self.gram = weight_hat.t() @ weight_hat if features < channels else None
        self.weight_hat = weight_hat

    def measure(self, steps: Steps) -> float:
        """The error with these steps."""
        scale, zero_point, total = steps.scale.to(self.rows.device), steps.zero_point, 0.0
        zero_point = None if zero_point is None else zero_point.to(scale.device)
        size = parts.rows(self.rows.shape[1])  # quantising makes four arrays of their size
        for rows, root_worth in zip(self.rows.split(size), self.root_worth.split(size), strict=True):
            e = self.quantizer.fake_quantize(rows, scale, zero_point, self.fmt.bits).sub_(rows).mul_(root_worth)
            if self.gram is None:
                total += float((e @ self.weight_hat.t()).square_().sum())
            else:
                total += float((e @ self.gram).mul_(e).sum())
        return total


class _ExactError(LayerError):
    """The error for cells of the fine grid; each is measured once, the best is remembered."""

    def __init__(self, seen: LinearObservation, worth: Tensor, fmt: Format, weight_hat: Tensor) -> None:
        super().__init__(seen.rows, worth, fmt, weight_hat)
        self.seen = seen
        self.known: dict[Cell, float] = {}
        self.best: Cell = (0, 0)
        self(self.best)

    def steps(self, cell: Cell) -> Steps:
        """The steps of a cell; its first index counts only in formats with a zero-point."""
        low, high = (end * LOWEST ** (i / FINE) for end, i in zip((self.seen.low, self.seen.high), cell, strict=True))
        if not self.fmt.symmetric:
            return range_steps(low, high, self.fmt)
        widest = max(-self.seen.low, self.seen.high) * LOWEST ** (cell[1] / FINE)
        return range_steps(-widest, widest, self.fmt)

    def __call__(self, cell: Cell) -> float:
        """The squared error; infinite outside the grid."""
        if min(cell) < 0 or max(cell) > FINE:
            return float("inf")
        if cell not in self.known:
            self.known[cell] = self.measure(self.steps(cell))
            if self.known[cell] < self.known[self.best]:
                self.best = cell
        return self.known[cell]


def row_worth(seen: LinearObservation, weight: Tensor) -> Tensor:
    """fp32 [R]: what the squared error of each row counts; `weight` is fp32 [N, K], not quantised."""
    return energy_worth(row_energy(seen.rows, weight), seen.row_weight)


def row_energy(rows: Tensor, weight: Tensor) -> Tensor:
    """fp32 [R]: squared norm of each row's output."""
    return (rows @ weight.t()).square_().sum(1)


def energy_worth(energy: Tensor, row_weight: Tensor | None) -> Tensor:
    """fp32 [R]: what the squared error of rows of that energy counts, times the rows' own weight."""
    middle = energy.median()
    worth = torch.where((energy > middle) & (middle > 0), middle / energy, torch.ones_like(energy))
    return worth if row_weight is None else worth * row_weight


def _walk(error: _ExactError, stride: int) -> None:
    """Move the best cell to better neighbours at `stride` until there is none."""
    moves = ((0, 1), (0, -1)) if error.fmt.symmetric else ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1))
    here: Cell | None = None
    while here != error.best:
        here = error.best
        for down, up in moves:
            error((here[0] + stride * down, here[1] + stride * up))


def _histogram(rows: Tensor, column_worth: Tensor, row_worth: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted histogram of all values, on the CPU, where sums have one order.

    Args:
        rows: fp32 [R, K].
        column_worth: fp32 [K].
        row_worth: fp32 [R].

    Returns:
        Mean value and mass of each bin that has mass, fp32 [bins] each; one bin of mass 0 where nothing has worth.
    """
    x, column_worth, row_worth = rows.cpu(), column_worth.cpu().double(), row_worth.cpu().double()
    low, high = float(x.min()), float(x.max())
    masses, sums = torch.zeros(2, BINS, dtype=torch.float64)
    size = parts.rows(x.shape[1])
    for part, worth in zip(x.split(size), row_worth.split(size), strict=True):
        mass = torch.outer(worth, column_worth).flatten()
        bins = ((part.double() - low) * (BINS / max(high - low, 1e-300))).flatten().long().clamp_(0, BINS - 1)
        masses += torch.bincount(bins, mass, BINS)
        sums += torch.bincount(bins, mass * part.flatten(), BINS)
    filled = masses > 0
    if not bool(filled.any()):
        return x.new_zeros(1), x.new_zeros(1)
    return (sums[filled] / masses[filled]).float(), (masses[filled] / masses.sum()).float()


def _best_cells(values: Tensor, masses: Tensor, error: _ExactError) -> Iterable[Cell]:
    """The coarse cells of least weighted squared error over the histogram, best first."""
    seen, fmt = error.seen, error.fmt
    index = torch.arange(0, FINE + 1, COARSE)
    factors = LOWEST ** (index.double() / FINE)
    if fmt.symmetric:
        scale = symmetric_scale(max(-seen.low, seen.high) * factors, fmt.bits)
        zero_point = torch.zeros_like(scale)
        cells = torch.stack((index, index), 1)
    else:
        cells = torch.cartesian_prod(index, index)
        ends = torch.cartesian_prod(factors, factors)
        scale, codes = affine_steps(seen.low * ends[:, 0], seen.high * ends[:, 1], fmt.bits)
        zero_point = codes.float()
    bottom, top = reference.code_range(fmt.bits)
    errors = []
    block = max(1, BLOCK // len(values))
    for s, z in zip(scale[:, None].split(block), zero_point[:, None].split(block), strict=True):
        x_hat = reference.round_codes(values, s.reciprocal(), z, bottom, top).sub_(z).mul_(s)
        errors.append(x_hat.sub_(values).square_().mul_(masses).sum(1))
    order = torch.cat(errors).argsort(stable=True)[:FINALISTS]
    return [(int(low), int(high)) for low, high in cells[order]]


def head_errors(x: Tensor, scales: Tensor, fmt: Format, error: Callable[[Tensor], Tensor]) -> Tensor:
    """fp32 [candidates, H]: `error` of symmetric steps [candidates, H]; infinite where it is no number."""
    quantizer = QUANTIZERS.get(fmt.scheme)
    errors = torch.stack([error(quantizer.fake_quantize(x, s[:, None, None], None, fmt.bits).sub_(x)) for s in scales])
    return errors.nan_to_num(nan=float("inf"), posinf=float("inf"))


SEARCHES.register("output-error")(OutputError())
