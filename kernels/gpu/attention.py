"""softmax(QK^T)V on codes, requantised, for rows that fit on chip and for longer ones (rule 7).

One program takes BLOCK_M rows of one head. Up to 256 tokens all logits of a row stay in registers: the columns are
covered by up to three tiles of a power of two (197 = 128 + 64 + 32, not 256), so there is one QK^T, one softmax over
the whole row, one PV. Longer rows take two passes over K: the first finds each row's maximum, the second computes the
exponentials with it, so that every code of P means the same as on chip (an online softmax would change the codes as
the maximum moves).

int8 P holds the weight minus half of its range: 2^(bits-1) where the weight is the code ("rowmax"), 128 where it comes
of the code's cube ("cubic"). What that takes from the product is given back by the column sums of v. A "cubic" code
needs the exponential of a third of the logit, and the cube of that serves the row sum.

"log2" P is 2^(2^bits-1-code) and v is turned into fp16, both exactly; products are summed in fp32. The sums are
integers, exact below 2^24: always for rows of up to 1,024 tokens at 3 bits or less. The code needs no exponential.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lampq_rt.kernels.gpu.numerics import (
    codes_int8,
    cube_weights,
    int8_to_fp16,
    levels,
    pack_nibbles,
    powers_fp16,
    round_int8,
)


@triton.jit
def _logits(q, k_ptr, first, TOKENS, d, logit_scale, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr):
    """fp32 [BLOCK_M, BLOCK_N] logits in powers of two; -inf beyond the last token."""
    columns = first + tl.arange(0, BLOCK_N)
    mask = (columns < TOKENS)[:, None] & (d < HEAD_DIM)[None, :]
    k = tl.load(k_ptr + columns[:, None] * HEAD_DIM + d[None, :], mask=mask, other=0)  # [BLOCK_N, BLOCK_D]
    logits = tl.dot(q, k.T, out_dtype=tl.int32).to(tl.float32) * logit_scale
    return tl.where((columns < TOKENS)[None, :], logits, float("-inf"))


@triton.jit
def _weighted(
    shifted, v_ptr, first, TOKENS, PADDED, d, acc, total, HEAD_DIM: tl.constexpr, P_BITS: tl.constexpr,
    P_SCHEME: tl.constexpr, PTX: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """acc + integer weights @ v, int32 or fp32 [BLOCK_M, BLOCK_D], and total + the sum of exponentials, fp32 [BLOCK_M].

    int8 weights lack half of their range; the half comes back by the column sums of v.
    """
    if P_SCHEME == "cubic":
        root = tl.exp2(shifted * (1 / 3))
        e = root * root * root
    else:
        e = tl.exp2(shifted)
    total += tl.sum(e, 1)
    columns = first + tl.arange(0, BLOCK_N)
    # v's padding is zero; a mask at TOKENS would load single bytes.
    mask = (d < HEAD_DIM)[:, None] & (columns < PADDED)[None, :]
    v = tl.load(v_ptr + d[:, None] * PADDED + columns[None, :], mask=mask, other=0)  # [BLOCK_D, BLOCK_N]
    if P_SCHEME == "log2":
        acc = tl.dot(powers_fp16(shifted, P_BITS), int8_to_fp16(v, PTX).T, acc)
    else:
        half: tl.constexpr = 128 if P_SCHEME == "cubic" else 2 ** (P_BITS - 1)
        weights = cube_weights(root, P_BITS) if P_SCHEME == "cubic" else e * (2**P_BITS - 1.0)
        p = round_int8(weights - half, -half, half - 1, PTX)
        sums = tl.sum(v.to(tl.int32), 1)
        acc = tl.dot(p, v.T, acc, out_dtype=tl.int32) + half * sums[None, :]
    return acc, total


@triton.jit
def attention_kernel(
    q_ptr, k_ptr,  # int8 [B, H, N, d]
    v_ptr,  # int8 [B, H, d, N_pad], zero in the padding
    logit_scale_ptr, v_scale_ptr,  # fp32 [H]
    table_ptr,  # int8 [256], see `levels`, or None
    out_ptr,  # int8 [B, N, H*d], packed [B, N, H*d/2], or floating point
    TOKENS, PADDED, inv_scale, zero_point,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, P_BITS: tl.constexpr, UNIT: tl.constexpr, P_SCHEME: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, FLOAT_OUT: tl.constexpr, OUT_PACKED: tl.constexpr, PTX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE_0: tl.constexpr, TILE_1: tl.constexpr, TILE_2: tl.constexpr, ON_CHIP: tl.constexpr,
):  # fmt: skip
    """Rows BLOCK_M * pid_0 ... of head pid_1 of image pid_2; on chip, absent tiles are 0 wide.

    An axis each, as two of a grid's three end at 65,535; a head's tiles follow each other, to share its k and v in L2.
    """
    head, image = tl.program_id(1), tl.program_id(2)
    head_index = image * HEADS + head
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    start = head_index.to(tl.int64) * TOKENS * HEAD_DIM
    k_ptr += start
    v_ptr += head_index.to(tl.int64) * HEAD_DIM * PADDED
    q_mask = (rows < TOKENS)[:, None] & (d < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + start + rows[:, None] * HEAD_DIM + d[None, :], mask=q_mask, other=0)
    c = tl.load(logit_scale_ptr + head)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32 if P_SCHEME == "log2" else tl.int32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)

    if ON_CHIP:
        s0 = _logits(q, k_ptr, 0, TOKENS, d, c, HEAD_DIM, TILE_0)
        most = tl.max(s0, 1)
        if TILE_1 > 0:
            s1 = _logits(q, k_ptr, TILE_0, TOKENS, d, c, HEAD_DIM, TILE_1)
            most = tl.maximum(most, tl.max(s1, 1))
        if TILE_2 > 0:
            s2 = _logits(q, k_ptr, TILE_0 + TILE_1, TOKENS, d, c, HEAD_DIM, TILE_2)
            most = tl.maximum(most, tl.max(s2, 1))
        acc, total = _weighted(
            s0 - most[:, None], v_ptr, 0, TOKENS, PADDED, d, acc, total, HEAD_DIM, P_BITS, P_SCHEME, PTX, TILE_0
        )
        if TILE_1 > 0:
            acc, total = _weighted(
                s1 - most[:, None], v_ptr, TILE_0, TOKENS, PADDED, d, acc, total, HEAD_DIM, P_BITS, P_SCHEME, PTX,
                TILE_1,
            )  # fmt: skip
        if TILE_2 > 0:
            acc, total = _weighted(
                s2 - most[:, None], v_ptr, TILE_0 + TILE_1, TOKENS, PADDED, d, acc, total, HEAD_DIM, P_BITS, P_SCHEME,
                PTX, TILE_2,
            )  # fmt: skip
    else:
        most = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
        for first in range(0, TOKENS, TILE_0):
            most = tl.maximum(most, tl.max(_logits(q, k_ptr, first, TOKENS, d, c, HEAD_DIM, TILE_0), 1))
        for first in range(0, TOKENS, TILE_0):
            shifted = _logits(q, k_ptr, first, TOKENS, d, c, HEAD_DIM, TILE_0) - most[:, None]
            acc, total = _weighted(
                shifted, v_ptr, first, TOKENS, PADDED, d, acc, total, HEAD_DIM, P_BITS, P_SCHEME, PTX, TILE_0
            )

    y = acc.to(tl.float32) * (tl.load(v_scale_ptr + head) / (UNIT * total))[:, None]
    width: tl.constexpr = HEADS * HEAD_DIM
    row_place = (image * TOKENS + rows).to(tl.int64)
    if FLOAT_OUT:
        place = row_place[:, None] * width + head * HEAD_DIM + d[None, :]
        tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=q_mask)
    else:
        codes = levels(codes_int8(y, inv_scale, zero_point, LOW, HIGH, PTX), table_ptr, OUT_PACKED)
        if OUT_PACKED:
            halves = tl.arange(0, BLOCK_D // 2)
            place = row_place[:, None] * (width // 2) + head * (HEAD_DIM // 2) + halves[None, :]
            packed_mask = (rows < TOKENS)[:, None] & (halves < HEAD_DIM // 2)[None, :]
            tl.store(out_ptr + place, pack_nibbles(codes, BLOCK_M, BLOCK_D), mask=packed_mask)
        else:
            tl.store(out_ptr + row_place[:, None] * width + head * HEAD_DIM + d[None, :], codes, mask=q_mask)
