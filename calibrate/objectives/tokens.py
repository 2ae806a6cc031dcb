"""Tokens count by what the answers make of them: the class token little in the first blocks, nearly all in the last.

    loss = sum_t w_t ||y_hat_t - y_t||^2 / sum_t w_t ||y_t - mean(y_t)||^2

The prefix tokens (class, registers) share what they have of the squared gradient of log p(label) at the block's output,
labels drawn from the model (its Fisher matrix), within the bounds that `compensate` keeps; the patches share the rest.
In the last block nothing but the class token is read, and one token of 197 is what `mse` gives it there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lampq_rt.calibrate import stream
from lampq_rt.calibrate.compensate import LEAST_SHARE, MOST_SHARE
from lampq_rt.calibrate.objectives.base import OBJECTIVES, BlockError, Study


def prefix_shares(exact: VisionTransformer, images: Tensor, prefix: int) -> Tensor:
    """fp64 [blocks], 0..1: of the first `prefix` tokens in the squared gradient at each block's output.

    Args:
        exact: the floating-point model.
        images: fp32 [n, C, H, W].
        prefix: tokens before those of the patches.
    """
    sums = torch.zeros(2, len(exact.blocks), dtype=torch.float64)
    draws = torch.Generator().manual_seed(0)
    for part in images.split(stream.GRAPH):
        with torch.enable_grad():
            x, outputs = stream.embedded(exact, part).detach().requires_grad_(True), list[Tensor]()
            for block in exact.blocks:
                x = block(x)
                outputs.append(x)
            logits = stream.answers(exact, x).flatten(1)
            labels = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=draws)[:, 0].to(logits.device)
            gradients = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), outputs)
        for number, gradient in enumerate(gradients):
            energy = gradient.double().square().sum(-1)
            sums[:, number] += torch.stack((energy[:, :prefix].sum(), energy.sum())).cpu()
    return sums[0] / sums[1].clamp(min=torch.finfo(torch.float64).tiny)


class Tokens:
    """`Objective` whose weights are fp32 [tokens, 1] a block, of mean 1."""

    orders: tuple[str, ...] = ("together", "blocks")
    why = ""

    def measure(self, study: Study) -> BlockError:
        """See `Objective.measure`; one pass over the images, forward and backward."""
        prefix = study.exact.num_prefix_tokens
        shares = prefix_shares(study.exact, study.images, prefix) if prefix else None

        def weights(block: int, y: Tensor) -> Tensor:
            tokens = y.shape[1]
            if shares is None or tokens <= prefix:
                return y.new_ones(tokens, 1)
            own = min(max(float(shares[block]), LEAST_SHARE), MOST_SHARE)
            found = y.new_full((tokens, 1), tokens * (1.0 - own) / (tokens - prefix))
            found[:prefix] = tokens * own / prefix
            return found

        def error(block: int, y_hat: Tensor, y: Tensor) -> Tensor:
            weight = weights(block, y)
            spread = ((y - y.mean(-1, keepdim=True)).square() * weight).mean()
            return ((y_hat - y).square() * weight).mean() / spread

        return error


OBJECTIVES.register("tokens")(Tokens())
