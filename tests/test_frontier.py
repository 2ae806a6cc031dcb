"""`lampq frontier`: points, resuming, the Pareto front, verdicts, and what is refused."""

import csv
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from lampq_rt import Plan, frontier
from lampq_rt.calibrate import RECIPES, reconstruct
from lampq_rt.calibrate.schedule import Schedule
from lampq_rt.cli import main
from lampq_rt.errors import DataError
from lampq_rt.frontier import Point, Sweep, front, table, verdicts
from lampq_rt.frontier_measure import MeasuredLatency, Recorded, latency_class
from tests.plans import range_plan, softmax_plan, tiny_vit

MODEL = "test_vit"


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("frontier")
    torch.manual_seed(0)
    save_file(timm.create_model(MODEL, num_classes=10).state_dict(), root / "w.safetensors")
    for folder, first in (("calib", 0), ("eval", 10)):
        (root / folder).mkdir()
        for index in range(first, first + 6):
            pixels = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(index))
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(root / folder / f"{index}.png")
    rows = "".join(f"{index}.png,{index % 10}\n" for index in range(10, 16))
    (root / "labels.csv").write_text("file,label\n" + rows)
    return root


def arguments(data, out, *more):
    given = ("frontier", MODEL, "--weights", data / "w.safetensors", "--images", data / "calib", "--eval-images")
    cheap = ("--recipes", "uniform,lampq", "--calib-images", 4, "--limit", 5)
    return (*given, data / "eval", *cheap, "--out", out, *more)


@pytest.fixture(scope="module")
def swept(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "sweep"
    labels = ("--labels", data / "labels.csv")
    result = run(*arguments(data, out, *labels, "--mean-bits", "4,4.5,8", "--json", out.parent / "facts.json"))
    assert result.exit_code == 0, result.output
    return SimpleNamespace(out=out, labels=labels, facts=json.loads((out.parent / "facts.json").read_text()))


def test_every_point_is_there_with_its_files(swept):
    keys = [(p["asked_bits"], p["recipe"]) for p in swept.facts["points"]]
    assert keys == [(4.0, "uniform"), (4.0, "lampq"), (4.5, "lampq"), (8.0, "uniform"), (8.0, "lampq")]
    for point in swept.facts["points"]:
        assert point["mean_bits"] <= point["asked_bits"] + 1e-6 and point["images"] == 5
        assert point["kl"] > 0 and point["top1"] is not None and point["latency_ms"] > 0
        assert Plan.load(swept.out / point["plan"]).mean_bits == pytest.approx(point["mean_bits"])
    assert len({point["latency_ms"] for point in swept.facts["points"]}) == 1  # a CPU has one class
    with (swept.out / "points.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["kl"]) for row in rows] == [p["kl"] for p in swept.facts["points"]]
    assert Image.open(swept.out / "frontier.png").size[0] > 800
    assert (swept.out / "frontier.svg").read_text().lstrip().startswith("<?xml")
    assert not list(swept.out.glob("*.tmp"))
    assert {v["bits"] for v in swept.facts["verdicts"]} == {4.0, 8.0}


def test_a_finished_sweep_computes_nothing_again(data, swept, monkeypatch):
    monkeypatch.setattr("lampq_rt.calibrate.calibrate", None)
    monkeypatch.setattr("lampq_rt.frontier_measure.measure", None)
    monkeypatch.setattr("lampq_rt.frontier_measure.bench", None)
    picture = (swept.out / "frontier.svg").read_bytes()
    again = run(*arguments(data, swept.out, *swept.labels, "--mean-bits", "4,4.5,8", "--json", "-"))
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout) == swept.facts
    assert (swept.out / "frontier.svg").read_bytes() == picture


def test_a_stopped_sweep_goes_on_with_its_plans(data, swept, tmp_path, monkeypatch):
    out = tmp_path / "sweep"
    first = run(*arguments(data, out, "--mean-bits", "4", "--recipes", "uniform", "--no-latency", "--json", "-"))
    point = json.loads(first.stdout)["points"][0]
    assert point["latency_ms"] is None and point["top1"] is None
    (out / "points.jsonl").unlink()
    monkeypatch.setattr("lampq_rt.calibrate.calibrate", None)
    again = run(*arguments(data, out, "--mean-bits", "4", "--recipes", "uniform", "--json", "-"))
    assert again.exit_code == 0, again.output
    found = json.loads(again.stdout)["points"][0]
    assert found.pop("latency_ms") > 0 and found.pop("seconds") >= 0
    assert all(point[key] == value for key, value in found.items())


def test_wrong_input_is_one_line(data, swept, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def fail(*given):
        result = run(*given)
        assert result.exit_code == 2, result.output
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        return line

    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "thesis.txt").write_text("mine")
    assert "holds other things" in fail(*arguments(data, tmp_path / "else"))
    assert "labels = " in fail(*arguments(data, swept.out))
    assert "seed = 0, not 1" in fail(*arguments(data, swept.out, *swept.labels, "--seed", 1))
    new = tmp_path / "new"
    for option, value, why in (
        ("--mean-bits", "4,x", "numbers from 2 to 8"),
        ("--mean-bits", "9", "numbers from 2 to 8"),
        ("--mean-bits", "1,8", "numbers from 2 to 8"),
        ("--device", "cuda", "no CUDA GPU"),
        ("--device", "abacus", "unknown device"),
        ("--target", "gpu", "unknown target 'gpu'; allowed: any, cpu, cuda"),
        ("--recipes", "magic", "unknown recipe 'magic'"),
        ("--y", "beauty", "known: kl, agreement, top1"),
        ("--y", "top1", "needs --labels"),
        ("--images", tmp_path / "no", "does not exist"),
        ("--images", data / "eval", "3 images of the 5 to evaluate on would be calibrated or trained on, too"),
    ):
        assert why in fail(*arguments(data, new, option, value))
    assert "nothing to do" in fail(*arguments(data, new, "--recipes", "uniform", "--mean-bits", "4.5"))
    assert not new.exists()
    (swept.out / "points.jsonl").open("a").write("{}\n")
    assert "line 6: not a point" in fail(*arguments(data, swept.out, *swept.labels))


@pytest.mark.parametrize("broken", ["calib", "eval"])
def test_a_start_that_fails_leaves_nothing(data, tmp_path, broken):
    shutil.copytree(data / broken, tmp_path / broken)
    for path in (tmp_path / broken).iterdir():
        path.write_bytes(path.read_bytes()[:100])
    option = {"calib": "--images", "eval": "--eval-images"}[broken]
    result = run(*arguments(data, tmp_path / "sweep", option, tmp_path / broken, "--mean-bits", 4))
    assert result.exit_code == 2 and "not a readable image" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == [broken]


def test_pictures_are_told_by_their_content(data, tmp_path):
    shutil.copytree(data / "eval", tmp_path / "eval")
    shutil.copy(data / "calib" / "3.png", tmp_path / "eval" / "renamed.png")
    new = ("--eval-images", tmp_path / "eval", "--calib-images", 6, "--limit", 7)
    result = run(*arguments(data, tmp_path / "sweep", *new))
    assert result.exit_code == 2 and not (tmp_path / "sweep").exists()
    assert "1 image of the 7 to evaluate on" in result.stderr and "renamed.png" in result.stderr


def test_a_recipe_that_trains_has_images_for_it_and_goes_on(data, tmp_path, monkeypatch):
    monkeypatch.setattr(reconstruct, "KEEP_EVERY", 2)
    short = replace(RECIPES.get("fast"), name="short", schedule=Schedule(steps=4, batch=3))
    monkeypatch.setitem(RECIPES._entries, "short", short)
    out, seen = tmp_path / "sweep", []
    before = ("--mean-bits", 4, "--recipes", "uniform", "--no-latency")
    assert run(*arguments(data, out, *before)).exit_code == 0
    given = ("--mean-bits", 4, "--recipes", "uniform,short", "--no-latency", "--train-images", 5)
    step = reconstruct._Training._gradients

    def interrupted(training, *rest):
        seen.append(len(training.course.images))
        if len(seen) == 4:
            raise KeyboardInterrupt
        return step(training, *rest)

    monkeypatch.setattr(reconstruct._Training, "_gradients", interrupted)
    assert run(*arguments(data, out, *given)).exit_code != 0
    state = out / "plans" / "short-4.training"
    kept = state.read_bytes()
    state.unlink()
    state.mkdir()
    result = run(*arguments(data, out, *given))
    assert result.exit_code == 2 and len(seen) == 4 and "short-4.training" in result.stderr, result.stderr
    state.rmdir()
    state.write_bytes(kept)
    assert not state.with_suffix(".plan").exists()
    other = ("--mean-bits", 3, *given[2:])
    assert run(*arguments(data, out, *other)).exit_code == 0 and state.is_file()  # another point leaves it alone
    del seen[4:]
    result = run(*arguments(data, out, *given, "--json", "-"))
    assert result.exit_code == 0, result.output
    assert set(seen) == {5} and len(seen) == 4 + 2  # two steps of the four had been kept
    assert [p["recipe"] for p in json.loads(result.stdout)["points"]] == ["uniform", "short"]
    assert not state.exists()
    assert run(*arguments(data, out, *before)).exit_code == 0
    assert "training images" in run(*arguments(data, out, *given[:-1], 6)).stderr


def point(recipe, bits, disk, kl, **more):
    made = Point(recipe, bits, bits, disk, disk, None, 4, None, None, 50.0, kl, 0.1, None, 1.0, "plans/x.plan")
    return replace(made, **more)


def test_the_front_holds_what_nothing_smaller_matches():
    points = [
        point("lampq", 3, 30, 0.5),
        point("uniform", 3, 30, 0.6),
        point("uniform", 4, 40, 0.5),
        point("lampq", 4, 41, 0.2),
        point("lampq", 5, 50, 0.3),
    ]
    assert [(p.recipe, p.asked_bits) for p in front(points, "disk_bytes", "kl")] == [("lampq", 3), ("lampq", 4)]
    assert front(points, "latency_ms", "kl") == [] and front(points, "disk_bytes", "top1") == []
    near = [point("uniform", 3, 300_000, 0.6), point("lampq", 3, 300_100, 0.5)]  # the same but for what is recorded
    assert [p.recipe for p in front(near, "disk_bytes", "kl")] == ["lampq"]
    timed = [replace(p, latency_ms=2.0) for p in points]
    assert [p.kl for p in front(timed, "latency_ms", "kl")] == [0.2]
    assert table(points).splitlines()[1].startswith("uniform,3,")


def test_verdicts_are_paired(tmp_path):
    sweep = Sweep(tmp_path / "sweep", {"model": "m"})
    sweep.make()
    base = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    for recipe, bits, kl in (
        ("uniform", 3, base),
        ("uniform", 4, base / 2),
        ("lampq", 3, base - torch.tensor([0.1, 0.11, 0.09, 0.1])),
        ("lampq", 4, base / 2 + torch.tensor([1.0, -1.0, 1.0, -0.9])),
        ("paper", 4, base + 0.5),
    ):
        sweep.add(point(recipe, bits, 10 * bits, float(kl.mean())), kl)
    found = {(v.recipe, v.bits): v for v in verdicts(sweep)}
    assert {key: v.text for key, v in found.items()} == {
        ("lampq", 3): "better",
        ("lampq", 4): "within noise",
        ("paper", 4): "worse",
    }
    against = [(v.baseline, v.recipe, v.bits) for v in verdicts(sweep, ("uniform", "lampq"))]
    assert against == [("uniform", *key) for key in found] + [("lampq", "paper", 4)]
    assert found["lampq", 3].difference == pytest.approx(-0.1) and found["lampq", 3].error < 0.01
    again = Sweep(tmp_path / "sweep", {"model": "m"})
    assert again.points == sweep.points
    (tmp_path / "sweep" / "kl" / "lampq-3.safetensors").write_bytes(b"noise")
    with pytest.raises(DataError, match="damaged"):
        verdicts(again)


def test_latency_is_measured_once_a_class(monkeypatch):
    model, images = tiny_vit(), torch.randn(2, 3, 32, 32)
    plans = [range_plan(model, images, bits) for bits in (8, 4, {"default": 8, "fc1": 16})]
    assert len({latency_class(p, "cpu") for p in plans}) == 2
    assert len({latency_class(p, "cuda") for p in plans}) == 3
    schemes = [plans[0], *(softmax_plan(plans[0], 4, scheme) for scheme in ("log2", "cubic"))]
    assert all(len({latency_class(p, device) for p in schemes}) == 3 for device in ("cpu", "cuda"))
    calls = []

    def bench(network, plan, **options):
        calls.append(plan)
        return SimpleNamespace(rows=[{"latency_ms": {"median": 3.0 + len(calls)}}])

    monkeypatch.setattr("lampq_rt.frontier_measure.bench", bench)
    latency_of = MeasuredLatency(model, "cpu", 1, (3, 32, 32))
    latency_of.know(plans[2], 1.5)
    assert [latency_of(p) for p in plans] == [4.0, 4.0, 1.5] and len(calls) == 1


def test_recorded_answers_are_repeated():
    calls = []
    model = torch.nn.Linear(3, 2)
    model.register_forward_hook(lambda m, i, o: calls.append(1))
    recorded = Recorded(model, "cpu")
    with torch.no_grad():
        first = [recorded(x) for x in torch.randn(5, 3).split(2)]
        recorded.rewind()
        again = [recorded(x) for x in torch.zeros(5, 3).split(2)]
    assert len(calls) == 3 and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert recorded.logits.shape == (5, 2)
    assert frontier.QUALITIES == ("kl", "agreement", "top1")
