"""Tokens count by what the answers make of them: the class token little in the first blocks, nearly all in the last.

    loss = sum_t w_t ||y_hat_t - y_t||^2 / sum_t w_t ||y_t - mean(y_t)||^2

The prefix tokens (class, registers) share what they have of the squared gradient of log p(label) at the block's output,
labels drawn from the model (its Fisher matrix), within the bounds that `compensate` keeps; the patches share the rest.
In the last block nothing but the class token is read, and one token of 197 is what `mse` gives it there.
"""

from __future__ import annotations

from torch import Tensor

from lampq_rt.calibrate.compensate import LEAST_SHARE, MOST_SHARE
from lampq_rt.calibrate.objectives.base import OBJECTIVES, BlockError, Study
from lampq_rt.calibrate.prefix import prefix_shares


class Tokens:
    """`Objective` whose weights are fp32 [tokens, 1] a block, of mean 1."""

    orders: tuple[str, ...] = ("together", "blocks")
    why = ""

    def measure(self, study: Study) -> BlockError:
        """See `Objective.measure`; one pass over the images, forward and backward."""
        prefix = study.exact.num_prefix_tokens
        blocks = [f"blocks.{number}" for number in range(len(study.exact.blocks))]
        shares = prefix_shares(study.exact, study.images, blocks, prefix=prefix, blocks=blocks)

        def weights(block: int, y: Tensor) -> Tensor:
            tokens = y.shape[1]
            if not 0 < prefix < tokens:
                return y.new_ones(tokens, 1)
            own = min(max(shares[blocks[block]], LEAST_SHARE), MOST_SHARE)
            found = y.new_full((tokens, 1), tokens * (1.0 - own) / (tokens - prefix))
            found[:prefix] = tokens * own / prefix
            return found

        def error(block: int, y_hat: Tensor, y: Tensor) -> Tensor:
            weight = weights(block, y)
            spread = ((y - y.mean(-1, keepdim=True)).square() * weight).mean()
            return ((y_hat - y).square() * weight).mean() / spread

        return error


OBJECTIVES.register("tokens")(Tokens())
