"""What every compiled model must pass, whatever its formats: torch.compile in one graph, and torch.export."""

from __future__ import annotations

import io

import torch
from torch import Tensor, nn


def exports_with_dynamic_batch(fast: nn.Module, images: Tensor) -> None:
    """Export with a dynamic batch, save, load, and compare at two sizes."""
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(fast, (images,), dynamic_shapes={"images": {0: batch}})
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for n in (1, 4):
        torch.testing.assert_close(loaded(images[:n]), fast(images[:n]))


def traces_in_one_graph(fast: nn.Module, images: Tensor) -> None:
    """`torch.compile` without a break, at two batch sizes."""
    with torch.inference_mode():
        wanted = fast(images)
    with torch.no_grad():
        traced = torch.compile(fast, fullgraph=True, dynamic=True)
        torch.testing.assert_close(traced(images), wanted, rtol=0.05, atol=0.05)
        torch.testing.assert_close(traced(images[:3]), wanted[:3], rtol=0.05, atol=0.05)
