"""The embedded default: a small Vision Transformer and the handwritten digits it was trained on, in one file.

`digits.npz` (written by `benchmarks/train_digits.py`) holds 1,797 images of 8×8 pixels with values 0…16, their labels,
a split into three disjoint parts, and the model's weights in fp16. It is there so that the whole job (calibrate,
compile, measure) can be tried with no network, no data set and no GPU. The model is a timm `VisionTransformer` like any
other: 16 patches of 2×2 pixels and a class token, six standard blocks, width 64.

    from lampq_rt.digits import load_digits, load_digits_model

    model = load_digits_model()
    images, labels = load_digits("test")
    accuracy = (model(images).argmax(1) == labels).float().mean()
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any, Literal, get_args

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

__all__ = ["MODEL_KWARGS", "Split", "load_digits", "load_digits_model", "normalize"]

Split = Literal["train", "calibration", "test"]

#: What `timm.models.vision_transformer.VisionTransformer` is built with.
MODEL_KWARGS: dict[str, Any] = {
    "img_size": 8,
    "patch_size": 2,
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 64,
    "depth": 6,
    "num_heads": 2,
}

_MAX_PIXEL = 16.0
_MEAN, _STD = 0.305, 0.376  # of all pixels / 16


def normalize(pixels: Tensor) -> Tensor:
    """Scales raw pixels to what the model was trained on.

    Args:
        pixels: [..., 8, 8], any dtype, values 0…16.

    Returns:
        Same shape, fp32, about zero mean and unit variance.
    """
    return (pixels.to(torch.float32) / _MAX_PIXEL - _MEAN) / _STD


def load_digits_model() -> VisionTransformer:
    """Builds the embedded Vision Transformer with its trained weights.

    Returns:
        The model in eval mode on the CPU, with fp32 parameters; [n, 1, 8, 8] fp32 images in, [n, 10] fp32 logits out.
    """
    model = VisionTransformer(**MODEL_KWARGS)
    with files(__name__).joinpath("digits.npz").open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        prefix = "model."
        state = {
            key.removeprefix(prefix): torch.from_numpy(arrays[key]).float() for key in arrays if key.startswith(prefix)
        }
    model.load_state_dict(state)
    return model.eval()


def load_digits(split: Split) -> tuple[Tensor, Tensor]:
    """Loads the images and labels of one part of the handwritten digits.

    Args:
        split: "train" (what the weights were fitted to), "calibration" (for the calibrator) or "test" (for accuracy).
            No image is in two of them.

    Returns:
        Images [n, 1, 8, 8] fp32, normalised, and labels [n] int64 of 0…9.

    Raises:
        ValueError: There is no such split.
    """
    if split not in get_args(Split):
        raise ValueError(f"no split {split!r} of the digits; there are {', '.join(get_args(Split))}")
    with files(__name__).joinpath("digits.npz").open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        index = arrays[f"split.{split}"]
        images, labels = arrays["images"][index], arrays["labels"][index]
    return normalize(torch.from_numpy(images).unsqueeze(1)), torch.from_numpy(labels.astype(np.int64))
