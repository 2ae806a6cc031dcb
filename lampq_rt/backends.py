"""What each backend executes: the menu of formats per site, and the machine's fitness. Nothing is probed at import."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lampq_rt.errors import BackendError, FormatError
from lampq_rt.formats import FLOAT, FLOAT_BITS, INTEGER_BITS, SOFTMAX_SCHEMES, Format
from lampq_rt.kernels.reference import SOFTMAX_BITS
from lampq_rt.sites import BLOCK_LINEARS, Kind, Site

TARGETS = ("any", "cpu", "cuda")
"""What `calibrate --target` accepts: "any" is what every backend can run."""

Formats = Mapping[str, Format]
"""One choice for a site: a format per operand."""

TABLE_KINDS = BLOCK_LINEARS
"""Kinds whose input may have levels from a table."""

WEIGHT_SCHEMES = ("uniform", "levels")
"""Of the weights of any linear."""


def formats(
    kind: Kind,
    bits: int,
    *,
    input_bits: int | None = None,
    p_scheme: str = "rowmax",
    input_granularity: str = "tensor",
    input_scheme: str = "uniform",
    weight_scheme: str = "uniform",
) -> dict[str, Format]:
    """The formats of a site of that kind at a width: weight and input share it (LampQ), as do a matmul's two operands.

    Args:
        kind: the site's kind.
        bits: 2..8, or 16 for floating point; 1 of a weight of scheme "levels".
        input_bits: width of a linear's input where it differs from the weight's. A patch embedding's is 8 by default,
            that beside a weight of 1 bit 2.
        p_scheme: of softmax output: "rowmax", "log2", which has at most 4 bits, or "cubic", at most 7.
        input_granularity: of a linear's input: "tensor", or "channel", which fc2 has alone: GELU of fc1 makes its
            codes, where a step a column costs nothing.
        input_scheme: of a linear's input: "uniform", or "table", which the blocks' linears have, at 2..7 bits.
        weight_scheme: of a linear's weight: "uniform", or "levels", at 1..7 bits.

    Raises:
        FormatError: no such scheme of softmax output, or not at that width; no such granularity at that kind; no such
            scheme of the input at that kind, or of the weight, or not at that width.
    """
    if bits == FLOAT_BITS:
        operands = {Kind.QK: ("q", "k"), Kind.PV: ("p", "v")}.get(kind, ("weight", "input"))
        return dict.fromkeys(operands, FLOAT)
    if kind is Kind.QK:
        return dict.fromkeys(("q", "k"), Format(bits, "uniform", "head", True))
    if kind is Kind.PV:
        return {"p": _softmax_format(bits, p_scheme), "v": Format(bits, "uniform", "head", True)}
    if input_granularity not in (("tensor", "channel") if kind is Kind.FC2 else ("tensor",)):
        allowed = "tensor, channel" if kind is Kind.FC2 else "tensor (channel at fc2 only)"
        raise FormatError(f"granularity {input_granularity!r} of the input of a {kind}; allowed: {allowed}")
    if input_scheme not in (("uniform", "table") if kind in TABLE_KINDS else ("uniform",)):
        allowed = "uniform, table" if kind in TABLE_KINDS else "uniform (table at linears of blocks only)"
        raise FormatError(f"scheme {input_scheme!r} of the input of a {kind}; allowed: {allowed}")
    if weight_scheme not in WEIGHT_SCHEMES:
        raise FormatError(f"scheme {weight_scheme!r} of a weight; allowed: {', '.join(WEIGHT_SCHEMES)}")
    if input_bits is None:
        input_bits = 8 if kind is Kind.PATCH_EMBED else max(bits, INTEGER_BITS[0])
    return {
        "weight": Format(bits, weight_scheme, "channel", True),
        "input": Format(input_bits, input_scheme, input_granularity, False),
    }


def _softmax_format(bits: int, scheme: str) -> Format:
    if scheme not in SOFTMAX_SCHEMES:
        raise FormatError(f"scheme {scheme!r} of softmax output; allowed: {', '.join(SOFTMAX_SCHEMES)}")
    if bits > SOFTMAX_BITS[scheme]:
        raise FormatError(f"{scheme} softmax output of {bits} bits; allowed: 2..{SOFTMAX_BITS[scheme]}")
    return Format(bits, scheme, "row", True)


def menu(site: Site, target: str = "any") -> tuple[Formats, ...]:
    """The formats that `target` executes at `site`, narrowest first, floating point last.

    Raises:
        BackendError: unknown target.
    """
    if target not in TARGETS:
        raise BackendError(f"unknown target {target!r}; allowed: {', '.join(TARGETS)}")
    return tuple(formats(site.kind, bits) for bits in (*INTEGER_BITS, FLOAT_BITS))


def check_formats(site: Site, chosen: Formats) -> None:
    """Refuse formats that no backend executes at `site`.

    Raises:
        FormatError: names the site, the operand, what came and what is allowed.
    """
    if set(chosen) != set(site.operands):
        raise FormatError(f"{site.name}: operands {sorted(chosen)}; expected {sorted(site.operands)}")
    floats = [f.is_float for f in chosen.values()]
    if any(floats) and not all(floats):
        raise FormatError(f"{site.name}: both operands must be in floating point, or neither")
    if all(floats):
        return
    for operand, came in chosen.items():
        p_scheme = came.scheme if operand == "p" and came.scheme in SOFTMAX_SCHEMES else "rowmax"
        granularity = came.granularity if operand == "input" else "tensor"
        scheme = "table" if operand == "input" and came.scheme == "table" else "uniform"
        of_weight = came.scheme if operand == "weight" and came.scheme in WEIGHT_SCHEMES else "uniform"
        try:
            allowed = formats(
                site.kind,
                came.bits,
                input_bits=max(came.bits, INTEGER_BITS[0]),
                p_scheme=p_scheme,
                input_granularity=granularity,
                input_scheme=scheme,
                weight_scheme=of_weight,
            )[operand]
        except FormatError as error:
            raise FormatError(f"{site.name}: {operand} is {came}; {error}") from None
        same_up_to_zero_point = Format(came.bits, came.scheme, came.granularity, allowed.symmetric) == allowed
        fixed = operand != "input" or granularity == "channel" or scheme == "table"  # these always have zero-points
        if not same_up_to_zero_point or (came.symmetric != allowed.symmetric and fixed):
            raise FormatError(f"{site.name}: {operand} is {came}; this runtime executes {allowed} there")
    if site.kind is Kind.QK and chosen["q"] != chosen["k"]:
        raise FormatError(f"{site.name}: q is {chosen['q']} and k is {chosen['k']}; both must share one format")


def resolve(device: str | torch.device | None) -> torch.device:
    """The device to compile for; None is the CPU.

    Raises:
        BackendError: the device does not exist here, or there are no kernels for it.
    """
    try:
        chosen = torch.device("cpu" if device is None else device)
    except RuntimeError:
        raise BackendError(f"unknown device {device!r}; allowed: cpu, cuda") from None
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise BackendError(
                "device 'cuda' was asked for, but PyTorch finds no CUDA GPU on this machine; allowed: cpu"
            )
        major, minor = torch.cuda.get_device_capability(chosen)
        if major < 8 and torch.version.hip is None:
            name = torch.cuda.get_device_name(chosen)
            raise BackendError(f"{name} is sm_{major}{minor}; the int8 kernels need sm_80 (A100, RTX 30) or newer")
    if chosen.type != "cpu":
        raise BackendError(f"device {str(device)!r} has no integer kernels; allowed: cpu, cuda")
    return chosen


def fallbacks(plan_sites: Mapping[str, object], device: torch.device) -> dict[str, str]:
    """Sites that this machine runs in floating point although their codes are integer, with the reason."""
    from lampq_rt.kernels.cpu import has_vnni

    if device.type != "cpu" or has_vnni():
        return {}
    reason = "this CPU has no VNNI instructions: the products of codes run in floating point"
    return dict.fromkeys(plan_sites, reason)
