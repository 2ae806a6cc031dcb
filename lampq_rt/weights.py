"""The weight operand of a linear: what its format makes of it, whatever scheme the plan gives it.

What multiplies is a *value*: the code itself where the scheme is "uniform", the level that the code names where it is
"levels". Codes are what plans and checkpoints hold; values are what the kernels' sums are over.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lampq_rt import channels
from lampq_rt.formats import Format
from lampq_rt.kernels import packing, reference
from lampq_rt.kernels.containers import LEVELS
from lampq_rt.plan import SiteParams
from lampq_rt.quantizers import QUANTIZERS
from lampq_rt.quantizers.levels import Levels, codes_of, of_codes


def levels_of(params: SiteParams) -> Tensor | None:
    """int8 [2^bits], rising; None where the weight has another scheme."""
    fmt = params.formats.get("weight")
    return params.tensors["weight.levels"] if fmt is not None and fmt.scheme == "levels" else None


def weight_codes(weight: Tensor, params: SiteParams) -> Tensor:
    """int8 [N, K] codes of a weight fp32 [N, K]: the plan's where it decided the rounding, else nearest."""
    given = params.tensors.get("weight.codes")
    if given is not None:
        return given.to(weight.device)
    fmt, scale = params.formats["weight"], params.tensors["weight.scale"].to(weight.device)
    weight = channels.scaled_weight(weight, params)
    quantizer, levels = QUANTIZERS.get(fmt.scheme), levels_of(params)
    if levels is not None:
        assert isinstance(quantizer, Levels)
        codes = quantizer.quantize(weight, scale[:, None], None, fmt.bits, weight=True, levels=levels)
    else:
        codes = quantizer.quantize(weight, scale[:, None], None, fmt.bits, weight=True)
    return codes.to(torch.int8)


def nearest_weight(rows: Tensor, fmt: Format, tensors: Mapping[str, Tensor]) -> Tensor:
    """fp32 [N, K] rounded to the nearest values of these steps and levels; `rows` are what is quantised."""
    quantizer, scale = QUANTIZERS.get(fmt.scheme), tensors["weight.scale"].to(rows.device)[:, None]
    if isinstance(quantizer, Levels):
        return quantizer.fake_quantize(rows, scale, None, fmt.bits, weight=True, levels=tensors["weight.levels"])
    return quantizer.fake_quantize(rows, scale, None, fmt.bits, weight=True)


def values(codes: Tensor, params: SiteParams) -> Tensor:
    """int8 [N, K]: what multiplies, of codes."""
    levels = levels_of(params)
    return codes if levels is None else of_codes(codes, levels)


def dequantized(codes: Tensor, params: SiteParams) -> Tensor:
    """fp32 [N, K]: the weight that codes stand for."""
    scale = params.tensors["weight.scale"].to(codes.device)
    return channels.unscaled_weight(values(codes, params).float() * scale[:, None], params)


def quantized_weight(weight: Tensor, params: SiteParams) -> Tensor:
    """`weight` [N, ...] at its plan's format, dequantised, same shape. Uses the plan's codes where it holds them."""
    return dequantized(weight_codes(weight.flatten(1), params), params).view_as(weight)


def container(codes: Tensor, params: SiteParams) -> tuple[Tensor, Tensor | None]:
    """A weight as it lies in memory, and int8 [16] levels where the kernels look them up on chip.

    Codes of at most 4 bits are packed, with the levels beside them; wider ones are replaced by what multiplies.

    Args:
        codes: int8 [N, K].
        params: of the site.
    """
    levels, bits = levels_of(params), params.formats["weight"].bits
    if levels is None:
        return packing.weight_container(codes, bits), None
    if not packing.is_packed_int4(codes.shape[-1], bits):
        return of_codes(codes, levels), None
    spread = levels.new_zeros(LEVELS)
    start = (LEVELS - len(levels)) // 2
    spread[start : start + len(levels)] = levels
    return packing.weight_container(codes, bits), spread.to(codes.device)


def contained_codes(w_q: Tensor, params: SiteParams) -> Tensor:
    """int8 [N, K] codes: undo `container`.

    Raises:
        ValueError: `w_q` holds what is none of the levels.
    """
    levels = levels_of(params)
    if w_q.dtype == torch.uint8:  # packed: codes, with levels beside them
        return reference.dense_weight(w_q)
    return w_q if levels is None else codes_of(w_q, levels)


def level_bytes(params: SiteParams) -> int:
    """Bytes in memory of the levels that lie beside packed codes."""
    scale = params.tensors.get("weight.scale")
    if levels_of(params) is None or scale is None:
        return 0
    packed = packing.is_packed_int4(params.params // scale.numel(), params.formats["weight"].bits)
    return LEVELS if packed else 0
