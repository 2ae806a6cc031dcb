"""Linears on codes through `linear.cpp`: exact sums, and all that follows them in one pass.

The order of operations is the contract's: the column constant joins the int32 sum, then one multiplication, one
addition. A weight is repacked once (`prepack`).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from lampq_rt.kernels import reference
from lampq_rt.kernels.cpu import native, program
from lampq_rt.kernels.cpu.machine import has_amx, has_vnni

BLOCK = 64
"""Output channels that lie together in a repacked weight."""

FLOAT, CODES, RESIDUAL = range(3)
"""What becomes of a result, by its number in linear.cpp."""

NO_CODES = (0.0, 0.0, 0.0, 0.0, 0)
NO_NORM = (None, None, 0.0, *NO_CODES, None)


@dataclass(frozen=True)
class Packed:
    """A weight as linear.cpp wants it.

    Attributes:
        weight: int32 [blocks * K/4 * 64], four codes a word.
        start: int32 [blocks * 64], what a sum starts with: the column constant, less 128 times the weight's row sum.
        scale: fp32 [N].
        bias: fp32 [N], zeros where there is none.
        inverse: fp32 [N] 1/step of every output channel, or None.
        offset: fp32 [N] zero-point of every output channel, or None.
    """

    weight: Tensor
    start: Tensor
    scale: Tensor
    bias: Tensor
    inverse: Tensor | None
    offset: Tensor | None


def serves(w_q: Tensor) -> bool:
    """True where linears with this weight (int8 [N, K] or packed) run here; with AMX, oneDNN is faster."""
    whole_words = w_q.dtype == torch.uint8 or w_q.shape[1] % 4 == 0
    return whole_words and has_vnni() and not has_amx() and native.has_products()


def pack(
    w_q: Tensor,
    scale: Tensor,
    column: Tensor,
    bias: Tensor | None,
    out_inv_scale: Tensor | None,
    out_offset: Tensor | None,
    levels: Tensor | None,
) -> Packed:
    """See `prepack.prepacked`."""
    dense = reference.dense_weight(w_q, levels).contiguous()
    channels, features = dense.shape
    blocks = -(-channels // BLOCK)
    weight = torch.empty(blocks * BLOCK * features // 4, dtype=torch.int32)
    start = torch.empty(blocks * BLOCK, dtype=torch.int32)
    _library().lampq_pack_weight(
        dense.data_ptr(), column.contiguous().data_ptr(), channels, features, weight.data_ptr(), start.data_ptr()
    )
    # Copies: the caller may change its buffers.
    inverse, offset = (None if t is None else t.clone() for t in (out_inv_scale, out_offset))
    bias = torch.zeros_like(scale) if bias is None else bias.clone()
    return Packed(weight, start, scale.clone(), bias, inverse, offset)


def to_codes(
    x_q: Tensor,
    packed: Packed,
    activation: str,
    inv_scale: float,
    zero_point: int,
    bits: int,
    dtype: torch.dtype,
    table: Tensor | None = None,
) -> Tensor:
    """Codes [..., N] in the int8 or uint8 container, or their levels where a `table` is given.

    Steps and zero-points that `packed` holds for the channels (`inverse`, `offset`) go before the numbers given here.
    """
    out = native.empty((*x_q.shape[:-1], len(packed.scale)), dtype)
    codes = native.code_arguments(inv_scale, zero_point, bits, dtype)
    _run(x_q, packed, CODES, activation, codes, out, NO_NORM, table)
    return out


def to_float(x_q: Tensor, packed: Packed, activation: str) -> Tensor:
    """fp32 [..., N]."""
    out = native.empty((*x_q.shape[:-1], len(packed.scale)), torch.float32)
    _run(x_q, packed, FLOAT, activation, NO_CODES, out, NO_NORM)
    return out


def add_(x: Tensor, x_q: Tensor, packed: Packed) -> None:
    """x += the result; `x` fp32, contiguous."""
    _run(x_q, packed, RESIDUAL, "none", NO_CODES, x, NO_NORM)


def add_and_norm_(
    x: Tensor,
    x_q: Tensor,
    packed: Packed,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    inv_scale: float,
    zero_point: int,
    bits: int,
    dtype: torch.dtype,
    table: Tensor | None = None,
) -> Tensor:
    """x += the result; codes of LayerNorm(x). `x` fp32, contiguous."""
    out = native.empty(tuple(x.shape), dtype)
    codes = native.code_arguments(inv_scale, zero_point, bits, dtype)
    norm = (native.at(norm_weight), native.at(norm_bias), eps, *codes, out.data_ptr())
    _run(x_q, packed, RESIDUAL, "none", NO_CODES, x, norm, table)
    return out


def _run(
    x_q: Tensor,
    packed: Packed,
    kind: int,
    activation: str,
    codes: tuple[float, float, float, float, int],
    out: Tensor,
    norm: tuple[object, ...],
    table: Tensor | None = None,
) -> None:
    x = x_q.contiguous()
    if x.dtype != torch.uint8:
        x = x.view(torch.uint8) ^ 0x80
    features = x.shape[-1]
    native.call(
        _library(), "lampq_linear", program.keep(x).data_ptr(), packed.weight.data_ptr(), packed.start.data_ptr(),
        packed.scale.data_ptr(), packed.bias.data_ptr(), native.at(packed.inverse), native.at(packed.offset),
        x.numel() // features, features, len(packed.scale), kind, int(activation == "gelu"), *codes,
        program.keep(out).data_ptr(), *norm, native.at(table), torch.get_num_threads(),
    )  # fmt: skip


def _library() -> ctypes.CDLL:
    library = native.library()
    assert library is not None, "callers ask `serves` first"
    return library
