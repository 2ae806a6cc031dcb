"""Other runtimes as variants of `lampq bench`: found by name, left out where missing, quantised once."""

import json

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import peer_tables
from benchmarks import peers as command
from benchmarks.harness import Store, rows_file
from lampq_rt import bench as benchmark
from lampq_rt import peers
from lampq_rt.bench import Result, bench, variants
from lampq_rt.errors import BackendError
from lampq_rt.peers import base
from lampq_rt.standin import stand_in_plan
from lampq_rt.variants import OURS, VARIANTS, Job
from tests.plans import tiny_vit

SIZE = (3, 32, 32)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return tiny_vit()


@pytest.fixture
def job(model, tmp_path):
    torch.manual_seed(0)
    plan = stand_in_plan(model, torch.randn(2, *SIZE), 8)
    return Job(model, plan, CPU, torch.randn(32, *SIZE), tmp_path / "kept")


def fake_row(variant, latency=1.0, **changes):
    row = {
        "model": "m", "batch": 1, "variant": variant, "threads": torch.get_num_threads(), "speedup": 2.0,
        "latency_ms": {"p20": latency, "median": latency, "p80": latency}, "machine": "abacus",
        "versions": {"torch": "2"}, "measured": "2026-01-01T00:00Z", "load": 0.1,
    }  # fmt: skip
    return {**row, **changes}


def test_every_peer_is_a_variant_and_in_a_group():
    assert set(peers.PEERS) <= set(VARIANTS.names())
    grouped = {name for group in peers.GROUPS.values() for name in group}
    assert grouped <= set(peers.PEERS)
    assert grouped == {name for name, peer in peers.PEERS.items() if "cpu" in peer.devices}
    assert variants(["openvino", "onnxruntime"]) == [
        "openvino-bf16",
        "openvino-int8",
        "ort-static",
        "ort-dynamic",
        OURS,
    ]


def test_missing_package_is_left_out_with_the_way_to_install_it(job, monkeypatch):
    monkeypatch.setattr(base, "find_spec", lambda package: None)
    monkeypatch.setattr(benchmark, "ROUND_SECONDS", 0.001)
    found = bench(job.original, job.plan, batches=[1], against=["openvino-int8"], rounds=2, input_size=SIZE)
    assert [row["variant"] for row in found.rows] == [OURS]
    assert found.left_out == {
        "openvino-int8": "openvino and nncf not installed; to have it: pip install '.[peers]' in a checkout"
    }
    assert peers.versions("openvino-int8") == {}


def test_peer_on_a_device_that_it_does_not_run_on(job):
    elsewhere = Job(job.original, job.plan, torch.device("meta"), job.calibration, job.folder)
    with pytest.raises(BackendError, match="runs on cpu, not on meta"):
        VARIANTS.get("ort-static")(elsewhere)


def test_quantised_model_is_made_once_a_set_of_images(job):
    made = []

    def make(folder):
        made.append(folder)
        (folder / "model").write_text("x")

    first = base.kept(job, "peer", make)
    assert base.kept(job, "peer", make) == first and len(made) == 1
    assert (first / "model").read_text() == "x"
    other = Job(job.original, job.plan, CPU, job.calibration + 1, job.folder)
    assert base.kept(other, "peer", make) != first and len(made) == 2


def test_quantising_that_fails_leaves_nothing(job):
    def make(folder):
        (folder / "half").write_text("x")
        raise BackendError("no")

    with pytest.raises(BackendError):
        base.kept(job, "peer", make)
    assert list(job.folder.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["openvino-bf16", "openvino-int8", "ort-static", "ort-dynamic"])
def test_real_peer_answers_like_the_original(job, variant):
    for package in peers.PEERS[variant].packages:
        pytest.importorskip(package, reason=f"{package} is not installed ({peers.INSTALL})")
    with torch.inference_mode():
        contender = VARIANTS.get(variant)(job)
        for batch in (1, 3, 1):
            images = torch.randn(batch, *SIZE)
            answer, truth = contender.run(images), job.original(images)
            assert answer.shape == truth.shape
            assert (answer - truth).pow(2).mean() < 0.05 * truth.pow(2).mean()
    assert contender.weight_bytes and len(list(job.folder.iterdir())) == 1


@pytest.fixture
def fake_bench(monkeypatch):
    """`bench` that measures nothing, and remembers what it was asked."""
    asked = []

    def run(original, plan, *, batches, against, name, **_):
        asked.append((name, batches[0]))
        rows = [fake_row(v, model=name, batch=batches[0]) for v in variants(against)]
        return Result([{k: v for k, v in row.items() if k not in ("measured", "load")} for row in rows])

    monkeypatch.setattr(command.bench, "bench", run)
    monkeypatch.setattr(command, "_random", lambda model: (tiny(), None))
    monkeypatch.setattr(command, "keep_memory", lambda: True)
    return asked


def tiny():
    model = tiny_vit()
    model.pretrained_cfg = {"input_size": SIZE}
    return model


def run_command(tmp_path, *arguments):
    app = command.typer.Typer()
    app.command()(command.main)
    options = ["--results", tmp_path, "--cache", tmp_path / "cache", "--models", "a,b", *arguments]
    return CliRunner().invoke(app, [str(option) for option in options])


def test_command_goes_on_where_it_was_and_never_replaces_a_row(tmp_path, fake_bench):
    arguments = ("--only", "speed", "--against", "bf16", "--batch")
    assert run_command(tmp_path, *arguments, "1").exit_code == 0
    document = tmp_path / "results.md"
    result = run_command(tmp_path, *arguments, "1,8", "--out", document)
    assert result.exit_code == 0, result.output
    assert fake_bench == [("a", 1), ("b", 1), ("a", 8), ("b", 8)]
    facts = json.loads(result.stdout.strip().splitlines()[-1])
    assert len(facts["speed"]) == 8 and facts["left_out"] == {}
    text = document.read_text()
    assert "<!-- peers-speed:begin -->" in text and "| a | 8 |" in text and "**lampq**" in text
    assert run_command(tmp_path, *arguments, "1", "--again").exit_code == 0
    store = Store(rows_file(folder=tmp_path))
    assert len(store.rows) == 12 and len(store.latest(kind="speed")) == 8


def test_command_out_of_time_measures_nothing(tmp_path, fake_bench):
    assert run_command(tmp_path, "--only", "speed", "--against", "bf16", "--minutes", "0.1").exit_code == 0
    assert fake_bench == []


def test_command_refuses_unknown_parts_and_variants(tmp_path):
    assert run_command(tmp_path, "--only", "colour").exit_code == 2
    result = run_command(tmp_path, "--against", "tensorrt")
    assert result.exit_code == 2 and "unknown variant 'tensorrt'" in result.output


def test_tables():
    speed = list(
        peer_tables.speed([fake_row("bf16-eager", 123.4), fake_row("openvino-int8", 3.456), fake_row(OURS, 5.0)])
    )
    assert speed[-1] == "| m | 1 | 123 (123–123) | 3.46 (3.46–3.46) | **5.00** (5.00–5.00) | 2.00 |"
    sizes = {"weight_bytes": 5_900_000, "peak_memory_bytes": None, "resident_bytes": 512_000_000}
    assert list(peer_tables.memory([fake_row(OURS, **sizes)]))[-1] == "| m | 1 | **lampq** | 5.9 | – | 512 |"
    facts = {
        "images": 10,
        "calib_images": 4,
        "top1": 70.0,
        "fp32_top1": 80.0,
        "lost": 10.0,
        "agreement": 90.0,
        "kl": 0.1,
    }
    assert (
        list(peer_tables.accuracy([fake_row("ort-static", **facts)]))[-1]
        == "| ort-static | 4 | 70.0 | 10.0 | 90.0 | 0.1 |"
    )
    assert list(peer_tables.speed([])) == list(peer_tables.memory([])) == list(peer_tables.accuracy([])) == []
