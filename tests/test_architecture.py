"""Descriptions of timm models: enough to build each again on the meta device, and nothing else gets through."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.layers import QuickGELU, RmsNorm
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from lampq_rt.adapters import timm_architecture
from lampq_rt.errors import CheckpointError
from tests.plans import tiny_vit

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 5}


def rebuilt(model: nn.Module) -> nn.Module:
    """The model again, by way of JSON; checks that shapes are the same and that nothing was allocated."""
    description = timm_architecture.describe(model)
    assert "obstacle" not in description, description
    twin = timm_architecture.build(json.loads(json.dumps(description)))
    assert {t.device.type for t in twin.state_dict().values()} == {"meta"} and not twin.training
    shapes, others = ({name: t.shape for name, t in m.state_dict().items()} for m in (model, twin))
    assert list(shapes.items()) == list(others.items()) and type(model) is type(twin)
    return twin


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"num_classes": 0, "in_chans": 1}),
        ("vit_tiny_patch16_224", {"img_size": (96, 128)}),
        ("vit_small_patch32_224", {}),
        ("vit_small_patch8_224", {}),
        ("vit_small_patch16_18x2_224", {}),
        ("vit_base_patch16_clip_quickgelu_224", {}),
        ("vit_base_patch16_siglip_224", {}),
        ("vit_medium_patch16_reg4_gap_256", {}),
        ("vit_little_patch16_reg4_gap_256", {"img_size": 128}),
        ("vit_small_patch14_dinov2", {"img_size": 98}),
        ("vit_small_patch14_reg4_dinov2", {}),
        ("vit_giant_patch14_dinov2", {}),
        ("deit_tiny_patch16_224", {"global_pool": "avg"}),
        ("deit_tiny_distilled_patch16_224", {"num_classes": 7}),
        ("deit3_small_patch16_224", {"dynamic_img_size": True}),
    ],
)
def test_timm_names(name: str, options: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, **options)
    assert timm_architecture.describe(model)["name"] == name
    rebuilt(model)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"img_size": (32, 48), "patch_size": (8, 16)},
        {"global_pool": "avg"},
        {"global_pool": "avg", "fc_norm": False},
        {"global_pool": "avg", "class_token": False},
        {"global_pool": "map", "class_token": False},
        {"global_pool": ""},
        {"num_classes": 0},
        {"init_values": 0.3, "qk_norm": True, "reg_tokens": 4, "no_embed_class": True},
        {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
        {"pre_norm": True, "act_layer": QuickGELU, "norm_layer": partial(nn.LayerNorm, eps=1e-3)},
        {"act_layer": "relu", "norm_layer": RmsNorm},
        {"drop_rate": 0.1, "patch_drop_rate": 0.1, "drop_path_rate": 0.1, "attn_drop_rate": 0.1},
        {"embed_dim": 66, "mlp_ratio": 48 / 11},
        {"qkv_bias": False, "proj_bias": False, "final_norm": False},
        {"dynamic_img_size": True, "dynamic_img_pad": True},
        {"pos_embed": "none"},
        {"depth": 0},
    ],
)
def test_models_made_by_hand(options: dict[str, Any]) -> None:
    rebuilt(VisionTransformer(**{**SMALL, **options}))


def test_a_rebuilt_model_computes_the_same() -> None:
    model = tiny_vit(
        init_values=0.3, qk_norm=True, pre_norm=True, act_layer="quick_gelu", global_pool="avg", reg_tokens=2
    )
    twin = rebuilt(model)
    twin.load_state_dict(model.state_dict(), assign=True)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(images), twin(images))


def test_changed_after_it_was_made() -> None:
    model = timm.create_model("deit_tiny_patch16_224", depth=2)
    model.set_input_size((64, 96))
    model.reset_classifier(3, "avg")
    twin = rebuilt(model)
    assert twin.patch_embed.img_size == (64, 96) and twin.head.out_features == 3 and twin.global_pool == "avg"
    rebuilt(VisionTransformerDistilled(**SMALL))


def test_describing_changes_nothing() -> None:
    model = tiny_vit()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    timm_architecture.describe(model)
    assert torch.equal(torch.get_rng_state(), before)


class _Mine(VisionTransformer):
    """A user's own subclass."""


def _edited(edit: Callable[[nn.Module], object]) -> nn.Module:
    model = VisionTransformer(**SMALL)
    edit(model)
    return model


OBSTACLES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "subclass": (lambda: _Mine(**SMALL), "its class .*_Mine is not timm's"),
    "head": (lambda: _edited(lambda m: setattr(m, "head", nn.Sequential(nn.Linear(64, 5)))), "head is a Sequential"),
    "method": (
        lambda: _edited(lambda m: setattr(m, "forward", lambda x: x)),
        "the model has its method forward replaced",
    ),
    "eps": (
        lambda: _edited(lambda m: setattr(m.blocks[1].norm1, "eps", 1e-3)),
        "blocks.1.norm1 has eps = 0.001, where",
    ),
    "block": (lambda: _edited(lambda m: m.blocks.__setitem__(0, nn.Identity())), "blocks.0"),
    "extra": (lambda: _edited(lambda m: m.add_module("aux", nn.Linear(2, 2))), "it has a module aux"),
    "parameter": (
        lambda: _edited(lambda m: m.register_buffer("b", torch.ones(2))),
        r"b has shape \(2,\), where .* None",
    ),
    "activation": (
        lambda: VisionTransformer(**SMALL, act_layer=partial(nn.GELU, approximate="tanh")),
        "mlp.act has approximate = 'tanh'",
    ),
    "no blocks": (lambda: _edited(lambda m: delattr(m, "blocks")), "its arguments cannot be read"),
}


@pytest.mark.parametrize("case", OBSTACLES)
def test_obstacles_are_told_and_refused(case: str) -> None:
    make, told = OBSTACLES[case]
    description = timm_architecture.describe(make())
    json.dumps(description)
    with pytest.raises(CheckpointError, match=f"cannot be rebuilt from a checkpoint because .*{told}") as caught:
        timm_architecture.build(description)
    assert "\n" not in str(caught.value)


def _hand(**kwargs: Any) -> dict[str, Any]:
    return {"family": "timm_vit", "class": "VisionTransformer", "name": None, "kwargs": kwargs}


@pytest.mark.parametrize(
    ("architecture", "told"),
    [
        (None, 'expected an object with "family"'),
        ([], 'expected an object with "family"'),
        ({"family": "timm_swin"}, 'expected an object with "family"'),
        ({"family": "timm_vit"}, "expected the keys"),
        ({**_hand(), "code": "import os"}, "expected the keys"),
        ({"family": "timm_vit", "obstacle": "a\nb" * 500}, "because a b"),
        ({**_hand(), "class": "Module"}, "architecture.class: expected VisionTransformer or"),
        ({**_hand(), "class": ["VisionTransformer"]}, "architecture.class"),
        ({**_hand(), "name": "resnet50"}, "architecture.name"),
        ({**_hand(), "name": "hf-hub:timm/vit"}, "architecture.name"),
        ({**_hand(), "name": "local-dir:/tmp"}, "architecture.name"),
        ({**_hand(), "name": 7}, "architecture.name"),
        (
            {**_hand(), "name": "vit_tiny_patch16_224", "class": "VisionTransformerDistilled"},
            "is a VisionTransformer, not",
        ),
        ({**_hand(), "kwargs": [1]}, "architecture.kwargs: expected an object"),
        (_hand(pretrained=True), "unknown argument 'pretrained'"),
        (_hand(embed_layer="os.system"), "unknown argument 'embed_layer'"),
        (_hand(depth=10**9), "kwargs.depth: 1000000000 is not allowed"),
        (_hand(depth=True), "kwargs.depth: True is not allowed"),
        (_hand(embed_dim=-64), "kwargs.embed_dim"),
        (_hand(embed_dim=64.0), "kwargs.embed_dim"),
        (_hand(mlp_ratio=float("nan")), "kwargs.mlp_ratio"),
        (_hand(mlp_ratio=1e9), "kwargs.mlp_ratio"),
        (_hand(num_classes=10**12), "kwargs.num_classes"),
        (_hand(img_size=[224, 224, 224]), "kwargs.img_size"),
        (_hand(img_size=10**6), "kwargs.img_size"),
        (_hand(qk_norm=1), "kwargs.qk_norm"),
        (_hand(global_pool={"a": 1}), "kwargs.global_pool"),
        (_hand(norm_layer=["torch.BatchNorm1d", 1e-6]), "kwargs.norm_layer"),
        (_hand(norm_layer="timm.LayerNorm"), "kwargs.norm_layer"),
        (_hand(act_layer="eval"), "kwargs.act_layer"),
        (_hand(num_heads=7), "timm cannot build it"),
        (_hand(class_token=False), "timm cannot build it"),
    ],
)
def test_hostile_descriptions(architecture: Any, told: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        timm_architecture.build(architecture)
    text = str(caught.value)
    assert told in text and "\n" not in text and len(text) < 700


def test_needs_no_network_and_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a socket was asked for")

    monkeypatch.setattr(socket, "socket", refuse)
    huge = timm_architecture.build(_hand(embed_dim=16384, depth=16, num_heads=64))  # 206 GB, if they were allocated
    assert all(p.is_meta for p in huge.parameters())
    timm_architecture.build({**_hand(), "name": "vit_giant_patch14_dinov2"})
