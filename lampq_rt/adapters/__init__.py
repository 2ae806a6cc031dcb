"""How a model family is read (its sites) and rebuilt (its integer form). One file a family."""

from __future__ import annotations

from torch import nn

from lampq_rt.adapters.base import Adapter
from lampq_rt.errors import ModelError
from lampq_rt.sites import Description


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter that understands `model`.

    Raises:
        ModelError: none does; the message names the model's class and what is supported.
    """
    from lampq_rt.adapters.timm_vit import TimmVit  # timm is slow to import

    for adapter in (TimmVit(),):
        if adapter.matches(model):
            return adapter
    raise ModelError(
        f"cannot quantise a {type(model).__module__}.{type(model).__qualname__}; supported: timm VisionTransformer "
        "(ViT, DeiT, DINOv2 and their variants)"
    )


def describe(model: nn.Module) -> Description:
    """Sites of `model`, and what stays in floating point.

    Raises:
        ModelError: the model is of no supported family, or has nothing that can be quantised.
    """
    return adapter_for(model).describe(model)


__all__ = ["Adapter", "adapter_for", "describe"]
