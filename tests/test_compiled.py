"""`lampq_rt.compile`: every kind of timm ViT, every mix of integer and float sites, and what users do with a module."""

from __future__ import annotations

import copy
import threading

import pytest
import timm
import torch
from timm.layers import SwiGLUPacked, get_act_layer
from torch import Tensor, nn

import lampq_rt
from lampq_rt.adapters import describe
from lampq_rt.errors import BackendError, FormatError, ModelError, PlanError
from lampq_rt.formats import Format
from lampq_rt.models import weight_bytes
from lampq_rt.modules import IntegerLinear
from lampq_rt.plan import SiteParams
from tests.plans import VARIANTS as COMMON
from tests.plans import assert_paths_agree, range_plan, rms, tiny_vit
from tests.tracing import exports_with_dynamic_batch, traces_in_one_graph

VARIANTS = {
    **COMMON,
    "swiglu": {"mlp_layer": SwiGLUPacked, "act_layer": get_act_layer("silu"), "mlp_ratio": 4},
}


def images_for(model: nn.Module, batch: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, *model.patch_embed.img_size, generator=generator)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_follow_the_original_and_the_reference(name: str) -> None:
    model = tiny_vit(**VARIANTS[name])
    images = images_for(model)
    plan = range_plan(model, images)
    before = copy.deepcopy(model.state_dict())
    assert_paths_agree(model, plan, images, noise_below=0.1)
    with torch.inference_mode():
        wanted, came = model(images), lampq_rt.compile(model, plan)(images)
    assert came.shape == wanted.shape and came.dtype == torch.float32
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "bits",
    [
        {"qkv": 16}, {"proj": 16}, {"fc1": 16}, {"fc2": 16}, {"qk": 16, "pv": 16}, {"head": 16, "patch_embed": 16},
        {"qkv": 16, "qk": 16, "pv": 16}, {"qk": 16, "pv": 16, "proj": 16}, {"default": 16, "qk": 8, "pv": 8},
        {"default": 16, "fc2": 8}, {"default": 6, "fc1": 3, "qkv": 4},
    ],
)  # fmt: skip
@pytest.mark.parametrize("variant", ["layer_scale", "qk_norm", "clip"])
def test_any_mix_of_integer_and_floating_point_sites(bits: dict[str, int], variant: str) -> None:
    model = tiny_vit(**VARIANTS[variant])
    images = images_for(model)
    plan = range_plan(model, images, bits)
    assert_paths_agree(model, plan, images)


def test_all_sites_at_16_bits_is_the_original() -> None:
    model = tiny_vit(init_values=0.3)
    images = images_for(model)
    with torch.inference_mode():
        torch.testing.assert_close(lampq_rt.compile(model, range_plan(model, images, 16))(images), model(images))


@pytest.mark.parametrize(
    "name", ["deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_tiny_patch16_224"]
)
def test_named_models_have_all_their_sites(name: str) -> None:
    model = timm.create_model(name, pretrained=False, depth=1, img_size=56).eval()
    description = describe(model)
    assert description.architecture == name and not description.skipped
    kinds = [site.kind for site in description.sites]
    heads = {"deit_tiny_distilled_patch16_224": 2, "vit_small_patch14_reg4_dinov2": 0}.get(name, 1)
    assert kinds == ["patch_embed", "qkv", "qk", "pv", "proj", "fc1", "fc2"] + ["head"] * heads
    images = images_for(model, 2)
    with torch.inference_mode():
        wanted, came = model(images), lampq_rt.compile(model, range_plan(model, images))(images)
    assert rms(came - wanted) < 0.15 * rms(wanted)


def test_what_stays_in_floating_point_is_reported() -> None:
    skipped = {s.name: s.reason for s in describe(tiny_vit(**VARIANTS["swiglu"])).skipped}
    assert skipped == {f"blocks.{i}.mlp": "GluMlp is not timm's Mlp of two linears" for i in range(2)}


def test_a_model_with_nothing_to_quantise_is_an_error() -> None:
    model = tiny_vit(num_classes=0)
    model.blocks = nn.Sequential()
    model.patch_embed.proj = nn.Conv2d(3, 64, 9, stride=8, padding=1)
    with pytest.raises(ModelError, match="nothing to quantise in this VisionTransformer: found 1 Conv2d"):
        describe(model)
    with pytest.raises(ModelError, match="cannot quantise a torch.nn.modules.linear.Linear"):
        describe(nn.Linear(3, 3))


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, lampq_rt.Plan, Tensor]:
    model = tiny_vit(init_values=0.5)
    images = images_for(model)
    return model, range_plan(model, images, {"default": 8, "fc1": 4}), images


Small = tuple[nn.Module, lampq_rt.Plan, Tensor]


def test_features_any_batch_and_eval_mode(small: Small) -> None:
    model, plan, images = small
    fast = lampq_rt.compile(model, plan)
    assert not fast.training and not fast.train().training
    features = fast.forward_features(images)
    assert features.shape == model.forward_features(images).shape
    torch.testing.assert_close(fast.forward_head(features), fast(images))
    for batch in (1, 3):
        torch.testing.assert_close(fast(images[:batch]), fast(images)[:batch])
    assert fast(images[:0]).shape == (0, 10)
    assert not any(p.requires_grad for p in fast.parameters()) and not fast(images).requires_grad


def test_a_block_leaves_its_input_alone(small: Small) -> None:
    model, plan, images = small
    fast = lampq_rt.compile(model, plan)
    x = torch.randn(2, 17, 64)
    kept = x.clone()
    fast.model.blocks[0](x)
    fast.model.blocks(x)
    assert torch.equal(x, kept)
    _, intermediates = fast.model.forward_intermediates(images)
    assert not torch.equal(intermediates[0], intermediates[1])


def test_deepcopy_state_dict_and_dtype(small: Small) -> None:
    model, plan, images = small
    fast = lampq_rt.compile(model, plan)
    wanted = fast(images)
    twin = copy.deepcopy(fast)
    assert torch.equal(twin(images), wanted)
    for tensor in twin.state_dict().values():
        tensor.zero_()
    assert torch.equal(fast(images), wanted), "a copy must share nothing"
    fresh = lampq_rt.compile(model, plan)
    fresh.load_state_dict(fast.state_dict())
    assert torch.equal(fresh(images), wanted)
    assert torch.equal(fast.half().to("cpu").bfloat16()(images), wanted), "scales stay in fp32"


def test_state_of_another_plan_is_refused(small: Small) -> None:
    model, plan, images = small
    other = lampq_rt.compile(model, range_plan(model, images, 8))
    with pytest.raises(PlanError, match="another plan"):
        other.load_state_dict(lampq_rt.compile(model, plan).state_dict(), strict=False)


def test_four_bit_weights_lie_two_to_a_byte(small: Small) -> None:
    model, plan, images = small
    eight, mixed = (lampq_rt.compile(model, p) for p in (range_plan(model, images, 8), plan))
    saved = 2 * 64 * 256 // 2  # fc1 of two blocks
    assert eight.weight_bytes - mixed.weight_bytes == saved
    assert mixed.model.blocks[0].mlp.fc1.w_q.shape == (256, 32)


def test_weights_repacked_by_the_kernels_are_counted_with_their_model(small: Small) -> None:
    model, plan, images = small
    fast, other = (lampq_rt.compile(model, plan) for _ in range(2))
    assert fast.served_bytes == fast.weight_bytes, "nothing is repacked before a forward pass"
    with torch.inference_mode():
        fast(images)
    codes = sum(m.out_features * m.in_features for m in fast.modules() if isinstance(m, IntegerLinear))
    served = fast.served_bytes
    assert fast.weight_bytes + codes <= served < fast.weight_bytes + 2 * codes  # beside codes: constants a channel
    with torch.inference_mode():
        fast(images[:1])
    assert fast.served_bytes == served and copy.deepcopy(fast).served_bytes == fast.weight_bytes
    assert other.served_bytes == other.weight_bytes
    reference = lampq_rt.compile(model, plan, backend="reference")
    reference(images)
    assert reference.served_bytes == reference.weight_bytes


def test_weight_bytes_are_those_of_any_model(small: Small) -> None:
    """A tensor that shares another's address, but not its size, hides nothing."""
    model, plan, _ = small
    fast = lampq_rt.compile(model, plan)
    whole = fast.weight_bytes
    fast.register_buffer("first", fast.model.head.linear.w_q[0])
    assert fast.weight_bytes == weight_bytes(fast) >= whole


@pytest.mark.slow
def test_torch_compile_in_one_graph(small: Small) -> None:
    model, plan, images = small
    traces_in_one_graph(lampq_rt.compile(model, plan), images)


def test_export_with_dynamic_batch_survives_saving(small: Small) -> None:
    model, plan, images = small
    exports_with_dynamic_batch(lampq_rt.compile(model, plan), images)


def test_threads_may_call_it_at_once(small: Small) -> None:
    model, plan, images = small
    fast = lampq_rt.compile(model, plan)
    with torch.inference_mode():
        wanted = [fast(images[i : i + 1]) for i in range(4)]
    failures: list[int] = []

    def work(index: int) -> None:
        with torch.inference_mode():
            for _ in range(20):
                if not torch.equal(fast(images[index : index + 1]), wanted[index]):
                    failures.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_masks_are_refused(small: Small) -> None:
    model, plan, images = small
    fast = lampq_rt.compile(model, plan)
    block = fast.model.blocks[0]
    tokens = torch.zeros(1, 1, model.embed_dim)
    for given in ({"is_causal": True}, {"attn_mask": torch.ones(1, 1)}):
        with pytest.raises(ModelError, match="attention masks"):
            block(tokens, **given)


def test_plans_that_do_not_fit_are_refused(small: Small) -> None:
    model, plan, images = small
    with pytest.raises(PlanError, match="made for VisionTransformer with weights .* calibrate again"):
        lampq_rt.compile(tiny_vit(init_values=0.5, seed=1), plan)
    name = "blocks.1.mlp.fc2"
    params = plan.sites[name]
    with pytest.raises(PlanError, match="names site 'blocks.7.mlp.fc1', which VisionTransformer does not have"):
        lampq_rt.compile(model, plan.with_sites({"blocks.7.mlp.fc1": params}))
    lacking = {k: v for k, v in plan.sites.items() if k != name}
    with pytest.raises(PlanError, match="no entry for site 'blocks.1.mlp.fc2'"):
        lampq_rt.compile(model, lampq_rt.Plan(plan.model, plan.weights_digest, lacking))
    for tensors, message in (
        ({}, "lacks the tensor weight.scale"),
        ({**params.tensors, "input.scale": torch.tensor(-1.0)}, "input.scale must be positive and finite"),
        ({**params.tensors, "weight.scale": torch.ones(3)}, r"weight.scale is torch.float32 \(3,\); expected"),
        ({**params.tensors, "bias": torch.ones(3)}, "a tensor bias that its formats do not use"),
    ):
        wrong = SiteParams(params.kind, params.formats, tensors, params.params)
        with pytest.raises(PlanError, match=message):
            lampq_rt.compile(model, plan.with_sites({name: wrong}))
    head = {"weight": Format(8, "uniform", "head"), "input": params.formats["input"]}
    with pytest.raises(FormatError, match="blocks.1.mlp.fc2: weight is Format"):
        lampq_rt.compile(model, plan.with_sites({name: SiteParams(params.kind, head, params.tensors)}))


def test_devices_and_backends_that_cannot_serve(small: Small) -> None:
    model, plan, _ = small
    for device in ("cuda", "mps", "nonsense"):
        with pytest.raises(BackendError, match="cpu"):
            lampq_rt.compile(model, plan, device=device)
    with pytest.raises(BackendError, match="unknown backend 'fast'; allowed: native, reference, triton"):
        lampq_rt.compile(model, plan, backend="fast")
