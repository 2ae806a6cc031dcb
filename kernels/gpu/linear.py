"""Linears on codes: int8 x int8 -> int32 on tensor cores, everything after the sum in the epilogue (rules 3 to 6).

One kernel serves the int8 and the packed 4-bit container of either operand and four epilogues:

    REQUANT   scale, bias, [GELU], requantise, int8 or packed 4-bit out       fc1
              (CHANNELS: every column with a step and an offset of its own)
    FLOAT     scale, bias, [GELU], floating point out                        patch embedding, head
    RESIDUAL  x += scale, bias, in place                                     proj, fc2
    HEADS     scale, bias, requantise per head; q, k by rows, v transposed    qkv

Both operands are K-contiguous, as wgmma wants them. A packed operand holds channel j of each group of 64 in the low
nibble of byte j and channel j + 32 in the high one, so a tile takes two dots: low nibbles against channels j, high
against j + 32. Nibbles stay 16 times too large (no sign extension, no byte permutes) and the factor is taken off the
sum, which is exact. Nibbles of weights that name levels become those, in registers (`level_halves`), as they are.

HEADS: the columns of v use row tiles that never cross an image, so that the transposed tile is stored in 16-byte
    pieces along tokens and the padding of v^T is written (as zeros) by the tile that reaches it. The columns of q and
    k use flat row tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lampq_rt.kernels.gpu.numerics import (
    codes_int8,
    gelu,
    high_nibbles_x16,
    level_halves,
    levels,
    load_levels,
    low_nibbles_x16,
    pack_nibbles,
)

REQUANT = tl.constexpr(0)
FLOAT = tl.constexpr(1)
RESIDUAL = tl.constexpr(2)
HEADS = tl.constexpr(3)


@triton.jit
def _tile_order(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column tile of a program, in groups of GROUP_M row tiles that share weights in L2."""
    per_group = GROUP_M * tiles_n
    first = (pid // per_group) * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    return first + (pid % per_group) % rows, (pid % per_group) // rows


@triton.jit
def row_bytes(K, PACKED: tl.constexpr):
    """Bytes of a row of codes. Packed, K is a multiple of 64; the compiler, untold, loads 8 bytes at a time."""
    return tl.multiple_of(K // 2, 32) if PACKED else K


@triton.jit
def load_codes(ptr, offsets, mask, k, K, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """int8 codes [rows, BLOCK_K] of channels k ...; `offsets` [rows]: where a row starts, in bytes."""
    channels = k + tl.arange(0, BLOCK_K)
    full = mask[:, None] if EVEN_K else mask[:, None] & (channels < K)[None, :]
    return tl.load(ptr + offsets[:, None] + channels[None, :], mask=full, other=0)


@triton.jit
def load_halves(
    ptr, offsets, mask, k, K, words,
    PACKED: tl.constexpr, LEVELS: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """The same channels as two int8 tiles [rows, BLOCK_K / 2]: those of low nibbles and those of high ones.

    Of packed codes, 16 times too large, or their LEVELS in `words`. What lies beyond K is code 0, whose level need not
    be 0: the other operand's zeros are what counts there.
    """
    slots = tl.arange(0, BLOCK_K // 2)  # bytes of a packed tile
    full = mask[:, None] if EVEN_K else mask[:, None] & (k // 2 + slots < row_bytes(K, True))[None, :]
    if PACKED:
        packed = tl.load(ptr + offsets[:, None] + (k // 2 + slots)[None, :], mask=full, other=0)
        if LEVELS:
            return level_halves(packed, words, PTX)
        return low_nibbles_x16(packed, PTX), high_nibbles_x16(packed, PTX)
    low_channels = (k + (slots // 32) * 64 + slots % 32)[None, :]
    low = tl.load(ptr + offsets[:, None] + low_channels, mask=full, other=0)
    high = tl.load(ptr + offsets[:, None] + low_channels + 32, mask=full, other=0)
    return low, high


@triton.jit
def _accumulate(
    a_ptr, b_ptr, levels_ptr, row_offsets, row_mask, column_offsets, column_mask, first_k, last_k, K,
    A_PACKED: tl.constexpr, B_PACKED: tl.constexpr, B_LEVELS: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """int32 [BLOCK_M, BLOCK_N] sum over channels first_k..last_k; `excess` times too large."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    if not A_PACKED and not B_PACKED:
        for k in range(first_k, last_k, BLOCK_K):
            a = load_codes(a_ptr, row_offsets, row_mask, k, K, EVEN_K, BLOCK_K)
            b = load_codes(b_ptr, column_offsets, column_mask, k, K, EVEN_K, BLOCK_K)
            acc = tl.dot(a, b.T, acc, out_dtype=tl.int32)
        return acc
    words = load_levels(levels_ptr)
    for k in range(first_k, last_k, BLOCK_K):
        a_low, a_high = load_halves(a_ptr, row_offsets, row_mask, k, K, words, A_PACKED, False, EVEN_K, BLOCK_K, PTX)
        b_low, b_high = load_halves(
            b_ptr, column_offsets, column_mask, k, K, words, B_PACKED, B_LEVELS, EVEN_K, BLOCK_K, PTX
        )
        acc = tl.dot(a_low, b_low.T, acc, out_dtype=tl.int32)
        acc = tl.dot(a_high, b_high.T, acc, out_dtype=tl.int32)
    return acc


@triton.jit
def _store_heads(
    codes, q_ptr, k_ptr, v_ptr, rows, columns, row_mask, image, first_token, TOKENS, PADDED, is_v,
    HEADS_: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """int8 codes [BLOCK_M, BLOCK_N] to q, k [B, H, N, d] or v [B, H, d, N_pad]."""
    width: tl.constexpr = HEADS_ * HEAD_DIM
    if is_v:
        channel = columns - 2 * width  # [BLOCK_N]: h * d + j
        tokens = first_token + tl.arange(0, BLOCK_M)
        transposed = tl.trans(tl.where((tokens < TOKENS)[:, None], codes, 0))
        v_place = (image * width + channel).to(tl.int64)[:, None] * PADDED + tokens[None, :]
        v_mask = (channel < width)[:, None] & (tokens < PADDED)[None, :]
        tl.store(v_ptr + v_place, transposed, mask=v_mask)
    else:
        image_of, token = rows // TOKENS, rows % TOKENS
        # In this order the compiler sees that HEAD_DIM columns share a head; else 3 heads of 64 store single bytes.
        head, j = (columns // HEAD_DIM) % HEADS_, columns % HEAD_DIM
        row_place = (image_of * HEADS_ * TOKENS + token).to(tl.int64) * HEAD_DIM
        place = row_place[:, None] + (head * HEAD_DIM)[None, :].to(tl.int64) * TOKENS + j[None, :]
        is_q = columns < width
        tl.store(q_ptr + place, codes, mask=row_mask[:, None] & is_q[None, :])
        tl.store(k_ptr + place, codes, mask=row_mask[:, None] & ((~is_q) & (columns < 2 * width))[None, :])


@triton.jit
def linear_kernel(
    a_ptr,  # codes of activations: int8 [M, K], or packed [M, K/2]
    b_ptr,  # codes of weights: int8 [N, K], or packed [N, K/2]
    scale_ptr,  # fp32 [N]
    column_ptr,  # int32 [N]
    bias_ptr,  # fp32 [N], or any pointer where HAS_BIAS is false
    out_ptr,  # [M, N] codes or floating point; x [M, N] for RESIDUAL; q for HEADS
    k_ptr, v_ptr,  # HEADS: k [B, H, N, d] and v [B, H, d, N_pad]
    step_ptr,  # HEADS, CHANNELS: fp32 [N], 1/step of every column
    offset_ptr,  # CHANNELS: fp32 [N], zero-point of every column
    table_ptr,  # REQUANT, not packed: int8 [256], see `levels`, or None
    levels_ptr,  # B_PACKED: int32 [4], see `load_levels`, or None
    partial_ptr,  # SPLIT_K > 1: int32 [M, N] zeros, and
    lock_ptr,  # int32 [tiles], zeros
    M, N, K, TOKENS, PADDED,
    inv_scale, zero_point,
    EPILOGUE: tl.constexpr, GELU: tl.constexpr, FAST_GELU: tl.constexpr, HAS_BIAS: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, V_LOW: tl.constexpr, V_HIGH: tl.constexpr,
    A_PACKED: tl.constexpr, B_PACKED: tl.constexpr, OUT_PACKED: tl.constexpr, CHANNELS: tl.constexpr,
    HEADS_: tl.constexpr, HEAD_DIM: tl.constexpr, IMAGES,
    EVEN_K: tl.constexpr, SPLIT_K: tl.constexpr, PTX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_M, BLOCK_N] tile; see the module's docstring."""
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    image, first_token = 0, 0
    is_v = False
    if EPILOGUE == HEADS:
        tiles_n = tl.cdiv(2 * HEADS_ * HEAD_DIM, BLOCK_N)
        flat_tiles = tiles_m * tiles_n
        is_v = pid >= flat_tiles
        if is_v:
            per_image = tl.cdiv(PADDED, BLOCK_M)
            tile_m, tile_n = _tile_order(
                pid - flat_tiles, IMAGES * per_image, tl.cdiv(HEADS_ * HEAD_DIM, BLOCK_N), GROUP_M
            )
            image, first_token = tile_m // per_image, (tile_m % per_image) * BLOCK_M
            first_row, row_limit = image * TOKENS + first_token, (image + 1) * TOKENS
            first_column, column_limit = 2 * HEADS_ * HEAD_DIM + tile_n * BLOCK_N, N
        else:
            tile_m, tile_n = _tile_order(pid, tiles_m, tiles_n, GROUP_M)
            first_row, row_limit = tile_m * BLOCK_M, M
            first_column, column_limit = tile_n * BLOCK_N, 2 * HEADS_ * HEAD_DIM
    else:
        tile_m, tile_n = _tile_order(pid, tiles_m, tl.cdiv(N, BLOCK_N), GROUP_M)
        first_row, row_limit = tile_m * BLOCK_M, M
        first_column, column_limit = tile_n * BLOCK_N, N
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, BLOCK_N)
    row_mask, column_mask = rows < row_limit, columns < column_limit

    span = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K) * BLOCK_K
    first_k = tl.program_id(1) * span
    a_rows = rows.to(tl.int64) * row_bytes(K, A_PACKED)
    b_rows = columns * row_bytes(K, B_PACKED)
    has_levels: tl.constexpr = levels_ptr is not None
    acc = _accumulate(
        a_ptr, b_ptr, levels_ptr, a_rows, row_mask, b_rows, column_mask, first_k, tl.minimum(first_k + span, K), K,
        A_PACKED, B_PACKED, has_levels, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, PTX,
    )  # fmt: skip
    place = rows.to(tl.int64)[:, None] * N + columns[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    if SPLIT_K > 1:
        # int32 sums are exact in any order. The last program of a tile to arrive reads the whole sum and goes on alone.
        tl.atomic_add(partial_ptr + place, acc, mask=mask, sem="relaxed")
        tl.debug_barrier()
        arrived = tl.atomic_add(lock_ptr + pid, 1, sem="acq_rel")
        if arrived < SPLIT_K - 1:
            return
        acc = tl.load(partial_ptr + place, mask=mask, other=0, volatile=True)
        tl.debug_barrier()  # zeros may be stored by other threads than those that load there
        tl.store(partial_ptr + place, tl.zeros_like(acc), mask=mask)
        tl.store(lock_ptr + pid, 0)

    scale = tl.load(scale_ptr + columns, mask=column_mask, other=0.0)
    column = tl.load(column_ptr + columns, mask=column_mask, other=0)
    excess: tl.constexpr = (16 if A_PACKED else 1) * (16 if B_PACKED and not has_levels else 1)
    if excess > 1:
        acc = acc >> (4 if excess == 16 else 8)  # exact: every term is a multiple
    y = (acc + column[None, :]).to(tl.float32) * scale[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + columns, mask=column_mask, other=0.0)[None, :]
    if GELU:
        y = gelu(y, FAST_GELU)

    if EPILOGUE == REQUANT:
        if CHANNELS:
            step = tl.load(step_ptr + columns, mask=column_mask, other=0.0)[None, :]
            offset = tl.load(offset_ptr + columns, mask=column_mask, other=0.0)[None, :]
            codes = codes_int8(y, step, offset, LOW, HIGH, PTX)
        else:
            codes = codes_int8(y, inv_scale, zero_point, LOW, HIGH, PTX)
        codes = levels(codes, table_ptr, OUT_PACKED)
        if OUT_PACKED:
            half_columns = first_column // 2 + tl.arange(0, BLOCK_N // 2)
            packed_place = rows.to(tl.int64)[:, None] * (N // 2) + half_columns[None, :]
            packed_mask = row_mask[:, None] & (half_columns < N // 2)[None, :]
            tl.store(out_ptr + packed_place, pack_nibbles(codes, BLOCK_M, BLOCK_N), mask=packed_mask)
        else:
            tl.store(out_ptr + place, codes, mask=mask)
    elif EPILOGUE == FLOAT:
        tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=mask)
    elif EPILOGUE == RESIDUAL:
        x = tl.load(out_ptr + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + place, (x + y).to(out_ptr.dtype.element_ty), mask=mask)
    else:
        step = tl.load(step_ptr + columns, mask=column_mask, other=0.0)[None, :]
        codes = codes_int8(y, step, 0.0, LOW, HIGH, PTX)
        if V_LOW != LOW:
            if is_v:
                codes = codes_int8(y, step, 0.0, V_LOW, V_HIGH, PTX)
        _store_heads(
            codes, out_ptr, k_ptr, v_ptr, rows, columns, row_mask, image, first_token, TOKENS, PADDED, is_v,
            HEADS_, HEAD_DIM, BLOCK_M,
        )  # fmt: skip
