"""Trains the embedded default: a small Vision Transformer on scikit-learn's handwritten digits.

    python benchmarks/train_digits.py --out lampq_rt/digits/digits.npz

1,100 images of 8×8 pixels are few for a transformer. What helps: linears that start at Xavier's width (timm's 0.02 is
meant for wider models), most images of a batch turned, scaled and shifted a little, and a moving average of the weights
over the last steps. Same seed, machine and thread count: same file. Two minutes on one core. scikit-learn is needed
here only; the file carries the digits themselves, so the installed package does without.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.progress import track
from sklearn.datasets import load_digits as sklearn_digits
from sklearn.model_selection import train_test_split
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lampq_rt.digits import MODEL_KWARGS, normalize

CALIBRATION_IMAGES, TEST_IMAGES = 100, 597


def split_indices(labels: NDArray[np.uint8], seed: int) -> dict[str, NDArray[np.int16]]:
    """Divides the images into train, calibration and test, each with every digit in the same share."""
    rest, test = train_test_split(np.arange(len(labels)), test_size=TEST_IMAGES, stratify=labels, random_state=seed)
    train, calibration = train_test_split(rest, test_size=CALIBRATION_IMAGES, stratify=labels[rest], random_state=seed)
    return {
        name: np.sort(index).astype(np.int16)
        for name, index in {"train": train, "calibration": calibration, "test": test}.items()
    }


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Turns (±11°), scales (±10 %), shifts (±1 pixel) and adds a little noise to seven images of ten.

    On so small images this is much: done to every image, the model never fits the plain ones (97 % instead of 99 %).

    Args:
        pixels: [n, 1, 8, 8] fp32, values 0…16.
        generator: Where the random numbers come from.

    Returns:
        Same shape and range.
    """
    count = len(pixels)
    angle, scale, shift_x, shift_y = (torch.rand(4, count, generator=generator) * 2 - 1).unbind()
    angle, scale = 0.2 * angle, 1 + 0.1 * scale
    pixel = 2 / pixels.shape[-1]  # in the coordinates of affine_grid, -1…1
    cos, sin = scale * torch.cos(angle), scale * torch.sin(angle)
    theta = torch.stack([cos, -sin, pixel * shift_x, sin, cos, pixel * shift_y], 1).view(count, 2, 3)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels, grid, mode="bilinear", align_corners=False)
    moved = (moved + 0.5 * torch.randn(moved.shape, generator=generator)).clamp_(0, 16)
    return torch.where(torch.rand(count, 1, 1, 1, generator=generator) < 0.7, moved, pixels)


def train(pixels: Tensor, labels: Tensor, epochs: int, batch_size: int, seed: int) -> nn.Module:
    """Fits the model with AdamW, a warm-up and a cosine, and returns the moving average of its weights."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = VisionTransformer(**MODEL_KWARGS, drop_path_rate=0.1).train()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05, betas=(0.9, 0.98))
    steps_per_epoch = len(pixels) // batch_size
    total, warmup = epochs * steps_per_epoch, 5 * steps_per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / (total - warmup)))),
    )
    for _ in track(range(epochs), description="training"):
        order = torch.randperm(len(pixels), generator=generator)
        for batch in order[: steps_per_epoch * batch_size].view(-1, batch_size):
            logits = model(normalize(augment(pixels[batch], generator)))
            loss = F.cross_entropy(logits, labels[batch], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
    return average.module.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in percent."""
    return 100 * (model(normalize(pixels)).argmax(1) == labels).float().mean().item()


def main(
    out: Annotated[Path, typer.Option(help="The .npz file to write.")] = Path("lampq_rt/digits/digits.npz"),
    epochs: Annotated[int, typer.Option(min=6, help="Passes over the training images.")] = 120,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a step.")] = 32,
    seed: Annotated[int, typer.Option(help="Of the split, the first weights and the augmentation.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
) -> None:
    """Train the embedded digits model and write it, with the digits, to one file."""
    torch.set_num_threads(threads)
    digits = sklearn_digits()
    images, labels = digits.images.astype(np.uint8), digits.target.astype(np.uint8)  # [1797, 8, 8], [1797]
    splits = split_indices(labels, seed)
    pixels, targets = torch.from_numpy(images).float().unsqueeze(1), torch.from_numpy(labels).long()
    parts = {name: torch.from_numpy(index).long() for name, index in splits.items()}

    model = train(pixels[parts["train"]], targets[parts["train"]], epochs, batch_size, seed)
    model = model.half().float()  # what is measured is what is written
    state = {f"model.{name}": tensor.half().numpy() for name, tensor in model.state_dict().items()}
    arrays = {"images": images, "labels": labels, **{f"split.{name}": index for name, index in splits.items()}, **state}
    temporary = out.with_name(f".{out.name}.tmp")
    with temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
    os.replace(temporary, out)

    for name, index in parts.items():
        print(f"{name:<12} {len(index):>5} images   top-1 {accuracy(model, pixels[index], targets[index]):6.2f} %")
    print(f"{out}: {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    typer.run(main)
