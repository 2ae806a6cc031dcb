"""Random changes of images that need no label: the floating-point model says what is right for what comes out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_CROP = 0.55
"""Least share of a side that a random crop keeps."""

LARGEST_ASPECT = 0.2
"""Greatest logarithm of a crop's change of aspect."""


def augmented(images: Tensor, draws: torch.Generator) -> Tensor:
    """fp32 [B, C, H, W], each image cropped, stretched and flipped at random, to the same size."""
    count = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=draws)

    side, stretch = uniform(SMALLEST_CROP, 1.0), uniform(-LARGEST_ASPECT, LARGEST_ASPECT).exp()
    place = torch.zeros(count, 2, 3)
    for axis, extent in enumerate(((side * stretch).clamp(max=1.0), (side / stretch).clamp(max=1.0))):
        place[:, axis, axis] = extent
        place[:, axis, 2] = uniform(-1.0, 1.0) * (1.0 - extent)
    place[:, 0, 0] *= torch.where(uniform(0.0, 1.0) < 0.5, -1.0, 1.0)
    grid = F.affine_grid(place, list(images.shape), align_corners=False).to(images.device)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
