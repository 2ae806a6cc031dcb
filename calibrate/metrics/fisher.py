"""The trace of the Fisher information of each linear's weight, from exact per-sample gradients that are never formed.

LampQ (AAAI-26, section 4.2): tr(F_i) = E_n || d log p(y_n | x_n) / d W_i ||_F^2. One sample's gradient of a linear's
weight is D^T X, with its inputs X [T, K] and output gradients D [T, N] over the tokens, so that its squared norm is

    || D^T X ||_F^2 = sum( (X X^T) o (D D^T) ),

two [T, T] Gram matrices in place of one [N, K] matrix; whichever costs less is taken. (The squared norm of a batch's
mean gradient is another quantity.) Images run one at a time: the graph of one is the largest thing in memory here,
and a layer's gradient is used up as soon as autograd has it. Only gradients of the linears' outputs are asked for,
none of weights.

The same pass keeps, per linear, rows of the input with the squared output gradients of those rows: what a penalty
needs that weighs the error of the layer's output. Rows are drawn in proportion to their share of the gradient (in a
ViT's last block it falls on the class token alone) and carry the inverse of their probability as a weight, so that
sums over them are unbiased. Labels and rows are drawn by the seed and the image's number, so that processes which
have some of the images each draw what one process would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lampq_rt.calibrate.distributed import SINGLE, UNIT, Shard, generator
from lampq_rt.calibrate.spill import Lazy, Spill
from lampq_rt.errors import DataError

UNIFORM_SHARE = 0.1
"""Share of the row sampling that is uniform over tokens, so that no row's weight is boundless."""

Progress = Callable[[int, int], None]
"""Called with what is done and what there is to do in all."""


@dataclass(frozen=True)
class Fisher:
    """What the gradients say of one linear.

    Attributes:
        trace: tr(F) of its weight, in nats^2 per unit of weight squared; mean over images and draws of labels.
        output: fp32 [N], squared gradient of each output channel, summed over tokens, mean over images and draws.
        rows: fp32 [R, K], inputs of drawn rows.
        weights: fp32 [R, N], squared output gradients of the same rows (mean over draws), so scaled that for any
            function e of the rows, sum(weights * e(rows)) estimates the mean over images of the sum over tokens of
            gradient^2 * e.
    """

    trace: float
    output: Tensor
    rows: Tensor
    weights: Tensor


def score(
    model: nn.Module,
    images: Tensor,
    sites: Sequence[str],
    *,
    labels: Tensor | None = None,
    draws: int = 4,
    rows: int = 1024,
    seed: int = 0,
    progress: Progress | None = None,
    shard: Shard = SINGLE,
) -> Mapping[str, Fisher]:
    """Fisher traces and weighted rows of the linears called `sites`.

    Args:
        model: in eval mode and floating point; images in, logits [B, classes] out. It is left as it was.
        images: fp32 [n, C, H, W] on any device; this process's share of them.
        sites: names of submodules that are called once in a forward pass with [B, ..., K] and return [B, ..., N].
        labels: int64 [n]; None draws them from the model's own answers (then it is the Fisher matrix itself; given
            labels make it the "empirical" one).
        draws: labels drawn per image, each at the price of a backward pass; labels that are given count once.
        rows: rows kept per linear, spread evenly over the images of all processes.
        seed: of the labels and rows.
        progress: called with the number of images done and n after each image.
        shard: the processes that have the other images.

    Returns:
        By name, on the model's device; rows and weights are read from disk each time.

    Raises:
        DataError: logits or gradients that are not finite.
    """
    device = next(model.parameters()).device
    counts = shard.objects(len(images))
    first, spill = sum(counts[: shard.rank]), Spill()
    gathered = {name: _Gathered(name, sum(counts), rows, seed, spill) for name in sites}

    def run() -> None:
        with _listening(model, gathered):
            for number, image in enumerate(images):
                chosen = None if labels is None else labels[number : number + 1, None].to(device)
                _one(model, image[None].to(device), first + number, chosen, draws, seed, gathered)
                if progress is not None:
                    progress(number + 1, len(images))

    shard.together(run)
    sums = {name: g.finish(shard) for name, g in gathered.items()}

    def result(name: str) -> Fisher:
        trace, output = sums[name]
        return Fisher(trace, output.to(device), spill.read(f"{name} rows"), spill.read(f"{name} weights"))

    return Lazy(list(sites), result)


def squared_norms(x: Tensor, d: Tensor) -> Tensor:
    """|| D^T X ||_F^2 of each sample.

    Args:
        x: [B, T, K].
        d: [B, T, N].

    Returns:
        fp64 [B].
    """
    tokens, k, n = x.shape[1], x.shape[2], d.shape[2]
    if tokens * (k + n) < k * n:
        product = (x @ x.transpose(1, 2)).double() * (d @ d.transpose(1, 2))
        return product.sum((1, 2))
    return (d.transpose(1, 2) @ x).square().sum((1, 2), dtype=torch.float64)


def sample_labels(logits: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Labels drawn from softmax(logits) [B, classes]: int64 [draws, B], the same on every device."""
    probabilities = logits.detach().double().cpu().softmax(-1)
    return torch.multinomial(probabilities, draws, replacement=True, generator=generator).t().to(logits.device)


@contextmanager
def _listening(model: nn.Module, gathered: Mapping[str, _Gathered]) -> Iterator[None]:
    """While this is entered, each linear hands its input, and autograd its output's gradient, to what gathers them."""

    def hook(one: _Gathered) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def see(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            one.input = inputs[0].detach()
            if output.requires_grad:
                output.register_hook(one.take)

        return see

    hooks = [model.get_submodule(name).register_forward_hook(hook(one)) for name, one in gathered.items()]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _one(
    model: nn.Module,
    image: Tensor,
    number: int,
    labels: Tensor | None,
    draws: int,
    seed: int,
    gathered: Mapping[str, _Gathered],
) -> None:
    """One image [1, C, H, W], the calibration set's `number`th: forward, and backward once for each label [L, 1]."""
    with torch.enable_grad():
        image = image.detach().requires_grad_(True)
        logits = model(image).flatten(1)
    if not bool(logits.isfinite().all()):
        raise DataError(f"the model's output is not finite for calibration image number {number} (NaN or infinity)")
    if labels is None:
        labels = sample_labels(logits, draws, generator(seed, number, "labels"))
    for one in gathered.values():
        one.begin(len(labels))
    for row, drawn in enumerate(labels):
        with torch.enable_grad():
            loss = F.cross_entropy(logits, drawn)
        torch.autograd.grad(loss, image, retain_graph=row + 1 < len(labels))
    for one in gathered.values():
        one.end(number)


class _Gathered:
    """Gathers one linear's statistics, image by image: sums a unit, rows and their weights on disk."""

    def __init__(self, name: str, images: int, rows: int, seed: int, spill: Spill) -> None:
        self.name, self.images, self.per_image = name, images, max(1, rows // images)
        self.seed, self.spill = seed, spill
        self.input = torch.empty(0)
        self.squared: Tensor | None = None
        self.trace, self.draws = 0.0, 1
        self.units: list[Tensor] = []
        self.unit = -1

    def begin(self, draws: int) -> None:
        """An image follows, with so many gradients."""
        self.squared, self.trace, self.draws = None, 0.0, draws

    def take(self, gradient: Tensor) -> None:
        """The gradient [1, ..., N] of the output for one label."""
        x = self.input.reshape(1, -1, self.input.shape[-1]).float()
        d = gradient.detach().reshape(1, x.shape[1], -1).float()
        self.trace += float(squared_norms(x, d)) / self.draws
        squared = d[0].square().div_(self.draws)
        self.squared = squared if self.squared is None else self.squared.add_(squared)

    def end(self, number: int) -> None:
        """That was all of the calibration set's `number`th image."""
        if self.squared is None:
            raise DataError(f"site {self.name!r} has no part in the model's answer")
        squared, x = self.squared, self.input.reshape(-1, self.input.shape[-1]).float()
        sums = torch.cat((squared.new_tensor([self.trace], dtype=torch.float64), squared.sum(0, dtype=torch.float64)))
        if number // UNIT == self.unit:
            self.units[-1] += sums.cpu()
        else:
            self.units.append(sums.cpu())
        self.unit = number // UNIT
        share = squared.sum(-1).double().cpu()  # [T]
        share = share / share.sum().clamp_min(1e-300)
        share = share * (1 - UNIFORM_SHARE) + UNIFORM_SHARE / len(share)
        if not bool(share.isfinite().all()):
            raise DataError(f"site {self.name!r}: its gradients are not finite on the calibration images")
        source = generator(self.seed, number, self.name)
        drawn = torch.multinomial(share, self.per_image, replacement=True, generator=source)
        scale = (1.0 / (share[drawn] * self.per_image * self.images)).float().to(x.device)
        drawn = drawn.to(x.device)
        self.spill.append(f"{self.name} rows", x[drawn])
        self.spill.append(f"{self.name} weights", squared[drawn] * scale[:, None])
        self.input, self.squared = torch.empty(0), None

    def finish(self, shard: Shard) -> tuple[float, Tensor]:
        """Trace and squared output gradient fp32 [N], means over the images of all processes; rows of all, too."""
        total: Tensor | float = 0.0
        for unit in shard.gather(torch.stack(self.units)):
            total = total + unit
        assert isinstance(total, Tensor)
        if shard.world > 1:
            for key in (f"{self.name} rows", f"{self.name} weights"):
                self.spill.replace(key, shard.gather(self.spill.read(key)))
        mean = total / self.images
        return float(mean[0]), mean[1:].float()
