"""Linears on codes through oneDNN: u8 activations, s8 weights, scale, bias, GELU and requantisation in one call.

oneDNN reads activations as code + 128 with zero-point 128, so that products are those of the signed code; the plan's
own zero-point is in `column` and is folded into the bias here. Weights are repacked for the machine once and kept in
a bounded cache beside the tensor they came from: as module buffers they would break deepcopy, `.to` and export.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from lampq_rt.kernels import reference
from lampq_rt.kernels.cpu.machine import has_vnni

CACHE_ENTRIES = 1024
"""Repacked weights kept at once: enough for two ViT-giant models; the least recently used goes first."""


@dataclass(frozen=True)
class Packed:
    """A weight as oneDNN wants it.

    Attributes:
        weight: opaque, blocked for this machine; dense fp32 [N, K] codes on a CPU without VNNI.
        scale: fp32 [N], dequantisation (times 1/step of the output for `per_channel_out`).
        zero_points: int32 [N], zeros.
        bias: fp32 [N], with the column constant folded in.
    """

    weight: Tensor
    scale: Tensor
    zero_points: Tensor
    bias: Tensor


@dataclass(frozen=True)
class _Entry:
    sources: tuple[weakref.ref[Tensor] | None, ...]
    versions: tuple[tuple[int, int], ...]
    packed: Packed


_cache: OrderedDict[int, _Entry] = OrderedDict()
_lock = threading.Lock()


def cached_bytes() -> int:
    """Bytes held by repacked weights, for memory reports."""
    with _lock:
        return sum(e.packed.weight.numel() * e.packed.weight.element_size() for e in _cache.values())


def packed(
    w_q: Tensor, scale: Tensor, column: Tensor, bias: Tensor | None, out_inv_scale: Tensor | None = None
) -> Packed:
    """The repacked weight of these buffers, from the cache or made now.

    Args:
        w_q: int8 [N, K], or uint8 [N, K/2] packed.
        scale: fp32 [N].
        column: int32 [N].
        bias: fp32 [N] or None.
        out_inv_scale: fp32 [N] where every output channel has a step of its own (qkv), folded into scale and bias.
    """
    sources = (w_q, scale, column, bias, out_inv_scale)
    versions = tuple(_version(t) for t in sources)
    key = id(w_q)
    with _lock:
        entry = _cache.get(key)
        if entry is not None and entry.versions == versions and _same(entry.sources, sources):
            _cache.move_to_end(key)
            return entry.packed
    made = _pack(w_q, scale, column, bias, out_inv_scale)
    refs = tuple(None if t is None else weakref.ref(t) for t in sources)
    weakref.finalize(w_q, _forget, key, made)
    with _lock:
        _cache[key] = _Entry(refs, versions, made)
        _cache.move_to_end(key)
        while len(_cache) > CACHE_ENTRIES:
            _cache.popitem(last=False)
    return made


def _forget(key: int, made: Packed) -> None:
    """Drop the entry of a weight that no longer exists, unless its id has been taken over by another."""
    with _lock:
        entry = _cache.get(key)
        if entry is not None and entry.packed is made:
            del _cache[key]


def _version(tensor: Tensor | None) -> tuple[int, int]:
    if tensor is None:
        return (0, 0)
    return (tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version)


def _same(refs: tuple[weakref.ref[Tensor] | None, ...], tensors: tuple[Tensor | None, ...]) -> bool:
    return all((t is None) if r is None else (r() is t) for r, t in zip(refs, tensors, strict=True))


def _pack(w_q: Tensor, scale: Tensor, column: Tensor, bias: Tensor | None, out_inv_scale: Tensor | None) -> Packed:
    dense = reference.dense_weight(w_q).contiguous()
    full_bias = column.double() * scale.double()
    if bias is not None:
        full_bias += bias.double()
    if out_inv_scale is not None:
        full_bias *= out_inv_scale.double()
        scale = (scale.double() * out_inv_scale.double()).float()
    weight = torch.ops.onednn.qlinear_prepack(dense, None) if has_vnni() else dense.float()
    # A copy: oneDNN reads these long after the caller may have changed its buffers.
    return Packed(weight, scale.clone(), torch.zeros(len(dense), dtype=torch.int32), full_bias.float())


def linear(
    x_q: Tensor, weight: Packed, activation: str, out_scale: float, out_zero_point: int, dtype: torch.dtype
) -> Tensor:
    """[..., K] codes to [..., N]: int8, uint8 (code + 128) or fp32. Codes saturate at 8 bits.

    Args:
        x_q: uint8 or int8 container.
        weight: from `packed`.
        activation: "none" or "gelu".
        out_scale: step of the result; 1.0 for fp32.
        out_zero_point: as stored, that is with 128 added for uint8.
        dtype: of the result.
    """
    x = unsigned(x_q)
    shape = (*x.shape[:-1], len(weight.scale))
    rows = x.reshape(-1, x.shape[-1])
    if not has_vnni():
        return _linear_floating(rows, weight, activation, out_scale, out_zero_point, dtype).view(shape)
    algorithm = "none" if activation == "gelu" else ""
    y = torch.ops.onednn.qlinear_pointwise(
        rows, 1.0, reference.OFFSET, weight.weight, weight.scale, weight.zero_points, weight.bias,
        out_scale, out_zero_point, dtype, activation, [], algorithm,
    )  # fmt: skip
    return y.view(shape)


def linear_add_(x: Tensor, x_q: Tensor, weight: Packed) -> None:
    """x += the linear's fp32 result, in the matmul's own call; `x` fp32, contiguous."""
    codes = unsigned(x_q)
    rows, target = codes.reshape(-1, codes.shape[-1]), x.view(-1, x.shape[-1])
    if not has_vnni():
        target.add_(_linear_floating(rows, weight, "none", 1.0, 0, torch.float32))
        return
    torch.ops.onednn.qlinear_pointwise.binary(
        rows, 1.0, reference.OFFSET, weight.weight, weight.scale, weight.zero_points, target, weight.bias,
        1.0, 0, torch.float32, 1.0, 0, "sum", 1.0, "none", [], "",
    )  # fmt: skip


def unsigned(x_q: Tensor) -> Tensor:
    """The uint8 container (code + 128) of codes in either container, contiguous."""
    x = x_q.contiguous()
    return x if x.dtype == torch.uint8 else x.view(torch.uint8) ^ 0x80


def _linear_floating(
    rows: Tensor, weight: Packed, activation: str, out_scale: float, out_zero_point: int, dtype: torch.dtype
) -> Tensor:
    """The same on a CPU without VNNI: products of codes in fp32."""
    y = (rows.float() - reference.OFFSET) @ weight.weight.t()
    y = y * weight.scale + weight.bias
    y = torch.nn.functional.gelu(y) if activation == "gelu" else y
    if dtype == torch.float32:
        return y
    info = torch.iinfo(dtype)
    return reference.round_codes(y, 1.0 / out_scale, float(out_zero_point), info.min, info.max).to(dtype)
