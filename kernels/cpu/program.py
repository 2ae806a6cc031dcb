"""Calls of the C++ kernels, recorded once and run again in one call: what CUDA graphs are on a GPU.

At batch 1 the Python between sixty kernels costs a small model a quarter of its time. `record` keeps every call that a
function makes with its addresses; the `Program` runs them again over the same memory, without Python. That is right
only where those calls are all that the function does, so a program proves itself: it must give the same bits as the
function for other numbers before it is used (`Program.of`).
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_thread = threading.local()

POINTERS, INTEGERS, FLOATS = 12, 10, 10


class _Call(ctypes.Structure):
    """`Call` of program.cpp: one kernel's arguments, by type, each in the order of the function's."""

    _fields_ = (
        ("function", ctypes.c_int64),
        ("pointers", ctypes.c_void_p * POINTERS),
        ("integers", ctypes.c_int64 * INTEGERS),
        ("floats", ctypes.c_float * FLOATS),
    )


class Recording:
    """The calls of one thread while it is active, and everything that must outlive them."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.kept: list[Any] = []


@contextmanager
def record() -> Iterator[Recording]:
    """Keep the calls that this thread makes within."""
    outer = getattr(_thread, "recording", None)
    _thread.recording = recording = Recording()
    try:
        yield recording
    finally:
        _thread.recording = outer


def note(name: str, args: tuple[Any, ...]) -> None:
    """Told of every call of a kernel."""
    recording = getattr(_thread, "recording", None)
    if recording is not None:
        recording.calls.append((name, args))


def keep(thing: Any) -> Any:
    """`thing`, which holds memory that kernels are given the address of; it lives as long as a recording needs it."""
    recording = getattr(_thread, "recording", None)
    if recording is not None:
        recording.kept.append(thing)
    return thing


class Program:
    """A recorded function of one tensor, for one shape and number of threads. Not for two threads at once.

    Attributes:
        input: where the argument is copied to.
        result: where the result is left; overwritten by the next call.
    """

    def __init__(self, library: ctypes.CDLL, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
        from lampq_rt.kernels.cpu.native import SIGNATURES

        self._library = library
        self.input = x.clone()
        with record() as recording:
            self.result = function(self.input)
        self._kept = recording.kept
        self._calls: Any = (_Call * len(recording.calls))()
        names = list(SIGNATURES)
        for place, (name, args) in enumerate(recording.calls):
            call = self._calls[place]
            call.function = names.index(name)
            used = {"pointers": 0, "integers": 0, "floats": 0}
            for kind, value in zip(SIGNATURES[name], args, strict=True):
                field = {ctypes.c_void_p: "pointers", ctypes.c_float: "floats"}.get(kind, "integers")
                getattr(call, field)[used[field]] = value
                used[field] += 1

    @classmethod
    def of(cls, library: ctypes.CDLL, function: Callable[[Tensor], Tensor], x: Tensor) -> Program | None:
        """A program for tensors like `x`, or None where calls of kernels are not all that `function` does.

        Args:
            library: the kernels.
            function: may write to its argument and return it.
            x: fp32, contiguous.
        """
        with torch.inference_mode(False), torch.no_grad():  # memory that may be written to in any mode
            program = cls(library, function, x)
            other = (x.flip(1) * 0.75).contiguous()
            return program if len(program._calls) and torch.equal(program(other), function(other.clone())) else None

    def __call__(self, x: Tensor) -> Tensor:
        """The function's result for `x`, of the recorded shape; a new tensor."""
        with torch.no_grad():
            self.input.copy_(x)
            self._library.lampq_run(self._calls, len(self._calls))
            return self.result.clone()
