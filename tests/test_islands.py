"""Layers that a plan leaves at 16 bits: in half precision on a GPU, in fp32 on a CPU.

There is no GPU here, so the modules are built with the GPU's precision on the CPU; the meta device shows what moving
to a GPU does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from timm.layers import SwiGLUPacked, get_act_layer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lampq_rt
from lampq_rt.adapters import describe
from lampq_rt.modules import IntegerLinear
from lampq_rt.modules_float import Part, Stream
from lampq_rt.modules_vit import integer_vit
from tests.plans import VARIANTS, range_plan, tiny_vit

HALF = Stream(torch.float16, torch.float16)
MIXES = [
    {"default": 16}, {"qkv": 16}, {"proj": 16}, {"fc1": 16}, {"fc2": 16}, {"qk": 16, "pv": 16},
    {"qkv": 16, "qk": 16, "pv": 16}, {"qk": 16, "pv": 16, "proj": 16}, {"default": 16, "qk": 8, "pv": 8},
    {"default": 16, "fc2": 8}, {"qkv": 16, "fc1": 4, "fc2": 16},
]  # fmt: skip
SWIGLU = {"mlp_layer": SwiGLUPacked, "act_layer": get_act_layer("silu"), "mlp_ratio": 4}


def images_for(model: nn.Module) -> Tensor:
    return torch.randn(16, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1))


def built(model: nn.Module, plan: lampq_rt.Plan, stream: Stream, backend: str = "reference") -> nn.Module:
    return integer_vit(model, describe(model), plan.sites, backend, stream)


def rms(x: Tensor) -> float:
    return float(x.double().pow(2).mean().sqrt())


class Conversions(TorchDispatchMode):
    """Counts conversions between floating-point dtypes of whole activations, [B, N, ...]."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].ndim >= 3:
            self.count += args[0].is_floating_point() and out.is_floating_point() and args[0].dtype != out.dtype
        return out


@contextmanager
def conversions() -> Iterator[Conversions]:
    with torch.no_grad(), Conversions() as mode:  # inference mode would hide what `to` is made of
        yield mode


@pytest.mark.parametrize("bits", MIXES)
@pytest.mark.parametrize("variant", ["plain", "layer_scale", "qk_norm", "clip", "swiglu"])
def test_half_precision_islands_follow_fp32_ones(bits: dict[str, int], variant: str) -> None:
    model = tiny_vit(**(SWIGLU if variant == "swiglu" else VARIANTS[variant]))
    images = images_for(model)
    plan = range_plan(model, images, bits)
    before = copy.deepcopy(model.state_dict())
    with torch.inference_mode():
        wanted = built(model, plan, Stream(torch.float16))(images)
        came = built(model, plan, HALF)(images)
        original = model(images)
    assert came.dtype == torch.float32 and came.isfinite().all()
    # Codes fall the other way where the stream's rounding moves them, which changes the answer as much as quantisation
    # did; it must not be further from the original's. fp16 rounds at 2^-11.
    assert rms(came - original) <= 1.1 * rms(wanted - original) + 2e-3 * rms(original)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_everything_at_16_bits_is_the_original_in_half_precision(dtype: torch.dtype) -> None:
    model = tiny_vit(init_values=0.3)
    images = images_for(model)
    island = built(model, range_plan(model, images, 16), Stream(dtype, dtype))
    twin = copy.deepcopy(model)
    twin.blocks.to(dtype)
    twin.blocks.register_forward_pre_hook(lambda module, args: (args[0].to(dtype),))
    twin.blocks.register_forward_hook(lambda module, args, out: out.float())
    with torch.inference_mode():
        torch.testing.assert_close(island(images), twin(images), rtol=1e-3, atol=1e-3)


def test_no_conversions_between_the_ends_of_the_stream() -> None:
    model = tiny_vit(init_values=0.3)
    images = images_for(model)
    blocks = built(model, range_plan(model, images, 16), HALF).blocks
    stream = torch.randn(3, 17, 64)
    with conversions() as seen:
        blocks(stream)
    assert seen.count == 2, "one when the stream starts, one when it ends"


def test_neighbours_hand_over_what_islands_take() -> None:
    model = tiny_vit()
    images = images_for(model)
    blocks = built(model, range_plan(model, images, {"default": 8, "proj": 16, "fc2": 16}), HALF, "native").blocks
    asked: list[torch.dtype] = []

    class Dtypes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func._schema.name in ("lampq::linear_float", "lampq::attention"):
                asked.append(args[-1])
            return func(*args, **(kwargs or {}))

    with torch.inference_mode(), Dtypes():
        blocks(torch.randn(3, 17, 64))
    assert asked == [torch.float16] * 4, "attention before proj and GELU before fc2, in two blocks"


def test_codes_are_never_made_from_half_precision_results_of_codes() -> None:
    model = tiny_vit(qk_norm=True, act_layer="quick_gelu")
    images = images_for(model)
    blocks = built(model, range_plan(model, images), HALF, "native").blocks
    asked: list[torch.dtype] = []

    class Dtypes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func._schema.name == "lampq::linear_float":
                asked.append(args[-1])
            return func(*args, **(kwargs or {}))

    with torch.inference_mode(), Dtypes():
        blocks(torch.randn(3, 17, 64))
    assert asked == [torch.float32] * 4, "qkv before qk-norm and fc1 before quick GELU, in two blocks"


def island_dtypes(model: nn.Module) -> set[torch.dtype]:
    parts = [module for module in model.modules() if isinstance(module, Part)]
    return {p.dtype for part in parts for module in part.islands() for p in module.parameters()}


def test_islands_change_precision_with_the_device_and_nothing_else_does() -> None:
    model = tiny_vit(init_values=0.3, qk_norm=True)
    images = images_for(model)
    plan = range_plan(model, images, {"default": 8, "proj": 16, "fc1": 16})
    plan = lampq_rt.Plan(plan.model, plan.weights_digest, plan.sites, residual_dtype="bfloat16")
    fast = lampq_rt.compile(model, plan)
    assert island_dtypes(fast) == {torch.float32}
    with torch.inference_mode():
        wanted = fast(images)
        assert torch.equal(fast.half().to("cpu").bfloat16()(images), wanted), "a CPU keeps fp32"
    before = {name: tensor.dtype for name, tensor in fast.state_dict().items()}
    bytes_before = fast.weight_bytes
    there = copy.deepcopy(fast).to("meta")  # stands for a GPU
    assert island_dtypes(there) == {torch.bfloat16}
    changed = {name for name, tensor in there.state_dict().items() if tensor.dtype != before[name]}
    layers = ("attention.proj", "attention.scale", "mlp.norm", "mlp.fc1")
    assert {name.rpartition(".")[0] for name in changed} == {f"model.blocks.{i}.{x}" for i in (0, 1) for x in layers}
    assert there.state_dict().keys() == fast.state_dict().keys()
    islands = sum(t.numel() for name, t in fast.state_dict().items() if name in changed)
    assert bytes_before == sum(t.numel() * t.element_size() for t in (*fast.parameters(), *fast.buffers()))
    assert sum(t.numel() * t.element_size() for t in there.state_dict().values()) == bytes_before - 2 * islands
    float32 = lampq_rt.compile(model, lampq_rt.Plan(plan.model, plan.weights_digest, plan.sites, {}, "float32"))
    assert island_dtypes(float32.to("meta")) == {torch.float32}, "the plan asks for fp32"


def on_gpu_and_back(model: nn.Module) -> None:
    """Round the islands as a GPU would, on the CPU."""
    for module in model.modules():
        if isinstance(module, Part):
            module.stream = HALF
    model.to("cpu")


def test_a_checkpoint_from_a_gpu_serves_on_a_cpu(tmp_path: Path) -> None:
    model = tiny_vit(init_values=0.3)
    images = images_for(model)
    plan = range_plan(model, images, {"default": 8, "fc2": 16, "qkv": 16})
    fast = lampq_rt.compile(model, plan)
    fast.save(tmp_path / "cpu.lampq")
    with torch.inference_mode():
        wanted = fast(images)
        on_gpu_and_back(fast)
        assert island_dtypes(fast) == {torch.float16}
        fast.save(tmp_path / "gpu.lampq")
        assert (tmp_path / "gpu.lampq").stat().st_size < (tmp_path / "cpu.lampq").stat().st_size
        came = lampq_rt.load(tmp_path / "gpu.lampq")
        assert island_dtypes(came) == {torch.float32}
        rounded = fast.state_dict()
        assert all(torch.equal(tensor, rounded[name].to(tensor.dtype)) for name, tensor in came.state_dict().items())
        assert came(images).isfinite().all()
        assert torch.equal(lampq_rt.load(tmp_path / "cpu.lampq")(images), wanted)
    fast.load_state_dict(lampq_rt.load(tmp_path / "cpu.lampq").state_dict())
    assert island_dtypes(fast) == {torch.float16}, "a state is taken in the precision of the device"
    assert any(isinstance(module, IntegerLinear) for module in fast.modules())
