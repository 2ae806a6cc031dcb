"""All blocks at once; every step sees its images changed anew.

loss = blocks * mean over blocks of the objective + answers * KL(p || p_hat)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lampq_rt.calibrate import stream
from lampq_rt.calibrate.augment import augmented
from lampq_rt.calibrate.orders.base import ORDERS, Course, Part, Unit, answers_divergence


class Together:
    """`Order` of one unit."""

    def steps(self, course: Course) -> list[int]:
        """See `Order.steps`."""
        return [course.steps]

    def units(self, course: Course) -> Iterator[Unit]:
        """See `Order.units`."""

        def draw(draws: torch.Generator) -> Sequence[Part]:
            drawn = torch.randperm(len(course.images), generator=draws)[: course.batch]
            seen = augmented(course.images[drawn.to(course.images.device)], draws)
            return [(part,) for part in seen.split(stream.GRAPH)]

        def loss(part: Part) -> Tensor:
            with course.teaching():
                wanted, targets = stream.outputs(course.exact, part[0])
            wanted, targets = wanted.float(), [target.float() for target in targets]
            found, outputs = stream.outputs(course.quantised, part[0])
            total = course.answers * answers_divergence(found, wanted)
            pairs = zip(outputs, targets, strict=True) if course.blocks else ()
            for block, (y_hat, y) in enumerate(pairs):
                total = total + course.blocks / len(targets) * course.error(block, y_hat, y)
            return total

        yield Unit(course.linears, course.matmuls, course.rest, len(course.exact.blocks), draw, loss)


ORDERS.register("together")(Together())
