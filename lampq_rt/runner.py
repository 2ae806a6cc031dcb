"""Runs a model on a GPU as CUDA graphs, one per batch bucket: at small batches the launches cost more than the kernels.

A batch is padded to the next bucket; a larger one than the largest bucket runs in pieces. Kernels are warmed up
before a capture (compiling or tuning inside one would invalidate it), all graphs of a model share one memory pool, and
the result is copied out of it, so that a second call cannot overwrite what the caller still holds. Threads and streams
may call at once: launches are serialised by a lock and, on the device, by an event that the next call's stream waits
for. Models share nothing but the lock under which one of them captures. Where memory does not suffice for a graph, that
bucket runs without one.

Inside a graph a large bucket may run in micro-batches, so that what one kernel writes is still in the L2 cache when
the next one reads it (`micro_batch_for`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lampq_rt.kernels.gpu.scratch import own_scratch

logger = logging.getLogger(__name__)

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
WARM_UP_CALLS = 2
L2_SHARE = 0.6
"""Part of the L2 cache that a kernel's input and output may take; the rest is for weights. Not yet measured."""
LEAST_MICRO_BATCH = 64
"""Fewer images than this leave processors idle: such a model runs its bucket whole. Not yet measured."""

Function = Callable[[Tensor], Tensor]

_capturing = threading.Lock()
"""Held while a runner prepares and captures: each synchronises the device, which would break another's capture."""


class Capture(Protocol):
    """What the runner asks of a device; `CudaCapture` is the real one."""

    def on(self, device: torch.device) -> AbstractContextManager[Any]:
        """Make `device` the calling thread's own."""
        ...

    def warm_up(self, call: Callable[[], object]) -> None:
        """Run `call` as often as it takes until nothing is compiled any more, beside the current stream."""
        ...

    def record(self, call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor, int]:
        """Record what `call` launches.

        Returns:
            What launches it again, the tensor that then holds the result, and the bytes that the memory pool grew by.
        """
        ...

    def mark(self) -> Any:
        """An event at this place of the current stream."""
        ...

    def wait(self, event: Any) -> None:
        """Let the current stream wait for `event`."""
        ...


@dataclass(frozen=True)
class _Own:
    """What one runner has on one device.

    Attributes:
        warm_up: stream that kernels run on before a capture.
        record: stream that is captured; graphs that share a pool must share it, too.
        pool: memory pool of the graphs.
    """

    warm_up: torch.cuda.Stream
    record: torch.cuda.Stream
    pool: Any


class CudaCapture:
    """CUDA graphs that share, on each device, a memory pool and a stream, and none of them with other runners.

    torch's own capture stream is one for the whole process, on the device that captured first. What is captured on one
    stream also shares a workspace of cuBLAS, which models that replay side by side must not. It has to come out of the
    graphs' pool (outside, torch may free it while graphs hold its address), so nothing is warmed up on that stream.
    """

    def __init__(self) -> None:
        self._by_device: dict[int, _Own] = {}

    def on(self, device: torch.device) -> AbstractContextManager[Any]:
        """See `Capture`."""
        return torch.cuda.device(device)

    def warm_up(self, call: Callable[[], object]) -> None:
        """See `Capture`."""
        side = self._own().warm_up
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_CALLS):
                call()
        torch.cuda.current_stream().wait_stream(side)

    def record(self, call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor, int]:
        """See `Capture`; after a failure the next graph starts anew, with other streams and another pool."""
        outer, own = torch.cuda.current_stream(), self._own()
        torch.cuda.empty_cache()  # as the capture would, so that what is reserved grows by the pool alone
        before = torch.cuda.memory_reserved()
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate in the meantime.
        capture = torch.cuda.graph(graph, pool=own.pool, stream=own.record, capture_error_mode="thread_local")
        try:
            with capture, own_scratch():
                result = call()
        except BaseException:
            del self._by_device[torch.cuda.current_device()]
            torch.cuda.set_stream(outer)  # a capture that cannot end leaves its own stream current
            raise
        return graph.replay, result, max(0, torch.cuda.memory_reserved() - before)

    def _own(self) -> _Own:
        """On the current device."""
        device = torch.cuda.current_device()
        if device not in self._by_device:
            streams = torch.cuda.Stream(device), torch.cuda.Stream(device)
            self._by_device[device] = _Own(*streams, torch.cuda.graph_pool_handle())
        return self._by_device[device]

    def mark(self) -> torch.cuda.Event:
        """See `Capture`."""
        return torch.cuda.current_stream().record_event()

    def wait(self, event: torch.cuda.Event) -> None:
        """See `Capture`."""
        torch.cuda.current_stream().wait_event(event)


@dataclass(frozen=True)
class Graph:
    """A captured batch size with its static buffers."""

    replay: Callable[[], None]
    images: Tensor
    result: Tensor
    pool_bytes: int


class GraphRunner:
    """Calls `function` through CUDA graphs.

    Args:
        function: images [B, C, H, W] to one tensor with B rows, on the GPU, without host synchronisation.
        buckets: batch sizes to capture, ascending; each on its first use.
        micro_batch: images that go through `function` at once inside a graph; None for the whole bucket.
        before_capture: called with every batch that the kernels will see, before a bucket's first run.
        capture: how to record; CUDA graphs by default.
    """

    def __init__(
        self,
        function: Function,
        buckets: tuple[int, ...] = BUCKETS,
        *,
        micro_batch: int | None = None,
        before_capture: Callable[[Tensor], None] | None = None,
        capture: Capture | None = None,
    ) -> None:
        if micro_batch is not None and micro_batch < 1:
            raise ValueError(f"micro_batch is {micro_batch}; at least 1 image, or None for whole batches")
        self.function = function
        self.buckets = tuple(sorted(buckets))
        self.micro_batch = micro_batch
        self._before_capture = before_capture
        self._capture: Capture = capture or CudaCapture()
        self._graphs: dict[tuple[Any, ...], Graph | None] = {}  # None: runs without one
        self._lock = threading.Lock()
        self._finished: Any = None

    def __call__(self, images: Tensor) -> Tensor:
        """The function's result for CUDA `images`; rows beyond the batch are never seen by the caller."""
        # Static buffers made in inference mode could not be written outside it.
        with torch.inference_mode(False), torch.no_grad():
            pieces = images.split(self.buckets[-1])
            results = [self._run(piece) for piece in pieces]
            return results[0] if len(results) == 1 else torch.cat(results)

    @property
    def memory_bytes(self) -> int:
        """Bytes that the graphs hold: the memory pool of their results and intermediates, and static inputs."""
        graphs = [graph for graph in list(self._graphs.values()) if graph is not None]
        return sum(g.pool_bytes + g.images.numel() * g.images.element_size() for g in graphs)

    def bucket(self, batch: int) -> int:
        """The captured batch size that serves `batch` images."""
        return next(b for b in self.buckets if b >= batch)

    def _run(self, images: Tensor) -> Tensor:
        batch = len(images)
        if batch == 0:
            return self.function(images)
        key = (self.bucket(batch), images.device, images.dtype, tuple(images.shape[1:]))
        with self._lock, self._capture.on(images.device):
            if self._finished is not None:
                self._capture.wait(self._finished)
            try:
                graph = self._graph(key, images)
                if graph is None:
                    return self._in_micro_batches(images)
                graph.images[:batch].copy_(images)
                graph.replay()
                return graph.result[:batch].clone()
            finally:
                self._finished = self._capture.mark()

    def _graph(self, key: tuple[Any, ...], images: Tensor) -> Graph | None:
        """The graph of a bucket, captured on its first use; None where there is no memory for one."""
        if key not in self._graphs:
            try:
                self._graphs[key] = self._captured(images, key[0])
            except Exception as error:
                if not _out_of_memory(error):
                    raise
                if None not in self._graphs.values():
                    logger.warning("no memory for a CUDA graph of %d images: they run without one, slower", key[0])
                self._graphs[key] = None
        return self._graphs[key]

    def _captured(self, images: Tensor, bucket: int) -> Graph:
        static = images.new_zeros((bucket, *images.shape[1:]))
        static[: len(images)].copy_(images)
        with _capturing:
            if self._before_capture is not None:
                for size in dict.fromkeys(len(piece) for piece in self._pieces(static)):
                    self._before_capture(static[:size])
            self._capture.warm_up(lambda: self._in_micro_batches(static))
            replay, result, pool_bytes = self._capture.record(lambda: self._in_micro_batches(static))
        return Graph(replay, static, result, pool_bytes)

    def _pieces(self, images: Tensor) -> Iterator[Tensor]:
        yield from images.split(min(self.micro_batch or len(images), len(images)))

    def _in_micro_batches(self, images: Tensor) -> Tensor:
        """The function's result; one piece's intermediates take the memory of the piece before."""
        result, row = None, 0
        for piece in self._pieces(images):
            part = self.function(piece)
            if len(part) == len(images):
                return part
            if result is None:
                result = part.new_empty((len(images), *part.shape[1:]))
            result[row : row + len(part)].copy_(part)
            row += len(part)
        assert result is not None
        return result


def micro_batch_for(image_bytes: int, l2_bytes: int) -> int | None:
    """Images that may go through the kernels at once so that one's output stays in L2 for the next; a power of two.

    A rule from a model of the cache, not from a measurement: input and output of the widest linear take `L2_SHARE` of
    L2. None (no micro-batches) where that leaves fewer than `LEAST_MICRO_BATCH` images.

    Args:
        image_bytes: input and output of the widest linear, for one image.
        l2_bytes: size of the L2 cache; 0 where it is not known.
    """
    fits = int(L2_SHARE * l2_bytes) // max(image_bytes, 1)
    return 1 << (fits.bit_length() - 1) if fits >= LEAST_MICRO_BATCH else None


def l2_bytes(device: torch.device | None = None) -> int:
    """Size of a GPU's L2 cache, by default the current one's; 0 where there is none or it does not tell."""
    if not torch.cuda.is_available():
        return 0
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))


def _out_of_memory(error: BaseException | None) -> bool:
    """True where `error` is, or came up while handling, a lack of GPU memory: ending a capture can fail after it."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False
