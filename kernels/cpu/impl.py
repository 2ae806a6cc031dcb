"""The CPU implementation of every op in `kernels/ops.py`, by the same names; `reference.py` says what each computes."""

from __future__ import annotations

import torch
from torch import Tensor

from lampq_rt.kernels import reference
from lampq_rt.kernels.cpu import eager, linear, native, onednn
from lampq_rt.kernels.cpu.prepack import prepacked


def _fp32(x: Tensor) -> Tensor:
    return x.to(torch.float32).contiguous()


def quantize(
    x: Tensor, inv_scale: float, zero_point: int, bits: int, dtype: torch.dtype, table: Tensor | None = None
) -> Tensor:
    """See `reference.quantize`."""
    lib = native.library()
    if lib is None:
        return reference.quantize(x.float(), inv_scale, zero_point, bits, dtype, table)
    return native.quantize(lib, _fp32(x), inv_scale, zero_point, bits, dtype, table)


def quantize_channels(
    x: Tensor, inv_scale: Tensor, offset: Tensor, bits: int, dtype: torch.dtype, table: Tensor | None = None
) -> Tensor:
    """See `reference.quantize_channels`, which serves: no usual model runs it, since fc1 makes those codes itself."""
    return reference.quantize_channels(x, inv_scale, offset, bits, dtype, table)


def layernorm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    inv_scale: float,
    zero_point: int,
    bits: int,
    dtype: torch.dtype,
    table: Tensor | None = None,
) -> Tensor:
    """See `reference.layernorm_quantize`."""
    lib = native.library()
    if lib is None:
        return reference.layernorm_quantize(x, weight, bias, eps, inv_scale, zero_point, bits, dtype, table)
    return native.layernorm_quantize(lib, _fp32(x), weight, bias, eps, inv_scale, zero_point, bits, dtype, table)


def linear_float(
    x_q: Tensor,
    w_q: Tensor,
    scale: Tensor,
    column: Tensor,
    bias: Tensor | None,
    activation: str,
    dtype: torch.dtype,
    levels: Tensor | None = None,
) -> Tensor:
    """See `reference.linear_float`. oneDNN's fp32 GELU is not the erf form's equal: there it follows the call."""
    if linear.serves(w_q):
        weight = prepacked(linear.pack, w_q, scale, column, bias, levels=levels)
        return linear.to_float(x_q, weight, activation).to(dtype)
    packed = prepacked(onednn.pack, w_q, scale, column, bias, levels=levels)
    y = onednn.linear(x_q, packed, "none", 1.0, 0, torch.float32)
    return (torch.nn.functional.gelu(y) if activation == "gelu" else y).to(dtype)


def linear_requant(
    x_q: Tensor,
    w_q: Tensor,
    scale: Tensor,
    column: Tensor,
    bias: Tensor | None,
    activation: str,
    out_inv_scale: float,
    out_zero_point: int,
    out_bits: int,
    dtype: torch.dtype,
    table: Tensor | None = None,
    levels: Tensor | None = None,
) -> Tensor:
    """See `reference.linear_requant`; GELU and requantisation inside the matmul's call."""
    if linear.serves(w_q):
        weight = prepacked(linear.pack, w_q, scale, column, bias, levels=levels)
        return linear.to_codes(x_q, weight, activation, out_inv_scale, out_zero_point, out_bits, dtype, table)
    offset = reference.OFFSET if dtype == torch.uint8 else 0
    packed = prepacked(onednn.pack, w_q, scale, column, bias, levels=levels)
    y = onednn.linear(x_q, packed, activation, 1.0 / out_inv_scale, out_zero_point + offset, dtype)
    if out_bits < 8:
        low, high = reference.code_range(out_bits)
        y.clamp_(low + offset, high + offset)
    return _remap(y, table)


def linear_requant_channels(
    x_q: Tensor,
    w_q: Tensor,
    scale: Tensor,
    column: Tensor,
    bias: Tensor | None,
    activation: str,
    out_inv_scale: Tensor,
    out_offset: Tensor,
    out_bits: int,
    dtype: torch.dtype,
    table: Tensor | None = None,
    levels: Tensor | None = None,
) -> Tensor:
    """See `reference.linear_requant_channels`. oneDNN's call has one zero-point and no steps behind a GELU: there
    the codes are made after it.
    """
    if linear.serves(w_q):
        weight = prepacked(linear.pack, w_q, scale, column, bias, out_inv_scale, out_offset, levels=levels)
        return linear.to_codes(x_q, weight, activation, 1.0, 0, out_bits, dtype, table)
    y = linear_float(x_q, w_q, scale, column, bias, activation, torch.float32, levels)
    return reference.quantize_channels(y, out_inv_scale, out_offset, out_bits, dtype, table)


def linear_residual(
    x: Tensor,
    x_q: Tensor,
    w_q: Tensor,
    scale: Tensor,
    column: Tensor,
    bias: Tensor | None,
    levels: Tensor | None = None,
) -> None:
    """See `reference.linear_residual`; the sum is formed in the matmul's call."""
    in_place = x.dtype == torch.float32 and x.is_contiguous()
    if in_place and linear.serves(w_q):
        linear.add_(x, x_q, prepacked(linear.pack, w_q, scale, column, bias, levels=levels))
    elif in_place:
        onednn.linear_add_(x, x_q, prepacked(onednn.pack, w_q, scale, column, bias, levels=levels))
    else:
        x.copy_(x.float() + linear_float(x_q, w_q, scale, column, bias, "none", torch.float32, levels))


def linear_residual_layernorm(
    x: Tensor,
    x_q: Tensor,
    w_q: Tensor,
    scale: Tensor,
    column: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    inv_scale: float,
    zero_point: int,
    bits: int,
    dtype: torch.dtype,
    table: Tensor | None = None,
    levels: Tensor | None = None,
) -> Tensor:
    """See `reference.linear_residual_layernorm`; rows are normalised as soon as they are finished."""
    norm = (norm_weight, norm_bias, eps, inv_scale, zero_point, bits, dtype, table)
    if x.dtype == torch.float32 and x.is_contiguous() and linear.serves(w_q):
        return linear.add_and_norm_(x, x_q, prepacked(linear.pack, w_q, scale, column, bias, levels=levels), *norm)
    linear_residual(x, x_q, w_q, scale, column, bias, levels)
    return layernorm_quantize(x, *norm)


def linear_qkv(
    x_q: Tensor,
    w_q: Tensor,
    scale: Tensor,
    column: Tensor,
    bias: Tensor | None,
    heads: int,
    out_inv_scale: Tensor,
    qk_bits: int,
    v_bits: int,
    levels: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.linear_qkv`; oneDNN takes every column's step in scale and bias: the matmul's own is 1."""
    if linear.serves(w_q):
        packed = prepacked(linear.pack, w_q, scale, column, bias, out_inv_scale, levels=levels)
        codes = linear.to_codes(x_q, packed, "none", 1.0, 0, 8, torch.int8)
    else:
        folded = prepacked(onednn.pack, w_q, scale, column, bias, out_inv_scale, levels=levels)
        codes = onednn.linear(x_q, folded, "none", 1.0, 0, torch.int8)
    return _split(codes, heads, qk_bits, v_bits)


def heads_quantize(
    qkv: Tensor,
    norm: bool,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    eps: float,
    heads: int,
    out_inv_scale: Tensor,
    qk_bits: int,
    v_bits: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.heads_quantize`."""
    return reference.heads_quantize(
        qkv, norm, q_weight, q_bias, k_weight, k_bias, eps, heads, out_inv_scale, qk_bits, v_bits
    )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logit_scale: Tensor,
    v_scale: Tensor,
    p_bits: int,
    p_scheme: str,
    out_inv_scale: float,
    out_zero_point: int,
    out_bits: int,
    dtype: torch.dtype,
    table: Tensor | None = None,
) -> Tensor:
    """See `reference.attention`."""
    lib = native.library()
    args = (
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        logit_scale,
        v_scale,
        p_bits,
        p_scheme,
        out_inv_scale,
        out_zero_point,
        out_bits,
    )
    if lib is None or not native.has_products() or q.shape[-1] % 4:
        return eager.attention(*args, dtype, table)
    if out_bits == reference.FLOAT_BITS:
        return native.attention(lib, *args, torch.float32).to(dtype)
    return native.attention(lib, *args, dtype, table)


def _remap(codes: Tensor, table: Tensor | None) -> Tensor:
    """See `reference.remap`; for codes that oneDNN made, contiguous."""
    lib = native.library()
    if lib is None or table is None:
        return reference.remap(codes, table)
    native.remap(lib, codes, table)
    return codes


def _split(qkv: Tensor, heads: int, qk_bits: int, v_bits: int) -> tuple[Tensor, Tensor, Tensor]:
    lib = native.library()
    if lib is None:
        return eager.split_heads(qkv, heads, qk_bits, v_bits)
    return native.split_heads(lib, qkv.contiguous(), heads, qk_bits, v_bits)
