"""Samples on disk instead of in memory: hundreds of MB that are read back one site at a time.

The samples of a model of any size outweigh it (a thousand rows of every operand, with gradients as many again), but
no step of calibration looks at more than one site. They are written to a temporary folder as they come, exactly as
they are, and read back when they are asked for. The folder goes when nobody refers to it any more.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from lampq_rt.files import in_temporary_folder
from lampq_rt.plan import SiteParams

K = TypeVar("K")
T = TypeVar("T")

CODES = "weight.codes"


class Spill:
    """fp32 or int8 tensors by key, that grow along their first dimension. StorageError where the disk is full."""

    def __init__(self) -> None:
        with in_temporary_folder():
            self._folder = tempfile.TemporaryDirectory(prefix="lampq-", ignore_cleanup_errors=True)
        self._shapes: dict[str, list[int]] = {}
        self._like: dict[str, Tensor] = {}

    def append(self, key: str, x: Tensor) -> None:
        """Add rows [R, ...]: int8, or floating point, which is kept as fp32."""
        x = x.detach() if x.dtype == torch.int8 else x.detach().float()
        shape = self._shapes.setdefault(key, [0, *x.shape[1:]])
        assert shape[1:] == list(x.shape[1:]), (key, shape, x.shape)
        self._like[key] = x.new_empty(0)
        with in_temporary_folder(), self._path(key).open("ab") as file:
            file.write(x.cpu().contiguous().numpy().data)
        shape[0] += len(x)

    def replace(self, key: str, x: Tensor) -> None:
        """Put these rows in the place of those that are there."""
        self._shapes.pop(key, None)
        self._path(key).unlink(missing_ok=True)
        self.append(key, x)

    def __contains__(self, key: str) -> bool:
        return key in self._shapes

    def read(self, key: str) -> Tensor:
        """All rows so far, [R, ...], on the device that the last ones came from."""
        like = self._like[key]
        values = np.fromfile(self._path(key), dtype=np.int8 if like.dtype == torch.int8 else np.float32)
        return torch.from_numpy(values).view(self._shapes[key]).to(like.device)

    def _path(self, key: str) -> Path:
        return Path(self._folder.name) / key.replace("/", "_")


class Batches:
    """fp32 rows [R, K] by batch, in order: a single batch in memory, several on disk."""

    def __init__(self) -> None:
        self._whole: Tensor | None = None
        self._spill, self._count = Spill(), 0

    def append(self, rows: Tensor, whole: bool) -> None:
        """Add a batch; `whole` says that it is the only one."""
        if whole:
            self._whole = rows
        else:
            self._spill.append(str(self._count), rows)
            self._count += 1

    def __iter__(self) -> Iterator[Tensor]:
        """The batches, one at a time."""
        if self._whole is not None:
            yield self._whole
        for number in range(self._count):
            yield self._spill.read(str(number))

    def clear(self) -> None:
        """Forget them."""
        self._whole, self._spill, self._count = None, Spill(), 0


class Shelf:
    """Formats and steps by key; where they hold codes of a weight, a quarter of it in fp32, those wait on disk."""

    def __init__(self) -> None:
        self._params: dict[str, SiteParams] = {}
        self._codes = Spill()

    def put(self, key: str, params: SiteParams) -> None:
        """Keep `params`."""
        tensors = dict(params.tensors)
        codes = tensors.pop(CODES, None)
        if codes is not None:
            self._codes.replace(key, codes)
        self._params[key] = replace(params, tensors=tensors)

    def get(self, key: str) -> SiteParams:
        """What was put there, its codes read anew."""
        params = self._params[key]
        return (
            replace(params, tensors={**params.tensors, CODES: self._codes.read(key)}) if key in self._codes else params
        )

    def __contains__(self, key: str) -> bool:
        return key in self._params


class Lazy(Mapping[K, T]):
    """A mapping whose values are made anew each time they are asked for.

    Args:
        names: the keys, in order.
        make: the value of a key.
    """

    def __init__(self, names: Sequence[K], make: Callable[[K], T]) -> None:
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: K) -> T:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[K]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
