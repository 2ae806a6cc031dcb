"""Zeroed memory for linears whose channels several programs share (split K): partial sums, and a counter a tile.

A kernel leaves zeros behind, so the next launch on the same stream can use the same memory without clearing it: at
batch 1 the clearing would be every third launch. Memory is kept for the default stream alone. Who uses another may
give it a memory pool of its own, which then must not hold what outlives the call (`torch.compile` with CUDA graphs
warms up so, and checks): there every launch gets new zeros, at most about a megabyte. A CUDA graph may run beside other
streams' work, so the runner's has memory of its own, cleared once a replay.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_kept: dict[Any, Tensor] = {}
_thread = threading.local()


def split_scratch(x: Tensor, sums: int, tiles: int) -> tuple[Tensor, Tensor]:
    """int32 zeros [at least sums] and [at least tiles] on x's device, for a launch that leaves zeros behind."""
    pool: dict[Any, Tensor] | None = getattr(_thread, "own", None)
    if pool is None:
        pool = _kept if _in_order(x) else {}
    key = None if x.is_cuda else threading.get_ident()
    return _zeros(pool, ("sums", x.device, key), sums), _zeros(pool, ("tiles", x.device, key), tiles)


def _in_order(x: Tensor) -> bool:
    """True where launches on x's device wait for each other: on its default stream, and on a CPU."""
    return not x.is_cuda or torch.cuda.current_stream(x.device) == torch.cuda.default_stream(x.device)


@contextmanager
def own_scratch() -> Iterator[None]:
    """Within it, this thread's launches share memory that nothing else uses."""
    outer = getattr(_thread, "own", None)
    _thread.own = {}
    try:
        yield
    finally:
        _thread.own = outer


@contextmanager
def captured(run: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """What replays `run` as a CUDA graph, without the host between its launches; for timing.

    It runs once before, which compiles what it launches and clears the memory that split K shares: in a graph of the
    runner that happens once for all its launches, so here it is no part of the replay.
    """
    with own_scratch():
        run()
        torch.cuda.synchronize()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()  # torch's own is of the device that captured first
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):  # others may allocate meanwhile
            run()
        yield graph.replay


def _zeros(pool: dict[Any, Tensor], key: Any, size: int) -> Tensor:
    held = pool.get(key)
    if held is None or held.numel() < size:
        held = pool[key] = torch.zeros(size, dtype=torch.int32, device=key[1])
    return held
