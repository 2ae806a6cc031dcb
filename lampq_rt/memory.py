"""Memory of this process: how much a forward pass needs at its peak, and an allocator that treats all variants alike.

Peak memory on a CPU is the growth of the resident set from before a variant was built to the peak of a forward pass
after warm-up: weights, repacked weights and activations, not what a compiler needed for a while. On a GPU it is what
PyTorch's allocator has taken: what a CUDA graph needs between its kernels stays with its pool, but counts as free.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from lampq_rt.files import in_temporary_folder

_PROCESS = Path("/proc/self")

_ALIGNMENT = 64
"""Bytes; of PyTorch's own allocations on a CPU, too."""

_PAGED: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
"""The files that `paged` models lie in."""

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""Names and numbers from malloc.h."""


def keep_memory() -> bool:
    """Tell glibc to keep freed memory for the next forward pass. For the command line: it changes the whole process.

    Each layer allocates its activations, some MB, anew. By default glibc returns such blocks to the system at once, and
    a good part of every variant's time, most of all fp32's, goes into page faults.

    Returns:
        False where the C library is not glibc or refuses.
    """
    return _mallopt(_TRIM_THRESHOLD, 2**31 - 1) and _mallopt(_TOP_PAD, 64 << 20) and _mallopt(_MMAP_THRESHOLD, 32 << 20)


def return_memory() -> bool:
    """Tell glibc to hand every block of some MB back when it is freed. For the command line: it changes the process.

    By default glibc learns from the first large block that is freed to keep later ones of that size, and a calibration,
    whose large blocks are all of different sizes, fills its heap with holes: half as much memory again.

    Returns:
        False where the C library is not glibc or refuses.
    """
    return _mallopt(_MMAP_THRESHOLD, 1 << 20)


def _mallopt(option: int, value: int) -> bool:
    """Set an option of glibc's allocator."""
    try:
        return bool(ctypes.CDLL(None).mallopt(option, value) == 1)
    except (AttributeError, OSError, TypeError):
        return False


def forget() -> None:
    """Drop what the last contenders held, and hand free memory back, so that the next measurement starts low."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim()


def trim() -> None:
    """Hand free memory of the C library (glibc) and weights of `paged` models back to the system.

    Where results of a few kB are kept between temporaries of some MB, glibc's heap fills with holes that it neither
    uses again nor gives back: ten times what is alive, in a search of steps.
    """
    drop_pages()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # not glibc
        pass


def drop_pages() -> None:
    """Hand weights of `paged` models back to the system; they are read anew when they are asked for.

    Takes some microseconds, where `trim` may take milliseconds.
    """
    for file in list(_PAGED):
        if hasattr(mmap, "MADV_DONTNEED"):  # Linux and the like
            file.madvise(mmap.MADV_DONTNEED)


def drop_pages_behind(modules: Iterable[nn.Module]) -> None:
    """Call `drop_pages` whenever one of these has run, from now on."""
    for module in modules:
        module.register_forward_hook(lambda *_: drop_pages())


def paged(model: nn.Module) -> nn.Module:
    """`model`, its parameters moved to a temporary file that is mapped into memory: same values, same speed.

    What is read stays in memory until `drop_pages`, and the system may take it earlier: of a model that is run block
    by block, with `drop_pages` between them, one block is there at a time. The file goes with the last of its tensors.

    Args:
        model: on the CPU; changed in place.

    Raises:
        StorageError: the file cannot be written.
    """
    kept = {(p.data_ptr(), p.shape): p.data for p in model.parameters() if p.numel() and p.device.type == "cpu"}
    if not kept:
        return model
    places = dict[tuple[int, torch.Size], int]()
    with in_temporary_folder(), tempfile.TemporaryFile(prefix="lampq-") as file:
        for key, x in kept.items():
            file.write(b"\0" * (-file.tell() % _ALIGNMENT))
            places[key] = file.tell()
            file.write(x.detach().contiguous().flatten().view(torch.uint8).numpy().data)
        file.flush()
        mapped = mmap.mmap(file.fileno(), 0)
    _PAGED.add(mapped)
    for p in model.parameters():
        if (start := places.get((p.data_ptr(), p.shape))) is not None:
            p.data = torch.frombuffer(mapped, dtype=p.dtype, count=p.numel(), offset=start).view(p.shape)
    return model


class PeakMemory:
    """Peak memory of one variant; made before it is built.

    Attributes:
        peak_bytes: after `peak`; None where the system does not tell.
    """

    def __init__(self, device: torch.device) -> None:
        forget()
        self.device = device
        self.peak_bytes: int | None = None
        self.before = torch.cuda.memory_reserved(device) if device.type == "cuda" else _status("VmRSS")

    @contextmanager
    def peak(self) -> Iterator[None]:
        """Around a forward pass after warm-up."""
        forget()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            yield
            self.peak_bytes = torch.cuda.max_memory_reserved(self.device) - (self.before or 0)
            return
        try:
            (_PROCESS / "clear_refs").write_text("5")  # the peak starts again from here (Linux)
        except OSError:
            self.before = None
        yield
        highest = _status("VmHWM")
        self.peak_bytes = None if self.before is None or highest is None else max(0, highest - self.before)


def resident_bytes() -> int | None:
    """Peak resident set of the whole process since it was last reset; None where the system does not tell."""
    return _status("VmHWM")


def _status(key: str) -> int | None:
    """A size from /proc/self/status in bytes; None where there is no such file."""
    try:
        lines = (_PROCESS / "status").read_text().splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith(f"{key}:")), None)
    return int(found.split()[1]) * 1024 if found else None
