"""A simulated model run from any of its blocks on, so that what changes late costs little to look at."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lampq_rt.calibrate.distributed import UNIT
from lampq_rt.memory import trim
from lampq_rt.simulate import Simulation


@dataclass(frozen=True)
class _Skip:
    """A block that hands on what it is given."""

    def __call__(self, x: Tensor, **extra: Any) -> Tensor:
        return x


class Replay:
    """Runs a model from any of its blocks on, on the residual stream that the blocks before it gave when this was made.

    Args:
        simulation: as it is set; blocks before the one that runs first must not have changed since.
        images: fp32 [n, C, H, W].
    """

    def __init__(self, simulation: Simulation, images: Tensor) -> None:
        self.simulation, self.images = simulation, images
        model: VisionTransformer = simulation.model
        self.blocks: list[nn.Module] = list(model.blocks)
        self.streams: list[list[Tensor]] = [[] for _ in self.blocks]
        with ExitStack() as hooks:
            for block, stream in zip(self.blocks, self.streams, strict=True):
                hooks.callback(block.register_forward_pre_hook(_keeping(stream)).remove)
            self._run(0, keep=True)

    def __call__(self, block: int | None) -> Tensor:
        """Logits [n, classes] from that block on; None: from the first."""
        return self._run(block or 0)

    def _run(self, first: int, keep: bool = False) -> Tensor:
        logits = []
        device = next(self.simulation.parameters()).device
        try:
            for block in self.blocks[:first]:
                block.forward = _Skip()  # type: ignore[method-assign]
            for number, batch in enumerate(self.images.split(UNIT)):
                with ExitStack() as hooks:
                    if not keep:
                        stream = self.streams[first][number]
                        hooks.callback(self.blocks[first].register_forward_pre_hook(_giving(stream)).remove)
                    logits.append(self.simulation(batch.to(device)).flatten(1).float())
                trim()
        finally:
            for block in self.blocks[:first]:
                del block.forward
        return torch.cat(logits)


def _keeping(stream: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def see(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        stream.append(inputs[0].detach())

    return see


def _giving(x: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def see(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (x, *inputs[1:])

    return see
