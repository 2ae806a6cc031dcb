"""A plan on disk: what is written is read, the same plan gives the same bytes, what is wrong is said in one line."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from lampq_rt import backends, plan_io
from lampq_rt.errors import PlanError
from lampq_rt.formats import FLOAT, Format
from lampq_rt.plan import Plan, SiteParams
from lampq_rt.sites import Kind

QKV = "blocks.0.attn.qkv"


def make_plan(**changes: Any) -> Plan:
    """A plan of five sites, each of another sort."""

    def linear(kind: Kind, bits: int, n: int, k: int) -> SiteParams:
        tensors = {
            "weight.scale": torch.linspace(0.01, 0.02, n),
            "input.scale": torch.tensor(0.1),
            "input.zero_point": torch.tensor(-2, dtype=torch.int32),
        }
        return SiteParams(kind, backends.formats(kind, bits), tensors, n * k)

    heads = {"q.scale": torch.tensor([0.1, 0.2]), "k.scale": torch.tensor([0.3, 0.4])}
    fc1 = linear(Kind.FC1, 3, 16, 8)
    codes = torch.randint(-4, 4, (16, 8), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    sites = {
        QKV: linear(Kind.QKV, 4, 24, 8),
        "blocks.0.attn.qk": SiteParams(Kind.QK, backends.formats(Kind.QK, 8), heads),
        "blocks.0.attn.pv": SiteParams(Kind.PV, backends.formats(Kind.PV, 5), {"v.scale": torch.tensor([0.5, 0.6])}),
        "blocks.0.mlp.fc1": replace(fc1, tensors={**fc1.tensors, "weight.codes": codes}),
        "head": SiteParams(Kind.HEAD, {"weight": FLOAT, "input": FLOAT}, {}, 80),
    }
    provenance = {"metric": "fisher", "budget": {"mean_bits": 4}, "gap": 1e-4, "images": [1, 2], "note": "größer"}
    return replace(Plan("tiny", "ab" * 32, sites, provenance, "bfloat16"), **changes)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make_plan().save(tmp_path / "a.plan")
    return tmp_path / "a.plan"


def message(call: Callable[[], object]) -> str:
    """The text of the PlanError that `call` raises: one line, always."""
    with pytest.raises(PlanError, match=r"\A[^\n]{,700}\Z") as caught:
        call()
    return str(caught.value)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """A disk that is full after `size` bytes of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_round_trip(saved: Path) -> None:
    plan, again = make_plan(), Plan.load(saved)
    assert plan.diff(again) == []
    assert (again.model, again.weights_digest, again.residual_dtype) == ("tiny", "ab" * 32, "bfloat16")
    assert again.provenance == plan.provenance and list(again.sites) == list(plan.sites)
    assert again.mean_bits == plan.mean_bits
    for name, params in plan.sites.items():
        other = again.sites[name]
        assert (other.kind, other.formats, other.params) == (params.kind, params.formats, params.params)
        assert other.tensors.keys() == params.tensors.keys()
        for key, tensor in params.tensors.items():
            assert other.tensors[key].dtype == tensor.dtype and torch.equal(other.tensors[key], tensor)


def test_same_plan_same_bytes(saved: Path, tmp_path: Path) -> None:
    provenance = dict(reversed(make_plan().provenance.items()))
    make_plan(provenance=provenance).save(tmp_path / "b.plan")
    Plan.load(saved).save(tmp_path / "c.plan")
    for name in (plan_io.JSON_NAME, plan_io.TENSORS_NAME):
        contents = {(tmp_path / folder / name).read_bytes() for folder in ("a.plan", "b.plan", "c.plan")}
        assert len(contents) == 1, name


def test_a_person_can_read_and_diff_it(saved: Path, tmp_path: Path) -> None:
    plan = make_plan()
    qkv = plan.sites[QKV]
    wider = replace(qkv, formats={**qkv.formats, "weight": Format(5, granularity="channel")})
    plan.with_sites({QKV: wider}).save(tmp_path / "b.plan")
    a, b = ((tmp_path / f / "plan.json").read_text().splitlines() for f in ("a.plan", "b.plan"))
    changed = [(x, y) for x, y in zip(a, b, strict=True) if x != y]
    assert [x.split(":")[0].strip() for x, _ in changed] == ['"mean_bits"', '"weight"', '"sha256"']
    assert max(map(len, a)) < 120 and "größer" in "".join(a)
    assert json.loads("".join(a))["sites"][QKV]["formats"]["weight"]["bits"] == 4


def test_replaces_a_plan_and_leaves_nothing_beside_it(saved: Path, tmp_path: Path) -> None:
    make_plan(model="other").save(saved)
    assert Plan.load(saved).model == "other"
    assert os.listdir(tmp_path) == ["a.plan"] and sorted(os.listdir(saved)) == ["plan.json", "plan.safetensors"]
    (tmp_path / "empty").mkdir()
    make_plan().save(tmp_path / "empty")
    (tmp_path / "link").symlink_to("a.plan")
    make_plan(model="third").save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and Plan.load(saved).model == "third"


def test_refuses_to_replace_what_is_not_a_plan(saved: Path, tmp_path: Path) -> None:
    (saved / "thesis.tex").write_text("years of work")
    text = message(lambda: make_plan(model="other").save(saved))
    assert "a.plan" in text and "thesis.tex" in text
    assert Plan.load(saved).model == "tiny" and (saved / "thesis.tex").exists()
    (tmp_path / "file").write_text("x")
    assert "a file of this name exists" in message(lambda: make_plan().save(tmp_path / "file"))
    assert "no folder" in message(lambda: make_plan().save(tmp_path / "missing" / "b.plan"))
    assert "null byte" in message(lambda: make_plan().save(tmp_path / "a\0b"))
    assert sorted(os.listdir(tmp_path)) == ["a.plan", "file"]


@pytest.mark.parametrize("size", [0, 100, 1500])
def test_disk_full(saved: Path, tmp_path: Path, size: int) -> None:
    with file_size_limit(size), pytest.raises(PlanError, match="cannot write plan .*: File too large"):
        make_plan(model="other").save(saved)
    assert Plan.load(saved).model == "tiny" and os.listdir(tmp_path) == ["a.plan"]


@pytest.mark.parametrize("function", ["fsync", "rename", "mkdir"])
def test_any_step_may_fail(saved: Path, tmp_path: Path, function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, original = [], getattr(os, function)

    def fail(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if (
            function == "rename" and len(calls) != 2
        ):  # the second puts the new folder in place; a third undoes the first
            return original(*args, **kwargs)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, function, fail)
    assert "No space left on device" in message(lambda: make_plan(model="other").save(saved))
    monkeypatch.undo()
    assert Plan.load(saved).model == "tiny" and os.listdir(tmp_path) == ["a.plan"]


@pytest.mark.parametrize(
    ("provenance", "field"),
    [
        ({"gap": float("nan")}, "provenance.gap"),
        ({"a": {"b": [1, float("inf")]}}, "provenance.a.b[1]"),
        ({"path": Path("x")}, "provenance.path"),
        ({"a": {1: 2}}, "provenance.a"),
        ({"note": "\ud800"}, "provenance.note"),
    ],
)
def test_provenance_that_is_not_json(tmp_path: Path, provenance: dict[str, Any], field: str) -> None:
    assert field in message(lambda: make_plan(provenance=provenance).save(tmp_path / "b.plan"))
    assert os.listdir(tmp_path) == []


def test_missing_and_misplaced_files(saved: Path, tmp_path: Path) -> None:
    assert "plan.json: No such file" in message(lambda: Plan.load(tmp_path / "nowhere"))
    assert "it is a file" in message(lambda: Plan.load(saved / "plan.json"))
    assert "null byte" in message(lambda: Plan.load(tmp_path / "a\0b"))
    other = tmp_path / "b.plan"
    make_plan().with_sites({}).save(other)
    os.remove(other / "plan.safetensors")
    assert "plan.safetensors: No such file" in message(lambda: Plan.load(other))
    os.mkdir(other / "plan.safetensors")
    assert "plan.safetensors: it is a folder" in message(lambda: Plan.load(other))
    os.rmdir(other / "plan.safetensors")
    os.mkfifo(other / "plan.safetensors")
    assert "not a regular file" in message(lambda: Plan.load(other))


def test_too_large(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_io, "JSON_LIMIT", 100)
    assert "plan.json" in message(lambda: Plan.load(saved)) and "at most 100" in message(lambda: Plan.load(saved))


def test_mixed_up_and_altered_tensors(saved: Path, tmp_path: Path) -> None:
    plan = make_plan()
    head = plan.sites[QKV]
    other = plan.with_sites({QKV: replace(head, tensors={**head.tensors, "input.scale": torch.tensor(0.2)})})
    other.save(tmp_path / "b.plan")
    good = (saved / "plan.safetensors").read_bytes()
    for data in [
        (tmp_path / "b.plan" / "plan.safetensors").read_bytes(),
        good[:-1],
        good + b"\0",
        b"",
        *(good[:i] + bytes([good[i] ^ 1 << i % 8]) + good[i + 1 :] for i in range(0, len(good), 7)),
    ]:
        (saved / "plan.safetensors").write_bytes(data)
        assert "plan.safetensors: altered, truncated, or of another plan" in message(lambda: Plan.load(saved))


@pytest.mark.parametrize("data", [b"\xff" * 64, b"", b"\0" * 7 + b"\x40{}", b"\x02" + b"\0" * 7 + b"[]"])
def test_tensor_file_that_is_none(saved: Path, data: bytes) -> None:
    content = json.loads((saved / "plan.json").read_text())
    content["tensors"]["sha256"] = hashlib.sha256(data).hexdigest()
    (saved / "plan.json").write_text(json.dumps(content))
    (saved / "plan.safetensors").write_bytes(data)
    assert "not a safetensors file" in message(lambda: Plan.load(saved))


def test_truncated_or_flipped_json_is_never_a_traceback(saved: Path) -> None:
    good = (saved / "plan.json").read_bytes()
    broken = [good[:cut] for cut in range(0, len(good) - 2, 13)]
    broken += [good[:i] + bytes([good[i] ^ 1 << i % 8]) + good[i + 1 :] for i in range(0, len(good), 3)]
    for data in broken:
        (saved / "plan.json").write_bytes(data)
        if data.split() == good.split():
            continue  # white space became other white space
        assert "plan.json" in message(lambda: Plan.load(saved))


def test_edited_by_hand(saved: Path) -> None:
    text = (saved / "plan.json").read_text()
    (saved / "plan.json").write_text(json.dumps(json.loads(text)))
    assert Plan.load(saved).diff(make_plan()) == []  # other white space is no other plan
    (saved / "plan.json").write_text(text.replace('"bits": 4', '"bits": 6', 1))
    assert "plan.json: altered since it was written" in message(lambda: Plan.load(saved))


def _set(path: str, *value: Any) -> Callable[[dict[str, Any]], None]:
    """An edit of one field, by its path; without a value, the field goes."""

    def edit(content: dict[str, Any]) -> None:
        *parents, last = path.split("/")
        for key in parents:
            content = content[key]
        content.pop(last, None)
        content.update((last, v) for v in value)

    return edit


BITS = f"sites/{QKV}/formats/weight/bits"


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (_set("version", 2), "version: expected 1"),
        (_set("version", True), "version: expected 1"),
        (_set("format", "recipe"), "not a plan of lampq_rt"),
        (_set("sites"), "'sites' is missing"),
        (_set("colour", "red"), "unknown key 'colour'"),
        (_set("model", 5), "model: expected a short text; got 5"),
        (_set("model", "a\nb"), "model: expected a short text"),
        (_set("weights_digest", "xyz"), "weights_digest: expected 64 hexadecimal digits"),
        (_set("residual_dtype", "int8"), "residual_dtype: expected float16 or bfloat16 or float32; got 'int8'"),
        (_set("mean_bits", "4"), "mean_bits: expected a number"),
        (_set("provenance", []), "provenance: expected an object"),
        (_set("tensors", []), "tensors: expected an object"),
        (_set("tensors/file", "../../etc/passwd"), "tensors.file: expected 'plan.safetensors'"),
        (_set("sites", {}), "sites: expected an object with 1 to"),
        (_set("sites", []), "sites: expected an object with 1 to"),
        (_set("sites/a b", {}), "sites['a b']: expected a module's qualified name"),
        (_set(f"sites/{QKV}", None), f"sites['{QKV}']: expected an object"),
        (_set(f"sites/{QKV}/kind", "mlp"), f"sites['{QKV}'].kind: expected patch_embed or"),
        (_set(f"sites/{QKV}/kind", ["qkv"]), f"sites['{QKV}'].kind"),
        (_set(f"sites/{QKV}/params", -1), f"sites['{QKV}'].params: expected a whole number"),
        (_set(f"sites/{QKV}/params", 1e3), f"sites['{QKV}'].params: expected a whole number"),
        (_set(f"sites/{QKV}/params", 10**30), f"sites['{QKV}'].params: expected a whole number"),
        (_set(f"sites/{QKV}/formats/input"), f"sites['{QKV}'].formats: 'input' is missing"),
        (_set(BITS, 9), "bits = 9; allowed: 2..8, or 16 for floating point (1 for weights of scheme 'levels')"),
        (_set(BITS, 4.0), "formats.weight: bits = 4.0; allowed: 2..8"),
        (_set(BITS, "4"), "formats.weight: bits = '4'"),
        (_set(f"sites/{QKV}/formats/weight/scheme", "magic"), "scheme: expected float or"),
        (_set(f"sites/{QKV}/formats/weight/granularity", "atom"), "granularity 'atom'"),
        (_set(f"sites/{QKV}/formats/input/symmetric", 0), "symmetric a boolean"),
        (_set(f"sites/{QKV}/formats/input/symmetric", True), "tensor 'input.zero_point' that its formats do not use"),
        (_set(f"sites/{QKV}"), f"no entry for '{QKV}'"),
        (_set("sites/head/formats", {"weight": FLOAT.to_json()}), "sites['head'].formats: 'input' is missing"),
    ],
)
def test_fields(saved: Path, edit: Callable[[dict[str, Any]], None], told: str) -> None:
    content = json.loads((saved / "plan.json").read_text())
    edit(content)
    (saved / "plan.json").write_text(json.dumps(content))
    text = message(lambda: Plan.load(saved))
    assert "plan.json" in text and told in text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "not valid JSON"),
        ("[1]", "not a plan"),
        ('{"a": 1, "a": 2}', "'a' stands there twice"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": -Infinity}', "-Infinity is no number"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        ("\udcff", "not valid JSON"),
    ],
)
def test_json_that_is_none(saved: Path, text: str, told: str) -> None:
    (saved / "plan.json").write_bytes(text.encode(errors="surrogateescape"))
    assert told in message(lambda: Plan.load(saved))


def test_infinity_in_disguise_and_deep_provenance(saved: Path) -> None:
    good = (saved / "plan.json").read_text()
    (saved / "plan.json").write_text(good.replace('"gap": 0.0001', '"gap": 1e999'))
    assert "provenance.gap" in message(lambda: Plan.load(saved))
    (saved / "plan.json").write_text(good.replace('"gap": 0.0001', '"gap": ' + "[" * 50 + "]" * 50))
    assert "provenance.gap[0]" in message(lambda: Plan.load(saved))


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        (f"{QKV}/weight.scale", None, "the tensor weight.scale is missing"),
        (f"{QKV}/weight.scale", torch.ones(24, dtype=torch.float64), "expected torch.float32 with 1 dimensions"),
        (f"{QKV}/weight.scale", torch.ones(24, 1), "expected torch.float32 with 1 dimensions"),
        (f"{QKV}/weight.scale", torch.ones(0), "something in it"),
        (f"{QKV}/weight.scale", torch.zeros(24), "steps must be positive and finite"),
        (f"{QKV}/input.scale", torch.tensor(float("nan")), "steps must be positive and finite"),
        (f"{QKV}/input.scale", torch.tensor(float("inf")), "steps must be positive and finite"),
        (f"{QKV}/input.zero_point", torch.tensor(8, dtype=torch.int32), "codes of this format lie in -8..7, got 8..8"),
        ("blocks.0.mlp.fc1/weight.codes", torch.full((16, 8), 4, dtype=torch.int8), "lie in -4..3, got 4..4"),
        ("head/weight.scale", torch.ones(10), "its formats do not use"),
        (f"{QKV}/extra", torch.ones(1), "tensor 'extra' that its formats do not use"),
        ("nowhere/weight.scale", torch.ones(1), "no entry for 'nowhere'"),
        ("loose", torch.ones(1), "no entry for 'loose'"),
    ],
)
def test_tensors(saved: Path, key: str, value: torch.Tensor | None, told: str) -> None:
    tensors = safetensors.torch.load_file(saved / "plan.safetensors")
    if value is None:
        del tensors[key]
    else:
        tensors[key] = value
    data = safetensors.torch.save(tensors)
    content = json.loads((saved / "plan.json").read_text())
    content["tensors"]["sha256"] = hashlib.sha256(data).hexdigest()
    (saved / "plan.json").write_text(json.dumps(content))
    (saved / "plan.safetensors").write_bytes(data)
    assert told in message(lambda: Plan.load(saved))


def test_a_plan_that_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    plan = make_plan()
    qkv = plan.sites[QKV]
    broken = plan.with_sites({QKV: replace(qkv, tensors={**qkv.tensors, "input.scale": torch.tensor(float("nan"))})})
    assert "steps must be positive" in message(lambda: broken.save(tmp_path / "b.plan"))
    assert os.listdir(tmp_path) == []


def test_diff() -> None:
    a = make_plan()
    qkv, fc1 = a.sites[QKV], a.sites["blocks.0.mlp.fc1"]
    b = a.with_sites(
        {
            QKV: replace(qkv, formats={**qkv.formats, "weight": Format(5, granularity="channel")}),
            "blocks.0.mlp.fc1": replace(
                fc1,
                tensors={
                    "weight.scale": fc1.tensors["weight.scale"] * 1.05,
                    "input.scale": fc1.tensors["input.scale"],
                    "input.zero_point": torch.tensor(1, dtype=torch.int32),
                    "weight.codes": fc1.tensors["weight.codes"].clone().index_fill_(0, torch.tensor([0]), 0),
                },
            ),
        }
    )
    sites = {name: params for name, params in b.sites.items() if name != "head"}
    b = replace(b, sites=sites, weights_digest="cd" * 32, provenance={**a.provenance, "metric": "hessian"})
    lines = a.diff(b)
    moved = int((a.sites["blocks.0.mlp.fc1"].tensors["weight.codes"][0] != 0).sum())
    assert lines == [
        "weights: abababababababab… -> cdcdcdcdcdcdcdcd…",
        f"mean bits: {a.mean_bits:.4f} -> {b.mean_bits:.4f}",
        f"{QKV}: weight 4 -> 5 bits",
        f"blocks.0.mlp.fc1: weight.codes: {moved} of 128 codes differ",
        "blocks.0.mlp.fc1: weight.scale changed by up to 5 %",
        "blocks.0.mlp.fc1: input.zero_point -2 -> 1",
        "head: only in the first plan",
        "provenance.metric: 'fisher' -> 'hessian'",
    ]
    assert a.diff(a) == []
