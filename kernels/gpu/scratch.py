"""Zeroed memory for linears whose channels several programs share (split K): partial sums, and a counter a tile.

A kernel leaves zeros behind, so the next launch on the same stream can use the same memory without clearing it: at
batch 1 the clearing would be every third launch. A CUDA graph may run beside other streams' work, so it gets memory of
its own, cleared once a replay.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_by_stream: dict[Any, Tensor] = {}
_thread = threading.local()


def split_scratch(x: Tensor, sums: int, tiles: int) -> tuple[Tensor, Tensor]:
    """int32 zeros [at least sums] and [at least tiles] on x's device, for a launch that leaves zeros behind."""
    own: dict[Any, Tensor] | None = getattr(_thread, "own", None)
    if own is None and x.is_cuda and torch.cuda.is_current_stream_capturing():
        own = {}  # a capture that is not the runner's: nothing is known of what runs beside it
    key: Any = threading.get_ident()
    if x.is_cuda:
        key = torch.cuda.current_stream(x.device).cuda_stream
    pool = _by_stream if own is None else own
    return _zeros(pool, ("sums", x.device, key), sums), _zeros(pool, ("tiles", x.device, key), tiles)


@contextmanager
def own_scratch() -> Iterator[None]:
    """Within it, this thread's launches share memory that nothing else uses."""
    outer = getattr(_thread, "own", None)
    _thread.own = {}
    try:
        yield
    finally:
        _thread.own = outer


def _zeros(pool: dict[Any, Tensor], key: Any, size: int) -> Tensor:
    held = pool.get(key)
    if held is None or held.numel() < size:
        held = pool[key] = torch.zeros(size, dtype=torch.int32, device=key[1])
    return held
