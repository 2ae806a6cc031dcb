"""A diagonal and a low-rank part of the Fisher matrix of a block's output: FIMA-Q (CVPR 2025, 2506.11543).

For small noise z at a block's output, the gradient of the divergence of the answers (temperature 20) is g = F z. With k
pairs of z and g, rows of Z and G, the matrix of rank k for which F Z^T = G^T is G^T (Z G^T)^-1 G, and

    loss = d^T G^T (Z G^T)^-1 G d / its first value + mean(d^2 mean_j g_j) / its first value,   d = |y_hat - y|

brought to the size of `mse` at the first step. As in the authors' code, z and g are means over images of absolute
values, so that noise of either sign adds up. Here all pairs are measured before training: noise j is what the last
share j / k of the blocks up to this one makes of the floating-point stream when they are quantised, so it grows from
the block's own to that of the whole prefix (the authors measure the gradient k times while the block is trained). Where
fewer blocks stand before, the rank is their number. Z G^T is made symmetric, and directions without a clearly positive
eigenvalue are left out: a loss must not fall below 0.
"""

from __future__ import annotations

import math

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lampq_rt.calibrate import stream
from lampq_rt.calibrate.objectives.base import OBJECTIVES, BlockError, Study, divergence_gradient

RANK = 5
"""k, as in the authors' configurations."""

LEAST_EIGENVALUE = 1e-3
"""Of those kept, over the greatest."""


def starts(block: int) -> list[int]:
    """First quantised block of each noise at the output of `block`, from the block alone to all up to it."""
    count = block + 1
    return sorted({count - math.ceil(j * count / RANK) for j in range(1, RANK + 1)}, reverse=True)


def pairs(
    exact: VisionTransformer, quantised: VisionTransformer, block: int, inputs: list[Tensor], wanted: Tensor
) -> tuple[Tensor, Tensor]:
    """Noise and gradients at a block's output, of growing noise.

    Args:
        exact: the floating-point model.
        quantised: its simulation.
        block: number of the block.
        inputs: of all blocks in floating point and, last, the last one's output; each [B, tokens, width].
        wanted: logits [B, classes].

    Returns:
        z and g, [noises, B, tokens, width] twice.
    """
    y, noises, gradients = inputs[block + 1], list[Tensor](), list[Tensor]()
    for start in starts(block):
        with torch.no_grad():
            noises.append(stream.through(quantised, inputs[start], start, block + 1) - y)
        gradients.append(divergence_gradient(exact, block, y + noises[-1], wanted))
    return torch.stack(noises), torch.stack(gradients)


def root(z: Tensor, g: Tensor) -> Tensor:
    """[rank, n], U with U^T U = G^T (Z G^T)^-1 G on the directions kept.

    Args:
        z: fp32 [k, n], noise.
        g: fp32 [k, n], gradients.
    """
    product = z.double() @ g.double().t()
    values, vectors = torch.linalg.eigh((product + product.t()) / 2)
    kept = values > LEAST_EIGENVALUE * values.max().clamp(min=torch.finfo(torch.float64).tiny)
    return (vectors[:, kept] * values[kept].rsqrt()).t().to(g.dtype) @ g


class Fisher:
    """`Objective` whose statistics are fp32 [rank + 1, tokens * width] a block."""

    orders: tuple[str, ...] = ("together", "blocks")
    why = ""

    def measure(self, study: Study) -> BlockError:
        """See `Objective.measure`; up to k passes through what follows each block, forward and backward."""
        depth = len(study.exact.blocks)
        sums: list[tuple[Tensor, Tensor] | None] = [None] * depth
        for images in study.images.split(stream.GRAPH):
            with torch.no_grad():
                wanted, targets = stream.outputs(study.exact, images)
                inputs = [stream.embedded(study.exact, images), *targets]
            for block in range(depth):
                z, g = pairs(study.exact, study.quantised, block, inputs, wanted)
                found = z.abs().sum(1).flatten(1), g.abs().sum(1).flatten(1)
                before = sums[block]
                sums[block] = found if before is None else (before[0] + found[0], before[1] + found[1])
        count = len(study.images)
        measured = [(z / count, g / count) for z, g in (pair for pair in sums if pair is not None)]
        roots, diagonals = [root(z, g) for z, g in measured], [g.mean(0) for _, g in measured]

        def error(block: int, y_hat: Tensor, y: Tensor) -> Tensor:
            d = (y_hat - y).flatten(1).abs()
            terms = {
                "low-rank": (1.0, (d @ roots[block].t()).square().sum(1).mean()),
                "diagonal": (1.0, (d.square() * diagonals[block]).mean()),
            }
            return study.first.sized(block, terms, y_hat, y)

        return error


OBJECTIVES.register("fisher")(Fisher())
