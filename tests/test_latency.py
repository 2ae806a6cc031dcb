"""Recording, timing and pricing of ops; tables on disk; predictions against whole forward passes."""

from __future__ import annotations

import json
import random
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lampq_rt import backends, compile
from lampq_rt.errors import TableError
from lampq_rt.latency import table as tables
from lampq_rt.latency.calls import Call, TensorSpec, Tracer
from lampq_rt.latency.predict import REFERENCE, Predictor, kernel_batches, third_floating, uniform
from lampq_rt.latency.profile import Profile
from lampq_rt.latency.table import LatencyTable, ModelEntry
from lampq_rt.latency.timing import time_call
from tests.latency_tables import gpu_price, hand_made
from tests.plans import VARIANTS, range_plan, tiny_vit

SIZE = (3, 32, 32)
CPU = torch.device("cpu")


def by_name(call: Call, batch: int) -> float:
    """A price that no two ops share."""
    return 0.01 + zlib.crc32(call.key.encode()) % 1000 / 1000


class Names(TorchDispatchMode):
    """Counts the ops of ours that really run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.startswith("lampq::"):
            self.found[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "patch_14"])
@pytest.mark.parametrize("bits", [{"default": 8}, {"default": 4, "fc2": 16, "head": 16}, {"qk": 16, "pv": 16}])
def test_what_is_recorded_is_what_a_compiled_model_runs(variant: str, bits: dict[str, int]) -> None:
    model, images = tiny_vit(**VARIANTS[variant]), torch.randn(2, *SIZE)
    plan = range_plan(model, images, bits)
    chosen = {name: params.formats for name, params in plan.sites.items()}
    traced: Counter[str] = Counter()
    for counted in Tracer(model, SIZE, "cpu").calls(chosen, 2).values():
        traced[counted.call.op.removesuffix(".default")] += counted.count
    with torch.inference_mode(), Names() as names:
        compile(model, plan)(images)
    assert {name: n for name, n in traced.items() if name.startswith("lampq::")} == dict(names.found)


def test_a_gpus_calls_have_its_containers_and_precision() -> None:
    model = tiny_vit()
    calls = Tracer(model, SIZE, "cuda").calls(uniform(Tracer(model, SIZE, "cuda").description, 4), 2)
    assert any("linear_qkv(u8[2,17,32], u8[192,32]" in key for key in calls)  # two codes a byte
    assert any("linear_residual(f16" in key for key in calls)
    cpu = Tracer(model, SIZE, "cpu").calls(uniform(Tracer(model, SIZE, "cpu").description, 4), 2)
    assert any("linear_qkv(u8[2,17,64], i8[192,64]" in key for key in cpu)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("variant", ["plain", "qk_norm", "layer_scale", "clip"])
def test_sites_and_pairs_add_up_to_whole_forward_passes(device: str, variant: str) -> None:
    model = tiny_vit(depth=4, **VARIANTS[variant])
    predictor = Predictor(hand_made(model, SIZE, [3], by_name, device=device), model, SIZE, 3)
    shares, base = predictor.shares(), predictor.entry.latency_ms["lampq"]
    assert predictor.latency_ms(uniform(predictor.description, REFERENCE)) == pytest.approx(base)
    draw = random.Random(0)
    for _ in range(4):
        widths = {s.name: 6 if s.is_matmul else draw.choice((2, 4, 5, 8, 16)) for s in predictor.description.sites}
        chosen = {s.name: backends.formats(s.kind, widths[s.name]) for s in predictor.description.sites}
        nodes = sum(shares.nodes[name][width] for name, width in widths.items())
        edges = sum(costs[widths[a], widths[b]] for (a, b), costs in shares.edges.items())
        assert base + nodes + edges == pytest.approx(predictor.latency_ms(chosen), rel=1e-9)


def test_integer_widths_that_run_the_same_ops_cost_the_same() -> None:
    model = tiny_vit(depth=3)
    shares = Predictor(hand_made(model, SIZE, [1], by_name), model, SIZE, 1).shares()
    for row in shares.nodes.values():
        assert len({row[bits] for bits in range(2, 8)}) == 1
    gpu = Predictor(hand_made(model, SIZE, [1], gpu_price, device="cuda"), model, SIZE, 1).shares()
    row = gpu.nodes["blocks.1.mlp.fc1"]
    assert row[2] == row[3] == row[4] < row[5] == row[8] == 0.0


def test_the_measured_models_come_out_as_they_were_measured() -> None:
    model = tiny_vit()
    table = hand_made(model, SIZE, [2], by_name)
    (key, entry), = table.models.items()  # fmt: skip
    times = {**entry.latency_ms, "lampq": 50.0, "lampq-float": 90.0, "lampq-mixed": 85.0}
    predictor = Predictor(table.updated({}, {key: ModelEntry("x", 2, times)}), model, SIZE, 2)
    found = {bits: predictor.latency_ms(uniform(predictor.description, bits)) for bits in (8, 16)}
    assert found == {8: pytest.approx(50.0), 16: pytest.approx(90.0)}
    assert predictor.latency_ms(third_floating(predictor.description)) == pytest.approx(85.0)
    assert min(predictor.factors()) > 0


def test_a_gpus_batch_runs_in_the_runners_pieces() -> None:
    gpu = LatencyTable("abacus", "cuda", 0, l2_bytes=50_000_000)
    assert kernel_batches(5, 10**6, gpu) == {8: 1}
    assert kernel_batches(300, 10**6, gpu) == {256: 1, 64: 1}
    assert kernel_batches(256, 300_000, gpu) == {64: 4}
    assert kernel_batches(5, 10**6, LatencyTable("abacus", "cpu", 1)) == {5: 1}


def test_what_a_table_lacks_is_said_in_one_line() -> None:
    model = tiny_vit()
    table = hand_made(model, SIZE, [1], by_name)
    with pytest.raises(
        TableError, match=r"no latencies of VisionTransformer at batch 2 for abacus, 1 thread; run: lam"
    ):
        Predictor(table, model, SIZE, 2).entry  # noqa: B018
    few = LatencyTable("abacus", "cpu", 1, calls=dict(list(table.calls.items())[3:]), models=table.models)
    with pytest.raises(TableError, match="lacks . of the .* ops that VisionTransformer runs at batch 1; run: lampq"):
        Predictor(few, model, SIZE, 1).shares()


def test_models_with_the_same_ops_share_an_entry() -> None:
    table = hand_made(tiny_vit(), SIZE, [1], by_name)
    assert Predictor(table, tiny_vit(seed=3), SIZE, 1).entry.name == "by hand"
    assert table.models.keys().isdisjoint({Predictor(table, tiny_vit(num_classes=7), SIZE, 1).fingerprint})


@pytest.mark.parametrize("bits", [8, 4, 16])
def test_every_call_can_be_timed(bits: int) -> None:
    tracer = Tracer(tiny_vit(qk_norm=True, init_values=0.5), SIZE, "cpu")
    for counted in tracer.calls(uniform(tracer.description, bits), 2).values():
        assert 0.0 < time_call(counted.call, CPU, footprint_bytes=100_000, seconds=0.001) < 1000.0


def test_a_table_survives_the_disk(tmp_path: Path) -> None:
    table = hand_made(tiny_vit(), SIZE, [1], by_name)
    table.save(tmp_path / "new" / "t.json")
    loaded = LatencyTable.load(tmp_path / "new" / "t.json")
    assert loaded.calls == pytest.approx(table.calls, rel=1e-3) and loaded.models.keys() == table.models.keys()
    assert (loaded.machine, loaded.device, loaded.threads) == ("abacus", "cpu", 1) and loaded.versions["torch"]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "schema": ({"schema": 2}, "schema is 2; this version reads 1"),
    "machine": ({"machine": 3}, "machine is 3"),
    "device": ({"device": "tpu"}, "device is 'tpu'; allowed: cpu, cuda"),
    "threads": ({"threads": -1}, "threads is -1"),
    "versions": ({"versions": {"torch": 2}}, "versions must be"),
    "calls": ({"calls": {"op": -1.0}}, "calls: 'op' is -1.0; positive milliseconds"),
    "text": ({"calls": {"op": "1"}}, "calls: 'op' is '1'"),
    "list": ({"calls": []}, "calls must be an object"),
    "model": ({"models": {"k": {"name": "m", "batch": 0, "latency_ms": {}}}}, "models.k.batch is 0"),
    "lampq": ({"models": {"k": {"name": "m", "batch": 1, "latency_ms": {}}}}, "models.k.latency_ms lacks 'lampq'"),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_a_malformed_table_is_refused_by_the_field(name: str, tmp_path: Path) -> None:
    changes, message = WRONG[name]
    path = tmp_path / "t.json"
    LatencyTable("abacus", "cpu", 1).updated({"op": 1.0}, {}).save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(TableError, match="latency table .*t.json: ") as error:
        LatencyTable.load(path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_json_is_refused(tmp_path: Path) -> None:
    for text in ("[]", "{", '{"schema": NaN}', "\x80"):
        (tmp_path / "t.json").write_text(text)
        with pytest.raises(TableError, match="t.json"):
            LatencyTable.load(tmp_path / "t.json")


def test_tables_are_found_by_the_machines_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMPQ_CACHE", str(tmp_path / "user"))
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "ours")
    blank = tables.empty(CPU)
    with pytest.raises(TableError, match="no latency table for .*; `lampq profile` makes one"):
        tables.required("cpu")
    blank.updated({"a": 1.0, "b": 1.0}, {}).save(tables.SHIPPED / blank.file_name)
    blank.updated({"b": 2.0}, {}).save(tables.user_path(blank))
    assert tables.required("cpu").calls == {"a": 1.0, "b": 2.0}
    assert LatencyTable("AMD EPYC, 2 cores", "cpu", 1).file_name == "cpu-amd-epyc-2-cores-1-thread.json"


@pytest.fixture
def small() -> nn.Module:
    return tiny_vit(depth=1, embed_dim=32, img_size=16)


def test_profile_fills_a_table_and_goes_on_where_it_was(
    small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lampq_rt.latency.timing.CALL_SECONDS", 0.001)
    monkeypatch.setattr("lampq_rt.bench.ROUND_SECONDS", 0.001)
    path = tmp_path / "t.json"
    profile = Profile(small, "small", (3, 16, 16), [1], CPU, path)
    steps = profile.calls()
    first = [next(steps) for _ in range(5)]
    assert all(timed.fresh for timed in first) and len(LatencyTable.load(path).calls) == 5
    again = Profile(small, "small", (3, 16, 16), [1], CPU, path)
    assert [timed.fresh for timed in again.calls()].count(False) == 5
    entries, left_out = again.models(["eager"], rounds=1)
    ours = {"lampq", "lampq-float", "lampq-mixed"}
    assert set(entries[0].latency_ms) == {*ours, "fp32-eager", "bf16-eager"} and not left_out
    assert min(again.factors()[1]) > 0
    whole = Profile(small, "small", (3, 16, 16), [1], CPU, path)
    assert whole.missing == [] and whole.models([], rounds=1)[0] == [LatencyTable.load(path).models[k] for k in
                                                                     LatencyTable.load(path).models]  # fmt: skip
    LatencyTable("abacus", "cpu", 1).save(tmp_path / "other.json")
    with pytest.raises(TableError, match="is of abacus, 1 thread; this is"):
        Profile(small, "small", (3, 16, 16), [1], CPU, tmp_path / "other.json")


def test_keys_leave_out_what_time_does_not_depend_on() -> None:
    spec = TensorSpec(torch.float32, (2, 3))
    one, two = (
        Call("lampq::quantize.default", (("x", spec), ("inv_scale", scale), ("zero_point", zero)))
        for scale, zero in ((1.0, 0), (2.0, 3))
    )
    assert one.key == two.key
