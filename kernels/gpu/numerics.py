"""Small device functions shared by the kernels: rounding to codes, GELU, nibbles.

Each has a plain form, which the interpreter and AMD run, and an inline-PTX form (`PTX` constexpr). They give the same
results; the PTX form saves instructions (registers hold four codes: no byte permutes).
"""

from __future__ import annotations

import triton
import triton.language as tl

MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and taking it off rounds half to even for |v| < 2^22


@triton.jit
def codes_int8(value, inv_scale, zero_point, LOW: tl.constexpr, HIGH: tl.constexpr, PTX: tl.constexpr):
    """clamp(rne(value * inv_scale + zero_point)) as int8; value fp32, any shape (rule 1)."""
    scaled = value * inv_scale + zero_point
    return round_int8(scaled, LOW, HIGH, PTX)


@triton.jit
def round_int8(scaled, LOW: tl.constexpr, HIGH: tl.constexpr, PTX: tl.constexpr):
    """clamp(rne(scaled)) as int8; scaled fp32."""
    if PTX:
        if LOW != -128 or HIGH != 127:
            scaled = tl.minimum(tl.maximum(scaled, LOW * 1.0), HIGH * 1.0)
        # Rounds half to even, saturates and packs four codes into a register.
        return tl.inline_asm_elementwise(
            """
            {
            .reg .s32 a, b, c, d, t;
            cvt.rni.s32.f32 a, $1;
            cvt.rni.s32.f32 b, $2;
            cvt.rni.s32.f32 c, $3;
            cvt.rni.s32.f32 d, $4;
            cvt.pack.sat.s8.s32.b32 t, d, c, 0;
            cvt.pack.sat.s8.s32.b32 $0, b, a, t;
            }
            """,
            "=r,r,r,r,r",
            [scaled],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    clamped = tl.minimum(tl.maximum(scaled, LOW * 1.0), HIGH * 1.0)
    return ((clamped + MAGIC) - MAGIC).to(tl.int8)


@triton.jit
def levels(codes, table_ptr, PACKED: tl.constexpr):
    """What int8 [256] at `table_ptr`, by signed code from -128 on, has for int8 codes; the codes where that is None.

    A load of single bytes, from 256 that stay in the first-level cache. Codes that will be packed have no table.
    """
    tl.static_assert(table_ptr is None or not PACKED)
    if table_ptr is not None:
        codes = tl.load(table_ptr + 128 + codes.to(tl.int32))
    return codes


@triton.jit
def powers_fp16(logarithm, BITS: tl.constexpr):
    """2^(2^BITS - 1 - rne(-logarithm)) as fp16, 0 where rne gives 2^BITS or more; logarithm fp32 <= 0, BITS <= 4.

    No exponential: the rounded sum's low bits are the exponent field (bias 15) of a normal number.
    """
    last: tl.constexpr = 2**BITS - 1
    # last + 15 is even, so that adding it together with MAGIC still rounds halves to even.
    field = (tl.maximum(logarithm, -(last + 1.0)) + (MAGIC + (last + 15.0))).to(tl.int32, bitcast=True)
    bits = tl.where(logarithm > -(last + 0.5), field << 10, 0).to(tl.int16)
    return bits.to(tl.float16, bitcast=True)


@triton.jit
def cube_weights(root, BITS: tl.constexpr):
    """rne(n * root)^3 * (255 / n^3) with n = 2^BITS - 1, still to be rounded; root fp32, 0 ... 1 (`reference`)."""
    top: tl.constexpr = 2**BITS - 1.0
    code = (root * top + MAGIC) - MAGIC
    return code * code * code * (255 / (top * top * top))


@triton.jit
def int8_to_fp16(codes, PTX: tl.constexpr):
    """int8 as fp16, exactly. The PTX form puts code + 128 into the low mantissa bits of 1024 and takes 1152 off."""
    if PTX:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 t, bias;
            mov.b32 bias, 0x64806480;
            xor.b32 t, $2, 0x80808080;
            prmt.b32 $0, t, 0x64646464, 0x4140;
            prmt.b32 $1, t, 0x64646464, 0x4342;
            sub.rn.f16x2 $0, $0, bias;
            sub.rn.f16x2 $1, $1, bias;
            }
            """,
            "=&r,=&r,r",
            [codes],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
    return codes.to(tl.float16)


@triton.jit
def gelu(x, FAST: tl.constexpr):
    """GELU of fp32 x: the erf form, or a tanh form on pairs of fp16 that moves a code by at most one (rule 6)."""
    if FAST:
        inner = x * (0.7978845608028654 + 0.035677408136300125 * x * x)
        tanh = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 p;
            cvt.rn.f16x2.f32 p, $3, $2;
            tanh.approx.f16x2 p, p;
            .reg .b16 l, h;
            mov.b32 {l, h}, p;
            cvt.f32.f16 $0, l;
            cvt.f32.f16 $1, h;
            }
            """,
            "=r,=r,r,r",
            [inner],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
        half = 0.5 * x
        return half * tanh + half
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def low_nibbles_x16(packed, PTX: tl.constexpr):
    """16 times the signed low nibbles of int8 bytes, as int8; the factor is taken off the sum."""
    if PTX:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $1, 4; and.b32 $0, $0, 0xF0F0F0F0;", "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4
        )
    return packed << 4


@triton.jit
def high_nibbles_x16(packed, PTX: tl.constexpr):
    """16 times the signed high nibbles of int8 bytes, as int8."""
    if PTX:
        return tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0xF0F0F0F0;", "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4
        )
    return packed & -16


@triton.jit
def load_levels(levels_ptr):
    """The level of every nibble, as its bits stand, in four int32 words: entries 0..7 of a code, then -8..-1.

    Args:
        levels_ptr: int32 [4], the bytes of int8 [16] by signed code from -8 on; or None, for weights without levels.
    """
    words = 0, 0, 0, 0
    if levels_ptr is not None:
        words = tl.load(levels_ptr + 2), tl.load(levels_ptr + 3), tl.load(levels_ptr), tl.load(levels_ptr + 1)
    return words


@triton.jit
def level_halves(packed, words, PTX: tl.constexpr):
    """Levels of the low nibbles of int8 bytes and of the high ones, int8; `words` from `load_levels`.

    The PTX form looks four up in three byte permutes: among the codes from 0 on, among those below, and the sign picks.
    Low and high nibbles come mixed and are sorted at the end; thirteen instructions for eight levels. The words are
    operands once for each of the four bytes, of which one is used.
    """
    if PTX:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 n, s, a, b, l, h;
            and.b32 n, $2, 0x77777777;
            shr.u32 s, $2, 1;
            lop3.b32 s, s, 0x44444444, 0x32103210, 0xEA;
            prmt.b32 a, $3, $7, n;
            prmt.b32 b, $11, $15, n;
            prmt.b32 l, a, b, s;
            shr.u32 n, n, 16;
            shr.u32 s, s, 16;
            prmt.b32 a, $3, $7, n;
            prmt.b32 b, $11, $15, n;
            prmt.b32 h, a, b, s;
            prmt.b32 $0, l, h, 0x6420;
            prmt.b32 $1, l, h, 0x7531;
            }
            """,
            "=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
            [packed, words[0], words[1], words[2], words[3]],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    return _level(packed.to(tl.int32), words), _level(packed.to(tl.int32) >> 4, words)


@triton.jit
def _level(nibble, words):
    """Byte n % 4 of word n // 4, n the last four bits of an int32 `nibble`."""
    upper = (nibble & 4) != 0
    word = tl.where((nibble & 8) != 0, tl.where(upper, words[3], words[2]), tl.where(upper, words[1], words[0]))
    return (word >> ((nibble & 3) * 8)).to(tl.int8)


@triton.jit
def pack_nibbles(codes, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """int8 codes [ROWS, COLUMNS] in -8..7 to bytes [ROWS, COLUMNS / 2] in the container's order."""
    groups: tl.constexpr = COLUMNS // 64
    halves = tl.permute(tl.reshape(codes, (ROWS, groups, 2, 32)), (0, 1, 3, 2))
    low, high = tl.split(halves)
    return tl.reshape((low & 15) | (high << 4), (ROWS, COLUMNS // 2))
