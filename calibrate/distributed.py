"""Calibration images spread over processes: who has which, and the few collectives that put the answers together.

    torchrun --nproc-per-node 2 -m lampq_rt.calibrate MODEL --images DIR --mean-bits 4 --out X.plan

Images run in units of `UNIT`. A process has whole units, next to each other, so that every forward pass sees the same
batch whatever the number of processes; what is drawn depends on the seed and the image's number alone. Statistics are
gathered by image or unit, in the order of the images, and summed in fp64 after that, by every process alike: the plan
is that of a single process. What does not concern images (the search of steps) is spread over sites; the rest (scores,
allocation) every process does for itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lampq_rt.errors import DataError, LampqError

UNIT = 8
"""Images that run at once."""

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """This process among those that calibrate together.

    Attributes:
        rank: its number, from 0.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """True for the process that speaks and writes."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of all images, in whole units.

        Raises:
            DataError: there are fewer units than processes.
        """
        units = -(-len(items) // UNIT)
        if units < self.world:
            raise DataError(
                f"{len(items)} images are too few for {self.world} processes: each needs {UNIT}, the last at least one"
            )
        start, stop = (units * r // self.world for r in (self.rank, self.rank + 1))
        return list(items[start * UNIT : stop * UNIT])

    def objects(self, value: T) -> list[T]:
        """Every process's value, in their order; anything that can be pickled."""
        if self.world == 1:
            return [value]
        found: list[T] = [value] * self.world
        dist.all_gather_object(found, value)
        return found

    def gather(self, x: Tensor) -> Tensor:
        """All processes' rows, in their order: [n_r, ...] to [sum of n_r, ...], on the device of `x`."""
        if self.world == 1:
            return x
        counts = self.objects(len(x))
        moved = x.cuda() if dist.get_backend() == "nccl" else x.cpu()
        padded = moved.new_zeros(max(counts), *x.shape[1:])
        padded[: len(x)] = moved
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).to(x.device)

    def together(self, work: Callable[[], T]) -> T:
        """The result of `work`, which may fail in one process: then all raise that error and none waits for ever.

        Raises:
            LampqError: of the first process that had one.
        """
        error: LampqError | None = None
        try:
            result = work()
        except LampqError as caught:
            if self.world == 1:
                raise
            error = caught
        for failed in self.objects(None if error is None else (type(error), str(error))):
            if failed is not None:
                raise failed[0](failed[1])
        return result


SINGLE = Shard()


def current() -> Shard:
    """The process group that was set up, or a process of its own."""
    if not (dist.is_available() and dist.is_initialized()):
        return SINGLE
    return Shard(dist.get_rank(), dist.get_world_size())


def generator(seed: int, *keys: object) -> torch.Generator:
    """Random numbers that depend on the seed and the keys (an image's number, a site's name) alone."""
    digest = hashlib.sha256("|".join(map(str, (seed, *keys))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
