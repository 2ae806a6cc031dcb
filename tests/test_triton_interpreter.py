"""The Triton kernels in Triton's interpreter, on CPU tensors, against the reference.

`TRITON_INTERPRET` is read when a kernel is decorated, so these tests are a pytest process of their own (`make test`
starts it); in any other they are skipped. What compiles is tested in `test_triton_compile.py`: the interpreter
accepts more.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lampq_rt
from lampq_rt.adapters import describe
from lampq_rt.kernels import reference
from lampq_rt.kernels.gpu.work import LinearWork
from lampq_rt.kernels.ops import TRITON
from lampq_rt.modules_float import Stream
from lampq_rt.modules_vit import integer_vit
from lampq_rt.standin import stand_in_plan
from tests.plans import log2_plan, range_plan, tiny_vit

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


def codes(shape: tuple[int, ...], bits: int, *, weight: bool = False, seed: int = 0) -> Tensor:
    low, high = reference.code_range(bits, weight=weight)
    return torch.randint(low, high + 1, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def linear_case(shape: tuple[int, int, int], a_bits: int, w_bits: int) -> tuple[Tensor, ...]:
    """x_q and w_q, packed where 4 bits, scale, column, bias; results spread over the codes of an 8-bit output."""
    m, k, n = shape
    x_q, w_q = codes((1, m, k), a_bits), codes((n, k), w_bits, weight=True, seed=1)
    torch.manual_seed(2)
    spread = math.sqrt(k) * 2 ** (a_bits + w_bits) / 12
    scale = (torch.rand(n) + 0.5) / spread
    scale[::3] *= -1
    column = reference.column_constant(w_q, -3)
    stored = [reference.pack_int4(t) if bits <= 4 else t for t, bits in ((x_q, a_bits), (w_q, w_bits))]
    return (*stored, scale, column, torch.randn(n))


@pytest.mark.parametrize(
    ("bits", "dtype"), [(8, torch.int8), (5, torch.int8), (4, torch.int8), (4, torch.int4), (2, torch.int4)]
)
def test_quantize_and_layernorm(bits: int, dtype: torch.dtype) -> None:
    ties = torch.cat([torch.arange(-140, 140) + 0.5, torch.tensor([127.6, -128.5, 1e30, -1e30])])
    x = torch.cat([ties, torch.randn(5 * 192 - len(ties)) * 60]).view(5, 192)
    args = (x, 1.0, 0, bits, dtype)
    came = TRITON.quantize(*args)
    assert torch.equal(came, reference.quantize(*args))
    for width in (64, 192, 320):
        x = torch.randn(2, 7, width) * 4 + 1
        x[0, 0] = 3.0
        for affine in ((torch.randn(width), torch.randn(width)), (None, None)):
            args = (x, *affine, 1e-6, 20.0, 3, bits, dtype)
            assert_codes(TRITON.layernorm_quantize(*args), reference.layernorm_quantize(*args))


@pytest.mark.parametrize("shape", [(197, 192, 64), (198, 64, 1000), (49, 768, 192), (1, 128, 64), (66, 320, 128)])
@pytest.mark.parametrize("a_bits", [8, 4])
@pytest.mark.parametrize("w_bits", [8, 4, 2])
def test_linears(shape: tuple[int, int, int], a_bits: int, w_bits: int) -> None:
    case = linear_case(shape, a_bits, w_bits)
    for activation in ("none", "gelu"):
        for bits, dtype in ((8, torch.int8), (4, torch.int4 if shape[2] % 64 == 0 else torch.int8)):
            args = (*case, activation, 30.0 if bits == 8 else 2.0, -2, bits, dtype)
            assert_codes(TRITON.linear_requant(*args), reference.linear_requant(*args), 2e-2)
    for dtype in (torch.float32, torch.float16):
        args = (*case, "none", dtype)
        torch.testing.assert_close(TRITON.linear_float(*args), reference.linear_float(*args), rtol=1e-3, atol=1e-3)
        start = torch.randn(1, shape[0], shape[2]).to(dtype)
        came, wanted = start.clone(), start.clone()
        TRITON.linear_residual(came, *case)
        reference.linear_residual(wanted, *case)
        torch.testing.assert_close(came, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(197, 192, 192), (66, 768, 192), (49, 384, 384), (70, 128, 320), (1, 64, 64)])
@pytest.mark.parametrize("bits", [(8, 8, 8), (8, 4, 8), (4, 4, 4), (4, 8, 4)])
def test_linear_and_layernorm_in_one_kernel(shape: tuple[int, int, int], bits: tuple[int, int, int]) -> None:
    from lampq_rt.kernels.gpu import configs, impl

    (m, _, width), (a_bits, w_bits, out_bits) = shape, bits
    case = linear_case(shape, a_bits, w_bits)
    container = torch.int4 if out_bits == 4 else torch.int8
    for norm, dtype in (((torch.randn(width), torch.randn(width)), torch.float16), ((None, None), torch.float32)):
        start = (torch.randn(1, m, width) * 3 + 1).to(dtype)
        came, wanted = start.clone(), start.clone()
        tail = (*norm, 1e-6, 20.0 if out_bits == 8 else 2.0, 3)
        codes_wanted = reference.linear_residual_layernorm(wanted, *case, *tail, out_bits, container)
        out = torch.full_like(codes_wanted, 99)
        config = configs.ROWS_CANDIDATES[0]
        impl.launch_rows(config, came, *case, out, *tail, reference.code_range(out_bits))
        torch.testing.assert_close(came, wanted, rtol=1e-3, atol=1e-3)
        assert_codes(out, codes_wanted, 2e-3 if dtype == torch.float32 else 5e-3)
        two_kernels = TRITON.linear_residual_layernorm(start, *case, *tail, out_bits, container)
        assert_codes(two_kernels, codes_wanted, 2e-3 if dtype == torch.float32 else 5e-3)


def test_split_k_gives_the_exact_sum_and_cleans_up() -> None:
    from lampq_rt.kernels.gpu import impl
    from lampq_rt.kernels.gpu.configs import LinearConfig
    from lampq_rt.kernels.gpu.linear import FLOAT

    case = linear_case((70, 768, 192), 8, 8)
    wanted = reference.linear_float(*case, "none", torch.float32)
    for split in (2, 3):
        out = torch.full((1, 70, 192), float("nan"))
        impl._launch_linear(FLOAT, *case, out, config=LinearConfig(64, 64, 128, split_k=split, warps=4))
        torch.testing.assert_close(out, wanted, rtol=1e-6, atol=1e-6)


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
    found = tune.tune_linear(work, "cpu")
    assert (found.ms, found.rule_ms) == (1.0, 3.0)
    with pytest.raises(RuntimeError, match=f"no configuration of {work.key} runs"):
        tune.tune_linear(work, "cpu")


@pytest.mark.parametrize(("times", "one"), [([3.0, 2.0], True), ([1.0, 2.0], False)])
def test_the_tuner_compares_one_kernel_with_two(
    times: list[float], one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lampq_rt.kernels.gpu import configs, tune

    ran = iter([*times, *[9.0] * len(configs.ROWS_CANDIDATES)])

    def bench(launch: Callable[[], None], **options: object) -> float:
        launch()
        return next(ran)

    monkeypatch.setattr(tune.triton.testing, "do_bench", bench)
    found = tune.tune_linear(LinearWork("rows", 34, 64, 256, 8, 4), "cpu")
    assert (found.config is not None) == one and (found.ms, found.rule_ms) == (min(times), times[0])


@pytest.mark.usefixtures("poisoned_heads")
@pytest.mark.parametrize("case", [(2, 197, 2, 64), (1, 198, 1, 32), (2, 49, 2, 48), (2, 5, 1, 80), (1, 17, 3, 64)])
@pytest.mark.parametrize("bits", [(8, 8), (4, 6)])
def test_linear_qkv(case: tuple[int, ...], bits: tuple[int, int]) -> None:
    batch, tokens, heads, head_dim = case
    width = heads * head_dim
    w_q = codes((3 * width, width), 8, weight=True)
    x_q = codes((batch, tokens, width), 8, seed=5)
    scale = (torch.rand(3 * width) + 0.5) / (math.sqrt(width) * 5500)
    steps = (torch.rand(3 * heads) * 20 + 20).repeat_interleave(head_dim)
    args = (x_q, w_q, scale, reference.column_constant(w_q, 9), torch.randn(3 * width), heads, steps, *bits)
    for came, wanted in zip(TRITON.linear_qkv(*args), reference.linear_qkv(*args), strict=True):
        assert_codes(came, wanted)


@pytest.fixture
def poisoned_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v full of garbage before the kernels write them, the padding of v included."""
    from lampq_rt.kernels.gpu import impl

    empty = impl._empty_heads
    monkeypatch.setattr(impl, "_empty_heads", lambda *args: tuple(t.fill_(85) for t in empty(*args)))


@pytest.mark.usefixtures("poisoned_heads")
@pytest.mark.parametrize(
    ("tokens", "head_dim"), [(197, 64), (198, 32), (49, 48), (49, 80), (5, 72), (1, 64), (16, 128)]
)
@pytest.mark.parametrize("affine", ["none", "plain", "weight", "both"])
def test_heads_quantize(tokens: int, head_dim: int, affine: str) -> None:
    batch, heads = 2, 3
    torch.manual_seed(1)
    qkv = torch.randn(batch, tokens, 3 * heads * head_dim) * 3 + 0.5
    norms = [torch.randn(head_dim) for _ in range(4)] if affine == "both" else [None] * 4
    if affine == "weight":
        norms[::2] = torch.randn(head_dim), torch.randn(head_dim)
    steps = (torch.rand(3 * heads) * 20 + 20).repeat_interleave(head_dim)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for bits in ((8, 8), (4, 6)):
            args = (qkv.to(dtype), affine != "none", *norms, 1e-5, heads, steps, *bits)
            for came, wanted in zip(TRITON.heads_quantize(*args), reference.heads_quantize(*args), strict=True):
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


@pytest.mark.parametrize("tokens", [1, 49, 197, 198, 256, 300])
@pytest.mark.parametrize("head_dim", [32, 64, 72])
def test_attention(tokens: int, head_dim: int) -> None:
    if tokens > 256 and head_dim != 64:
        pytest.skip("long rows are tried with one head size")
    q, k, v = (codes((1, 2, tokens, head_dim), 8, seed=s) for s in range(3))
    v = reference.transpose_v(v)
    scales = (torch.tensor([1e-3, 3e-5]), torch.tensor([0.7, 0.2]))
    for p in ((8, "rowmax"), (4, "rowmax"), (4, "log2"), (3, "log2")):
        for bits, dtype in ((8, torch.int8), (4, torch.int4 if head_dim == 64 else torch.int8)):
            args = (q, k, v, *scales, *p, 1.5 if bits == 8 else 0.1, -2, bits, dtype)
            assert_codes(TRITON.attention(*args), reference.attention(*args))
    for p, limit in (((8, "rowmax"), 1e-4), ((4, "log2"), 1e-6), ((3, "log2"), 1e-6)):
        args = (q, k, v, *scales, *p, 1.0, 0, 16, torch.float32)
        came, wanted = TRITON.attention(*args), reference.attention(*args)
        # A rowmax code that falls the other way moves a row by 1/255 of a value: compare the spread, not each number.
        assert (came - wanted).pow(2).mean().sqrt() <= limit * wanted.pow(2).mean().sqrt()


@pytest.mark.parametrize("tokens", [49, 197, 300])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_log2_codes_on_ties_and_beyond_the_last_code(tokens: int, bits: int) -> None:
    q = torch.zeros((1, 1, tokens, 32), dtype=torch.int8)
    q[..., 0] = 1
    k = torch.zeros_like(q)
    k[0, 0, :, 0] = -(torch.arange(tokens) % 50).to(torch.int8)  # logits 0, -1/2, -1, …
    v = reference.transpose_v(codes((1, 1, tokens, 32), 8))
    args = (q, k, v, torch.tensor([0.5]), torch.ones(1), bits, "log2", 1.0, 0, 16, torch.float32)
    torch.testing.assert_close(TRITON.attention(*args), reference.attention(*args), rtol=1e-5, atol=1e-5)
    assert [round(i / 2) for i in (1, 3, 5)] == [0, 2, 2], "the row holds ties both ways"


@pytest.mark.parametrize("p", [(8, "rowmax"), (4, "log2")])
@pytest.mark.parametrize("tokens", [49, 197, 577])
def test_attention_ignores_what_lies_in_the_padding_of_v(tokens: int, p: tuple[int, str]) -> None:
    q, k, v = (codes((1, 2, tokens, 64), 8, seed=s) for s in range(3))
    v = reference.transpose_v(v)
    poisoned = v.clone()
    poisoned[..., tokens:] = -77
    tail = (torch.tensor([1e-3, 3e-5]), torch.tensor([0.7, 0.2]), *p, 1.5, 0, 8, torch.int8)
    assert_codes(TRITON.attention(q, k, poisoned, *tail), reference.attention(q, k, v, *tail))


@pytest.mark.parametrize(
    ("bits", "input_bits", "log2"),
    [
        (8, None, False), (4, None, False), ({"default": 8, "fc1": 4, "fc2": 3, "proj": 16}, None, False),
        ({"default": 5, "qkv": 4}, 4, False), (8, None, True), (4, None, True),
    ],
)  # fmt: skip
def test_a_whole_model_runs_on_the_triton_path(bits: dict[str, int] | int, input_bits: int | None, log2: bool) -> None:
    model = tiny_vit(init_values=0.5)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    plan = stand_in_plan(model, images, bits, input_bits=input_bits)
    plan = log2_plan(plan, 4) if log2 else plan
    with torch.inference_mode():
        wanted = lampq_rt.compile(model, plan, backend="reference")(images)
        came = lampq_rt.compile(model, plan, backend="triton")(images)
        original = model(images)
    noise = (wanted - original).pow(2).mean().sqrt()
    assert (came - wanted).pow(2).mean().sqrt() <= 0.5 * noise


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


def test_one_deit_tiny_block_at_197_tokens() -> None:
    model = tiny_vit(img_size=224, patch_size=16, embed_dim=192, depth=1, num_heads=3)
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(3))
    plan = range_plan(model, images, 8)
    with torch.inference_mode():
        wanted = lampq_rt.compile(model, plan, backend="reference")(images)
        came = lampq_rt.compile(model, plan, backend="triton")(images)
        noise = (wanted - model(images)).pow(2).mean().sqrt()
    assert (came - wanted).pow(2).mean().sqrt() <= 0.5 * noise
