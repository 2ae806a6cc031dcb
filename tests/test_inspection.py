"""Reading assembly: a few lines of each kind, counted by hand."""

from __future__ import annotations

from lampq_rt.kernels.gpu.inspection import read_amd, read_nvidia

PTX = """
    ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    cp.async.cg.shared.global [ %r5 + 0 ], [ %rd2 + 0 ], 0x10, %r6;
    ld.global.b8 { %rs1 }, [ %rd3 + 0 ];
    st.shared.b8 [ %r7 + 0 ], %rs1;
    st.shared.v4.b8 [ %r7 + 0 ], {%rs1, %rs2, %rs3, %rs4};
    mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32 { %r8 }, { %r9 }, { %r10 }, { %r8 };
    wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {%r11}, %rd4, %rd5, 1;
    st.global.v2.b32 [ %rd6 + 0 ], { %r1, %r2 };
"""

SASS = (
    "Function:some_kernel\n"
    "--:-:1:-:8\tLDC R1, c[0x0][0x28];\n"
    "--:-:-:-:1\tLDGSTS.E.BYPASS.128 [R2], [R4.64];\n"
    "LBB1:\n"
    "--:-:-:-:1\tIMMA.16832.S8.S8 R24, R4, R8, R24;\n"
    "04:-:-:-:1\t@!P1 BAR.SYNC 0x0;\n"
    "04:-:-:-:5\t@!P0 BRA LBB1;\n"
    "--:-:-:-:1\tSTL [R1], R5;\n"
    "--:-:-:-:1\t@P2 STG.E.128 [R2.64], R4;\n"
    "--:-:-:-:1\tEXIT;\n"
)

AMD = """
some_kernel:
\tglobal_load_dwordx4 v[2:5], v[0:1], off
.LBB0_1:
\tv_mfma_i32_16x16x32_i8 a[0:3], v[2:3], v[4:5], a[0:3]
\tds_write_b8 v1, v2
\tds_read_u8 v3, v1
\ts_cbranch_scc1 .LBB0_1
\tbuffer_store_byte v1, v2, s[0:3], 0 offen
\tglobal_load_ushort v6, v[0:1], off
\tscratch_store_dword off, v1, s32
\ts_endpgm
.Lfunc_end0:
    .vgpr_count:     96
"""


def test_nvidia() -> None:
    made = read_nvidia("sm80", PTX, SASS, 1024)
    assert (made.wgmma, made.mma, made.mfma) == (1, 1, 0)
    assert (made.byte_accesses, made.byte_shared_stores, made.byte_shared_loads) == (1, 1, 0)
    assert made.load_bytes == (16, 1, 16) and made.store_bytes == (8,) and made.copy_bytes == (16,)
    assert (made.spills, made.registers, made.instructions) == (1, 25, 8)
    assert made.loop_mix == {"matrix": 1, "barrier": 1, "other": 1}
    assert made.mix["async copy"] == made.mix["global store"] == 1 and "global load" not in made.mix


def test_registers_that_a_matrix_instruction_still_reads() -> None:
    begin = "--:-:-:-:1\tIGMMA.64x64x32.S8.S8 R24, R56, gdesc[UR4], R24, gsb0;\n"
    end = "--:-:-:-:2\tWARPGROUP.DEPBAR.LE gsb0, 0x0;\n"

    def found(between: str, behind: str = "") -> int:
        return read_nvidia("sm90", "", f"{begin}--:-:-:-:1\t{between};\n{end}{behind}", 0).overwritten

    assert found("IADD3 R57, R1, R2, R3") == found("@P0 LDS.64 R58, [R2+0x40]") == found("CS2R R59, SRZ") == 1
    assert found("LDS.64 R55, [R2]") == found("LDS.128 R53, [R2]") == found("SHFL.BFLY PT, R58, R4, 0x1, 0x1f") == 1
    assert found("STS [R56], R57") == found("IADD3 R60, R56, R57, R58") == found("UIADD3 UR56, UR4, UR5, URZ") == 0
    assert found("NOP", "--:-:-:-:1\tIADD3 R57, R1, R2, R3;\n") == 0
    shared = "--:-:-:-:1\tIGMMA.64x64x32.S8.S8 R24, gdesc[UR4], R24, gsb0;\n--:-:-:-:1\tIADD3 R4, R1, R2, R3;\n"
    assert read_nvidia("sm90", "", shared, 0).overwritten == 0


def test_amd() -> None:
    made = read_amd("gfx942", AMD, 1024)
    assert (made.wgmma, made.mma, made.mfma) == (0, 0, 1)
    assert (made.byte_accesses, made.byte_shared_stores, made.byte_shared_loads) == (1, 1, 1)
    assert made.load_bytes == (16, 2) and made.store_bytes == (1,)
    assert (made.spills, made.registers, made.instructions) == (1, 96, 9)
    assert made.loop_mix == {"matrix": 1, "shared store": 1, "shared load": 1, "other": 1}
