"""A Vision Transformer in parts: what enters the blocks, what passes through some of them, what comes of it.

Works on timm's model and on its simulation alike; run one after the other, the parts are the model, to the bit.
"""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

GRAPH = 4
"""Images whose activations are in memory at once."""


def embedded(model: VisionTransformer, images: Tensor) -> Tensor:
    """What enters the first block: fp32 [B, tokens, width] of images [B, C, H, W]."""
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    assert isinstance(x, Tensor)
    return x


def through(model: VisionTransformer, x: Tensor, first: int, last: int | None = None) -> Tensor:
    """[B, tokens, width] behind blocks first, ..., last - 1 (None: all that follow)."""
    for block in model.blocks[first:last]:
        x = block(x)
    return x


def penultimate(model: VisionTransformer, x: Tensor) -> Tensor:
    """Input of the head, [B, width], of what leaves the last block."""
    features: Tensor = model.forward_head(model.norm(x), pre_logits=True)
    return features


def answers(model: VisionTransformer, x: Tensor) -> Tensor:
    """Logits [B, classes] of what leaves the last block."""
    logits: Tensor = model.forward_head(model.norm(x))
    return logits


def outputs(model: VisionTransformer, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits [B, classes] of fp32 images [B, C, H, W], and what every block gives, [B, tokens, width] each."""
    x, found = embedded(model, images), list[Tensor]()
    for block in model.blocks:
        x = block(x)
        found.append(x)
    return answers(model, x), found
