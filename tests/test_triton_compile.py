"""The Triton kernels compiled for GPUs that are not there: is each what it is meant to be?

PTX and SASS must hold the int8 matrix instruction of the architecture, wide global accesses, no access of single bytes
and no spills. A kernel that computes the right numbers another way would pass every other test and be slow.
"""

from __future__ import annotations

import os

import pytest

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter's kernels cannot be compiled"
)
triton = pytest.importorskip("triton")

from lampq_rt.kernels.gpu import configs, offline  # noqa: E402

ARCHITECTURES = (80, 89, 90, 100)
"""For the kernel that matters most; sm_89 and sm_100 get the same code from Triton as sm_80 elsewhere."""

LIMITS = {80: "sm80", 89: "sm89", 90: "sm90", 100: "sm100"}
LARGE = configs.LinearConfig()
SMALL = configs.LinearConfig(64, 64, 128, warps=4, stages=4)


def check(made: offline.Compiled, arch: int, *, matrix: bool = True, load: int = 16, store: int = 16) -> None:
    """What every kernel must have."""
    assert made.byte_accesses == 0, made
    assert made.spills == 0, made
    assert made.shared_bytes <= configs.SHARED_LIMIT[LIMITS[arch]], made
    assert max(made.load_bytes) >= load and max(made.store_bytes) >= store, made
    if matrix:
        assert (made.wgmma if arch == 90 else made.mma) > 0, made


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("config", [LARGE, SMALL], ids=["128x128", "64x64"])
@pytest.mark.parametrize("epilogue", ["requant", "gelu", "residual", "float", "heads"])
def test_linear_int8(arch: int, config: configs.LinearConfig, epilogue: str) -> None:
    gelu = epilogue == "gelu"
    check(offline.compile_linear(arch, "requant" if gelu else epilogue, config, gelu=gelu), arch, store=8)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("a_packed", [False, True], ids=["a8", "a4"])
@pytest.mark.parametrize("epilogue", ["gelu", "residual", "heads"])
def test_linear_int4(arch: int, a_packed: bool, epilogue: str) -> None:
    gelu = epilogue == "gelu"
    made = offline.compile_linear(
        arch, "requant" if gelu else epilogue, SMALL, a_packed=a_packed, b_packed=True, out_packed=gelu, gelu=gelu
    )
    check(made, arch, load=8, store=4)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_split_k(arch: int) -> None:
    config = configs.LinearConfig(64, 64, 128, split_k=4, warps=4)
    check(offline.compile_linear(arch, "residual", config), arch)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("tokens", "head_dim"), [(49, 32), (197, 64), (197, 80), (256, 64), (577, 64), (577, 128)])
def test_attention(arch: int, tokens: int, head_dim: int) -> None:
    check(offline.compile_attention(arch, tokens, head_dim), arch, store=8)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("tokens", "head_dim"), [(49, 32), (197, 64), (197, 80), (256, 64), (256, 96), (256, 128), (577, 64), (577, 128)]
)
def test_attention_log2(arch: int, tokens: int, head_dim: int) -> None:
    made = offline.compile_attention(arch, tokens, head_dim, p_bits=4, p_scheme="log2")
    check(made, arch, store=8)
    assert (made.wgmma_fp16 if arch == 90 else made.mma_fp16) > 0, made


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("packed", [False, True], ids=["int8", "int4"])
def test_attention_and_layernorm_pack(arch: int, packed: bool) -> None:
    check(offline.compile_attention(arch, 197, packed=packed), arch, store=8)
    for width in (192, 768):
        check(offline.compile_layernorm(arch, width, packed=packed), arch, matrix=False, store=4 if packed else 8)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("x", ["*fp16", "*fp32"])
@pytest.mark.parametrize("head_dim", [32, 48, 64, 72, 80, 128])
def test_heads(arch: int, x: str, head_dim: int) -> None:
    for norm in (True, False):
        made = offline.compile_heads(arch, head_dim, norm=norm, x=x)
        check(made, arch, matrix=False)
        assert min(made.store_bytes) >= 8, made
