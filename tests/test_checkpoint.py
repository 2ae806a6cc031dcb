"""Checkpoints: a reloaded model answers bit for bit as the saved one; a damaged or hostile file is one clear line."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import resource
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

import lampq_rt
from lampq_rt import checkpoint
from lampq_rt.compiler import CompiledModel
from lampq_rt.errors import BackendError, CheckpointError
from lampq_rt.formats import FLOAT
from lampq_rt.plan import Plan
from lampq_rt.weights import weight_codes
from tests.plans import VARIANTS as COMMON
from tests.plans import range_plan, tiny_vit

VARIANTS = {**COMMON, "odd_width": {"embed_dim": 66, "num_heads": 3}}
MIXED = {"default": 8, "qkv": 2, "proj": 3, "fc1": 4, "fc2": 5, "qk": 6, "pv": 7, "head": 6}


def images_for(model: nn.Module) -> Tensor:
    size = model.patch_embed.img_size
    return torch.randn(3, model.patch_embed.proj.in_channels, *size, generator=torch.Generator().manual_seed(1))


def compiled(bits: dict[str, int] | int = 8, **changes: Any) -> tuple[CompiledModel, Tensor]:
    model = tiny_vit(**changes)
    images = images_for(model)
    return lampq_rt.compile(model, range_plan(model, images, bits)), images


def same_everywhere(a: CompiledModel, b: CompiledModel, images: Tensor) -> None:
    with torch.inference_mode():
        assert torch.equal(a(images), b(images))
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    assert all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(left.values(), right.values(), strict=True))
    assert a.plan.diff(b.plan) == [] and a.architecture == b.architecture and a.fallbacks == b.fallbacks
    assert a.weight_bytes == b.weight_bytes
    assert not b.training and not any(p.requires_grad or p.is_meta for p in b.parameters())


def message(call: Callable[[], object]) -> str:
    """The text of the CheckpointError that `call` raises: one line, always."""
    with pytest.raises(CheckpointError, match=r"\A[^\n]{,700}\Z") as caught:
        call()
    return str(caught.value)


@pytest.fixture(scope="module")
def small() -> tuple[CompiledModel, bytes]:
    """A model with a small file, and the file."""
    model, _ = compiled(MIXED, depth=1, embed_dim=32, img_size=16)
    return model, bytes(checkpoint._encoded(model))


@pytest.mark.parametrize("bits", [8, 3, pytest.param(MIXED, id="mixed")])
@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip(name: str, bits: dict[str, int] | int, tmp_path: Path) -> None:
    model, images = compiled(bits, **VARIANTS[name])
    model.save(tmp_path / "m.lampq")
    again = lampq_rt.load(tmp_path / "m.lampq")
    same_everywhere(model, again, images)
    again.save(tmp_path / "n.lampq")
    assert (tmp_path / "m.lampq").read_bytes() == (tmp_path / "n.lampq").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["m.lampq", "n.lampq"]


def test_float_sites(tmp_path: Path) -> None:
    for kind in ("qkv", "proj", "fc1", "fc2", "head", "patch_embed"):
        model, images = compiled({"default": 8, kind: 16}, init_values=0.5)
        model.save(tmp_path / "m.lampq")
        same_everywhere(model, lampq_rt.load(tmp_path / "m.lampq"), images)
    model, images = compiled({"default": 4, "qk": 16, "pv": 16})
    model.save(tmp_path / "m.lampq")
    same_everywhere(model, lampq_rt.load(tmp_path / "m.lampq"), images)


def test_rounding_decided_by_the_plan(tmp_path: Path) -> None:
    """Codes that the plan holds are stored once, and come back in the plan and in the model."""
    model = tiny_vit()
    images = images_for(model)
    plan = range_plan(model, images, MIXED)
    name = "blocks.1.mlp.fc1"
    nearest = weight_codes(model.get_submodule(name).weight.detach(), plan.sites[name])
    codes = (nearest - (nearest > 0).to(torch.int8)).contiguous()
    params = plan.sites[name]
    decided = plan.with_sites({name: replace(params, tensors={**params.tensors, "weight.codes": codes})})
    sizes = []
    for which in (plan, decided):
        fast = lampq_rt.compile(model, which)
        fast.save(tmp_path / "m.lampq")
        again = lampq_rt.load(tmp_path / "m.lampq")
        same_everywhere(fast, again, images)
        sizes.append((tmp_path / "m.lampq").stat().st_size)
    assert torch.equal(again.plan.sites[name].tensors["weight.codes"], codes)
    assert abs(sizes[0] - sizes[1]) < 100


def test_state_that_does_not_follow_from_the_plan_is_kept(tmp_path: Path) -> None:
    model, images = compiled(MIXED)
    state = model.state_dict()
    changed = [key for key in state if key.endswith(("qkv.scale", "fc1.column", "matmuls.v_scale"))]
    assert changed
    for key in changed:
        state[key].copy_(state[key] * 2)
    model.save(tmp_path / "m.lampq")
    same_everywhere(model, lampq_rt.load(tmp_path / "m.lampq"), images)


def test_named_distilled_model_and_provenance(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=2, num_classes=7).eval()
    images = images_for(model)
    plan = replace(range_plan(model, images), provenance={"metric": "fisher"}, residual_dtype="float32")
    fast = lampq_rt.compile(model, plan)
    fast.save(tmp_path / "m.lampq")
    again = lampq_rt.load(tmp_path / "m.lampq", "cpu")
    same_everywhere(fast, again, images)
    assert again.plan == replace(plan, sites=again.plan.sites)
    assert again.architecture["name"] == "deit_tiny_distilled_patch16_224"


def test_needs_no_network_and_same_bytes_every_time(
    small: tuple[CompiledModel, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a socket was asked for")

    monkeypatch.setattr(socket, "socket", refuse)
    model, data = small
    for name in ("a", "b"):
        checkpoint.save(model, tmp_path / name)
        assert (tmp_path / name).read_bytes() == data
        checkpoint.load(str(tmp_path / name))


def test_the_reference_is_saved_as_the_same_model(tmp_path: Path) -> None:
    model = tiny_vit()
    plan = range_plan(model, images_for(model), MIXED)
    for backend in ("native", "reference"):
        lampq_rt.compile(model, plan, backend=backend).save(tmp_path / backend)
    assert (tmp_path / "native").read_bytes() == (tmp_path / "reference").read_bytes()


def test_size_on_disk(tmp_path: Path) -> None:
    """The bytes of DeiT-Tiny against fp32, as issue 2 demands of W8 and of mean 4 bits."""
    model = timm.create_model("deit_tiny_patch16_224").eval()
    images = images_for(model)[:1]
    full = sum(4 * p.numel() for p in model.parameters())
    shares = []
    for bits in (8, 4):
        lampq_rt.compile(model, range_plan(model, images, bits)).save(tmp_path / "m.lampq")
        shares.append((tmp_path / "m.lampq").stat().st_size / full)
    assert shares[0] <= 0.27 and shares[1] <= 0.15, shares


# What can be wrong with a file ------------------------------------------------------------------------------------


def loads(data: bytes, path: Path) -> Callable[[], CompiledModel]:
    path.write_bytes(data)
    return lambda: checkpoint.load(path)


def test_truncated_anywhere(small: tuple[CompiledModel, bytes], tmp_path: Path) -> None:
    _, data = small
    cuts = {*range(0, 200), *range(200, len(data), 97), *range(len(data) - 50, len(data))}
    for cut in cuts:
        text = message(loads(data[:cut], tmp_path / "m.lampq"))
        assert "m.lampq" in text, cut
    assert "damaged" in message(loads(data + b"\0", tmp_path / "m.lampq"))


def test_every_byte_flipped(small: tuple[CompiledModel, bytes], tmp_path: Path) -> None:
    """Whatever is flipped, nothing is decoded: no byte of the file goes unchecked."""
    _, data = small
    rng = random.Random(0)
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= rng.choice((1, 2, 4, 8, 16, 32, 64, 128, 255))
        try:
            checkpoint._decoded(bytes(flipped))
        except CheckpointError:
            pass
        else:
            raise AssertionError(f"byte {place} may change unseen")
        if place % 97 == 0:
            assert "m.lampq" in message(loads(bytes(flipped), tmp_path / "m.lampq")), place


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "0 bytes long"),
        (b"\x10", "1 bytes long"),
        ((1 << 63).to_bytes(8, "little") + b"{}", "its header would have 9223372036854775808 bytes"),
        ((101 << 20).to_bytes(8, "little") + b"{}", "its header would have"),
        ((1000).to_bytes(8, "little") + b"{}", "truncated"),
        ((2).to_bytes(8, "little") + b"{}", "no 'lampq_rt' in the metadata"),
        ((2).to_bytes(8, "little") + b"[]", "no 'lampq_rt' in the metadata"),
        ((4).to_bytes(8, "little") + b"\xff\xfe\0\0", "not valid JSON"),
        ((20_000).to_bytes(8, "little") + b"[" * 20_000, "not valid JSON"),
        (b"PK\x03\x04" + b"\0" * 100, "truncated, or not a checkpoint"),
        (b"\x80\x04\x95" + b"a" * 100, "its header would have"),
        (safetensors.torch.save({"weight": torch.ones(3)}), "no 'lampq_rt' in the metadata"),
        (safetensors.torch.save({"w": torch.ones(3)}, {"lampq_rt": "hello"}), "it begins with 'hello'"),
    ],
)
def test_not_a_checkpoint(data: bytes, told: str, tmp_path: Path) -> None:
    assert told in message(loads(data, tmp_path / "m.lampq"))


def test_missing_file_folder_pipe_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "nowhere.lampq: No such file" in message(lambda: checkpoint.load(tmp_path / "nowhere.lampq"))
    assert "it is a folder" in message(lambda: checkpoint.load(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in message(lambda: checkpoint.load(tmp_path / "pipe"))
    assert "null byte" in message(lambda: checkpoint.load(tmp_path / "a\0b"))
    assert message(lambda: checkpoint.load(tmp_path / "a\nb"))
    monkeypatch.setattr(checkpoint, "SIZE_LIMIT", 10)
    assert "it has 11 bytes; at most 10" in message(loads(b"x" * 11, tmp_path / "m.lampq"))
    with pytest.raises(BackendError, match="unknown device"):
        checkpoint.load(tmp_path / "m.lampq", "abacus")


def sealed(content: Any, tensors: dict[str, Tensor], version: int = 1) -> bytes:
    """A file whose digest is right, as docs/plan.md describes it."""
    text = f"checkpoint {version} sha256 {'0' * 64} {json.dumps(content)}"
    data = safetensors.torch.save(tensors, {"lampq_rt": text})
    return data.replace(b"0" * 64, hashlib.sha256(data).hexdigest().encode(), 1)


def opened(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    size = int.from_bytes(data[:8], "little")
    text = json.loads(data[8 : 8 + size])["__metadata__"]["lampq_rt"]
    return json.loads(text.split(" ", 4)[4]), safetensors.torch.load(data)


Edit = Callable[[dict[str, Any], dict[str, Tensor]], object]
QKV = "blocks.0.attention.qkv"
HOSTILE: dict[str, tuple[Edit, str]] = {
    "unknown key": (lambda c, t: c.update(code="import os"), "expected the keys"),
    "no architecture": (lambda c, t: c.pop("architecture"), "expected the keys"),
    "null architecture": (lambda c, t: c.update(architecture=None), "architecture: expected an object"),
    "huge depth": (lambda c, t: c["architecture"]["kwargs"].update(depth=10**9), "kwargs.depth"),
    "other depth": (lambda c, t: c["architecture"]["kwargs"].update(depth=2), "no entry for site 'blocks.1"),
    "other width": (lambda c, t: c["architecture"]["kwargs"].update(embed_dim=64), "weight.scale is torch.float32"),
    "other tokens": (lambda c, t: c["architecture"]["kwargs"].update(img_size=32), "the tensor pos_embed is"),
    "other model": (lambda c, t: c["architecture"].update(name="resnet50"), "no Vision Transformer called 'resnet50'"),
    "obstacle": (lambda c, t: c["architecture"].update(obstacle="x"), "cannot be rebuilt"),
    "no plan": (lambda c, t: c.update(plan=[]), "plan: not a plan of lampq_rt"),
    "plan version": (lambda c, t: c["plan"].update(version=9), "plan: version: expected 1"),
    "site missing": (lambda c, t: c["plan"]["sites"].pop("head"), "no entry for 'head'"),
    "site too many": (
        lambda c, t: c["plan"]["sites"].update({"blocks.7.attn.pv": c["plan"]["sites"]["blocks.0.attn.pv"]}),
        "sites['blocks.7.attn.pv']: the tensor v.scale is missing",
    ),
    "site made float": (
        lambda c, t: c["plan"]["sites"]["head"].update(formats=dict.fromkeys(("weight", "input"), FLOAT.to_json())),
        "that its formats do not use",
    ),
    "other bits": (
        lambda c, t: c["plan"]["sites"]["blocks.0.attn.qkv"]["formats"]["weight"].update(bits=3),
        f"codes of {QKV}",
    ),
    "NaN step": (lambda c, t: t["plan/head/input.scale"].fill_(float("nan")), "steps must be positive and finite"),
    "linears": (lambda c, t: c["linears"].pop(QKV), "its integer linears are not those"),
    "linears null": (lambda c, t: c.update(linears=None), "its integer linears are not those"),
    "codes of plan": (lambda c, t: c.update(codes_of_plan=[["head"]]), "codes_of_plan: expected a list"),
    "codes of plan, unknown": (lambda c, t: c.update(codes_of_plan=["x"]), "codes_of_plan: expected a list"),
    "codes missing": (lambda c, t: t.pop(f"codes/{QKV}"), f"codes of '{QKV}': missing"),
    "codes too many": (lambda c, t: t.update({"codes/x": torch.ones(2)}), "codes of 'x': not in the plan"),
    "codes too short": (lambda c, t: t.update({f"codes/{QKV}": t[f"codes/{QKV}"][1:].clone()}), f"codes of {QKV}"),
    "codes of floats": (lambda c, t: t.update({f"codes/{QKV}": t[f"codes/{QKV}"].float()}), f"codes of {QKV}"),
    "state missing": (lambda c, t: t.pop("state/pos_embed"), "the tensor pos_embed is missing"),
    "state too much": (lambda c, t: t.update({"state/x": torch.ones(2)}), "there is a tensor 'x'"),
    "state, other shape": (
        lambda c, t: t.update({"state/norm.weight": torch.ones(2)}),
        "norm.weight is torch.float32 [2]",
    ),
    "state, other kind": (
        lambda c, t: t.update({"state/norm.weight": torch.ones(32).int()}),
        "norm.weight is torch.int32",
    ),
    "state, container": (lambda c, t: t.update({f"state/{QKV}.w_q": torch.ones(2)}), f"{QKV}.w_q is torch.float32"),
    "stray tensor": (lambda c, t: t.update({"pickle": torch.ones(2)}), "there is a tensor 'pickle'"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_with_a_right_digest(case: str, small: tuple[CompiledModel, bytes], tmp_path: Path) -> None:
    edit, told = HOSTILE[case]
    content, tensors = opened(small[1])
    edit(content, tensors)
    text = message(loads(sealed(content, tensors), tmp_path / "m.lampq"))
    assert "m.lampq" in text and told in text


def test_the_documented_format_is_what_is_read(small: tuple[CompiledModel, bytes], tmp_path: Path) -> None:
    content, tensors = opened(small[1])
    loads(sealed(content, tensors), tmp_path / "m.lampq")()
    assert "its version is 2; this lampq_rt" in message(loads(sealed(content, tensors, 2), tmp_path / "m.lampq"))
    assert "expected the keys" in message(loads(sealed([1], tensors), tmp_path / "m.lampq"))
    assert "not valid JSON" in message(loads(sealed({"a": float("nan")}, tensors), tmp_path / "m.lampq"))


# What can be wrong while saving ------------------------------------------------------------------------------------


def test_disk_full_leaves_the_old_file(small: tuple[CompiledModel, bytes], tmp_path: Path) -> None:
    model, data = small
    path = tmp_path / "m.lampq"
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (0, 4096, len(data) - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            text = message(lambda: model.save(path))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "cannot write checkpoint" in text and "File too large" in text and "m.lampq" in text
        assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["m.lampq"]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_any_step_may_fail(
    function: str, small: tuple[CompiledModel, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "m.lampq").write_bytes(b"old")
    monkeypatch.setattr(os, function, fail)
    assert "No space left on device" in message(lambda: small[0].save(tmp_path / "m.lampq"))
    assert (tmp_path / "m.lampq").read_bytes() == b"old" and os.listdir(tmp_path) == ["m.lampq"]


def test_places_that_cannot_be_written(small: tuple[CompiledModel, bytes], tmp_path: Path) -> None:
    model, data = small
    assert "there is no folder" in message(lambda: model.save(tmp_path / "missing" / "m.lampq"))
    assert "it is a folder" in message(lambda: model.save(tmp_path))
    assert "null byte" in message(lambda: checkpoint.save(model, "a\0b"))
    assert "cannot write" in message(lambda: model.save(tmp_path / ("long" * 100)))
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in message(lambda: model.save(tmp_path / "pipe"))
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "link").symlink_to("target")
    model.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_bytes() == data


def test_a_model_that_cannot_be_rebuilt_compiles_but_is_not_saved(tmp_path: Path) -> None:
    model = tiny_vit()
    model.norm = nn.Sequential(model.norm)
    images = images_for(model)
    fast = lampq_rt.compile(model, range_plan(model, images))
    assert fast(images).isfinite().all()
    text = message(lambda: fast.save(tmp_path / "m.lampq"))
    assert "cannot be rebuilt from a checkpoint because norm is a Sequential" in text and os.listdir(tmp_path) == []


def test_plan_of_a_checkpoint_can_be_saved_by_itself(small: tuple[CompiledModel, bytes], tmp_path: Path) -> None:
    loads(small[1], tmp_path / "m.lampq")().plan.save(tmp_path / "m.plan")
    assert Plan.load(tmp_path / "m.plan").diff(small[0].plan) == []
