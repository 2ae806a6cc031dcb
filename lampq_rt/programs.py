"""Runs of blocks on a CPU without Python between the kernels, where that is worth it: small batches of small models.

The first call of a shape runs as it is, the second is recorded (`lampq_rt.kernels.cpu.program`), later ones replay.
Every thread that calls at the same time has a program of its own. A program is made anew when a weight was changed in
place, and none is used while calls are traced or seen by a dispatch mode.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

MOST_BYTES = 32 << 20
"""Of intermediates that a program keeps; beyond, Python's share of the time is small."""

MOST_SHAPES = 4
"""Shapes that are remembered; the oldest goes first."""

Function = Callable[[Tensor], Tensor]


class Programs:
    """The programs of one run of blocks.

    Args:
        owner: whose parameters and buffers the function reads.
        possible: False where the function does more than call kernels.
    """

    def __init__(self, owner: nn.Module, possible: bool) -> None:
        self._possible = possible
        self._owner = [owner]  # in a list: a module among its own modules would have no end
        self._lock = threading.Lock()
        self._free: dict[Any, list[Any] | None] = {}  # None: no program can serve that shape
        self._holders: list[Mapping[str, Tensor | None]] = []
        self._seen: tuple[int, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Programs:
        """Of the copied blocks, without programs."""
        return Programs(copy.deepcopy(self._owner[0], memo), self._possible)

    def __getstate__(self) -> dict[str, Any]:
        """Programs hold addresses: none is pickled."""
        return {"_possible": self._possible, "_owner": self._owner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_owner"][0], state["_possible"])  # type: ignore[misc]

    def forget(self) -> None:
        """Drop all programs: the weights are others, or elsewhere."""
        with self._lock:
            self._free.clear()
            self._holders = []

    def serves(self, x: Tensor) -> bool:
        """True where a program may run `x`."""
        if not self._possible or x.device.type != "cpu" or x.dtype != torch.float32 or not x.numel():
            return False
        if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None or x.requires_grad:
            return False
        return type(x) is Tensor and self._bytes(x) <= MOST_BYTES

    def __call__(self, x: Tensor, function: Function) -> Tensor:
        """function(x), which may write to its argument; `x` is left as it is."""
        from lampq_rt.kernels.cpu import native, program

        library = native.library()
        key = (tuple(x.shape), torch.get_num_threads())
        with self._lock:
            self._check_weights()
            first = key not in self._free
            if first:
                if len(self._free) >= MOST_SHAPES:
                    del self._free[next(iter(self._free))]
                self._free[key] = []
            free = self._free[key]
            mine = free.pop() if free else None
        if library is None or first or free is None:
            return function(x.clone())
        if mine is None:
            mine = program.Program.of(library, function, x.contiguous())
            if mine is None:
                with self._lock:
                    self._free[key] = None
                return function(x.clone())
        result: Tensor = mine(x)
        with self._lock:
            if self._free.get(key) is free:
                free.append(mine)
        return result

    def _check_weights(self) -> None:
        """Forget programs whose weights were changed or replaced since."""
        if not self._holders:
            modules = list(self._owner[0].modules())
            self._holders = [d for m in modules for d in (m._parameters, m._buffers) if d]
        tensors = [t for holder in self._holders for t in holder.values() if t is not None]
        seen = tuple([id(t) + (0 if t.is_inference() else t._version) for t in tensors])
        if seen != self._seen:
            self._free.clear()
            self._seen = seen

    def _bytes(self, x: Tensor) -> int:
        """About what a program for `x` keeps: codes of qkv (twice), attention, hidden layer, norms of each block."""
        return 14 * x.numel() * len(list(self._owner[0].children()))
