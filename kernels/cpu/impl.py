"""The CPU implementation of every op in `kernels/ops.py`, by the same names; `reference.py` says what each computes."""

from __future__ import annotations

import torch
from torch import Tensor

from lampq_rt.kernels import reference
from lampq_rt.kernels.cpu import eager, native, onednn


def _fp32(x: Tensor) -> Tensor:
    return x.to(torch.float32).contiguous()


def quantize(x: Tensor, inv_scale: float, zero_point: int, bits: int, dtype: torch.dtype) -> Tensor:
    """See `reference.quantize`."""
    lib = native.library()
    if lib is None:
        return reference.quantize(x.float(), inv_scale, zero_point, bits, dtype)
    return native.quantize(lib, _fp32(x), inv_scale, zero_point, bits, dtype)


def layernorm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    inv_scale: float,
    zero_point: int,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """See `reference.layernorm_quantize`."""
    lib = native.library()
    if lib is None:
        return reference.layernorm_quantize(x, weight, bias, eps, inv_scale, zero_point, bits, dtype)
    return native.layernorm_quantize(lib, _fp32(x), weight, bias, eps, inv_scale, zero_point, bits, dtype)


def linear_float(
    x_q: Tensor, w_q: Tensor, scale: Tensor, column: Tensor, bias: Tensor | None, activation: str, dtype: torch.dtype
) -> Tensor:
    """See `reference.linear_float`. GELU is applied after the call: oneDNN's fp32 GELU is not the erf form's equal."""
    y = onednn.linear(x_q, onednn.packed(w_q, scale, column, bias), "none", 1.0, 0, torch.float32)
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
) -> Tensor:
    """See `reference.linear_requant`; GELU and requantisation inside the matmul's call."""
    offset = reference.OFFSET if dtype == torch.uint8 else 0
    weight = onednn.packed(w_q, scale, column, bias)
    y = onednn.linear(x_q, weight, activation, 1.0 / out_inv_scale, out_zero_point + offset, dtype)
    if out_bits < 8:
        low, high = reference.code_range(out_bits)
        y.clamp_(low + offset, high + offset)
    return y


def linear_residual(x: Tensor, x_q: Tensor, w_q: Tensor, scale: Tensor, column: Tensor, bias: Tensor | None) -> None:
    """See `reference.linear_residual`; the sum is a post-op of the matmul."""
    weight = onednn.packed(w_q, scale, column, bias)
    if x.dtype == torch.float32 and x.is_contiguous():
        onednn.linear_add_(x, x_q, weight)
    else:
        x.copy_(x.float() + onednn.linear(x_q, weight, "none", 1.0, 0, torch.float32))


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
) -> Tensor:
    """See `reference.linear_residual_layernorm`."""
    linear_residual(x, x_q, w_q, scale, column, bias)
    return layernorm_quantize(x, norm_weight, norm_bias, eps, inv_scale, zero_point, bits, dtype)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.linear_qkv`; every column's step is in its scale and bias, so that the matmul's step is 1."""
    weight = onednn.packed(w_q, scale, column, bias, out_inv_scale)
    return _split(onednn.linear(x_q, weight, "none", 1.0, 0, torch.int8), heads, qk_bits, v_bits)


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
    if lib is None or not native.has_attention() or q.shape[-1] % 4:
        return eager.attention(*args, dtype)
    if out_bits == reference.FLOAT_BITS:
        return native.attention(lib, *args, torch.float32).to(dtype)
    return native.attention(lib, *args, dtype)


def _split(qkv: Tensor, heads: int, qk_bits: int, v_bits: int) -> tuple[Tensor, Tensor, Tensor]:
    lib = native.library()
    if lib is None:
        return eager.split_heads(qkv, heads, qk_bits, v_bits)
    return native.split_heads(lib, qkv.contiguous(), heads, qk_bits, v_bits)
