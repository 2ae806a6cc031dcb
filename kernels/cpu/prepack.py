"""Weights repacked for this machine, once, in a bounded cache beside the tensors they came from.

As module buffers they would break deepcopy, `.to` and export. An entry lives as long as its weight does, and is made
anew when one of the tensors it was made from was changed or replaced.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from torch import Tensor

from lampq_rt.kernels.cpu.program import keep

CACHE_ENTRIES = 1024
"""Repacked weights kept at once: enough for two ViT-giant models; the least recently used goes first."""

P = TypeVar("P")
Pack = Callable[[Tensor, Tensor, Tensor, "Tensor | None", "Tensor | None", "Tensor | None", "Tensor | None"], P]
"""Repacks a weight; see `prepacked` for its arguments. The result is a dataclass."""


@dataclass(frozen=True)
class _Entry:
    pack: Any
    sources: tuple[weakref.ref[Tensor] | None, ...]
    versions: tuple[tuple[int, int], ...]
    packed: Any


_cache: OrderedDict[int, _Entry] = OrderedDict()
_lock = threading.Lock()


def cached_bytes(weights: Iterable[Tensor] | None = None) -> int:
    """Bytes held beside weights as they are stored: each repacked, with its constants, scales and biases.

    Args:
        weights: `w_q` of the linears that are asked for, other tensors count nothing; None: all in this process.
    """
    with _lock:
        if weights is None:
            entries = list(_cache.values())
        else:
            asked = {id(w): w for w in weights}
            entries = [e for key, e in _cache.items() if key in asked and _same(e.sources[:1], (asked[key],))]
    return sum(_bytes(entry.packed) for entry in entries)


def prepacked(
    pack: Pack[P],
    w_q: Tensor,
    scale: Tensor,
    column: Tensor,
    bias: Tensor | None,
    out_inv_scale: Tensor | None = None,
    out_offset: Tensor | None = None,
    levels: Tensor | None = None,
) -> P:
    """What `pack` makes of these buffers, from the cache or made now.

    Args:
        pack: which layout.
        w_q: int8 [N, K], or uint8 [N, K/2] packed.
        scale: fp32 [N].
        column: int32 [N].
        bias: fp32 [N] or None.
        out_inv_scale: fp32 [N] where every output channel has a step of its own (qkv, and fc1 before such an fc2).
        out_offset: fp32 [N] where it has a zero-point of its own, too.
        levels: int8 [16] where the codes of a packed weight name levels (`reference.dense_weight`).
    """
    sources = (w_q, scale, column, bias, out_inv_scale, out_offset, levels)
    versions = tuple(_version(t) for t in sources)
    key = id(w_q)
    with _lock:
        entry = _cache.get(key)
        if entry is not None and entry.pack is pack and entry.versions == versions and _same(entry.sources, sources):
            _cache.move_to_end(key)
            return keep(entry.packed)  # type: ignore[no-any-return]
    made = pack(*sources)
    refs = tuple(None if t is None else weakref.ref(t) for t in sources)
    weakref.finalize(w_q, _forget, key, made)
    with _lock:
        _cache[key] = _Entry(pack, refs, versions, made)
        _cache.move_to_end(key)
        while len(_cache) > CACHE_ENTRIES:
            _cache.popitem(last=False)
    return keep(made)  # type: ignore[no-any-return]


def _forget(key: int, made: Any) -> None:
    """Drop the entry of a weight that no longer exists, unless its id has been taken over by another."""
    with _lock:
        entry = _cache.get(key)
        if entry is not None and entry.packed is made:
            del _cache[key]


def _bytes(packed: Any) -> int:
    """Of all tensors of what a `Pack` made."""
    tensors = [value for f in fields(packed) if isinstance(value := getattr(packed, f.name), Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def _version(tensor: Tensor | None) -> tuple[int, int]:
    if tensor is None:
        return (0, 0)
    return (tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version)


def _same(refs: tuple[weakref.ref[Tensor] | None, ...], tensors: tuple[Tensor | None, ...]) -> bool:
    return all((t is None) if r is None else (r() is t) for r, t in zip(refs, tensors, strict=True))
