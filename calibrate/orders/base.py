"""What an order of training must be able to do: units, one after the other, each with its own steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lampq_rt.calibrate.objectives import BlockError
from lampq_rt.calibrate.straight_through import LearningLinear, LearningMatmul
from lampq_rt.registry import Registry

Part = tuple[Tensor, ...]
"""What is in memory at once of a step, [b, ...] each."""


@dataclass(frozen=True)
class Rates:
    """Learning rates, a step.

    Attributes:
        codes: of weights, in codes.
        factors: of logarithms of steps.
        rest: of norms and biases.
        soft: of AdaRound's V.
    """

    codes: float
    factors: float
    rest: float
    soft: float


@dataclass(frozen=True)
class Course:
    """All that an order works with.

    Attributes:
        exact: the floating-point model, frozen.
        quantised: the model that learns, its linears `LearningLinear`s.
        linears: those, by name.
        matmuls: of attention, whose steps learn, by name.
        rest: norms and biases that learn, by name.
        images: fp32 [n, C, H, W], normalised.
        error: of a block's output.
        steps: of each unit.
        batch: images a step.
        blocks: weight of the blocks' errors.
        answers: weight of the answers' divergence.
        seed: of what is drawn.
        precision: of the factors of products.
        finish: steps of all together, behind the last block.
        finish_rates: their rates; None: those of the steps before.
    """

    exact: VisionTransformer
    quantised: VisionTransformer
    linears: Mapping[str, LearningLinear]
    matmuls: Mapping[str, LearningMatmul]
    rest: Mapping[str, nn.Parameter]
    images: Tensor
    error: BlockError
    steps: int
    batch: int
    blocks: float
    answers: float
    seed: int
    precision: torch.dtype = torch.float32
    finish: int = 0
    finish_rates: Rates | None = None

    @contextmanager
    def teaching(self) -> Iterator[None]:
        """In it the floating-point model runs without a graph, its products in `precision`."""
        reduced = self.precision != torch.float32
        with torch.no_grad(), torch.autocast(self.images.device.type, self.precision, enabled=reduced):
            yield


@dataclass(frozen=True)
class Unit:
    """What trains together.

    Attributes:
        linears: by name.
        matmuls: of attention, by name.
        rest: norms and biases, by name.
        blocks: how many blocks' errors its loss is the mean of.
        draw: what a step sees, in parts; called with a generator that the step alone decides.
        loss: scalar with a gradient, mean over the images of a part.
        rates: in place of the schedule's, where given.
    """

    linears: Mapping[str, LearningLinear]
    matmuls: Mapping[str, LearningMatmul]
    rest: Mapping[str, nn.Parameter]
    blocks: int
    draw: Callable[[torch.Generator], Sequence[Part]]
    loss: Callable[[Part], Tensor]
    rates: Rates | None = None


class Order(Protocol):
    """One order of training."""

    def steps(self, course: Course) -> list[int]:
        """Number of steps of each unit."""
        ...

    def units(self, course: Course) -> Iterator[Unit]:
        """The units. Each has been trained when the next is asked for, also where that was before an interruption."""
        ...


ORDERS: Registry[Order] = Registry("order of training")


def answers_divergence(found: Tensor, wanted: Tensor) -> Tensor:
    """Scalar: mean over images of KL(wanted || found), of logits [B, ...]."""
    p, q = wanted.flatten(1).log_softmax(-1), found.flatten(1).log_softmax(-1)
    return F.kl_div(q, p, log_target=True, reduction="batchmean")
