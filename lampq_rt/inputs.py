"""The input operand of a linear: what its format makes of it, whatever scheme and granularity the plan gives it."""

from __future__ import annotations

from torch import Tensor

from lampq_rt.plan import SiteParams
from lampq_rt.quantizers import QUANTIZERS
from lampq_rt.quantizers.table import Table


def table_of(params: SiteParams) -> Tensor | None:
    """int8 [256], the level of every code of the 8-bit grid; None where the site's input has another scheme."""
    fmt = params.formats.get("input")
    return params.tensors["input.table"] if fmt is not None and fmt.scheme == "table" else None


def quantized_input(x: Tensor, params: SiteParams) -> Tensor:
    """`x` in the format of a linear's input and back, a new tensor; `x` itself where that is floating point.

    Args:
        x: fp32 [..., K], or anything where the input has one step.
        params: formats and steps of the site.

    Returns:
        fp32, as `x`.
    """
    fmt = params.formats["input"]
    if fmt.is_float:
        return x
    scale, zero_point = params.tensors["input.scale"].to(x.device), params.tensors.get("input.zero_point")
    zero_point = None if zero_point is None else zero_point.to(x.device)
    quantizer, table = QUANTIZERS.get(fmt.scheme), table_of(params)
    if table is not None:
        assert isinstance(quantizer, Table)
        return quantizer.fake_quantize(x, scale, zero_point, fmt.bits, table=table)
    return quantizer.fake_quantize(x, scale, zero_point, fmt.bits)
