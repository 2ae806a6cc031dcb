"""Runs a model on a GPU as CUDA graphs, one per batch bucket: at small batches the launches cost more than the kernels.

A batch is padded to the next bucket; a larger one than the largest bucket runs in pieces. Kernels are warmed up
before a capture (compiling or tuning inside one would invalidate it), all graphs share one memory pool, and the
result is copied out of it, so that a second call cannot overwrite what the caller still holds. Threads and streams
may call at once: launches are serialised by a lock and, on the device, by an event that the next call's stream waits
for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
WARM_UP_CALLS = 2


@dataclass(frozen=True)
class Graph:
    """A captured batch size with its static buffers."""

    graph: torch.cuda.CUDAGraph
    images: Tensor
    result: Tensor


class GraphRunner:
    """Calls `function` through CUDA graphs.

    Args:
        function: images [B, C, H, W] to one tensor with B rows, on the GPU, without host synchronisation.
        buckets: batch sizes to capture, ascending; each on its first use.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], buckets: tuple[int, ...] = BUCKETS) -> None:
        self.function = function
        self.buckets = tuple(sorted(buckets))
        self._graphs: dict[tuple[Any, ...], Graph] = {}
        self._pool: Any = None
        self._lock = threading.Lock()
        self._finished: torch.cuda.Event | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """The function's result for CUDA `images`; rows beyond the batch are never seen by the caller."""
        pieces = images.split(self.buckets[-1])
        results = [self._run(piece) for piece in pieces]
        return results[0] if len(results) == 1 else torch.cat(results)

    @property
    def memory_bytes(self) -> int:
        """Bytes of the static input and output buffers of all graphs; intermediates lie in the pool they share."""
        return sum(t.numel() * t.element_size() for g in self._graphs.values() for t in (g.images, g.result))

    def bucket(self, batch: int) -> int:
        """The captured batch size that serves `batch` images."""
        return next(b for b in self.buckets if b >= batch)

    def _run(self, images: Tensor) -> Tensor:
        batch = len(images)
        if batch == 0:
            return self.function(images)
        key = (self.bucket(batch), images.device, images.dtype, tuple(images.shape[1:]))
        with self._lock, torch.cuda.device(images.device):
            stream = torch.cuda.current_stream()
            if self._finished is not None:
                stream.wait_event(self._finished)
            captured = self._graphs.get(key)
            if captured is None:
                captured = self._graphs[key] = self._capture(images, key[0])
            captured.images[:batch].copy_(images)
            captured.graph.replay()
            result = captured.result[:batch].clone()
            self._finished = stream.record_event()
            return result

    def _capture(self, images: Tensor, bucket: int) -> Graph:
        static = images.new_zeros((bucket, *images.shape[1:]))
        static[: len(images)].copy_(images)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_CALLS):
                self.function(static)
        torch.cuda.current_stream().wait_stream(side)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = self.function(static)
        return Graph(graph, static, result)
