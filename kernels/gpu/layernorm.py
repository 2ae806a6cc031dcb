"""LayerNorm and quantise in one pass, and plain quantise: one program holds whole rows in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from lampq_rt.kernels.gpu.numerics import codes_int8, levels, pack_nibbles


@triton.jit
def standardised(x, inside, D, eps):
    """fp32 rows [M, BLOCK_D] less their mean, over their deviation; `inside` marks the D columns that count."""
    mean = tl.sum(x, 1) / D
    centred = tl.where(inside, x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / D
    return centred * (1.0 / tl.sqrt(variance + eps))[:, None]


@triton.jit
def layernorm_quantize_kernel(
    x_ptr,  # floating point [M, D]
    weight_ptr, bias_ptr,  # fp32 [D], or any pointer where HAS_AFFINE is false
    table_ptr,  # int8 [256], see `levels`, or None
    out_ptr,  # int8 [M, D], or packed [M, D/2]
    M, D, eps, inv_scale, zero_point,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    OUT_PACKED: tl.constexpr, PTX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows BLOCK_M * pid ...; BLOCK_D is D rounded up to a power of two."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    inside = (columns < D)[None, :]
    mask = (rows < M)[:, None] & inside
    x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * D + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    y = standardised(x, inside, D, eps)
    if HAS_WEIGHT:
        y = y * tl.load(weight_ptr + columns, mask=columns < D, other=0.0)[None, :]
    if HAS_BIAS:
        y = y + tl.load(bias_ptr + columns, mask=columns < D, other=0.0)[None, :]
    codes = levels(codes_int8(y, inv_scale, zero_point, LOW, HIGH, PTX), table_ptr, OUT_PACKED)
    if OUT_PACKED:
        halves = tl.arange(0, BLOCK_D // 2)
        place = rows.to(tl.int64)[:, None] * (D // 2) + halves[None, :]
        packed_mask = (rows < M)[:, None] & (halves < D // 2)[None, :]
        tl.store(out_ptr + place, pack_nibbles(codes, BLOCK_M, BLOCK_D), mask=packed_mask)
    else:
        tl.store(out_ptr + rows.to(tl.int64)[:, None] * D + columns[None, :], codes, mask=mask)


@triton.jit
def quantize_kernel(
    x_ptr,  # floating point [count]
    out_ptr,  # int8 [count], or packed [count / 2]
    step_ptr, offset_ptr,  # CHANNELS: fp32 [D], 1/step and zero-point of every channel
    table_ptr,  # int8 [256], see `levels`, or None
    count, D, inv_scale, zero_point,
    CHANNELS: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, OUT_PACKED: tl.constexpr, PTX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK consecutive values; packed output needs rows of a multiple of 64."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    places = first + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + places, mask=places < count, other=0.0).to(tl.float32)
    if CHANNELS:
        channels = places % D
        step, offset = tl.load(step_ptr + channels), tl.load(offset_ptr + channels)
        codes = codes_int8(x, step, offset, LOW, HIGH, PTX)
    else:
        codes = codes_int8(x, inv_scale, zero_point, LOW, HIGH, PTX)
    codes = levels(codes, table_ptr, OUT_PACKED)
    if OUT_PACKED:
        halves = first // 2 + tl.arange(0, BLOCK // 2)
        packed = tl.reshape(pack_nibbles(tl.reshape(codes, (1, BLOCK)), 1, BLOCK), (BLOCK // 2,))
        tl.store(out_ptr + halves, packed, mask=halves < count // 2)
    else:
        tl.store(out_ptr + places, codes, mask=places < count)
