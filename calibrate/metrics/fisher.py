"""The trace of the Fisher information of each linear's weight, from exact per-sample gradients that are never formed.

LampQ (AAAI-26, section 4.2): tr(F_i) = E_n || d log p(y_n | x_n) / d W_i ||_F^2. One sample's gradient of a linear's
weight is D^T X, with its inputs X [T, K] and output gradients D [T, N] over the tokens, so that its squared norm is

    || D^T X ||_F^2 = sum( (X X^T) o (D D^T) ),

two [T, T] Gram matrices in place of one [N, K] matrix; whichever costs less is taken. (The squared norm of a batch's
mean gradient is another quantity.) Images run one at a time, and of an image's graph one block's at a time: the pass
forward keeps the blocks' inputs alone, the way back makes each block's graph anew from its input (checkpointing, Chen
et al. 1604.06174), for all labels at once. A layer's gradient is used up as soon as autograd has it. Only gradients
of the linears' outputs are asked for, none of weights.

The same pass keeps, per linear, rows of the input with the squared output gradients of those rows: what a penalty
needs that weighs the error of the layer's output. Rows are drawn in proportion to their share of the gradient (in a
ViT's last block it falls on the class token alone) and carry the inverse of their probability as a weight, so that
sums over them are unbiased. Labels and rows are drawn by the seed and the image's number, so that processes which
have some of the images each draw what one process would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lampq_rt.calibrate.distributed import SINGLE, UNIT, Shard, generator
from lampq_rt.calibrate.spill import Lazy, Spill
from lampq_rt.errors import DataError
from lampq_rt.memory import drop_pages, trim

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
    blocks: Sequence[str] = (),
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
        blocks: names of submodules that run once each, in this order, from one tensor to one tensor: their graphs are
            made one at a time. Without, the whole graph is held.
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
        with ExitStack() as entered:
            entered.enter_context(_listening(model, gathered))
            cut = [entered.enter_context(_cut(model.get_submodule(name))) for name in blocks]
            for number, image in enumerate(images):
                chosen = None if labels is None else labels[number : number + 1, None].to(device)
                _one(model, image[None].to(device), first + number, chosen, draws, seed, gathered, cut)
                trim()
                if progress is not None:
                    progress(number + 1, len(images))

    shard.together(run)
    sums = {name: g.finish(shard) for name, g in gathered.items()}

    def result(name: str) -> Fisher:
        trace, output = sums[name]
        return Fisher(trace, output.to(device), spill.read(f"{name} rows"), spill.read(f"{name} weights"))

    return Lazy(list(sites), result)


def squared_norms(x: Tensor, d: Tensor, gram: Tensor | None = None) -> Tensor:
    """|| D^T X ||_F^2 of each sample.

    Args:
        x: [B, T, K].
        d: [B, T, N].
        gram: [B, T, T], X X^T where it is known already.

    Returns:
        fp64 [B].
    """
    if by_gram(x, d.shape[2]):
        gram = x @ x.transpose(1, 2) if gram is None else gram
        return (gram.double() * (d @ d.transpose(1, 2))).sum((1, 2))
    return (d.transpose(1, 2) @ x).square().sum((1, 2), dtype=torch.float64)


def by_gram(x: Tensor, n: int) -> bool:
    """True where two [T, T] matrices cost less than one [n, K] matrix; x is [B, T, K]."""
    tokens, k = x.shape[1:]
    return tokens * (k + n) < k * n


def sample_labels(logits: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Labels drawn from softmax(logits) [B, classes]: int64 [draws, B], the same on every device."""
    probabilities = logits.detach().double().cpu().softmax(-1)
    return torch.multinomial(probabilities, draws, replacement=True, generator=generator).t().to(logits.device)


@contextmanager
def _listening(model: nn.Module, gathered: Mapping[str, _Gathered]) -> Iterator[None]:
    """While this is entered, each linear hands its input, and autograd its output's gradient, to what gathers them."""

    def hook(one: _Gathered) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def see(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad:
                one.see(inputs[0])
                output.register_hook(one.take)

        return see

    hooks = [model.get_submodule(name).register_forward_hook(hook(one)) for name, one in gathered.items()]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


class _Cut:
    """A block whose graph is not made as the model runs, but afterwards, from its input."""

    def __init__(self, block: nn.Module) -> None:
        self.run: Callable[..., Tensor] = block.forward
        self.input, self.extra, self.output = torch.empty(0), dict[str, Any](), torch.empty(0)

    def __call__(self, x: Tensor, **extra: Any) -> Tensor:
        """The block's output, a leaf of the graph of what follows."""
        self.input, self.extra = x, extra
        with torch.no_grad():
            self.output = self.run(x, **extra)
        return self.output.requires_grad_(True)

    def graph(self) -> tuple[Tensor, Tensor]:
        """Input and output of the block, the graph between them."""
        with torch.enable_grad():
            x = self.input.detach().requires_grad_(True)
            return x, self.run(x, **self.extra)

    def forget(self) -> None:
        """Hold nothing more."""
        self.input, self.extra, self.output = torch.empty(0), {}, torch.empty(0)


@contextmanager
def _cut(block: nn.Module) -> Iterator[_Cut]:
    """While this is entered, the block runs cut off."""
    cut = _Cut(block)
    block.forward = cut  # type: ignore[assignment]
    try:
        yield cut
    finally:
        del block.forward


def _one(
    model: nn.Module,
    image: Tensor,
    number: int,
    labels: Tensor | None,
    draws: int,
    seed: int,
    gathered: Mapping[str, _Gathered],
    blocks: Sequence[_Cut],
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
    with torch.enable_grad():
        losses = [F.cross_entropy(logits, drawn) for drawn in labels]
    gradients = _back(losses, blocks[-1].output if blocks else image, [None] * len(losses))
    del logits, losses
    for place in reversed(range(len(blocks))):
        _end(gathered, number)
        x, y = blocks[place].graph()
        before, source = blocks[place].input, blocks[place - 1].output if place else image
        blocks[place].forget()
        gradients = _back([y] * len(gradients), x, gradients)
        if before is not source:
            gradients = _back([before] * len(gradients), source, gradients)
        drop_pages()
        if place == len(blocks) // 2:  # at every block it would take less memory, and half as long again
            trim()
    _end(gathered, number)
    for name, one in gathered.items():
        if one.open:
            raise DataError(f"site {name!r} has no part in the model's answer")


def _end(gathered: Mapping[str, _Gathered], number: int) -> None:
    """The gradients of those that have some are all there."""
    for one in gathered.values():
        if one.squared is not None:
            one.end(number)


def _back(outputs: Sequence[Tensor], to: Tensor, gradients: Sequence[Tensor | None]) -> list[Tensor]:
    """Gradients of `to`, one for each output and its own gradient (None: 1); the graph is used up."""
    last = len(outputs) - 1
    return [
        torch.autograd.grad(output, to, gradient, retain_graph=row < last)[0]
        for row, (output, gradient) in enumerate(zip(outputs, gradients, strict=True))
    ]


class _Gathered:
    """Gathers one linear's statistics, image by image: sums a unit, rows and their weights on disk."""

    def __init__(self, name: str, images: int, rows: int, seed: int, spill: Spill) -> None:
        self.name, self.images, self.per_image = name, images, max(1, rows // images)
        self.seed, self.spill = seed, spill
        self.input = torch.empty(0)
        self.gram: Tensor | None = None
        self.squared: Tensor | None = None
        self.trace, self.draws, self.open = 0.0, 1, False
        self.units: list[Tensor] = []
        self.unit = -1

    def begin(self, draws: int) -> None:
        """An image's gradients follow, so many."""
        self.squared, self.trace, self.draws, self.open = None, 0.0, draws, True

    def see(self, x: Tensor) -> None:
        """The input of the linear, whose gradients follow."""
        self.input, self.gram = x.detach(), None

    def take(self, gradient: Tensor) -> None:
        """The gradient [1, ..., N] of the output for one label."""
        x = self.input.reshape(1, -1, self.input.shape[-1]).float()
        d = gradient.detach().reshape(1, x.shape[1], -1).float()
        if self.gram is None and by_gram(x, d.shape[2]):
            self.gram = x @ x.transpose(1, 2)  # the same for all labels
        self.trace += float(squared_norms(x, d, self.gram)) / self.draws
        squared = d[0].square().div_(self.draws)
        self.squared = squared if self.squared is None else self.squared.add_(squared)

    def end(self, number: int) -> None:
        """That was all of the calibration set's `number`th image."""
        assert self.squared is not None
        squared, x = self.squared, self.input.reshape(-1, self.input.shape[-1]).float()
        trace = squared.new_tensor([self.trace], dtype=torch.float64)
        sums = torch.cat((trace, squared.sum(0, dtype=torch.float64)))
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
        self.input, self.gram, self.squared, self.open = torch.empty(0), None, None, False

    def finish(self, shard: Shard) -> tuple[float, Tensor]:
        """Trace and squared output gradient fp32 [N], means over all images."""
        total: Tensor | float = 0.0
        for unit in shard.gather(torch.stack(self.units)):
            total = total + unit
        assert isinstance(total, Tensor)
        if shard.world > 1:
            for key in (f"{self.name} rows", f"{self.name} weights"):
                self.spill.replace(key, shard.gather(self.spill.read(key)))
        mean = total / self.images
        return float(mean[0]), mean[1:].float()
