"""The trace of the Fisher information of each linear's weight, from exact per-sample gradients that are never formed.

LampQ (AAAI-26, section 4.2): tr(F_i) = E_n || d log p(y_n | x_n) / d W_i ||_F^2. One sample's gradient of a linear's
weight is D^T X, with its inputs X [T, K] and output gradients D [T, N] over the tokens, so that its squared norm is

    || D^T X ||_F^2 = sum( (X X^T) o (D D^T) ),

two [T, T] Gram matrices in place of one [N, K] matrix; whichever costs less is taken. The loss is summed over the
batch: samples do not meet in a network without batch statistics, so each row of D belongs to its sample alone. (The
squared norm of a batch's mean gradient is another quantity.) Only gradients of the linears' outputs are asked of
autograd, none of weights.

The same pass keeps, per linear, rows of the input with the squared output gradients of those rows: what a penalty
needs that weighs the error of the layer's output. Rows are drawn in proportion to their share of the gradient (in a
ViT's last block it falls on the class token alone) and carry the inverse of their probability as a weight, so that
sums over them are unbiased.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lampq_rt.errors import DataError

BATCH = 8
"""Images that run at once."""

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
) -> dict[str, Fisher]:
    """Fisher traces and weighted rows of the linears called `sites`.

    Args:
        model: in eval mode and floating point; images in, logits [B, classes] out. It is left as it was.
        images: fp32 [n, C, H, W] on any device.
        sites: names of submodules that are called once in a forward pass with [B, ..., K] and return [B, ..., N].
        labels: int64 [n]; None draws them from the model's own answers (then it is the Fisher matrix itself; given
            labels make it the "empirical" one).
        draws: labels drawn per image, each at the price of a backward pass; labels that are given count once.
        rows: rows kept per linear, spread evenly over the images.
        seed: of the labels and rows.
        progress: called with the number of images done and n after each batch.

    Returns:
        By name, on the model's device.

    Raises:
        DataError: logits or gradients that are not finite.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    gathered = {name: _Gathered(len(images), rows, generator) for name in sites}
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [model.get_submodule(name).register_forward_hook(_keep(seen, name)) for name in sites]
    try:
        for start in range(0, len(images), BATCH):
            batch = images[start : start + BATCH].to(device).detach().requires_grad_(True)
            seen.clear()
            with torch.enable_grad():
                logits = model(batch).flatten(1)
            chosen = None if labels is None else labels[start : start + BATCH].to(device)[None]
            gradients = _gradients(logits, {name: seen[name][1] for name in sites}, chosen, draws, generator)
            for name in sites:
                gathered[name].add(seen[name][0], gradients[name])
            if progress is not None:
                progress(min(start + BATCH, len(images)), len(images))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: gathered[name].result(name) for name in sites}


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


def _keep(seen: dict[str, tuple[Tensor, Tensor]], name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[name] = (inputs[0].detach(), output)

    return hook


def _gradients(
    logits: Tensor, outputs: dict[str, Tensor], labels: Tensor | None, draws: int, generator: torch.Generator
) -> dict[str, list[Tensor]]:
    """By name, the gradient of the loss with respect to that output, once for each draw of labels."""
    if not bool(logits.isfinite().all()):
        raise DataError("the model's output is not finite on the calibration images (NaN or infinity)")
    if labels is None:
        labels = sample_labels(logits, draws, generator)
    found: dict[str, list[Tensor]] = {name: [] for name in outputs}
    for row, drawn in enumerate(labels):
        loss = F.cross_entropy(logits, drawn, reduction="sum")
        more = row + 1 < len(labels)
        gradients = torch.autograd.grad(loss, list(outputs.values()), retain_graph=more, materialize_grads=True)
        for name, gradient in zip(outputs, gradients, strict=True):
            found[name].append(gradient)
    return found


class _Gathered:
    """Sums up one linear's statistics over batches."""

    def __init__(self, images: int, rows: int, generator: torch.Generator) -> None:
        self.images, self.per_image, self.generator = images, max(1, rows // images), generator
        self.trace = 0.0
        self.output: Tensor | float = 0.0
        self.rows: list[Tensor] = []
        self.weights: list[Tensor] = []

    def add(self, x: Tensor, gradients: list[Tensor]) -> None:
        """A batch: inputs [B, ..., K] and output gradients [B, ..., N], one for each draw of labels."""
        x = x.reshape(x.shape[0], -1, x.shape[-1]).float()
        grads = [d.reshape(x.shape[0], x.shape[1], -1).float() for d in gradients]
        self.trace += float(sum(squared_norms(x, d).sum() for d in grads)) / (len(grads) * self.images)
        squared = torch.stack([d.square() for d in grads]).mean(0)  # [B, T, N]
        self.output = self.output + squared.sum((0, 1)) / self.images
        share = squared.sum(-1).double().cpu()  # [B, T]
        share = share / share.sum(-1, keepdim=True).clamp_min(1e-300)
        share = share * (1 - UNIFORM_SHARE) + UNIFORM_SHARE / share.shape[-1]
        drawn = torch.multinomial(share, self.per_image, replacement=True, generator=self.generator)  # [B, r]
        scale = 1.0 / (share.gather(1, drawn) * self.per_image * self.images)
        drawn, scale = drawn.to(x.device), scale.float().to(x.device)
        image = torch.arange(len(drawn), device=x.device)[:, None]
        self.rows.append(x[image, drawn].flatten(0, 1))
        self.weights.append((squared[image, drawn] * scale[..., None]).flatten(0, 1))

    def result(self, name: str) -> Fisher:
        """What was gathered."""
        if not (self.trace >= 0.0 and self.trace < float("inf")):
            raise DataError(f"site {name!r}: its gradients are not finite on the calibration images")
        assert isinstance(self.output, Tensor)
        return Fisher(self.trace, self.output, torch.cat(self.rows), torch.cat(self.weights))
