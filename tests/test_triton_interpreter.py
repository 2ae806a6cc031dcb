"""The Triton kernels in Triton's interpreter, on CPU tensors, against the reference.

`TRITON_INTERPRET` is read when a kernel is decorated, so these tests are a pytest process of their own (`make test`
starts it); in any other they are skipped. `triton_cases.py` has what is run; `test_triton_compile.py` compiles the
same, because the interpreter accepts more than the compiler.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lampq_rt
from lampq_rt.adapters import describe
from lampq_rt.kernels import reference
from lampq_rt.kernels.gpu.work import LinearWork
from lampq_rt.kernels.ops import SCHEMAS, TRITON
from lampq_rt.modules_float import Stream
from lampq_rt.modules_vit import integer_vit
from lampq_rt.plan import Plan
from tests import triton_cases as cases
from tests.plans import range_plan, tiny_vit

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="runs with TRITON_INTERPRET=1, in its own process"
    ),
]


def assert_codes(came: Tensor, wanted: Tensor, rate: float = 1e-3) -> None:
    """At most one code apart and rarely; packed containers are unpacked first."""
    assert came.dtype == wanted.dtype and came.shape == wanted.shape
    if came.dtype == torch.uint8:
        came, wanted = reference.unpack_int4(came), reference.unpack_int4(wanted)
    difference = (came.int() - wanted.int()).abs()
    assert int(difference.max()) <= 1
    assert float((difference > 0).float().mean()) <= rate


def both(case: cases.Case) -> tuple[Any, Any]:
    """What the kernel and the reference answer."""
    name, args = case
    return getattr(TRITON, name)(*args), getattr(reference, name)(*args)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes and numbers full of garbage before the kernels write them."""
    from lampq_rt.kernels.gpu import impl

    empty = impl._empty
    monkeypatch.setattr(impl, "_empty", lambda *args: empty(*args).fill_(85))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("bits", "dtype"), cases.QUANTIZE)
def test_quantize_and_layernorm(bits: int, dtype: torch.dtype) -> None:
    for case in cases.quantize_cases(bits, dtype):
        came, wanted = both(case)
        assert_codes(came, wanted, 0.0 if case[0].startswith("quantize") else 1e-3)


@pytest.mark.usefixtures("poisoned")
def test_levels_are_the_codes_looked_up() -> None:
    from lampq_rt.kernels.gpu import configs

    seen = set()
    for seed, (name, args) in enumerate(cases.level_cases()):
        table = cases.codes((256,), 8, seed=seed)
        launches = [getattr(TRITON, name)]
        if name == "linear_residual_layernorm":
            launches.append(lambda *a: cases.in_one_kernel(a[:13], configs.ROWS_CANDIDATES[0], *a[13:]))
        for launch in launches:
            plain, looked_up = (launch(args[0].clone(), *args[1:], *tail) for tail in ((), (table,)))
            assert torch.equal(looked_up, reference.remap(plain, table)), (name, args[0].shape)
        seen.add(name)
    assert seen == {name for name, schema in SCHEMAS.items() if "table=None" in schema}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", cases.LINEARS)
@pytest.mark.parametrize("a_bits", cases.A_BITS)
@pytest.mark.parametrize("w_bits", cases.W_BITS)
def test_linears(shape: tuple[int, int, int], a_bits: int, w_bits: int) -> None:
    for name, args in cases.linear_cases(shape, a_bits, w_bits):
        if name.startswith("linear_requant"):
            assert_codes(*both((name, args)), 2e-2)
        elif name == "linear_float":
            torch.testing.assert_close(*both((name, args)), rtol=1e-3, atol=1e-3)
        else:
            came, wanted = args[0].clone(), args[0].clone()
            TRITON.linear_residual(came, *args[1:])
            reference.linear_residual(wanted, *args[1:])
            torch.testing.assert_close(came, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", cases.ROWS)
@pytest.mark.parametrize("bits", cases.ROWS_BITS)
def test_linear_and_layernorm_in_one_kernel(shape: tuple[int, int, int], bits: tuple[int, int, int]) -> None:
    from lampq_rt.kernels.gpu import configs

    for name, (x, *rest) in cases.rows_cases(shape, bits):
        rate = 2e-3 if x.dtype == torch.float32 else 5e-3
        one, two, wanted = x.clone(), x.clone(), x.clone()
        codes = getattr(reference, name)(wanted, *rest)
        assert_codes(cases.in_one_kernel((one, *rest), configs.ROWS_CANDIDATES[0]), codes, rate)
        assert_codes(getattr(TRITON, name)(two, *rest), codes, rate)
        for came in (one, two):
            torch.testing.assert_close(came, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("poisoned", "poisoned_heads")
@pytest.mark.parametrize("name", [name for name, schema in SCHEMAS.items() if "levels=None" in schema])
def test_weights_with_levels_are_the_dense_weights_of_levels(name: str) -> None:
    """Bit for bit, whatever follows the sum; the reference too."""
    from lampq_rt.kernels.gpu import configs

    def results(op: Callable[..., Any], args: tuple[Any, ...]) -> list[Tensor]:
        args = (args[0].clone(), *args[1:])
        came = op(*args)
        return [args[0], *(() if came is None else came if isinstance(came, tuple) else (came,))]

    some = [case for case in cases.weight_level_cases() if case[0] == name]
    assert some
    for case in some:
        packed, dense = case[1], cases.with_dense_weight(case)[1]
        ops = [getattr(TRITON, name), getattr(reference, name)]
        if name == "linear_residual_layernorm":
            ops.append(lambda *a: cases.in_one_kernel(a[:13], configs.ROWS_CANDIDATES[0], *a[13:]))
        for op in ops:
            for came, wanted in zip(results(op, packed), results(op, dense), strict=True):
                assert came.dtype == wanted.dtype and torch.equal(came, wanted), packed[0].shape


@pytest.mark.parametrize("a_bits", cases.A_BITS)
def test_sums_of_levels_are_exact(a_bits: int) -> None:
    """Also where K is split, and where a step of the loop reaches beyond it."""
    from lampq_rt.kernels.gpu import start
    from lampq_rt.kernels.gpu.configs import LinearConfig
    from lampq_rt.kernels.gpu.linear import FLOAT

    for seed, (m, k, n) in enumerate(((70, 768, 192), (33, 320, 65), (1, 64, 7))):
        levels = cases.weight_levels(4, seed)
        x_q, w_q, _, column, _ = cases.linear_case((m, k, n), a_bits, 4, levels)
        case = (x_q, w_q, torch.ones(n), column, None)
        wanted = reference.linear_float(*case, "none", torch.float32, levels)
        assert torch.equal(TRITON.linear_float(*case, "none", torch.float32, levels=levels), wanted)
        for split in cases.SPLITS:
            out = torch.full((1, m, n), float("nan"))
            config = LinearConfig(64, 64, 128, split_k=split, warps=4)
            start.linear(FLOAT, *case, out, config=config, levels=levels)
            assert torch.equal(out, wanted)


def test_split_k_gives_the_exact_sum_and_cleans_up() -> None:
    from lampq_rt.kernels.gpu import scratch, start
    from lampq_rt.kernels.gpu.configs import LinearConfig
    from lampq_rt.kernels.gpu.linear import FLOAT

    case = cases.linear_case((70, 768, 192), 8, 8)
    wanted = reference.linear_float(*case, "none", torch.float32)
    for split in cases.SPLITS:
        out = torch.full((1, 70, 192), float("nan"))
        start.linear(FLOAT, *case, out, config=LinearConfig(64, 64, 128, split_k=split, warps=4))
        torch.testing.assert_close(out, wanted, rtol=1e-6, atol=1e-6)
    kept = scratch.split_scratch(case[0], 70 * 192, 6)
    assert not any(bool(zeros.any()) for zeros in kept), "the next launch relies on it"
    with scratch.own_scratch():
        own = scratch.split_scratch(case[0], 70 * 192, 6)
        assert own[0].data_ptr() != kept[0].data_ptr() == scratch._kept[next(iter(scratch._kept))].data_ptr()
        assert scratch.split_scratch(case[0], 64, 1)[0] is own[0]


@pytest.mark.parametrize(
    "work",
    [
        LinearWork("heads", 34, 192, 64, heads=2, tokens=17),
        LinearWork("requant", 34, 256, 64, 4, 4, 4, gelu=True),
        LinearWork("residual", 34, 64, 1024, 8, 4),
        LinearWork("float", 2, 10, 64, gelu=True, out_dtype=torch.float32),
    ],
    ids=lambda work: work.epilogue,
)
def test_the_tuner_launches_every_candidate(work: LinearWork, monkeypatch: pytest.MonkeyPatch) -> None:
    from lampq_rt.kernels.gpu import tune

    times = iter([3.0, 2.0, 1.0])

    def bench(launch: Callable[[], None], **options: object) -> float:
        launch()
        time = next(times, None)
        if time is None:
            raise RuntimeError("out of registers")
        return time

    monkeypatch.setattr(tune.triton.testing, "do_bench", bench)
    found = tune.tune_linear(work, "cpu", levels=work.w_bits == 4)
    assert (found.ms, found.rule_ms) == (1.0, 3.0)
    with pytest.raises(RuntimeError, match=f"no configuration of {work.key} runs"):
        tune.tune_linear(work, "cpu")


@pytest.mark.parametrize(("times", "one"), [([3.0, 2.0], True), ([1.0, 2.0], False)])
def test_the_tuner_compares_one_kernel_with_two(times: list[float], one: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from lampq_rt.kernels.gpu import configs, tune

    ran = iter([*times, *[9.0] * len(configs.ROWS_CANDIDATES)])

    def bench(launch: Callable[[], None], **options: object) -> float:
        launch()
        return next(ran)

    monkeypatch.setattr(tune.triton.testing, "do_bench", bench)
    found = tune.tune_linear(LinearWork("rows", 34, 64, 256, 8, 4), "cpu", levels=one)
    assert (found.config is not None) == one and (found.ms, found.rule_ms) == (min(times), times[0])


@pytest.fixture
def poisoned_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v full of garbage before the kernels write them, the padding of v included."""
    from lampq_rt.kernels.gpu import impl

    empty = impl._empty_heads
    monkeypatch.setattr(impl, "_empty_heads", lambda *args: tuple(t.fill_(85) for t in empty(*args)))


@pytest.mark.usefixtures("poisoned_heads")
@pytest.mark.parametrize("case", cases.QKV)
@pytest.mark.parametrize("bits", cases.QKV_BITS)
def test_linear_qkv(case: tuple[int, int, int, int], bits: tuple[int, int]) -> None:
    for came, wanted in zip(*both(cases.qkv_case(case, bits)), strict=True):
        assert_codes(came, wanted)


@pytest.mark.usefixtures("poisoned_heads")
@pytest.mark.parametrize(("tokens", "head_dim"), cases.HEADS)
@pytest.mark.parametrize("affine", cases.AFFINE)
def test_heads_quantize(tokens: int, head_dim: int, affine: str) -> None:
    for case in cases.heads_cases(tokens, head_dim, affine):
        for came, wanted in zip(*both(case), strict=True):
            assert_codes(came, wanted, 0.0 if affine == "none" else 1e-3)


@pytest.mark.usefixtures("poisoned_heads")
def test_heads_quantize_rounds_ties_to_even_and_saturates() -> None:
    values = torch.cat(
        [torch.arange(-140, 140) + 0.5, torch.tensor([127.6, -128.5, 1e30, -1e30, 127.49999, 0.49999997])]
    )
    qkv = values.repeat(8)[: 11 * 3 * 64].view(1, 11, 192)
    args = (qkv, False, None, None, None, None, 0.0, 2, torch.ones(192), 8, 8)
    for came, wanted in zip(TRITON.heads_quantize(*args), reference.heads_quantize(*args), strict=True):
        assert torch.equal(came, wanted)


@pytest.mark.parametrize(("tokens", "head_dim"), cases.ATTENTION)
def test_attention(tokens: int, head_dim: int) -> None:
    every = list(cases.attention_cases(tokens, head_dim))
    floating = len(cases.FLOAT_SOFTMAX)
    # A code of P that falls the other way can move its whole row, which is much of a small result.
    for case in every[:-floating]:
        assert_codes(*both(case), 1e-3 if tokens > 64 else 1e-2)
    for case, (_, scheme) in zip(every[-floating:], cases.FLOAT_SOFTMAX, strict=True):
        came, wanted = both(case)
        # A code that falls the other way moves a row, by 1/255 of a value with rowmax: compare the spread, not each
        # number. No exponential enters a log2 code.
        limit = 1e-6 if scheme == "log2" else 1e-4
        assert (came - wanted).pow(2).mean().sqrt() <= limit * wanted.pow(2).mean().sqrt()


@pytest.mark.parametrize("tokens", [49, 197, 300])
@pytest.mark.parametrize("p", [(2, "log2"), (3, "log2"), (4, "log2"), (2, "cubic"), (4, "cubic"), (7, "cubic")])
def test_codes_on_ties_and_beyond_the_last_one(tokens: int, p: tuple[int, str]) -> None:
    q = torch.zeros((1, 1, tokens, 32), dtype=torch.int8)
    q[..., 0] = 1
    k = torch.zeros_like(q)
    k[0, 0, :, 0] = -(torch.arange(tokens) % 50).to(torch.int8)  # logits 0, -1/2, -1, …
    v = reference.transpose_v(cases.codes((1, 1, tokens, 32), 8))
    args = (q, k, v, torch.tensor([0.5]), torch.ones(1), *p, 1.0, 0, 16, torch.float32)
    torch.testing.assert_close(TRITON.attention(*args), reference.attention(*args), rtol=1e-5, atol=1e-5)
    assert [round(i / 2) for i in (1, 3, 5)] == [0, 2, 2], "the row holds ties both ways of log2, and n / 2 of cubic"


@pytest.mark.parametrize("p", [(8, "rowmax"), (4, "log2"), (4, "cubic")])
@pytest.mark.parametrize("tokens", [49, 197, 577])
def test_attention_ignores_what_lies_in_the_padding_of_v(tokens: int, p: tuple[int, str]) -> None:
    q, k, v = (cases.codes((1, 2, tokens, 64), 8, seed=s) for s in range(3))
    v = reference.transpose_v(v)
    poisoned = v.clone()
    poisoned[..., tokens:] = -77
    tail = (torch.tensor([1e-3, 3e-5]), torch.tensor([0.7, 0.2]), *p, 1.5, 0, 8, torch.int8)
    assert_codes(TRITON.attention(q, k, poisoned, *tail), reference.attention(q, k, v, *tail))


def assert_model(model: nn.Module, plan: Plan, images: Tensor) -> None:
    """The kernels' logits are nearer to the reference's than half of what quantisation changes."""
    with torch.inference_mode():
        wanted = lampq_rt.compile(model, plan, backend="reference")(images)
        came = lampq_rt.compile(model, plan, backend="triton")(images)
        noise = (wanted - model(images)).pow(2).mean().sqrt()
    assert (came - wanted).pow(2).mean().sqrt() <= 0.5 * noise


@pytest.mark.parametrize(("bits", "input_bits", "p_scheme"), cases.MODELS)
def test_a_whole_model_runs_on_the_triton_path(bits: cases.Bits, input_bits: int | None, p_scheme: str) -> None:
    assert_model(*cases.model_case(bits, input_bits, p_scheme))


@pytest.mark.parametrize("bits", cases.CHANNELS)
def test_a_whole_model_with_steps_by_channel(bits: cases.Bits) -> None:
    assert_model(*cases.channel_case(bits))


@pytest.mark.parametrize("channels", [False, True])
def test_a_whole_model_with_tables(channels: bool) -> None:
    assert_model(*cases.table_case(5, channels))


def test_a_whole_model_with_relus() -> None:
    """fc1's codes clip at 0 (`IntegerLinear.clips_below_zero`): no kernel has a ReLU."""
    model, images = tiny_vit(act_layer=nn.ReLU), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    plan = range_plan(model, images, 5)
    assert all(block.mlp.activation == "none" for block in lampq_rt.compile(model, plan, backend="triton").model.blocks)
    assert_model(model, plan, images)


@pytest.mark.parametrize(
    "bits", [8, {"default": 8, "qkv": 16, "fc2": 16}, {"default": 8, "qk": 16, "pv": 16, "proj": 16}]
)
def test_a_whole_model_with_a_half_precision_stream(bits: dict[str, int] | int) -> None:
    half = Stream(torch.float16, torch.float16)
    model = tiny_vit(init_values=0.5, qk_norm=True)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    plan = range_plan(model, images, bits)
    with torch.inference_mode():
        wanted, came = (
            integer_vit(model, describe(model), plan.sites, backend, half)(images)
            for backend in ("reference", "triton")
        )
        noise = (wanted - model(images)).pow(2).mean().sqrt()
    assert (came - wanted).pow(2).mean().sqrt() <= 0.5 * noise


@pytest.mark.parametrize("bits", [{"default": 8, "patch_embed": 16}, {"default": 8, "patch_embed": 16, "qkv": 16}])
def test_a_whole_model_whose_tokens_come_transposed(bits: dict[str, int]) -> None:
    """Without a class token, timm's tokens are a view of the convolution's channels; kernels write rows."""
    model, images = tiny_vit(class_token=False, global_pool="avg"), torch.randn(2, 3, 32, 32)
    assert not model._pos_embed(model.patch_embed(images)).is_contiguous()
    plan = range_plan(model, images, bits)
    assert_model(model, plan, images)
    block, tokens = lampq_rt.compile(model, plan, backend="triton").model.blocks[0], torch.randn(2, 64, 16).mT
    torch.testing.assert_close(block(tokens), block(tokens.contiguous()))


def test_one_deit_tiny_block_at_197_tokens() -> None:
    assert_model(*cases.deit_block())
