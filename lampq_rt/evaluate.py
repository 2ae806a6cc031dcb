"""How close a quantised model stays to its original on the same images: top-1 and top-5, agreement, KL divergence.

Both models see every batch, so that differences are paired: on 1,000 images one standard error of top-1 itself is 1.2
points, of the difference far less. KL(original || quantised) is in nats, the mean over images, from logits in fp64.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lampq_rt.errors import DataError, ModelError


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found; None where it cannot be known.

    Attributes:
        images: number of images.
        top1, top5: percent right of the model in question; None without labels.
        fp32_top1, fp32_top5: the same of its original; None without labels or without the original.
        agreement: percent of images on which both have the same top-1; None without the original.
        kl: KL(original || model), nats, mean over images; None without the original.
        seconds: duration of the whole run, decoding and both models included.
    """

    images: int
    top1: float | None
    top5: float | None
    fp32_top1: float | None
    fp32_top5: float | None
    agreement: float | None
    kl: float | None
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """A plain dict, in the order that `lampq eval --json` writes."""
        return asdict(self)


@dataclass
class _Sums:
    """Counts over the images seen so far."""

    images: int = 0
    top1: int = 0
    top5: int = 0
    fp32_top1: int = 0
    fp32_top5: int = 0
    agree: int = 0
    kl: float = 0.0


def evaluate(
    model: nn.Module, original: nn.Module | None, batches: Iterable[Tensor], labels: Tensor | None = None
) -> Evaluation:
    """Run `model`, and `original` beside it, over all batches.

    Args:
        model: images [B, C, H, W] to logits [B, classes]; may be `original` itself, and lie on another device.
        original: the floating-point model, or None where its weights are not at hand.
        batches: fp32 images, on any device.
        labels: int64 [images] of the classes, in the order of the batches.

    Raises:
        DataError: no image, or another number of images than labels.
        ModelError: a model gives logits that are not finite, or no logits.
    """
    started = time.perf_counter()
    sums = _Sums()
    with torch.inference_mode():
        for images in batches:
            ours = _logits(model, images, sums.images, "the quantised model" if model is not original else "the model")
            theirs = ours if model is original else None
            if original is not None and theirs is None:
                theirs = _logits(original, images, sums.images, "the original model").to(ours.device)
            truth = None
            if labels is not None:
                truth = labels[sums.images : sums.images + len(images)].to(ours.device)
                if len(truth) != len(images):
                    raise DataError(f"{len(labels)} labels for more than {sums.images + len(truth)} images")
            _count(sums, ours, theirs, truth)
    if not sums.images:
        raise DataError("no images to evaluate on")
    return _evaluation(sums, labels is not None, original is not None, time.perf_counter() - started)


def kl_divergence(original: Tensor, quantised: Tensor) -> Tensor:
    """KL(original || quantised) of each image in nats, fp64 [B], from logits [B, classes]."""
    p = original.double().log_softmax(-1)
    q = quantised.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def _device(model: nn.Module, images: Tensor) -> torch.device:
    """Where a model expects its images; one without parameters and buffers takes them as they are."""
    tensor = next(itertools.chain(model.parameters(), model.buffers()), images)
    return tensor.device


def _logits(model: nn.Module, images: Tensor, first: int, what: str) -> Tensor:
    logits = model(images.to(_device(model, images)))
    if logits.ndim != 2 or not logits.shape[1]:
        raise ModelError(f"{what} gives {tuple(logits.shape)}, not logits [images, classes]; has it a classifier?")
    finite = torch.isfinite(logits).all(-1)
    if not bool(finite.all()):
        image = first + int((~finite).nonzero()[0])
        raise ModelError(f"{what} gives logits that are NaN or infinite, first for image {image}")
    return logits


def _count(sums: _Sums, ours: Tensor, theirs: Tensor | None, truth: Tensor | None) -> None:
    sums.images += len(ours)
    if truth is not None:
        top1, top5 = _right(ours, truth)
        sums.top1, sums.top5 = sums.top1 + top1, sums.top5 + top5
    if theirs is None:
        return
    if theirs.shape != ours.shape:
        raise ModelError(f"logits {tuple(ours.shape)} against {tuple(theirs.shape)}: not the same classifier")
    sums.agree += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
    sums.kl += float(kl_divergence(theirs, ours).sum())
    if truth is not None:
        top1, top5 = _right(theirs, truth)
        sums.fp32_top1, sums.fp32_top5 = sums.fp32_top1 + top1, sums.fp32_top5 + top5


def _right(logits: Tensor, truth: Tensor) -> tuple[int, int]:
    """Images whose class is the model's first answer, and among its first five."""
    ranked = logits.topk(min(5, logits.shape[-1]), -1).indices == truth[:, None]
    return int(ranked[:, 0].sum()), int(ranked.sum())


def _evaluation(sums: _Sums, labelled: bool, paired: bool, seconds: float) -> Evaluation:
    def percent(count: int, known: bool) -> float | None:
        return round(100.0 * count / sums.images, 4) if known else None

    return Evaluation(
        images=sums.images,
        top1=percent(sums.top1, labelled),
        top5=percent(sums.top5, labelled),
        fp32_top1=percent(sums.fp32_top1, labelled and paired),
        fp32_top5=percent(sums.fp32_top5, labelled and paired),
        agreement=percent(sums.agree, paired),
        kl=max(0.0, sums.kl / sums.images) if paired else None,
        seconds=round(seconds, 3),
    )
