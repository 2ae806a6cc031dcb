"""Finds the fastest configuration of a linear on this GPU by timing the feasible ones."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from lampq_rt.kernels import reference
from lampq_rt.kernels.gpu import configs, linear, start, tables
from lampq_rt.kernels.gpu.scratch import captured
from lampq_rt.kernels.gpu.work import LinearWork

EPILOGUES = {"requant": linear.REQUANT, "float": linear.FLOAT, "residual": linear.RESIDUAL, "heads": linear.HEADS}
SPLITS: tuple[int, ...] = (1, 2, 4, 8)

logger = logging.getLogger(__name__)


def candidates(
    m: int, n: int, k: int, arch: str, processors: int, a_bits: int, w_bits: int, splits: Sequence[int] = SPLITS
) -> Iterator[configs.LinearConfig]:
    """Feasible tiles; K split, into one of `splits`, only where the tiles alone leave processors idle."""
    for config in configs.LINEAR_CANDIDATES:
        if not configs.feasible(config, arch, a_bits, w_bits):
            continue
        tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
        for split in splits:
            if split == 1 or (tiles * split <= 2 * processors and k // split >= 2 * config.block_k):
                yield replace(config, split_k=split)


@dataclass(frozen=True)
class Tuned:
    """What tuning one launch found.

    Attributes:
        config: the fastest configuration; None where two kernels are faster than one ("rows").
        ms: its median time, milliseconds.
        rule_ms: time of the configuration that the rule of thumb would have chosen; None where that does not run. For
            "rows", time of the two kernels as they are tuned.
    """

    config: configs.LinearConfig | None
    ms: float
    rule_ms: float | None


def _never() -> bool:
    return False


def tune_linear(
    work: LinearWork, device: str = "cuda", *, levels: bool = False, stop: Callable[[], bool] = _never
) -> Tuned:
    """Time every candidate on random data (zeros would draw less power).

    Args:
        work: the launch.
        device: "cuda"; "cpu" in Triton's interpreter.
        levels: codes of the packed weight name levels. The key is the same: tables are tuned without.
        stop: asked before each candidate, of which one may have to be compiled first, whether to give up.

    Raises:
        NothingRuns: no candidate runs on this GPU.
        Stopped: `stop` said so; what was timed until then names no winner.
    """
    case, weight_levels = _case(work, device), _levels(device) if levels else None
    found: dict[configs.LinearConfig | None, float | None] = {}
    for config, launch in starts(work, case, weight_levels):
        if stop():
            raise Stopped(work.key)
        found[config] = _timed(launch)
    times = {config: ms for config, ms in found.items() if ms is not None}
    if not times:
        raise NothingRuns(f"no configuration of {work.key} runs on {start.facts(case['x_q'])[0]}")
    best = min(times, key=times.__getitem__)
    return Tuned(best, times[best], found[next(iter(found))])


class NothingRuns(RuntimeError):
    """No candidate for a launch runs on this GPU."""


class Stopped(Exception):
    """Tuning was given up before it was done."""


def starts(
    work: LinearWork, case: Mapping[str, Tensor] | None = None, levels: Tensor | None = None
) -> Iterator[tuple[configs.LinearConfig | None, Callable[[], None]]]:
    """Every candidate with what starts it, the rule of thumb's first; of "rows" two kernels, None, come first.

    Args:
        work: the launch.
        case: operands; by default without values, for `offline.recording`.
        levels: int8 [16], what codes of the packed weight name.
    """
    case = _case(work, "meta") if case is None else case
    linear_args = (case["x_q"], case["w_q"], case["scale"], case["column"], case["bias"])
    shape, bits = (work.m, work.n, work.k), (work.a_bits, work.w_bits)
    arch, processors, _ = start.facts(case["x_q"])
    if work.epilogue == "rows":
        norm = (None, None, 1e-6, 20.0, 0)
        codes = case["out"].new_empty((work.m, work.n), dtype=torch.int8)
        tuned = tables.linear(arch, replace(work, epilogue="residual").key)
        apart = tuned or configs.linear_config(*shape, processors, arch, *bits)

        def two() -> None:
            start.linear(linear.RESIDUAL, *linear_args, case["out"], config=apart, levels=levels)
            start.layernorm(case["out"], codes, *norm, reference.code_range(8))

        def one(config: configs.LinearConfig) -> None:
            start.rows(config, case["out"], *linear_args, codes, *norm, reference.code_range(8), None, levels)

        yield None, two
        for config in configs.ROWS_CANDIDATES:
            if configs.rows_feasible(config, work.n, arch, work.a_bits, work.w_bits):
                yield config, partial(one, config)
        return
    options = {**_options(work, case), "levels": levels}

    def tile(config: configs.LinearConfig) -> None:
        start.linear(EPILOGUES[work.epilogue], *linear_args, case["out"], config=config, **options)

    rule, splits = configs.linear_config(*shape, processors, arch, *bits), SPLITS
    if work.epilogue == "heads":  # `start.linear` splits no K there: others would be the same kernel again
        rule, splits = replace(rule, split_k=1), SPLITS[:1]
    for config in dict.fromkeys((rule, *candidates(*shape, arch, processors, *bits, splits))):
        yield config, partial(tile, config)


def _timed(launch: Callable[[], None]) -> float | None:
    """Median milliseconds; None where it cannot be compiled or does not fit here."""
    try:
        return _time(launch)
    except (TritonError, RuntimeError) as error:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # raises where the device is lost: what came after would only look slow or unfit
        logger.info("a candidate is left out: %s", f"{type(error).__name__}: {error}"[:200])
        return None


def _time(launch: Callable[[], None]) -> float:
    """Median milliseconds, from a CUDA graph, as models run: of small launches the host would take longer."""
    with captured(launch) if torch.cuda.is_available() else nullcontext(launch) as replay:  # or in the interpreter
        return float(triton.testing.do_bench(replay, warmup=5, rep=25, return_mode="median"))


def tune_all(
    works: Iterable[LinearWork],
    arch: str,
    table: Path | None = None,
    *,
    again: bool = False,
    stop: Callable[[], bool] = _never,
) -> Iterator[tuple[LinearWork, Tuned | None]]:
    """Tune the launches that `table` lacks, and write it after each one: a run that is stopped goes on where it was.

    Args:
        works: launches; a second one with the same key is left out.
        arch: architecture of the present GPU, as in "sm90".
        table: file to write to, by default the user's own, which every model on this machine then runs with.
        again: tune what the table has, too.
        stop: as for `tune_linear`.

    Yields:
        Every launch with what was found, None where the table had it already; not those of which nothing runs.

    Raises:
        Stopped: `stop` said so; what was yielded is in the table.
    """
    known = set() if again else set(tables.read(table or tables.user_table(arch)))
    seen: set[str] = set()
    for work in works:
        if work.key in seen:
            continue
        seen.add(work.key)
        if work.key in known:
            yield work, None
            continue
        try:
            found = tune_linear(work, stop=stop)
        except NothingRuns as error:
            logger.warning("%s; the rule of thumb stays", error)
            continue
        tables.save(arch, {work.key: found.config}, table)
        yield work, found


def _levels(device: str) -> Tensor:
    """Random levels of weights."""
    return torch.randint(-127, 128, (reference.LEVELS,), dtype=torch.int8, device=device)


def _case(work: LinearWork, device: str) -> dict[str, Tensor]:
    """Random operands."""
    m, n, k, heads, tokens = work.m, work.n, work.k, work.heads, work.tokens
    low, high = reference.code_range(work.a_bits)
    x_q = torch.randint(low, high + 1, (m, k), dtype=torch.int8, device=device)
    low, high = reference.code_range(work.w_bits, weight=True)
    w_q = torch.randint(low, high + 1, (n, k), dtype=torch.int8, device=device)
    case = {
        "x_q": reference.pack_int4(x_q) if work.a_bits <= 4 else x_q,
        "w_q": reference.pack_int4(w_q) if work.w_bits <= 4 else w_q,
        "scale": torch.rand(n, device=device) / (math.sqrt(k) * 2 ** (work.a_bits + work.w_bits - 6)),
        "column": reference.column_constant(w_q, 3),
        "bias": torch.randn(n, device=device),
    }
    if work.epilogue == "heads":
        images, head_dim = m // tokens, n // (3 * heads)
        case["out"] = torch.empty((images, heads, tokens, head_dim), dtype=torch.int8, device=device)
        case["k"] = torch.empty_like(case["out"])
        padded = reference.padded_tokens(tokens)
        case["v"] = torch.empty((images, heads, head_dim, padded), dtype=torch.int8, device=device)
        case["step"] = torch.full((n,), 20.0, device=device)
    elif work.epilogue == "requant":
        shape = (m, n // 2) if work.out_bits <= 4 else (m, n)
        case["out"] = torch.empty(shape, dtype=torch.uint8 if work.out_bits <= 4 else torch.int8, device=device)
    else:
        case["out"] = torch.zeros((m, n), dtype=work.out_dtype, device=device)
    return case


def _options(work: LinearWork, case: Mapping[str, Tensor]) -> dict[str, Any]:
    if work.epilogue == "heads":
        layout = (len(case["out"]), work.tokens, work.heads, work.n // (3 * work.heads))
        return {"k": case["k"], "v": case["v"], "step": case["step"], "layout": layout}
    if work.epilogue == "requant":
        codes = reference.code_range(work.out_bits)
        return {"gelu": work.gelu, "inv_scale": 20.0, "codes": codes, "out_packed": work.out_bits <= 4}
    return {"gelu": work.gelu}
