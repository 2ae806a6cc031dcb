"""Compares a model's answers on the calibration images with those of the floating-point model.

A few dozen images are a small sample, and the KL divergence is heavy-tailed: most of it comes from the few images
whose answer hangs in the balance, and rounding errors decide those like a coin. Two things make decisions between
plans less of a lottery (measured in docs/calibration.md):

* The divergence is taken between softened answers, softmax(logits / T) with T = 1.5 (times T^2, Hinton et al. 2015,
  section 2), so that images far from any balance count, too.
* Each image is also seen shifted by a few pixels. That costs no new image, and the rounding errors of the shifted one
  are as good as independent: rounding is chaotic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lampq_rt.calibrate.distributed import SINGLE, UNIT, Shard
from lampq_rt.memory import trim
from lampq_rt.simulate import Simulation

TEMPERATURE = 1.5
MARGIN = 0.1
"""By which share the images as they are may be worse than a rival's before the other views are looked at."""

ENOUGH = 96
"""So many images need no other views."""

SHIFT = 0.055
"""How far a view is shifted, as a share of the image's side: not a multiple of any patch."""


@dataclass(frozen=True)
class Answers:
    """What a model answers to the calibration images, against what it should.

    Attributes:
        accuracy: percent of images with the right label; percent that agree with the floating-point model without
        labels. cross_entropy: nats, mean over images, against the labels; without, against the floating-point model's
        probabilities. kl: nats, mean over images, of the floating-point model's probabilities against these.
        divergence: the same of softened probabilities over all views: what plans are compared by; infinite where
        the images as they are left no hope. unshifted: its share of the images as they are.
    """

    accuracy: float
    cross_entropy: float
    kl: float
    divergence: float
    unshifted: float

    def beat(self, rival: Answers) -> bool:
        """True where the divergence is less and accuracy no worse."""
        return self.divergence < rival.divergence and self.accuracy >= rival.accuracy


@dataclass(frozen=True)
class Judge:
    """Holds the images and what should be answered to them.

    Attributes:
        images: fp32 [m, C, H, W]: this process's share of the n images.
        logits: fp32 [V * n, classes] of the floating-point model: of all images, then of V - 1 other views of them.
        labels: int64 [n], or None.
        count: n. Views decide by their divergence alone.
        shard: the processes that have the other images.
    """

    images: Tensor
    logits: Tensor
    labels: Tensor | None
    count: int
    shard: Shard = SINGLE

    @torch.no_grad()
    def __call__(self, simulation: Simulation, rival: Answers | None = None) -> Answers:
        """Run the images through `simulation` as it is set.

        Args:
            simulation: the model.
            rival: answers that these should beat. Where the images as they are show that they do not, or by how far
                they would have to catch up that they hardly can, the other views are not run.
        """
        logits = answer(simulation, self.images, shard=self.shard)
        if rival is not None:
            seen = self.judge(logits)
            if seen.accuracy < rival.accuracy or seen.unshifted > rival.unshifted * (1.0 + MARGIN):
                return replace(seen, divergence=math.inf)
        views = range(1, len(self.logits) // self.count)
        others = [answer(simulation, self.images, view, self.shard) for view in views]
        return self.judge(torch.cat([logits, *others]))

    def judge(self, logits: Tensor) -> Answers:
        """The answers that these logits are, [V * n, classes], or [n, classes] of the images as they are."""
        found, wanted = (x[: self.count].double().log_softmax(-1) for x in (logits, self.logits))
        kl = F.kl_div(found, wanted, reduction="batchmean", log_target=True)
        if self.labels is None:
            right, cross_entropy = wanted.argmax(-1), -(wanted.exp() * found).sum(-1).mean()
        else:
            right = self.labels.to(found.device)
            cross_entropy = F.nll_loss(found, right)
        accuracy = (found.argmax(-1) == right).double().mean() * 100
        soft, soft_wanted = ((x[: len(logits)].double() / TEMPERATURE).log_softmax(-1) for x in (logits, self.logits))
        divergence = F.kl_div(soft, soft_wanted, reduction="none", log_target=True).sum(-1) * TEMPERATURE**2
        unshifted = divergence[: self.count].mean()
        return Answers(float(accuracy), float(cross_entropy), float(kl), float(divergence.mean()), float(unshifted))


@torch.no_grad()
def answer(simulation: Simulation, images: Tensor, view: int = 0, shard: Shard = SINGLE) -> Tensor:
    """fp32 logits [n, classes] of `simulation` as it is set, to all processes' images in that view, on its device."""
    device = next(simulation.parameters()).device
    logits = []
    for batch in images.split(UNIT):
        logits.append(simulation(shifted(batch, view).to(device)).flatten(1).float())
        trim()  # else holes of the passes before stay in memory beneath the next one's activations
    return shard.gather(torch.cat(logits))


def views(count: int, size: tuple[int, int]) -> int:
    """Views of `count` images of that height and width: 3, or 1 where they suffice or are too small for `shifted`."""
    height, width = size
    return 1 if count >= ENOUGH or min(height, width) <= 2 * max(_shift(height), _shift(width)) else 3


def shifted(images: Tensor, view: int) -> Tensor:
    """[B, C, H, W] as they are (view 0), up and to the left (1) or up alone (2), the edge reflected."""
    if not view:
        return images
    height, width = images.shape[-2:]
    down, right = _shift(height), _shift(width)
    padded = F.pad(images, (right, right, down, down), mode="reflect")
    return padded[..., 2 * down :, 2 * right :] if view == 1 else padded[..., 2 * down :, :width]


def _shift(side: int) -> int:
    return max(1, round(SHIFT * side))
