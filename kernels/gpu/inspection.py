"""Reads what a compiler made of a kernel: PTX and SASS of NVIDIA, the assembly of AMD.

Only the text is read, so all of this works where there is no GPU. Counts are static: an instruction within a loop
counts once, and `loop_mix` says which ones they are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

CLASSES = {
    "matrix": (r"IGMMA|IMMA|HGMMA|HMMA", r"v_mfma_"),
    "permute": (r"PRMT", r"v_perm_b32|v_alignbyte"),
    "logic": (r"U?LOP3|U?SHF|SGXT", r"v_(?:and|or|xor|not|bfe|bfi|lshl|lshr|ashr|alignbit)"),
    "multiply-add": (r"FFMA|FMUL|FADD|HADD2|HFMA2|HMUL2", r"v_(?:pk_)?(?:fma|fmac|mul|add|sub|mac|fmamk|fmaak)_f"),
    "convert": (r"F2I|I2F|I2FP|F2IP|F2FP|I2IP|F2F", r"v_cvt"),
    "special": (r"MUFU", r"v_(?:exp|log|rcp|rsq|sqrt)_f"),
    "global load": (r"LDG|LD", r"(?:global|buffer|flat)_load"),
    "global store": (r"STG|ST|RED|ATOMG", r"(?:global|buffer|flat)_(?:store|atomic)"),
    "async copy": (r"LDGSTS|UTMALDG", r"(?:global|buffer)_load\S*_lds"),
    "shared load": (r"LDS|LDSM", r"ds_(?:read|load)"),
    "shared store": (r"STS|STSM", r"ds_(?:write|store)"),
    "shuffle": (r"SHFL", r"ds_(?:bpermute|permute|swizzle)"),
    "barrier": (r"BAR", r"s_barrier"),
}
"""What instructions are for: SASS opcodes (whole), and how AMD's begin."""


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one kernel.

    Attributes:
        arch: "sm80", "sm89", "sm90", "sm100" or "gfx942".
        wgmma: `wgmma …s32.s8.s8` instructions (Hopper).
        mma: `mma.sync …s8` instructions.
        mfma: `v_mfma_i32_…_i8` instructions (AMD).
        fp16_matrix: those of fp16 operands with fp32 sums, of any of the three kinds.
        byte_accesses: loads and stores of single bytes, global memory.
        byte_shared_loads, byte_shared_stores: the same in shared memory (AMD: LDS).
        load_bytes, store_bytes: widths of the global accesses, in bytes.
        copy_bytes: those of `load_bytes` that go to shared memory by themselves: what the loop of a linear loads
            (NVIDIA; AMD's loads all pass through registers).
        spills: local-memory (AMD: scratch) instructions.
        overwritten: instructions that write to a register which an asynchronous matrix instruction may still read
            (Hopper); such a kernel computes wrong numbers, see `_overwritten`.
        shared_bytes: shared memory of one program.
        registers: of one thread; on AMD vector and accumulator registers together.
        mix: instructions by `CLASSES`, "other" for the rest.
        loop_mix: those that lie within loops.
    """

    arch: str
    wgmma: int
    mma: int
    mfma: int
    fp16_matrix: int
    byte_accesses: int
    byte_shared_loads: int
    byte_shared_stores: int
    load_bytes: tuple[int, ...]
    store_bytes: tuple[int, ...]
    copy_bytes: tuple[int, ...]
    spills: int
    overwritten: int
    shared_bytes: int
    registers: int
    mix: Mapping[str, int]
    loop_mix: Mapping[str, int]

    @property
    def instructions(self) -> int:
        """All of the kernel's, each counted once."""
        return sum(self.mix.values())

    @property
    def loop_instructions(self) -> int:
        """Those of the loops' bodies, each counted once."""
        return sum(self.loop_mix.values())


def read_nvidia(arch: str, ptx: str, sass: str, shared_bytes: int) -> Compiled:
    """Count what matters in PTX (which still says the types) and SASS (which is what runs)."""
    registers = re.findall(r"\bR(\d+)\b", sass)
    pattern = re.compile(r"^(LBB\d+):|^\S+\t(?:@!?U?P\w+ )?([\w.]+)(?:.*?\b(LBB\d+))?", re.MULTILINE)
    mix, loop_mix = _mixes(pattern.findall(sass), "BRA", 0)
    byte = r"\b{}\.{}(?:(?!\.v\d)\S)*\.[bus]8\b"
    return Compiled(
        arch=arch,
        wgmma=len(re.findall(r"wgmma\.mma_async\S*\.s32\.s8\.s8", ptx)),
        mma=len(re.findall(r"mma\.sync\S*\.s8\.s8", ptx)),
        mfma=0,
        fp16_matrix=len(
            re.findall(r"(?:wgmma\.mma_async|mma\.sync)\S*\.f32\.f16\.f16|tcgen05\.mma\S*\.kind::f16", ptx)
        ),
        byte_accesses=len(re.findall(byte.format("(?:ld|st)", "global"), ptx)),
        byte_shared_loads=len(re.findall(byte.format("ld", "shared"), ptx)),
        byte_shared_stores=len(re.findall(byte.format("st", "shared"), ptx)),
        load_bytes=_ptx_widths("ld", ptx) + _copies(ptx),
        store_bytes=_ptx_widths("st", ptx),
        copy_bytes=_copies(ptx),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        overwritten=_overwritten(sass),
        shared_bytes=shared_bytes,
        registers=max((int(r) for r in registers), default=0) + 1,
        mix=mix,
        loop_mix=loop_mix,
    )


_INSTRUCTION = re.compile(r"^\S+\t(?:@!?U?P\w+ )?([\w.]+)(?: (?:(R\d+)|P\w+))?(?:, (R\d+))?", re.MULTILINE)
"""Opcode of SASS, and the registers that its first two operands are, if they are any."""

_OPERAND_REGISTERS = 4
"""Of the first factor of one Hopper matrix instruction: 64 rows of 32 bytes, by 128 threads."""


def _overwritten(sass: str) -> int:
    """Writes to a factor's registers between a Hopper's matrix instruction and the wait for it.

    Assemblers before CUDA 13.3 are known to give such registers away too early. Read in the order of the text: the wait
    follows in the same block.
    """
    count, read = 0, set[int]()
    for opcode, first, second in _INSTRUCTION.findall(sass):
        stem, *kinds = opcode.split(".")
        if stem == "WARPGROUP" and "DEPBAR" in kinds:
            read.clear()
        elif stem.endswith("GMMA"):
            read.update(_registers(second, _OPERAND_REGISTERS))
        else:
            wide = 4 if {"128", "4"} & set(kinds) else 2 if {"64", "WIDE"} & set(kinds) or stem == "CS2R" else 1
            written = first or second  # behind a predicate where one is written, too
            count += not read.isdisjoint(_registers(written, wide))
    return count


def _registers(first: str, count: int) -> range:
    """Numbers of so many registers from "R8" on; none of ""."""
    begin = int(first[1:] or 0)
    return range(begin, begin + (count if first else 0))


def read_amd(arch: str, text: str, shared_bytes: int) -> Compiled:
    """The same from AMD's assembly."""
    code = text.split(".Lfunc_end")[0]
    pattern = re.compile(r"^(\.\w+):|^\s+([vs]_\w+|(?:ds|global|buffer|flat|scratch)_\w+)(?:.*?(\.LBB\w+))?", re.M)
    mix, loop_mix = _mixes(pattern.findall(code), "s_cbranch", 1)
    registers = re.search(r"\.vgpr_count:\s+(\d+)", text)
    return Compiled(
        arch=arch,
        wgmma=0,
        mma=0,
        mfma=len(re.findall(r"\bv_mfma_i32_\w+_i8\b", code)),
        fp16_matrix=len(re.findall(r"\bv_mfma_f32_\w+_f16\b", code)),
        byte_accesses=len(re.findall(r"\b(?:global|buffer|flat)_(?:load|store)_[us]?byte", code)),
        byte_shared_loads=len(re.findall(r"\bds_(?:read|load)_[ui]8", code)),
        byte_shared_stores=len(re.findall(r"\bds_(?:write|store)_b8", code)),
        load_bytes=_amd_widths("load", code),
        store_bytes=_amd_widths("store", code),
        copy_bytes=(),
        spills=len(re.findall(r"^\s+scratch_", code, re.MULTILINE)),
        overwritten=0,
        shared_bytes=shared_bytes,
        registers=int(registers[1]) if registers else 0,
        mix=mix,
        loop_mix=loop_mix,
    )


def _mixes(lines: Iterable[tuple[str, str, str]], branch: str, side: int) -> tuple[dict[str, int], dict[str, int]]:
    """Instructions by class, all and within loops, of (label, opcode, target) lines; `side` picks from `CLASSES`."""
    patterns = [(name, re.compile(f"(?:{both[side]})$" if side == 0 else both[side])) for name, both in CLASSES.items()]
    labels: dict[str, int] = {}
    names: list[str] = []
    inside: set[int] = set()
    for label, opcode, target in lines:
        if label:
            labels[label] = len(names)
            continue
        if opcode.startswith(branch) and target in labels:
            inside.update(range(labels[target], len(names) + 1))
        stem = opcode.split(".")[0] if side == 0 else opcode
        # The last that fits: an asynchronous copy is a load, too.
        names.append(([name for name, pattern in patterns if pattern.match(stem)] or ["other"])[-1])
    return dict(Counter(names)), dict(Counter(name for i, name in enumerate(names) if i in inside))


def _ptx_widths(access: str, ptx: str) -> tuple[int, ...]:
    found = re.findall(access + r"\.global\S*?(?:\.v(\d))?\.[bfus](\d+)\b", ptx)
    return tuple(int(vector or 1) * int(bits) // 8 for vector, bits in found)


def _copies(ptx: str) -> tuple[int, ...]:
    """Bytes of the asynchronous copies from global to shared memory."""
    return tuple(int(size, 16) for size in re.findall(r"cp\.async\.c[ag]\S* \[[^]]+\], \[[^]]+\], (0x[0-9a-f]+)", ptx))


def _amd_widths(access: str, code: str) -> tuple[int, ...]:
    found = re.findall(rf"\b(?:global|buffer|flat)_{access}_[us]?(byte|short|dword)(?:x(\d))?", code)
    sizes = {"byte": 1, "short": 2, "dword": 4}
    return tuple(sizes[kind] * int(count or 1) for kind, count in found)
