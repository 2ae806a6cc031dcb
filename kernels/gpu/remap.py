"""Codes of the 8-bit grid to levels of a table, in place (docs/numerics.md, "Tables").

The table's 256 bytes stay in the first-level cache, so the kernel is bound by the codes, which are read and written 16
bytes a thread; only the look-ups themselves are loads of single bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 4096
"""Codes a program of 4 warps: two accesses a thread, one of 16 bytes where warps have 64 threads."""


@triton.jit
def remap_kernel(
    codes_ptr,  # bytes of a container [count], in place
    table_ptr,  # int8 [256], by signed code from -128 on
    count, SIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK consecutive codes; SIGNED is false where a byte is code + 128."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < count
    entries = tl.load(codes_ptr + places, mask=mask, other=0).to(tl.int32) & 255
    if SIGNED:
        entries = entries ^ 128
    levels = tl.load(table_ptr + entries)
    if not SIGNED:
        levels = (levels.to(tl.int32) ^ 128).to(tl.int8)
    tl.store(codes_ptr + places, levels, mask=mask)
