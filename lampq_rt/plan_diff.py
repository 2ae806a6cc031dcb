"""What differs between two plans, for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lampq_rt.plan import Plan, SiteParams


def diff(a: Plan, b: Plan) -> list[str]:
    """Differences of two plans, one line each, for people; empty where there are none.

    Steps are compared where the format is the same: another width has other steps anyway.
    """
    replaced = sorted({*a.activations, *b.activations})
    lines = [
        f"{key}: {x} -> {y}"
        for key, x, y in (
            ("model", a.model, b.model),
            ("weights", f"{a.weights_digest[:16]}…", f"{b.weights_digest[:16]}…"),
            ("residual dtype", a.residual_dtype, b.residual_dtype),
            ("mean bits", f"{a.mean_bits:.4f}", f"{b.mean_bits:.4f}"),
            *((name, *(plan.activations.get(name, "the model's own") for plan in (a, b))) for name in replaced),
        )
        if x != y
    ]
    for name in dict.fromkeys((*a.sites, *b.sites)):
        if name not in b.sites or name not in a.sites:
            lines.append(f"{name}: only in the {'first' if name in a.sites else 'second'} plan")
        else:
            lines += [f"{name}: {text}" for text in _site_differences(a.sites[name], b.sites[name])]
    for name in sorted({*a.edits, *b.edits}):
        difference = _tensor_difference(f"edit of {name}", a.edits.get(name), b.edits.get(name))
        lines += [difference] if difference else []
    first, second = (dict(_leaves(plan.provenance, "provenance")) for plan in (a, b))
    for path in sorted({*first, *second}):
        x, y = (repr(side[path]) if path in side else "nothing" for side in (first, second))
        if x != y:
            lines.append(f"{path}: {x:.80} -> {y:.80}")
    return lines


def _site_differences(a: SiteParams, b: SiteParams) -> Iterator[str]:
    if a.kind is not b.kind or a.params != b.params:
        yield f"{a.kind} of {a.params} parameters -> {b.kind} of {b.params}"
        return
    for operand, x in a.formats.items():
        y = b.formats[operand]
        if x.bits != y.bits:
            yield f"{operand} {x.bits} -> {y.bits} bits"
        for field in ("scheme", "granularity", "symmetric"):
            if not (x.is_float or y.is_float) and getattr(x, field) != getattr(y, field):
                yield f"{operand} {field} {getattr(x, field)} -> {getattr(y, field)}"
        if x == y:
            keys = sorted(key for key in {*a.tensors, *b.tensors} if key.startswith(f"{operand}."))
            yield from filter(None, (_tensor_difference(key, a.tensors.get(key), b.tensors.get(key)) for key in keys))


def _tensor_difference(key: str, a: Tensor | None, b: Tensor | None) -> str | None:
    if a is None or b is None:
        return f"{key} only in the {'second' if a is None else 'first'} plan"
    if a.shape != b.shape:
        return f"{key} has shape {list(a.shape)} -> {list(b.shape)}"
    if torch.equal(a.cpu(), b.cpu()):
        return None
    if key.endswith(".scale"):
        return f"{key} changed by up to {100 * float((b.cpu() / a.cpu() - 1).abs().max()):.3g} %"
    if a.is_floating_point():  # zero-points of channels, in steps; edits
        return f"{key} moved by up to {float((b.cpu() - a.cpu()).abs().max()):.3g}"
    if a.numel() == 1:
        return f"{key} {int(a)} -> {int(b)}"
    return f"{key}: {int((a.cpu() != b.cpu()).sum())} of {a.numel()} codes differ"


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Paths and values of nested objects; a list is one value."""
    if not isinstance(value, Mapping):
        yield path, value
        return
    for key, inner in value.items():
        yield from _leaves(inner, f"{path}.{key}")
