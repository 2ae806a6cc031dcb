"""q, k and v codes from a floating-point qkv: optional LayerNorm of q and k over a head's channels, then quantise.

For models with qk-norm, and for a qkv that the plan leaves in floating point. One program takes BLOCK_M tokens of one
head of one image, all three of q, k and v. Row tiles never cross an image, so that the transposed tile of v is stored
in wide pieces along tokens, and the tile that reaches the padding of v^T writes its zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lampq_rt.kernels.gpu.layernorm import standardised
from lampq_rt.kernels.gpu.numerics import codes_int8


@triton.jit
def _affine(x, weight_ptr, bias_ptr, d, eps, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """LayerNorm of fp32 rows [BLOCK_M, BLOCK_D] over their HEAD_DIM channels."""
    inside = d < HEAD_DIM
    y = standardised(x, inside[None, :], HEAD_DIM, eps)
    if HAS_WEIGHT:
        y = y * tl.load(weight_ptr + d, mask=inside, other=0.0)[None, :]
    if HAS_BIAS:
        y = y + tl.load(bias_ptr + d, mask=inside, other=0.0)[None, :]
    return y


@triton.jit
def heads_kernel(
    qkv_ptr,  # floating point [B, N, 3*H*d]
    q_weight_ptr, q_bias_ptr, k_weight_ptr, k_bias_ptr,  # fp32 [d], or any pointer where there is none
    step_ptr,  # fp32 [3*H*d], 1/step of every column
    q_ptr, k_ptr,  # int8 [B, H, N, d]
    v_ptr,  # int8 [B, H, d, N_pad]
    TOKENS, PADDED, eps,
    NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, V_LOW: tl.constexpr, V_HIGH: tl.constexpr,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PTX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Tokens BLOCK_M * pid_0 ... of head pid_1 of image pid_2; BLOCK_D is d rounded up to a power of two.

    An axis each, as two of a grid's three end at 65,535.
    """
    width: tl.constexpr = HEADS * HEAD_DIM
    head, image = tl.program_id(1), tl.program_id(2)
    head_index = image * HEADS + head
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    inside = d < HEAD_DIM
    mask = (tokens < TOKENS)[:, None] & inside[None, :]
    columns = head * HEAD_DIM + d
    place = (image.to(tl.int64) * TOKENS + tokens)[:, None] * (3 * width) + columns[None, :]
    q = tl.load(qkv_ptr + place, mask=mask, other=0.0).to(tl.float32)
    k = tl.load(qkv_ptr + place + width, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(qkv_ptr + place + 2 * width, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        q = _affine(q, q_weight_ptr, q_bias_ptr, d, eps, HAS_WEIGHT, HAS_BIAS, HEAD_DIM)
        k = _affine(k, k_weight_ptr, k_bias_ptr, d, eps, HAS_WEIGHT, HAS_BIAS, HEAD_DIM)
    q_step = tl.load(step_ptr + columns, mask=inside, other=0.0)[None, :]
    k_step = tl.load(step_ptr + width + columns, mask=inside, other=0.0)[None, :]
    v_step = tl.load(step_ptr + 2 * width + columns, mask=inside, other=0.0)[None, :]

    start = head_index.to(tl.int64) * TOKENS * HEAD_DIM
    out_place = start + tokens[:, None] * HEAD_DIM + d[None, :]
    tl.store(q_ptr + out_place, codes_int8(q, q_step, 0.0, LOW, HIGH, PTX), mask=mask)
    tl.store(k_ptr + out_place, codes_int8(k, k_step, 0.0, LOW, HIGH, PTX), mask=mask)
    # Absent tokens were loaded as zero, and zero has code 0: the padding needs no other value.
    v_codes = codes_int8(v, v_step, 0.0, V_LOW, V_HIGH, PTX)
    if qkv_ptr.dtype.element_ty == tl.float32:
        # Codes cross the threads as fp16, which holds them exactly: as int8 they would cross byte by byte. A qkv of 16
        # bits is transposed by the compiler before it is widened.
        transposed = tl.trans(v_codes.to(tl.float16)).to(tl.int8)  # [BLOCK_D, BLOCK_M]
    else:
        transposed = tl.trans(v_codes)
    v_place = (head_index.to(tl.int64) * HEAD_DIM + d)[:, None] * PADDED + tokens[None, :]
    tl.store(v_ptr + v_place, transposed, mask=inside[:, None] & (tokens < PADDED)[None, :])
