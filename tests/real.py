"""Real weights and images, where they are: a folder named shared/data beside the checkout, or $LAMPQ_DATA."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lampq_rt import images, models

FOLDER = Path(os.environ.get("LAMPQ_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")

needs_data = [
    pytest.mark.data,
    pytest.mark.skipif(not FOLDER.is_dir(), reason="no real weights and images (shared/data or $LAMPQ_DATA) here"),
]


@cache
def model(name: str) -> nn.Module:
    """A timm model with its real weights, e.g. "deit_tiny_patch16_224"."""
    return models.load_model(name, FOLDER / "weights" / f"{name}.safetensors")


def calibration_images(name: str, count: int) -> Tensor:
    """fp32 [count, 3, 224, 224], preprocessed for that model."""
    files = images.choose(images.list_images(FOLDER / "calib1000"), count, seed=0)
    return images.load_images(files, images.preprocessing(name))


def evaluation_images(name: str, limit: int) -> tuple[Tensor, Tensor]:
    """Images that are in no calibration set, and their labels."""
    folder = FOLDER / "imagenet_dev1000"
    every = images.list_images(folder)
    files = images.spread(every, limit)
    labels = images.read_labels(folder / "labels.csv", folder, every, 1000)
    return images.load_images(files, images.preprocessing(name)), torch.tensor([labels[f] for f in files])
