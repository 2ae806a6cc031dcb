"""Parts of `python -m benchmarks.gpu` that ask whether the kernels are right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import lampq_rt
from benchmarks.gpu.job import Facts, Job, attempt
from benchmarks.gpu.models import timing_plan
from lampq_rt.kernels import reference
from lampq_rt.kernels.gpu import configs, impl, start
from lampq_rt.kernels.ops import NATIVE, SCHEMAS

CODE_RATE = 2e-2
"""Codes of the GPU may lie one beside the reference's where a value is near the middle of two, this often at most."""

TOLERANCES = {torch.float32: 2e-3, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Of floating-point results, relative and absolute: two roundings to half precision."""

REPEATS = 20
"""Every op runs so often on the same inputs: results that change are a race."""


def correctness(job: Job) -> Facts:
    """Every op on the GPU against the reference on the CPU, each fed the same inputs; what was right before stands."""
    from benchmarks.gpu.cases import cases

    asked = list(cases())
    assert {name for _, name, _ in asked} == set(SCHEMAS), "an op has no case"
    rows = [row for row in job.earlier.get("rows", ()) if not _is_wrong(row)]
    done = {row["case"] for row in rows}
    for label, name, args in asked:
        if label in done:
            continue
        rows.append({"case": label, **attempt(lambda name=name, args=args: _compared(name, args))})
        if len(rows) % 10 == 0:
            job.save(_verdict(rows, len(asked)))
    return _verdict(rows, len(asked))


def _is_wrong(row: Facts) -> bool:
    return bool(row.get("error") or row["wrong"] or row["unstable"])


def _verdict(rows: list[Facts], asked: int) -> Facts:
    """Rows and what they say together: what is wrong comes first."""
    wrong, left = [row["case"] for row in rows if _is_wrong(row)], asked - len(rows)
    summary = f"{len(rows)} cases, {len(wrong)} wrong" + (f": {', '.join(wrong[:3])}" if wrong else "")
    return {"rows": rows, "wrong": wrong, "left": left, "summary": summary + (f", {left} left" if left else "")}


def _compared(name: str, args: tuple[Any, ...]) -> Facts:
    """One op, and for a residual with LayerNorm also the single kernel that a table may prefer."""
    inputs = [a.cuda() if isinstance(a, Tensor) else a for a in args]
    wanted = _results(getattr(reference, name)(*(reference_args := _own(args))), name, reference_args)
    ways = [lambda own: getattr(NATIVE, name)(*own)]
    config = rows_config(inputs) if name == "linear_residual_layernorm" else None
    if config is not None:
        ways.append(lambda own: in_one_kernel(config, own))
    facts: Facts = {"max": 0.0, "rate": 0.0, "wrong": False, "unstable": 0}
    for way in ways:
        first: list[Tensor] | None = None
        for _ in range(REPEATS):
            own = _own(inputs)
            came = _results(way(own), name, own)
            first = first or came
            facts["unstable"] += not all(map(torch.equal, came, first))
        assert first is not None
        for got, want in zip(first, wanted, strict=True):
            _add(facts, got.cpu(), want)
    return facts


def _own(args: Sequence[Any]) -> list[Any]:
    """The arguments with a first one of their own: residual ops write to it."""
    return [args[0].clone(), *args[1:]]


def _add(facts: Facts, got: Tensor, want: Tensor) -> None:
    """Put the worse of two results into the row of a case."""
    if got.dtype == torch.uint8:
        got, want = reference.unpack_int4(got), reference.unpack_int4(want)
    difference = (got.double() - want.double()).abs()
    largest, rate = float(difference.max()), float((difference > 0).double().mean())
    if want.is_floating_point():
        tolerance = TOLERANCES[want.dtype]
        wrong = not bool((difference <= tolerance + tolerance * want.double().abs()).all())  # also where it is NaN
    else:
        wrong = largest > 1 or rate > CODE_RATE
    facts["max"], facts["rate"] = max(facts["max"], largest), max(facts["rate"], rate)
    facts["wrong"] = facts["wrong"] or wrong


def _results(came: Any, name: str, args: list[Any]) -> list[Tensor]:
    """Everything that an op wrote."""
    found = [] if came is None else list(came) if isinstance(came, tuple) else [came]
    return [args[0], *found] if name.startswith("linear_residual") else found


def rows_config(args: Sequence[Any]) -> configs.LinearConfig | None:
    """The first tile that can hold whole rows of `linear_residual_layernorm`; None where none can, so no table has one.

    384 columns of a packed operand are such a case: unpacking takes the registers that the sums would need.
    """
    x, x_q, w_q = args[:3]
    widths = (4 if x_q.dtype == torch.uint8 else 8, 4 if w_q.dtype == torch.uint8 else 8)
    arch = start.facts(x_q)[0]
    return next((c for c in configs.ROWS_CANDIDATES if configs.rows_feasible(c, x.shape[-1], arch, *widths)), None)


def in_one_kernel(config: configs.LinearConfig, args: Sequence[Any]) -> Tensor:
    """Codes of `linear_residual_layernorm` by `linear_rows_kernel`, which also writes x."""
    *operands, bits, dtype = args[:13]
    x = operands[0]
    out = impl._empty(x, tuple(x.shape), dtype)
    start.rows(config, *operands[:6], out, *operands[6:], reference.code_range(bits), *args[13:])
    return out


def logits(job: Job) -> Facts:
    """GPU logits against the reference's on a real DeiT-Tiny (random weights where none are given).

    docs/numerics.md says why two right implementations may lie as far apart as the reference from itself.
    """
    import timm
    from safetensors.torch import load_file

    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224").eval()
    if job.weights:
        model.load_state_dict(load_file(job.weights))
    images = torch.randn(8, 3, 224, 224)
    moved = images + 1e-4 * torch.randn(images.shape)
    plan = timing_plan(model, 8, 8)
    with torch.inference_mode():
        came = lampq_rt.compile(model, plan, device="cuda")(images.cuda()).cpu()
        reference_model = lampq_rt.compile(model, plan, backend="reference")
        truth, beside, original = reference_model(images), reference_model(moved), model(images)
    rms, itself, noise = (float(x.pow(2).mean().sqrt()) for x in (came - truth, beside - truth, truth - original))
    right = rms <= max(1.25 * itself, noise / 2)
    summary = f"{'right' if right else 'WRONG'}: RMS to the reference {rms:.4f}, of it to itself with images moved by "
    summary += f"1e-4 {itself:.4f}, to fp32 {noise:.4f}"
    return {"rms": rms, "itself": itself, "noise": noise, "wrong": [] if right else ["logits"], "summary": summary}
