"""Elements count by what moving all of them does to the answers: APHQ-ViT (2504.02508), average perturbation Hessian.

    loss = mean(H (y_hat - y)^2) / mean square of y - mean(y),   H = mean over images of |J(y + e s) - J(y - e s)| / 2 e

where J is the gradient of the divergence of the answers (temperature 20) with respect to the block's output. H is
divided by its mean, as in the authors' code: the size of the loss stays that of `mse`, and only ratios between elements
of a block count. Two things differ from the paper, where e = 1e-6 and s = 1 everywhere:

* s has random signs, others for every image. The same amount added to all channels of a token is what LayerNorm takes
  away, and in a pre-norm Transformer every path from the residual stream to the answers begins with one: the Hessian
  times a constant is exactly 0 (`tests/test_objectives.py`), and what a constant measures is rounding. With random
  signs, |H s| is on average as large as the rows of the Hessian are.
* e is 0.01 of the output's root mean square. With J(y) = 0, J(y + e s) is made of differences between probabilities
  that differ by e / 20 of themselves or so, for e = 1e-6 by 5e-8, below fp32's rounding of 6e-8. 0.01 stands far above,
  and is still small: the error of a central difference is of the order of e^2.
"""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lampq_rt.calibrate import stream
from lampq_rt.calibrate.objectives.base import OBJECTIVES, BlockError, Study, divergence_gradient, spread

STEP = 0.01
"""e over the root mean square of the output."""


def importance(exact: VisionTransformer, block: int, y: Tensor, wanted: Tensor, signs: Tensor) -> Tensor:
    """|J(y + e s) - J(y - e s)| / 2 e of every image.

    Args:
        exact: the floating-point model.
        block: number of the block.
        y: [B, tokens, width], its output.
        wanted: logits [B, classes].
        signs: s, as y.

    Returns:
        As y, not negative.
    """
    step = STEP * y.square().mean((1, 2), keepdim=True).sqrt().clamp(min=torch.finfo(y.dtype).tiny)
    above, below = (divergence_gradient(exact, block, y + sign * step * signs, wanted) for sign in (1, -1))
    return (above - below).abs() / (2 * step)


class Aph:
    """`Objective` whose weights are fp32 [tokens, width] a block, of mean 1."""

    orders: tuple[str, ...] = ("together", "blocks")
    why = ""

    def measure(self, study: Study) -> BlockError:
        """See `Objective.measure`; two passes through what follows each block, forward and backward."""
        sums, draws = list[Tensor](), torch.Generator().manual_seed(0)
        for images in study.images.split(stream.GRAPH):
            with torch.no_grad():
                wanted, targets = stream.outputs(study.exact, images)
            for block, y in enumerate(targets):
                signs = (torch.randint(0, 2, y.shape, generator=draws) * 2 - 1).to(y)
                found = importance(study.exact, block, y, wanted, signs).sum(0)
                if len(sums) == block:
                    sums.append(found)
                else:
                    sums[block] += found
        weights = [_of_mean_one(found) for found in sums]

        def error(block: int, y_hat: Tensor, y: Tensor) -> Tensor:
            return ((y_hat - y).square() * weights[block]).mean() / spread(y)

        return error


def _of_mean_one(weights: Tensor) -> Tensor:
    """`weights` over their mean; ones where they are all 0 (a head that says nothing)."""
    mean = weights.mean()
    return weights / mean if float(mean) > 0 else torch.ones_like(weights)


OBJECTIVES.register("aph")(Aph())
