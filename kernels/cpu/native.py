"""Builds the C++ kernels for this machine once, keeps the library in the user's cache, and calls it through ctypes.

No build system and no PyTorch headers: one compiler call of about two seconds. ctypes releases the interpreter lock
during a call, so several threads can run models at once. Where no compiler is found, `library()` is None and
`eager.py` serves instead.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lampq_rt.kernels import reference
from lampq_rt.kernels.cpu import program

logger = logging.getLogger(__name__)

SOURCES = tuple(Path(__file__).with_name(name) for name in ("kernels.cpp", "linear.cpp", "program.cpp"))
HEADERS = tuple(Path(__file__).with_name(name) for name in ("common.h", "vnni.h"))
FLAGS = (
    "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-std=c++17",
    "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-w",
)  # fmt: skip
WIDE_FLAG = "-mprefer-vector-width=512"
"""Tried first; compilers for other processors refuse it."""

BUILD_SECONDS = 120

_i64, _int, _float, _ptr = ctypes.c_int64, ctypes.c_int, ctypes.c_float, ctypes.c_void_p
_CODES = [_float, _float, _float, _float, _int]
SIGNATURES: dict[str, list[Any]] = {
    "lampq_quantize": [_ptr, _ptr, _i64, *_CODES, _ptr, _int],
    "lampq_layernorm_quantize": [_ptr] * 4 + [_i64, _i64, _float, *_CODES, _ptr, _int],
    "lampq_split_heads": [_ptr] * 4 + [_i64] * 5 + [_int] * 5,
    "lampq_linear": [_ptr] * 7 + [_i64] * 3 + [_int] * 2 + _CODES + [_ptr] * 3 + [_float, *_CODES, _ptr, _ptr, _int],
    "lampq_attention": [_ptr] * 6 + [_i64] * 5 + [_float, _int, _int, *_CODES, _int, _ptr, _int],
    "lampq_remap": [_ptr] * 2 + [_i64] + [_int] * 2,
    "lampq_pack_weight": [_ptr] * 2 + [_i64] * 2 + [_ptr] * 2,
    "lampq_run": [_ptr, _i64],
}
"""Arguments of every function; program.cpp knows the first six by their places here."""

SCHEMES = ("rowmax", "log2", "cubic")
"""Schemes of P by their number in kernels.cpp."""

NEED_VNNI = ("lampq_attention", "lampq_pack_weight", "lampq_linear")
"""Functions that a library for a CPU without AVX512-VNNI does not have."""


def cache_folder() -> Path:
    """Where built libraries are kept: $LAMPQ_CACHE, else lampq_rt below the user's cache folder."""
    named = os.environ.get("LAMPQ_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lampq_rt"


def compiler() -> str | None:
    """Path of a C++ compiler: $CXX, else the first of c++, g++, clang++ that exists."""
    named = os.environ.get("CXX")
    names = [named] if named else ["c++", "g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


@cache
def library() -> ctypes.CDLL | None:
    """The loaded library, built if need be; None where it cannot be had (logged once, with the reason)."""
    cxx = compiler()
    if cxx is None:
        logger.warning(
            "no C++ compiler found: what lies between the int8 matmuls runs in eager PyTorch, which is slower"
        )
        return None
    try:
        path = cache_folder() / f"cpu-{_key(cxx)}.so"
        if not path.is_file():
            _build(cxx, path)
        loaded = ctypes.CDLL(str(path))
        for name, types in SIGNATURES.items():
            if name in NEED_VNNI and not loaded.lampq_has_vnni():
                continue
            getattr(loaded, name).argtypes = types
            getattr(loaded, name).restype = None
        return loaded
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        logger.warning(
            "C++ kernels could not be built (%s): eager PyTorch serves instead, slower", detail.strip()[:300]
        )
        return None


def _key(cxx: str) -> str:
    """What a build depends on: source, flags, compiler, processor."""
    version = subprocess.run(
        [cxx, "--version"], capture_output=True, text=True, timeout=BUILD_SECONDS, check=True
    ).stdout
    parts = (
        *(path.read_text() for path in (*SOURCES, *HEADERS)),
        *FLAGS,
        WIDE_FLAG,
        version,
        platform.machine(),
        _processor(),
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))}))


def _build(cxx: str, path: Path) -> None:
    """Compile into a temporary file and rename: two processes may build at once, none sees half a library."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        target = Path(folder) / "kernels.so"
        for flags in ([WIDE_FLAG, *FLAGS], [*FLAGS]):
            command = [cxx, *flags, *map(str, SOURCES), "-o", str(target)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS)
            if done.returncode == 0:
                break
        else:
            raise subprocess.CalledProcessError(done.returncode, command, stderr=done.stderr)
        os.replace(target, path)


def has_products() -> bool:
    """True where the library is there and this CPU has the instructions that its products of codes are written for."""
    loaded = library()
    return loaded is not None and bool(loaded.lampq_has_vnni())


def code_arguments(
    inv_scale: float, zero_point: int, bits: int, dtype: torch.dtype
) -> tuple[float, float, float, float, int]:
    """How codes are made, in the order of `_CODES`: 1/step, zero-point, least and largest code, what is stored beside.

    Args:
        inv_scale: 1/step.
        zero_point: of the signed code.
        bits: 2..8.
        dtype: container, int8 or uint8; the last number, which is added to each code, is 128 for uint8 and 0 for int8.
    """
    low, high = reference.code_range(bits)
    return inv_scale, float(zero_point), float(low), float(high), reference.OFFSET if dtype == torch.uint8 else 0


def call(lib: ctypes.CDLL, name: str, *args: Any) -> None:
    """Call a kernel; a recording, where there is one, is told."""
    getattr(lib, name)(*args)
    program.note(name, args)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A result to be written by a kernel."""
    return cast(Tensor, program.keep(torch.empty(shape, dtype=dtype)))


def at(tensor: Tensor | None) -> int | None:
    """Address, or a null pointer."""
    return None if tensor is None else program.keep(tensor).data_ptr()  # type: ignore[no-any-return]


def quantize(
    lib: ctypes.CDLL,
    x: Tensor,
    inv_scale: float,
    zero_point: int,
    bits: int,
    dtype: torch.dtype,
    table: Tensor | None,
) -> Tensor:
    """See `reference.quantize`; `x` fp32, contiguous."""
    out = empty(tuple(x.shape), dtype)
    codes = code_arguments(inv_scale, zero_point, bits, dtype)
    call(lib, "lampq_quantize", at(x), at(out), x.numel(), *codes, at(table), torch.get_num_threads())
    return out


def remap(lib: ctypes.CDLL, codes: Tensor, table: Tensor) -> None:
    """See `reference.remap`; contiguous."""
    offset = reference.OFFSET if codes.dtype == torch.uint8 else 0
    call(lib, "lampq_remap", at(codes), at(table), codes.numel(), offset, torch.get_num_threads())


def layernorm_quantize(
    lib: ctypes.CDLL,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    inv_scale: float,
    zero_point: int,
    bits: int,
    dtype: torch.dtype,
    table: Tensor | None,
) -> Tensor:
    """See `reference.layernorm_quantize`; fp32, contiguous."""
    out = empty(tuple(x.shape), dtype)
    width = x.shape[-1]
    codes = code_arguments(inv_scale, zero_point, bits, dtype)
    call(
        lib,
        "lampq_layernorm_quantize",
        at(x),
        at(weight),
        at(bias),
        at(out),
        x.numel() // max(width, 1),
        width,
        eps,
        *codes,
        at(table),
        torch.get_num_threads(),
    )
    return out


def split_heads(lib: ctypes.CDLL, qkv: Tensor, heads: int, qk_bits: int, v_bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """int8 codes [B, N, 3*H*d], saturated at 8 bits, to q, k [B, H, N, d], v [B, H, d, N_pad] at their bits."""
    batch, tokens, width = qkv.shape
    head_dim, padded = width // (3 * heads), reference.padded_tokens(tokens)
    q, k = (empty((batch, heads, tokens, head_dim), torch.int8) for _ in range(2))
    v = empty((batch, heads, head_dim, padded), torch.int8)
    ranges = (*reference.code_range(qk_bits), *reference.code_range(v_bits))
    call(
        lib,
        "lampq_split_heads",
        at(qkv),
        at(q),
        at(k),
        at(v),
        batch,
        tokens,
        heads,
        head_dim,
        padded,
        *ranges,
        torch.get_num_threads(),
    )
    return q, k, v


def attention(
    lib: ctypes.CDLL,
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
    table: Tensor | None = None,
) -> Tensor:
    """See `reference.attention`; all contiguous, head_dim a multiple of 4, `dtype` fp32 for a floating-point result."""
    unit, scheme = reference.softmax_unit(p_bits, p_scheme), SCHEMES.index(p_scheme)
    batch, heads, tokens, head_dim = q.shape
    out = empty((batch, tokens, heads * head_dim), dtype)
    floating = out_bits == reference.FLOAT_BITS
    codes = code_arguments(out_inv_scale, out_zero_point, 8 if floating else out_bits, dtype)
    call(
        lib, "lampq_attention",
        at(q), at(k), at(v), at(logit_scale), at(v_scale), at(out), batch, heads, tokens, head_dim, v.shape[-1],
        unit, scheme, p_bits, *codes, int(floating), at(table), torch.get_num_threads(),
    )  # fmt: skip
    return out
