"""Linears on codes through oneDNN: u8 activations, s8 weights, scale, bias, GELU and requantisation in one call.

Serves where `linear.cpp` does not: with AMX, without a C++ compiler, without AVX512-VNNI, or where rows are no
multiple of four codes. oneDNN reads activations as code + 128 with zero-point 128, so that products are those of the
signed code; the plan's own zero-point is in `column` and is folded into the bias here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lampq_rt.kernels import reference
from lampq_rt.kernels.cpu.machine import has_vnni


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


def pack(
    w_q: Tensor,
    scale: Tensor,
    column: Tensor,
    bias: Tensor | None,
    out_inv_scale: Tensor | None,
    out_offset: Tensor | None,
    levels: Tensor | None,
) -> Packed:
    """See `prepack.prepacked`; steps of the output channels are folded into scale and bias."""
    assert out_offset is None, "steps and offsets of channels do not go through oneDNN's call"
    dense = reference.dense_weight(w_q, levels).contiguous()
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
        weight: from `pack`.
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
