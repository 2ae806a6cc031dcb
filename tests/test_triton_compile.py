"""The Triton kernels compiled for GPUs that are not there: is each what it is meant to be?

The assembly must hold the int8 matrix instruction of the architecture, wide global accesses, no access of single bytes
and no spills. A kernel that computes the right numbers another way would pass every other test and be slow. And every
shape that is run in the interpreter must compile.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter's kernels cannot be compiled"
)
triton = pytest.importorskip("triton")

import lampq_rt  # noqa: E402
from lampq_rt.kernels import reference  # noqa: E402
from lampq_rt.kernels.gpu import configs, impl, inspection, linear, offline, start, tables  # noqa: E402
from tests import triton_cases as cases  # noqa: E402

ARCHITECTURES = ("sm80", "sm89", "sm90", "sm100", "gfx942")
"""For the kernels that matter most; sm89 and sm100 get the same code from Triton as sm80 elsewhere."""

LARGE = configs.LinearConfig()
SMALL = configs.LinearConfig(64, 64, 128, warps=4, stages=4)
WHOLE_ATTENTION = ((197, 64),)
"""Compiled with every scheme of P and every output."""

TURNS = 7
"""Other shapes compile each seventh of these, starting elsewhere every time: one takes ptxas two seconds."""

COLUMNS = {"requant": 3072, "gelu": 3072, "channels": 3072, "residual": 768, "float": 768, "heads": 2304}
"""Of ViT-Base's linears, by epilogue."""


def check(launch: offline.Launch, *, matrix: bool = True, load: int = 16, store: int = 16) -> inspection.Compiled:
    """What every kernel must have; every copy that a loop makes ahead is as wide as the widest load must be."""
    made = offline.compile_launch(launch)
    assert made.byte_accesses == made.byte_shared_stores == 0, made
    # AMD transposes v through LDS: wide stores, loads of single bytes.
    assert made.byte_shared_loads == 0 or (made.mfma and launch.values.get("EPILOGUE") == linear.HEADS.value), made
    assert made.spills == made.overwritten == 0, made
    assert made.shared_bytes <= configs.SHARED_LIMIT[made.arch], made
    assert max(made.load_bytes) >= load and max(made.store_bytes) >= store, made
    assert min(made.copy_bytes, default=load) >= load, made
    if matrix:
        assert {"sm90": made.wgmma, "gfx942": made.mfma}.get(made.arch, made.mma) > 0, made
    return made


def linear_launch(
    arch: str,
    epilogue: str,
    config: configs.LinearConfig,
    a_bits: int = 8,
    w_bits: int = 8,
    heads: int = 12,
    table: torch.Tensor | None = None,
    levels: bool = False,
) -> offline.Launch:
    """A linear of ViT-Base (with 12 heads) at batch 64; "gelu" packs its codes where its input is packed.

    "channels" is "gelu" with a step a column.
    """
    gelu = epilogue in ("gelu", "channels")
    width, n, m = 64 * heads, COLUMNS[epilogue] * heads // 12, 64 * 197

    def empty(*shape: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x_q, w_q = empty(m, width // (8 // a_bits)), empty(n, width)
    if w_bits == 4:
        w_q = empty(n, width // 2, dtype=torch.uint8)
    vector, column = empty(n, dtype=torch.float32), empty(n, dtype=torch.int32)
    options: dict[str, Any] = {"gelu": gelu, "config": config, "table": table}
    options["levels"] = empty(reference.LEVELS) if levels else None
    out = empty(m, n, dtype=torch.float16 if epilogue in ("float", "residual") else torch.int8)
    if gelu and a_bits == 4:
        options |= {"out_packed": True, "codes": (-8, 7)}
    if epilogue == "channels":
        options |= {"step": vector, "offset": vector}
    if epilogue == "heads":
        options |= {"k": out, "v": out, "step": vector, "layout": (64, 197, heads, 64)}
    number = {"requant": 0, "gelu": 0, "channels": 0, "float": 1, "residual": 2, "heads": 3}[epilogue]
    with offline.recording(arch) as launches:
        start.linear(triton.language.constexpr(number), x_q, w_q, vector, column, vector, out, **options)
    return launches[0]


def small(arch: str) -> configs.LinearConfig:
    """A tile of 64 rows, with as many stages as the memory holds."""
    return configs.RULE_AMD[-1] if arch.startswith("gfx") else SMALL


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("epilogue", COLUMNS)
def test_linear_int8(arch: str, epilogue: str) -> None:
    large = configs.RULE_AMD[0] if arch.startswith("gfx") else LARGE
    check(linear_launch(arch, epilogue, large), store=4)
    if arch in ("sm90", "gfx942"):
        check(linear_launch(arch, epilogue, small(arch)), store=4)


@pytest.mark.parametrize("arch", ["sm80", "sm90", "gfx942"])
@pytest.mark.parametrize("a_bits", [8, 4])
@pytest.mark.parametrize("epilogue", ["gelu", "channels", "residual", "heads"])
def test_linear_int4(arch: str, a_bits: int, epilogue: str) -> None:
    check(linear_launch(arch, epilogue, small(arch), a_bits, 4), store=4)


@pytest.mark.parametrize("arch", ["sm80", "sm90"])
@pytest.mark.parametrize("a_bits", [8, 4])
def test_packed_codes_are_loaded_wide_where_k_is_masked(arch: str, a_bits: int) -> None:
    """DeiT-Tiny's 192 channels are no multiple of a step of the loop: the mask must not split 16 bytes either."""
    launch = linear_launch(arch, "gelu", small(arch), a_bits, 4, heads=3)
    assert not launch.values["EVEN_K"] and set(check(launch, store=4).copy_bytes) == {16}


@pytest.mark.parametrize("arch", ["sm80", "sm90", "gfx942"])
@pytest.mark.parametrize("a_bits", [8, 4])
@pytest.mark.parametrize("epilogue", COLUMNS)
def test_levels_of_weights_are_looked_up_in_registers(arch: str, a_bits: int, epilogue: str) -> None:
    """Eight byte permutes for eight weights in the loop, four words loaded before it, and nothing else changes."""
    launch = linear_launch(arch, epilogue, small(arch), a_bits, 4, levels=True)
    made = check(launch, store=4)
    plain = offline.compile_launch(linear_launch(arch, epilogue, small(arch), a_bits, 4))
    assert (made.wgmma, made.mma, made.mfma) == (plain.wgmma, plain.mma, plain.mfma), made
    vector_words = () if arch == "gfx942" else (4, 4, 4, 4)  # AMD has scalar loads for them
    assert sorted(made.load_bytes) == sorted((*plain.load_bytes, *vector_words)), made
    if vector_words:
        threads = 32 * launch.warps
        words = launch.values["BLOCK_N"] * launch.values["BLOCK_K"] // 2 // 4 // threads
        assert made.loop_mix["permute"] == 8 * words and "permute" not in plain.loop_mix, made


def test_shipped_tables_hold_what_compiles() -> None:
    """Every distinct tile of every table that is shipped, with the epilogue that it was tuned for."""
    shipped = sorted(tables.SHIPPED.glob("*.json"))
    if not shipped:
        pytest.skip("no table is shipped yet: none was tuned on a GPU")
    for path in shipped:
        pairs = {(key.split()[1], config) for key, config in tables.read(path).items() if config is not None}
        assert pairs, path
        for epilogue, config in sorted(pairs, key=str):
            if epilogue != "rows":
                check(linear_launch(path.stem, epilogue, config), store=4)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_split_k(arch: str) -> None:
    check(linear_launch(arch, "residual", configs.LinearConfig(64, 64, 128, split_k=4, warps=4, stages=2)), store=4)


@pytest.mark.parametrize("arch", ["sm80", "sm90"])
@pytest.mark.parametrize("epilogue", ["requant", "gelu", "residual"])
def test_partial_sums_become_zero_after_all_have_read_them(arch: str, epilogue: str) -> None:
    """Loads and the stores of zeros have layouts of their own, so that a thread stores where another one loads."""
    config = configs.LinearConfig(64, 64, 128, split_k=4, warps=4, stages=2)
    text = offline.build(linear_launch(arch, epilogue, config)).asm["ptx"]
    after = text[text.rindex("ld.volatile.global") :]
    assert 0 < after.index("bar.sync") < after.index("st.global")


@pytest.mark.parametrize("arch", ["sm80", "sm90", "gfx942"])
def test_three_heads_are_stored_in_wide_pieces(arch: str) -> None:
    """DeiT-Tiny: columns of a tile belong to heads of q and of k."""
    check(linear_launch(arch, "heads", configs.linear_config(12608, 576, 192, 132, arch), heads=3))


def attention_launches(
    arch: str,
    tokens: int,
    head_dim: int,
    dtype: torch.dtype = torch.int8,
    p: tuple[int, str] = (8, "rowmax"),
    table: torch.Tensor | None = None,
) -> list[offline.Launch]:
    q, v = ((64, 12, tokens, head_dim), (64, 12, head_dim, reference.padded_tokens(tokens)))
    codes = [torch.empty(shape, dtype=torch.int8, device="meta") for shape in (q, q, v)]
    scale, bits = torch.empty(12, device="meta"), 4 if dtype == torch.int4 else 8
    with offline.recording(arch) as launches:
        impl.attention(*codes, scale, scale, *p, 1.0, 0, bits, dtype, table)
    return launches


@pytest.mark.parametrize("arch", ["sm80", "sm90", "gfx942"])
@pytest.mark.parametrize(("tokens", "head_dim"), [(49, 32), (197, 64), (197, 80), (256, 64), (577, 64), (577, 128)])
@pytest.mark.parametrize("p", [(8, "rowmax"), (4, "cubic")], ids=["rowmax", "cubic"])
def test_attention(arch: str, tokens: int, head_dim: int, p: tuple[int, str]) -> None:
    # AMD loads 49 x 32 codes with 256 threads in pieces of 8 bytes.
    for launch in attention_launches(arch, tokens, head_dim, p=p):
        check(launch, load=8 if tokens < 64 else 16, store=4 if arch == "gfx942" else 8)


@pytest.mark.parametrize("arch", ["sm80", "sm90", "sm100"])
@pytest.mark.parametrize(
    ("tokens", "head_dim"), [(49, 32), (197, 64), (197, 80), (256, 64), (256, 96), (256, 128), (577, 64), (577, 128)]
)
def test_attention_log2(arch: str, tokens: int, head_dim: int) -> None:
    for launch in attention_launches(arch, tokens, head_dim, p=(4, "log2")):
        assert check(launch, load=8 if tokens < 64 else 16, store=8).fp16_matrix > 0


@pytest.mark.parametrize("arch", ["sm80", "sm90"])
@pytest.mark.parametrize("head_dim", [32, 48, 64, 72, 80, 128])
def test_heads(arch: str, head_dim: int) -> None:
    steps, weight = torch.empty(36 * head_dim, device="meta"), torch.empty(head_dim, device="meta")
    for dtype in (torch.float16, torch.float32):
        qkv = torch.empty(64, 197, 36 * head_dim, dtype=dtype, device="meta")
        for norm in ((True, weight, weight, weight, weight), (False, None, None, None, None)):
            with offline.recording(arch) as launches:
                impl.heads_quantize(qkv, *norm, 1e-6, 12, steps, 8, 8)
            for launch in launches:
                assert min(check(launch, matrix=False, store=8).store_bytes) >= 8


@pytest.mark.parametrize("arch", ["sm80", "sm90"])
@pytest.mark.parametrize(
    ("width", "a_bits", "w_bits"), [(192, 8, 8), (192, 8, 4), (192, 4, 4), (256, 8, 4), (256, 4, 4), (384, 8, 8)]
)
def test_linear_and_layernorm_in_one_kernel(arch: str, width: int, a_bits: int, w_bits: int) -> None:
    """The first configuration of the list that fits, which no table need prefer; on Hopper, with levels, too."""
    fitting = [c for c in configs.ROWS_CANDIDATES if configs.rows_feasible(c, width, arch, a_bits, w_bits)]
    case = cases.linear_case((64, 4 * width, width), a_bits, w_bits)
    tail = (torch.empty(width), torch.empty(width), 1e-6, 20.0, 3)
    codes = (4, torch.int4) if a_bits == 4 else (8, torch.int8)
    args = (torch.empty(1, 64, width, dtype=torch.float16), *case, *tail, *codes)
    with offline.recording(arch) as launches:
        cases.in_one_kernel(args, fitting[0])
        if w_bits == 4 and arch == "sm90":
            cases.in_one_kernel(args, fitting[0], None, cases.weight_levels(4))
    for launch in launches:
        check(launch, store=16)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.int8, torch.int4], ids=["int8", "int4"])
def test_attention_and_layernorm_pack(arch: str, dtype: torch.dtype) -> None:
    for launch in attention_launches(arch, 197, 64, dtype):
        check(launch, store=4)
    for width in (192, 768):
        x, weight = torch.empty(12608, width, dtype=torch.float16, device="meta"), torch.empty(width, device="meta")
        with offline.recording(arch) as launches:
            impl.layernorm_quantize(x, weight, weight, 1e-6, 1.0, 0, 4 if dtype == torch.int4 else 8, dtype)
        check(launches[0], matrix=False, load=8, store=4)


@pytest.mark.parametrize("arch", ["sm80", "sm90", "gfx942"])
@pytest.mark.parametrize("epilogue", ["gelu", "channels", "attention", "layernorm", "rows"])
def test_levels_are_looked_up_and_nothing_else_changes(arch: str, epilogue: str) -> None:
    """A load of a byte for each code, in the epilogue; matrix instructions and the loop are those without a table."""
    plain, with_table = (level_launch(arch, epilogue, has_table) for has_table in (False, True))
    before, made = offline.compile_launch(plain), offline.compile_launch(with_table)
    threads = plain.warps * (64 if arch.startswith("gfx") else 32)
    columns = {"attention": ("BLOCK_D",), "layernorm": ("BLOCK_D",), "rows": ("TILE_0", "TILE_1")}
    width = sum(plain.values[name] for name in columns.get(epilogue, ("BLOCK_N",)))
    assert before.byte_accesses == 0 and made.byte_accesses == plain.values["BLOCK_M"] * width // threads
    assert before.spills == made.spills == made.overwritten == 0, made
    assert (made.wgmma, made.mma, made.mfma) == (before.wgmma, before.mma, before.mfma), made
    assert made.loop_mix.get("matrix") == before.loop_mix.get("matrix"), made
    assert max(made.store_bytes) >= max(before.store_bytes) and max(made.load_bytes) == max(before.load_bytes), made
    if arch == "sm90" and epilogue not in ("layernorm", "rows"):
        assert made.wgmma and made.byte_shared_loads == made.byte_shared_stores == 0, made


def level_launch(arch: str, epilogue: str, has_table: bool) -> offline.Launch:
    """The kernel with that epilogue, or of that name, with or without a table."""
    table = torch.empty(256, dtype=torch.int8, device="meta") if has_table else None
    if epilogue in COLUMNS:
        return linear_launch(arch, epilogue, small(arch), table=table)
    if epilogue == "attention":
        return attention_launches(arch, 197, 64, table=table)[0]
    with offline.recording(arch) as launches:
        if epilogue == "layernorm":
            x, weight = torch.empty(12608, 192, dtype=torch.float16, device="meta"), torch.empty(192, device="meta")
            impl.layernorm_quantize(x, weight, weight, 1e-6, 1.0, 0, 8, torch.int8, table)
        else:
            fitting = [c for c in configs.ROWS_CANDIDATES if configs.rows_feasible(c, 192, arch, 8, 8)]
            ((_, args), _) = cases.rows_cases((64, 768, 192), (8, 8, 8))
            cases.in_one_kernel(args, fitting[0], None if table is None else torch.empty(256, dtype=torch.int8))
    return launches[0]


ARITHMETIC = {"LOW", "HIGH", "V_LOW", "V_HIGH", "GELU", "HAS_BIAS", "HAS_WEIGHT", "P_BITS"}
"""Constants of the kernels that change no shape."""


def shape_of(launch: offline.Launch) -> str:
    """Equal for launches whose blocks, containers and divisible sizes are the same."""
    names = launch.kernel.arg_names
    constants = {names[path[0]]: getattr(value, "value", value) for path, value in launch.constants.items()}
    constants = {name: value for name, value in constants.items() if name not in ARITHMETIC}
    aligned = sorted(names[path[0]] for path in launch.attributes if not names[path[0]].endswith("_ptr"))
    return repr((launch.name, constants, aligned, launch.warps))


def interpreted(group: str) -> Iterator[cases.Case]:
    """The calls of `test_triton_interpreter.py`."""
    if group == "layernorm":
        for bits, dtype in cases.QUANTIZE:
            yield from cases.quantize_cases(bits, dtype)
        table = cases.codes((256,), 8)
        yield from ((name, (*args, table)) for name, args in cases.level_cases())
    elif group == "levels":
        yield from cases.weight_level_cases()
    elif group == "qkv":
        yield from (cases.qkv_case(case, bits) for case in cases.QKV for bits in cases.QKV_BITS)
    elif group == "attention":
        for turn, shape in enumerate(cases.ATTENTION):
            every = list(cases.attention_cases(*shape))
            yield from every if shape in WHOLE_ATTENTION else every[turn % TURNS :: TURNS]
    elif group == "heads":
        for tokens, head_dim in cases.HEADS:
            for affine in cases.AFFINE:
                yield from cases.heads_cases(tokens, head_dim, affine)
    elif group.startswith("linear"):
        for shape in cases.LINEARS:
            for w_bits in cases.W_BITS:
                yield from cases.linear_cases(shape, int(group[-1]), w_bits)


@pytest.mark.parametrize("arch", ["sm90", "gfx942"])
@pytest.mark.parametrize(
    "group", ["layernorm", "linear8", "linear4", "levels", "qkv", "heads", "attention", "split", "rows", "models"]
)
def test_what_the_interpreter_runs_compiles(arch: str, group: str) -> None:
    with offline.recording(arch) as launches:
        for name, args in interpreted(group):
            getattr(impl, name)(*args)
        if group == "split":
            case, out = cases.linear_case((70, 768, 192), 8, 8), torch.empty(1, 70, 192)
            for split in cases.SPLITS:
                config = configs.LinearConfig(64, 64, 128, split_k=split, warps=4)
                start.linear(linear.FLOAT, *case, out, config=config)
        if group == "rows":
            for shape in cases.ROWS:
                for bits in cases.ROWS_BITS:
                    all_ = configs.ROWS_CANDIDATES
                    fitting = [c for c in all_ if configs.rows_feasible(c, shape[2], arch, *bits[:2])]
                    for _, args in cases.rows_cases(shape, bits) if fitting else ():
                        cases.in_one_kernel(args, fitting[0])
        if group == "models":
            some = [*(cases.model_case(*c) for c in cases.MODELS), *(cases.channel_case(b) for b in cases.CHANNELS)]
            some += [cases.table_case(5, channels) for channels in (False, True)]
            for model, plan, images in (*some, cases.deit_block()):
                lampq_rt.compile(model, plan, backend="triton")(images)
    assert launches
    distinct = list({shape_of(launch): launch for launch in launches}.values())
    for launch in distinct[:: 3 if arch.startswith("gfx") else 1]:  # AMD's compiler takes as long again
        made = offline.compile_launch(launch)
        looks_up = launch.signature.get("table_ptr", "constexpr") != "constexpr"
        wide = made.byte_accesses + made.byte_shared_stores == 0
        assert launch.name != "attention_kernel" or looks_up or wide, launch


def test_the_report_counts_and_predicts() -> None:
    """One kernel of DeiT-Tiny through the whole report; the page says what is prediction."""
    from benchmarks import compile_report, launches

    case = ("sm90", "deit_tiny_patch16_224", "W8A8", 8)
    started = {case: [s for s in launches.started(*case[1:], case[0]) if s.launch.name == "attention_kernel"]}
    kernels = compile_report.compile_all(started)
    (fact,) = (kernel.facts() for kernel in kernels.values())
    assert fact["spills"] == 0 and fact["mix"]["matrix"] > 0 and fact["programs_per_processor"] >= 1
    (row,) = compile_report.predictions(started, kernels)
    assert row["W8A8"]["kernels"] == 12
    assert row["W8A8"]["operations"] == 12 * 4 * 8 * 3 * 197**2 * 64
    assert 0 < row["W8A8"]["floor_ms"] < row["W8A8"]["predicted_ms"]
    page = "\n".join(compile_report.markdown([fact], [row]))
    assert compile_report.PREDICTED in page and "ASSUMED" in page and "attention 64 rows" in page
