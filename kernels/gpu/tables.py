"""Tuned configurations: shipped per architecture in `kernels/tuning/`, the user's own beside the cache. JSON, never
pickle.

A table maps the key of a launch to a `LinearConfig`. Rows of M share a bucket (the power of two above), so that a
model tuned at one batch serves its neighbours. A key that no table has is served by the rule in `configs`; this is
logged once. For one kernel in place of two ("rows"), null says that two were faster.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from lampq_rt.kernels.cpu.native import cache_folder
from lampq_rt.kernels.gpu.configs import LinearConfig

Table = dict[str, LinearConfig | None]

logger = logging.getLogger(__name__)

SHIPPED = Path(__file__).resolve().parent.parent / "tuning"
_FIELDS = {f.name for f in fields(LinearConfig)}


def linear_key(epilogue: str, m: int, n: int, k: int, a_bits: int, w_bits: int, out_bits: int, gelu: bool) -> str:
    """The key of a linear's launch: epilogue, shape with M's bucket, containers, GELU."""
    bucket = 1 << max(m - 1, 1).bit_length()
    return f"linear {epilogue} m{bucket} n{n} k{k} a{a_bits} w{w_bits} o{out_bits}{' gelu' if gelu else ''}"


def linear(arch: str, key: str) -> LinearConfig | None:
    """The tuned configuration of `key` on `arch`, or None."""
    found = _table(arch).get(key)
    if found is None:
        _tell_once(arch)
    return found


def rows(arch: str, key: str) -> LinearConfig | None:
    """The tuned configuration of one kernel for linear, residual and LayerNorm, or None: two kernels are faster there.

    Nothing is said of a shape that no table has: the two kernels look up their own.
    """
    return _table(arch).get(key)


def has(arch: str, key: str) -> bool:
    """True where `key` was tuned on `arch`, here or by us."""
    return key in _table(arch)


def user_table(arch: str) -> Path:
    """Where `save` puts what was tuned on this machine."""
    return cache_folder() / f"{arch}.json"


def save(arch: str, entries: Mapping[str, LinearConfig | None], path: Path | None = None) -> Path:
    """Merge `entries` into the table at `path` (the user's by default); written beside it and renamed."""
    target = path or user_table(arch)
    target.parent.mkdir(parents=True, exist_ok=True)
    merged = {**read(target), **entries}
    text = json.dumps({key: config and config.to_json() for key, config in sorted(merged.items())}, indent=1)
    with tempfile.NamedTemporaryFile("w", dir=target.parent, delete=False) as file:
        file.write(text + "\n")
    os.replace(file.name, target)
    _table.cache_clear()
    return target


@cache
def _table(arch: str) -> Table:
    return {**read(SHIPPED / f"{arch}.json"), **read(user_table(arch))}


@cache
def _tell_once(arch: str) -> None:
    logger.info("no tuned configuration on %s for some shapes: a rule of thumb serves; `lampq tune` finds better", arch)


def read(path: Path) -> Table:
    """A table; an unreadable one counts as empty, and is said to be."""
    try:
        return parsed(json.loads(path.read_text()))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        logger.warning("tuning table %s is unreadable (%s) and is left out", path, error)
        return {}


def parsed(data: Any) -> Table:
    """A table as it is in JSON.

    Raises:
        ValueError, TypeError, AttributeError: it is not one.
    """
    return {key: _config(key, value) for key, value in data.items()}


def _config(key: str, value: Any) -> LinearConfig | None:
    if value is None and key.startswith("linear rows "):
        return None
    if set(value) != _FIELDS or not all(type(v) is int and 0 < v <= 512 for v in value.values()):
        raise ValueError(f"not a configuration: {value!r:.100}")
    return LinearConfig(**value)
