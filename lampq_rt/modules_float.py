"""What a plan leaves in floating point: the residual stream, and modules between integer ones ("islands").

On a GPU both have the plan's `residual_dtype`, so that a 16-bit layer runs on half-precision tensor cores, needs no
conversion to its neighbours, and takes two bytes a weight. On a CPU both are fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from lampq_rt.modules import QuantizingNorm

P = TypeVar("P", bound="Part")


@dataclass(frozen=True)
class Stream:
    """Precision of the residual stream and of islands, by device.

    Attributes:
        gpu: dtype on a GPU (and on the meta device, which stands for one): the plan's `residual_dtype`.
        cpu: dtype on a CPU.
    """

    gpu: torch.dtype = torch.float16
    cpu: torch.dtype = torch.float32

    def dtype(self, device: torch.device) -> torch.dtype:
        """The dtype on `device`."""
        return self.cpu if device.type == "cpu" else self.gpu


Advanced = tuple[Tensor, Tensor | None]
"""The new residual stream, and what enters the follower (None without one)."""


class Part(nn.Module):
    """Half a block: x += f(norm(x)). The norm is run by whoever wrote x last, so that one kernel can do both.

    Islands change precision when they move to a device that has another. Moving from a CPU to a GPU rounds their
    weights; moving back widens them again, without what the rounding took.
    """

    norm: nn.Module
    stream: Stream

    @property
    def reader(self) -> nn.Module:
        """The layer that `enter`'s result is for."""
        raise NotImplementedError

    @property
    def only_kernels(self) -> bool:
        """True where calls of kernels are all that `advance` and `enter` do on a CPU."""
        return False

    def advance(self, x: Tensor, normed: Tensor, follower: Part | None) -> Advanced:
        """Add to the residual stream and normalise it for the next part.

        Args:
            x: floating point [B, N, D]; its memory may be overwritten.
            normed: what `enter` makes of x.
            follower: the next part, or None.
        """
        raise NotImplementedError

    def enter(self, x: Tensor) -> Tensor:
        """Norm of x: codes where the norm gives codes, else in the islands' precision."""
        norm = self.norm
        return norm(x, self.reader) if isinstance(norm, QuantizingNorm) else norm(x.to(self.island(x)))

    def islands(self) -> Iterable[nn.Module]:
        """The modules that run in the stream's precision."""
        raise NotImplementedError

    def island(self, x: Tensor) -> torch.dtype:
        """Precision of the islands where `x` lies."""
        return self.stream.dtype(x.device)

    def _apply(self: P, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> P:
        super()._apply(fn, recurse)
        for module in self.islands():
            weight = next(module.parameters(), None)
            if weight is not None:
                module.to(self.stream.dtype(weight.device))
        return self
