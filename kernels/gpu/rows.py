"""proj and fc2 with the LayerNorm that follows: x += (scale, bias), then codes of LayerNorm(x), in one kernel.

One program holds whole rows: up to two column tiles, each a power of two, cover D <= 512 without waste (192 = 128 +
64, 384 = 256 + 128), and the activations' tile is loaded once for both. The residual stream is written, but not read
again, and a block is five kernels instead of seven. Whether that beats two kernels depends on shape and GPU (a
program an SM needs rows enough): the tuned tables say so, see `impl.linear_residual_layernorm`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lampq_rt.kernels.gpu.linear import load_codes, load_halves, row_bytes
from lampq_rt.kernels.gpu.numerics import codes_int8, levels, load_levels, pack_nibbles


@triton.jit
def _add_products(
    acc, a_low, a_high, b_ptr, columns, D, k, K, words,
    B_PACKED: tl.constexpr, B_LEVELS: tl.constexpr, SPLIT: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """acc + a @ b^T for one tile of columns; `a_high` counts only where channels come in halves (SPLIT)."""
    offsets = columns * row_bytes(K, B_PACKED)
    if SPLIT:
        b_low, b_high = load_halves(b_ptr, offsets, columns < D, k, K, words, B_PACKED, B_LEVELS, EVEN_K, BLOCK_K, PTX)
        acc = tl.dot(a_low, b_low.T, acc, out_dtype=tl.int32)
        acc = tl.dot(a_high, b_high.T, acc, out_dtype=tl.int32)
    else:
        b = load_codes(b_ptr, offsets, columns < D, k, K, EVEN_K, BLOCK_K)
        acc = tl.dot(a_low, b.T, acc, out_dtype=tl.int32)
    return acc


@triton.jit
def _new_rows(
    acc, x_ptr, scale_ptr, column_ptr, bias_ptr, rows, columns, M, D,
    EXCESS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Adds the dequantised products to x in memory; the sum as x's dtype holds it, fp32, 0 beyond D."""
    inside = columns < D
    mask = (rows < M)[:, None] & inside[None, :]
    place = x_ptr + rows.to(tl.int64)[:, None] * D + columns[None, :]
    if EXCESS > 1:
        acc = acc >> (4 if EXCESS == 16 else 8)  # exact: every term is a multiple
    column = tl.load(column_ptr + columns, mask=inside, other=0)
    y = (acc + column[None, :]).to(tl.float32) * tl.load(scale_ptr + columns, mask=inside, other=0.0)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + columns, mask=inside, other=0.0)[None, :]
    x = (tl.load(place, mask=mask, other=0.0).to(tl.float32) + y).to(x_ptr.dtype.element_ty)
    tl.store(place, x, mask=mask)
    return tl.where(inside[None, :], x.to(tl.float32), 0.0)


@triton.jit
def _store_codes(
    centred, inverse, norm_weight_ptr, norm_bias_ptr, table_ptr, out_ptr, rows, columns, first: tl.constexpr, M, D,
    inv_scale, zero_point, HAS_NORM_WEIGHT: tl.constexpr, HAS_NORM_BIAS: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, OUT_PACKED: tl.constexpr, PTX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Codes of one tile of the normalised rows."""
    inside = columns < D
    y = centred * inverse[:, None]
    if HAS_NORM_WEIGHT:
        y = y * tl.load(norm_weight_ptr + columns, mask=inside, other=0.0)[None, :]
    if HAS_NORM_BIAS:
        y = y + tl.load(norm_bias_ptr + columns, mask=inside, other=0.0)[None, :]
    codes = levels(codes_int8(y, inv_scale, zero_point, LOW, HIGH, PTX), table_ptr, OUT_PACKED)
    if OUT_PACKED:
        halves = first // 2 + tl.arange(0, BLOCK_N // 2)
        place = rows.to(tl.int64)[:, None] * (D // 2) + halves[None, :]
        mask = (rows < M)[:, None] & (halves < D // 2)[None, :]
        tl.store(out_ptr + place, pack_nibbles(codes, BLOCK_M, BLOCK_N), mask=mask)
    else:
        place = rows.to(tl.int64)[:, None] * D + columns[None, :]
        tl.store(out_ptr + place, codes, mask=(rows < M)[:, None] & inside[None, :])


@triton.jit
def linear_rows_kernel(
    a_ptr,  # codes of activations: int8 [M, K], or packed [M, K/2]
    b_ptr,  # codes of weights: int8 [D, K], or packed [D, K/2]
    scale_ptr, column_ptr, bias_ptr,  # fp32, int32, fp32 [D]; any pointer for bias where HAS_BIAS is false
    x_ptr,  # residual stream [M, D], floating point, in place
    norm_weight_ptr, norm_bias_ptr,  # fp32 [D], likewise
    table_ptr,  # int8 [256], see `levels`, or None
    levels_ptr,  # B_PACKED: int32 [4], see `load_levels`, or None
    out_ptr,  # int8 [M, D], or packed [M, D/2]
    M, D, K, eps, inv_scale, zero_point,
    HAS_BIAS: tl.constexpr, HAS_NORM_WEIGHT: tl.constexpr, HAS_NORM_BIAS: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr,
    A_PACKED: tl.constexpr, B_PACKED: tl.constexpr, OUT_PACKED: tl.constexpr, EVEN_K: tl.constexpr, PTX: tl.constexpr,
    BLOCK_M: tl.constexpr, TILE_0: tl.constexpr, TILE_1: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows BLOCK_M * pid ...; TILE_0 + TILE_1 >= D, TILE_1 may be 0."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns_0 = tl.arange(0, TILE_0)
    columns_1 = TILE_0 + tl.arange(0, TILE_1 if TILE_1 > 0 else TILE_0)
    offsets = rows.to(tl.int64) * row_bytes(K, A_PACKED)
    acc_0 = tl.zeros((BLOCK_M, TILE_0), dtype=tl.int32)
    acc_1 = tl.zeros((BLOCK_M, TILE_1 if TILE_1 > 0 else 1), dtype=tl.int32)
    split: tl.constexpr = A_PACKED or B_PACKED
    has_levels: tl.constexpr = levels_ptr is not None
    words = load_levels(levels_ptr)
    for k in range(0, K, BLOCK_K):
        if split:
            low, high = load_halves(a_ptr, offsets, rows < M, k, K, words, A_PACKED, False, EVEN_K, BLOCK_K, PTX)
        else:
            low = load_codes(a_ptr, offsets, rows < M, k, K, EVEN_K, BLOCK_K)
            high = low
        acc_0 = _add_products(
            acc_0, low, high, b_ptr, columns_0, D, k, K, words, B_PACKED, has_levels, split, EVEN_K, BLOCK_K, PTX
        )
        if TILE_1 > 0:
            acc_1 = _add_products(
                acc_1, low, high, b_ptr, columns_1, D, k, K, words, B_PACKED, has_levels, split, EVEN_K, BLOCK_K, PTX
            )

    excess: tl.constexpr = (16 if A_PACKED else 1) * (16 if B_PACKED and not has_levels else 1)
    x_0 = _new_rows(acc_0, x_ptr, scale_ptr, column_ptr, bias_ptr, rows, columns_0, M, D, excess, HAS_BIAS)
    total = tl.sum(x_0, 1)
    if TILE_1 > 0:
        x_1 = _new_rows(acc_1, x_ptr, scale_ptr, column_ptr, bias_ptr, rows, columns_1, M, D, excess, HAS_BIAS)
        total += tl.sum(x_1, 1)
    mean = total / D
    centred_0 = tl.where((columns_0 < D)[None, :], x_0 - mean[:, None], 0.0)
    squares = tl.sum(centred_0 * centred_0, 1)
    if TILE_1 > 0:
        centred_1 = tl.where((columns_1 < D)[None, :], x_1 - mean[:, None], 0.0)
        squares += tl.sum(centred_1 * centred_1, 1)
    inverse = 1.0 / tl.sqrt(squares / D + eps)
    _store_codes(
        centred_0, inverse, norm_weight_ptr, norm_bias_ptr, table_ptr, out_ptr, rows, columns_0, 0, M, D, inv_scale,
        zero_point, HAS_NORM_WEIGHT, HAS_NORM_BIAS, LOW, HIGH, OUT_PACKED, PTX, BLOCK_M, TILE_0,
    )  # fmt: skip
    if TILE_1 > 0:
        _store_codes(
            centred_1, inverse, norm_weight_ptr, norm_bias_ptr, table_ptr, out_ptr, rows, columns_1, TILE_0, M, D,
            inv_scale, zero_point, HAS_NORM_WEIGHT, HAS_NORM_BIAS, LOW, HIGH, OUT_PACKED, PTX, BLOCK_M, TILE_1,
        )  # fmt: skip
