"""Block after block: BRECQ (2102.05426), and all that follow it for Vision Transformers.

A block is fed by the quantised blocks before it, which have been trained; its target is what it gives in the
floating-point model on the floating-point stream. The patch embedding trains with the first block. What stands behind
the last one trains at the end, towards the answers (AdaLog's code does so with the head). A block does not know what
the others make of its error: with `Schedule.finish`, all train together behind that, towards the answers alone.

Every image is changed at random once, before the first block, and both streams stay in memory from block to block:
8 bytes an element of [images, tokens, width], 0.3 GB for 1,000 images of DeiT-Tiny. More images than the steps of a
block see are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lampq_rt.calibrate import stream
from lampq_rt.calibrate.augment import augmented
from lampq_rt.calibrate.orders.base import ORDERS, Course, Part, Unit, answers_divergence
from lampq_rt.calibrate.straight_through import held


class Blocks:
    """`Order` of one unit a block, one for what follows them and, where wanted, one of all."""

    def steps(self, course: Course) -> list[int]:
        """See `Order.steps`."""
        return [course.steps] * (len(course.exact.blocks) + 1) + ([course.finish] if course.finish else [])

    def units(self, course: Course) -> Iterator[Unit]:
        """See `Order.units`."""
        depth = len(course.exact.blocks)
        x_hat = x = _seen(course)
        for block in range(depth):
            forward = _block(course, block)
            y = _mapped(_exact_block(course, block), x)

            def loss(part: Part, block: int = block, forward: Callable[[Tensor], Tensor] = forward) -> Tensor:
                return course.blocks * course.error(block, forward(part[0]), part[1])

            unit = _unit(course, block, x_hat, y, loss)
            yield unit
            with held(unit.linears.values()):
                x_hat, x = _mapped(forward, x_hat), y

        def head_loss(part: Part) -> Tensor:
            with torch.no_grad():
                wanted = stream.answers(course.exact, part[1])
            return course.answers * answers_divergence(stream.answers(course.quantised, part[0]), wanted)

        yield _unit(course, depth, x_hat, x, head_loss)
        if course.finish:
            answering = replace(course, blocks=0.0, answers=1.0)
            yield from (replace(unit, rates=course.finish_rates) for unit in ORDERS.get("together").units(answering))


def _seen(course: Course) -> Tensor:
    """Images that a unit's steps may see, each changed once."""
    draws = torch.Generator().manual_seed(course.seed)
    count = min(len(course.images), course.steps * course.batch)
    drawn = torch.randperm(len(course.images), generator=draws)[:count].to(course.images.device)
    return torch.cat([augmented(course.images[part], draws) for part in drawn.split(stream.GRAPH)])


def _block(course: Course, block: int) -> Callable[[Tensor], Tensor]:
    """The block that learns; the first one with all before it."""
    model = course.quantised
    if block:
        return lambda x: stream.through(model, x, block, block + 1)
    return lambda images: stream.through(model, stream.embedded(model, images), 0, 1)


def _exact_block(course: Course, block: int) -> Callable[[Tensor], Tensor]:
    model = course.exact
    if block:
        return lambda x: stream.through(model, x, block, block + 1)
    return lambda images: stream.through(model, stream.embedded(model, images), 0, 1)


@torch.no_grad()
def _mapped(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), a few images at a time: always the same ones, so that a resumed training has the same bits."""
    return torch.cat([function(part) for part in x.split(stream.GRAPH)])


def _unit(course: Course, number: int, x_hat: Tensor, y: Tensor, loss: Callable[[Part], Tensor]) -> Unit:
    """The unit of that number: what belongs to its block, fed with x_hat, [n, ...] like its target y."""
    depth = len(course.exact.blocks)

    def draw(draws: torch.Generator) -> Sequence[Part]:
        drawn = torch.randperm(len(x_hat), generator=draws)[: course.batch].to(x_hat.device)
        return list(zip(x_hat[drawn].split(stream.GRAPH), y[drawn].split(stream.GRAPH), strict=True))

    return Unit(
        {name: linear for name, linear in course.linears.items() if _number(name, depth) == number},
        {name: matmul for name, matmul in course.matmuls.items() if _number(name, depth) == number},
        {name: parameter for name, parameter in course.rest.items() if _number(name, depth) == number},
        1,
        draw,
        loss,
    )


def _number(name: str, depth: int) -> int:
    """Number of the unit that a parameter or a linear of that name belongs to."""
    parts = name.split(".")
    if parts[0] == "blocks":
        return int(parts[1])
    return 0 if parts[0] in ("patch_embed", "norm_pre") else depth


ORDERS.register("blocks")(Blocks())
