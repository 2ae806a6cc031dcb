"""A linear whose input has a step and a zero-point a channel (docs/numerics.md, "Steps by channel").

    code[k]  = clamp(rne(x[k] / scale[k] + zero_point[k]))        x_hat[k] = (code[k] - zero_point[k]) * scale[k]
    y[n]     = weight.scale[n] * sum_k (code[k] - zero_point[k]) * w_q[n, k] + b[n]

The input's steps are multiplied into the weight's columns before the weight is quantised, so w_q stands for W * scale
and the sum over k stays one of integers. What the zero-points add to it is a constant of each output channel and joins
the bias. The linear itself therefore runs as any other; only whoever makes its codes needs vectors in the place of two
numbers.
"""

from __future__ import annotations

from torch import Tensor

from lampq_rt.plan import SiteParams


def by_channel(params: SiteParams) -> bool:
    """True where the site's input has a step a channel."""
    fmt = params.formats.get("input")
    return fmt is not None and fmt.granularity == "channel"


def vectors(params: SiteParams) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """fp32 [K] twice, 1/step and zero-point of every input channel; None twice where a site has one step for all."""
    if not by_channel(params):
        return None, None
    return params.tensors["input.scale"].reciprocal(), params.tensors["input.zero_point"].clone()


def scaled_weight(rows: Tensor, params: SiteParams) -> Tensor:
    """What is quantised of a weight fp32 [N, K]: its columns times the input's steps, where those are by channel."""
    return rows * params.tensors["input.scale"].to(rows.device) if by_channel(params) else rows


def scaled_input(x_hat: Tensor, params: SiteParams) -> Tensor:
    """What multiplies `scaled_weight`: x_hat fp32 [R, K], in steps of its channels where those are by channel."""
    return x_hat / params.tensors["input.scale"].to(x_hat.device) if by_channel(params) else x_hat


def unscaled_weight(rows: Tensor, params: SiteParams) -> Tensor:
    """Undo `scaled_weight`, on dequantised rows."""
    return rows / params.tensors["input.scale"].to(rows.device) if by_channel(params) else rows


def folded_bias(bias: Tensor | None, codes: Tensor, params: SiteParams, gamma: Tensor | None) -> Tensor:
    """fp32 [N]: gamma * (bias - weight.scale * sum_k zero_point[k] * w_q[n, k]), formed in fp64 and rounded once.

    Args:
        bias: fp32 [N] or None.
        codes: int8 [N, K], what multiplies.
        params: of the site, its input by channel.
        gamma: fp32 [N], LayerScale to fold in, or None.
    """
    zero_point, scale = (params.tensors[key].to(codes.device).double() for key in ("input.zero_point", "weight.scale"))
    folded = -scale * (codes.double() @ zero_point)
    if bias is not None:
        folded = folded + bias.detach().double()
    return (folded if gamma is None else folded * gamma.detach().double()).float()
