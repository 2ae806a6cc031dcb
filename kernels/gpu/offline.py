"""Compiles a kernel for a GPU that is not there, and reads what the compiler made of it.

Triton's compiler needs no device: PTX and SASS for sm_80, sm_89, sm_90 and sm_100 come out of it on any machine. From
them tests and `benchmarks.compile_report` read what a speed depends on: which matrix instruction, how wide the loads
and stores, what was spilled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lampq_rt.kernels import reference
from lampq_rt.kernels.gpu import attention, configs, heads, layernorm, linear, rows

POINTERS = {
    "scale_ptr": "*fp32", "column_ptr": "*i32", "bias_ptr": "*fp32", "step_ptr": "*fp32", "partial_ptr": "*i32",
    "lock_ptr": "*i32", "weight_ptr": "*fp32", "norm_weight_ptr": "*fp32", "norm_bias_ptr": "*fp32",
    "logit_scale_ptr": "*fp32", "v_scale_ptr": "*fp32",
}  # fmt: skip
"""Element types of pointers that are not int8 codes."""

FLOATS = ("inv_scale", "zero_point", "eps")
MULTIPLES_OF_16 = ("N", "K", "D", "PADDED")
"""Sizes that the launcher's specialisation finds to be multiples of 16 for every ViT."""


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one kernel.

    Attributes:
        wgmma: `wgmma …s32.s8.s8` instructions (Hopper).
        mma: `mma.sync …s8` instructions.
        wgmma_fp16, mma_fp16: the same of fp16 operands with fp32 sums.
        byte_accesses: loads and stores of single bytes, global or shared.
        load_bytes, store_bytes: widths of the global accesses, in bytes.
        spills: local-memory instructions in SASS.
        shared_bytes: shared memory of one program.
        registers: of one thread.
        instructions: in SASS.
    """

    wgmma: int
    mma: int
    wgmma_fp16: int
    mma_fp16: int
    byte_accesses: int
    load_bytes: tuple[int, ...]
    store_bytes: tuple[int, ...]
    spills: int
    shared_bytes: int
    registers: int
    instructions: int


def compile_kernel(
    kernel: Any, constants: Mapping[str, Any], pointers: Mapping[str, str], arch: int, warps: int, stages: int
) -> Compiled:
    """Compile `kernel` for sm_`arch`.

    Args:
        kernel: a `triton.jit` function (not decorated under TRITON_INTERPRET=1).
        constants: its constexpr arguments.
        pointers: element types of pointers that differ from `POINTERS` and int8.
        arch: 80, 89, 90, 100.
        warps: of a program.
        stages: of the load pipeline.
    """
    names = kernel.arg_names
    types = {**POINTERS, **pointers}

    def type_of(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name.endswith("_ptr"):
            return types.get(name, "*i8")
        return "fp32" if name in FLOATS else "i32"

    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name not in constants and (name.endswith("_ptr") or name in MULTIPLES_OF_16)
    }
    indexed = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, {name: type_of(name) for name in names}, indexed, aligned)
    made = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps, "num_stages": stages}
    )
    return _read(made.asm["ptx"], made.asm["sass"], made.metadata.shared)


def _read(ptx: str, sass: str, shared_bytes: int) -> Compiled:
    """Count what matters in the text."""
    registers = re.findall(r"\bR(\d+)\b", sass)
    return Compiled(
        wgmma=len(re.findall(r"wgmma\.mma_async\S*\.s32\.s8\.s8", ptx)),
        mma=len(re.findall(r"mma\.sync\S*\.s8\.s8", ptx)),
        wgmma_fp16=len(re.findall(r"wgmma\.mma_async\S*\.f32\.f16\.f16", ptx)),
        mma_fp16=len(re.findall(r"mma\.sync\S*\.f32\.f16\.f16\.f32", ptx)),
        byte_accesses=len(re.findall(r"\b(?:ld|st)\.(?:global|shared)(?:(?!\.v\d)\S)*\.[bus]8\b", ptx)),
        load_bytes=_widths(r"ld\.global\S*?(?:\.v(\d))?\.[bfus](\d+)\b", ptx) + _copies(ptx),
        store_bytes=_widths(r"st\.global\S*?(?:\.v(\d))?\.[bfus](\d+)\b", ptx),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        shared_bytes=shared_bytes,
        registers=max((int(r) for r in registers), default=0) + 1,
        instructions=len(re.findall(r"\t\S.*;$", sass, re.MULTILINE)),
    )


def _widths(pattern: str, ptx: str) -> tuple[int, ...]:
    return tuple(int(vector or 1) * int(bits) // 8 for vector, bits in re.findall(pattern, ptx))


def _copies(ptx: str) -> tuple[int, ...]:
    """Bytes of the asynchronous copies from global to shared memory."""
    return tuple(int(size, 16) for size in re.findall(r"cp\.async\.c[ag]\S* \[[^]]+\], \[[^]]+\], (0x[0-9a-f]+)", ptx))


def compile_linear(
    arch: int,
    epilogue: str,
    config: configs.LinearConfig,
    *,
    a_packed: bool = False,
    b_packed: bool = False,
    out_packed: bool = False,
    gelu: bool = False,
    head_dim: int = 64,
    heads: int = 12,
    out: str = "*fp16",
) -> Compiled:
    """`linear_kernel` with `epilogue` "requant", "float", "residual" or "heads"."""
    low, high = (-8, 7) if out_packed else (-128, 127)
    constants = {
        "EPILOGUE": {"requant": 0, "float": 1, "residual": 2, "heads": 3}[epilogue],
        "GELU": gelu, "FAST_GELU": True, "HAS_BIAS": True, "LOW": low, "HIGH": high, "V_LOW": low, "V_HIGH": high,
        "A_PACKED": a_packed, "B_PACKED": b_packed, "OUT_PACKED": out_packed, "HEADS_": heads, "HEAD_DIM": head_dim,
        "EVEN_K": True, "SPLIT_K": config.split_k, "PTX": True,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "GROUP_M": config.group_m,
    }  # fmt: skip
    pointers = {"out_ptr": out if epilogue in ("float", "residual") else "*i8"}
    return compile_kernel(linear.linear_kernel, constants, pointers, arch, config.warps, config.stages)


def compile_attention(
    arch: int, tokens: int, head_dim: int = 64, *, p_bits: int = 8, p_scheme: str = "rowmax", packed: bool = False
) -> Compiled:
    """`attention_kernel` as the launcher configures it."""
    config = configs.attention_config(tokens, head_dim, p_scheme)
    low, high = (-8, 7) if packed else (-128, 127)
    constants = {
        "HEADS": 12, "HEAD_DIM": head_dim, "P_BITS": p_bits, "UNIT": reference.softmax_unit(p_bits, p_scheme),
        "LOG2": p_scheme == "log2", "LOW": low, "HIGH": high, "FLOAT_OUT": False,
        "OUT_PACKED": packed, "PTX": True, "BLOCK_M": config.block_m,
        "BLOCK_D": max(32, triton.next_power_of_2(head_dim)), "ON_CHIP": config.on_chip,
        **{f"TILE_{i}": width for i, width in enumerate(config.tiles)},
    }  # fmt: skip
    return compile_kernel(attention.attention_kernel, constants, {}, arch, config.warps, config.stages)


def compile_heads(arch: int, head_dim: int, *, norm: bool = True, x: str = "*fp16") -> Compiled:
    """`heads_kernel` as the launcher configures it; `x` is the element type of qkv."""
    block_m, block_d = configs.heads_blocks(head_dim)
    constants = {
        "NORM": norm, "HAS_WEIGHT": norm, "HAS_BIAS": norm, "LOW": -128, "HIGH": 127, "V_LOW": -128, "V_HIGH": 127,
        "HEADS": 12, "HEAD_DIM": head_dim, "PTX": True, "BLOCK_M": block_m, "BLOCK_D": block_d,
    }  # fmt: skip
    names = ("q_weight_ptr", "q_bias_ptr", "k_weight_ptr", "k_bias_ptr")
    pointers = {"qkv_ptr": x, **dict.fromkeys(names, "*fp32")}
    return compile_kernel(heads.heads_kernel, constants, pointers, arch, 4, 1)


def compile_layernorm(arch: int, width: int, *, x: str = "*fp16", packed: bool = False) -> Compiled:
    """`layernorm_quantize_kernel` as the launcher configures it."""
    block_m, block_d = configs.layernorm_blocks(width)
    low, high = (-8, 7) if packed else (-128, 127)
    constants = {
        "HAS_WEIGHT": True, "HAS_BIAS": True, "LOW": low, "HIGH": high, "OUT_PACKED": packed, "PTX": True,
        "BLOCK_M": block_m, "BLOCK_D": block_d,
    }  # fmt: skip
    return compile_kernel(layernorm.layernorm_quantize_kernel, constants, {"x_ptr": x}, arch, 4, 1)


def compile_rows(
    arch: int, config: configs.LinearConfig, width: int, *, a_packed: bool = False, b_packed: bool = False,
    x: str = "*fp16",
) -> Compiled:  # fmt: skip
    """`linear_rows_kernel` as the launcher configures it; its output is packed where its input is."""
    low, high = (-8, 7) if a_packed else (-128, 127)
    tiles = configs.row_tiles(width)
    constants = {
        "HAS_BIAS": True, "HAS_NORM_WEIGHT": True, "HAS_NORM_BIAS": True, "LOW": low, "HIGH": high,
        "A_PACKED": a_packed, "B_PACKED": b_packed, "OUT_PACKED": a_packed, "EVEN_K": True, "PTX": True,
        "BLOCK_M": config.block_m, "TILE_0": tiles[0], "TILE_1": tiles[1], "BLOCK_K": config.block_k,
    }  # fmt: skip
    return compile_kernel(rows.linear_rows_kernel, constants, {"x_ptr": x}, arch, config.warps, config.stages)
