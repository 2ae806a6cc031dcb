"""What this CPU can do. Asked when needed, never at import."""

from __future__ import annotations

import os
from functools import cache

import torch

_WITHOUT_VNNI = {"SSE41", "AVX", "AVX2", "AVX512_CORE"}
"""Values of ONEDNN_MAX_CPU_ISA under which oneDNN multiplies 8-bit codes in 16-bit steps that saturate."""


@cache
def has_amx() -> bool:
    """True where the CPU multiplies whole int8 tiles, which oneDNN knows how to use and our own kernels do not."""
    return bool(torch.cpu._is_amx_tile_supported())


@cache
def _cpu_has_vnni() -> bool:
    return bool(torch.cpu._is_vnni_supported())


def has_vnni() -> bool:
    """True where u8 x s8 products are summed exactly (AVX512-VNNI or AVX-VNNI, and oneDNN is allowed to use it).

    Without it oneDNN's int8 matmul saturates at 16 bits and gives wrong sums, so the codes are multiplied in floating
    point.
    """
    return _cpu_has_vnni() and os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() not in _WITHOUT_VNNI
