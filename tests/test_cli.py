"""The commands, end to end on timm's smallest ViT with random weights, and every mistake as one line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from lampq_rt import Plan, models
from lampq_rt.calibrate import RECIPES, reconstruct
from lampq_rt.calibrate.schedule import Schedule
from lampq_rt.errors import ModelError
from tests.commands import fail, run, succeed

MODEL = "test_vit"


class Bench:
    """A folder with weights, images, labels, and what the first commands make of them."""

    def __init__(self, root: Path):
        self.root = root
        self.weights, self.other_weights = root / "w.safetensors", root / "other.safetensors"
        for path, seed in ((self.weights, 0), (self.other_weights, 1)):
            torch.manual_seed(seed)
            save_file(timm.create_model(MODEL, num_classes=10).state_dict(), path)
        self.images = root / "images"
        self.images.mkdir()
        for index, suffix in enumerate(("png", "jpg", "webp", "png", "jpg", "png")):
            pixels = torch.randint(0, 256, (64, 80, 3), generator=torch.Generator().manual_seed(index))
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(self.images / f"{index}.{suffix}")
        names = sorted(path.name for path in self.images.iterdir())
        self.labels = root / "labels.csv"
        self.labels.write_text("file,label\n" + "".join(f"{name},{i}\n" for i, name in enumerate(names)))
        self.plan, self.checkpoint = root / "x.plan", root / "x.lampq"


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    made = Bench(tmp_path_factory.mktemp("cli"))
    out = succeed(
        "calibrate", MODEL, "--weights", made.weights, "--images", made.images, "--mean-bits", 4, "--recipe", "uniform",
        "--calib-images", 4, "--out", made.plan, "--json", made.root / "calibrate.json",
    )  # fmt: skip
    made.calibrate_output = out.output
    succeed("compile", MODEL, "--weights", made.weights, "--plan", made.plan, "--out", made.checkpoint,
            "--json", made.root / "compile.json")  # fmt: skip
    return made


def test_calibrate(bench):
    facts = json.loads((bench.root / "calibrate.json").read_text())
    assert {"mean_bits", "weight_bytes", "seconds", "objective", "mip_gap"} <= set(facts)
    assert facts["mean_bits"] == 4.0 and facts["images"] == 4 and facts["recipe"] == "uniform"
    assert "Bits per layer" in bench.calibrate_output and "mean bits" in bench.calibrate_output


def test_calibrate_again_gives_the_same_plan_and_says_that_images_are_few(bench):
    result = succeed(
        "calibrate", MODEL, "--weights", bench.weights, "--images", bench.images, "--budget", "mean_bits=4",
        "--recipe", "uniform", "--calib-images", 4, "--out", bench.root / "again.plan",
    )  # fmt: skip
    assert (bench.root / "again.plan" / "plan.json").read_bytes() == (bench.plan / "plan.json").read_bytes()
    assert "fewer than" not in result.stderr
    result = succeed(
        "calibrate", MODEL, "--weights", bench.weights, "--images", bench.images, "--mean-bits", 8, "--labels",
        bench.labels, "--recipe", "uniform", "--out", bench.root / "few.plan",
    )  # fmt: skip
    assert "holds 6 images, fewer than the 32 asked for" in result.stderr


def test_a_training_that_was_interrupted_goes_on_with_the_same_command(bench, monkeypatch):
    monkeypatch.setattr(reconstruct, "KEEP_EVERY", 2)
    short = replace(RECIPES.get("fast"), name="short", schedule=Schedule(steps=4, batch=3))
    monkeypatch.setitem(RECIPES._entries, "short", short)
    plans = [bench.root / "whole.plan", bench.root / "interrupted.plan"]
    command = ["calibrate", MODEL, "--weights", bench.weights, "--images", bench.images, "--mean-bits", 4,
               "--recipe", "short", "--calib-images", 4, "--train-images", 6, "--out"]  # fmt: skip
    succeed(*command, plans[0])
    state = bench.root / "interrupted.plan.training"
    step, calls = reconstruct._Training._gradients, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(reconstruct._Training, "_gradients", interrupted)
    assert run(*command, plans[1]).exit_code != 0
    assert state.exists() and not plans[1].exists()
    monkeypatch.setattr(reconstruct._Training, "_gradients", step)
    succeed(*command, plans[1])
    assert not state.exists()
    assert Plan.load(plans[0]).digest == Plan.load(plans[1]).digest


def test_compile(bench):
    facts = json.loads((bench.root / "compile.json").read_text())
    assert facts["disk_bytes"] == bench.checkpoint.stat().st_size < facts["fp32_bytes"]
    assert facts["weight_bytes"] < facts["fp32_bytes"]


def evaluation(bench, *arguments):
    result = succeed("eval", MODEL, "--images", bench.images, "--json", "-", *arguments)
    return json.loads(result.stdout)


def test_eval_of_a_plan(bench):
    facts = evaluation(bench, "--weights", bench.weights, "--plan", bench.plan, "--labels", bench.labels)
    keys = ["model", "images", "top1", "top5", "fp32_top1", "fp32_top5", "agreement", "kl", "seconds"]
    assert list(facts) == keys and facts["model"] == MODEL and facts["images"] == 6
    assert all(0 <= facts[key] <= 100 for key in keys[2:7]) and facts["kl"] > 0


def test_eval_on_every_backend_of_this_machine(bench):
    arguments = ("--weights", bench.weights, "--plan", bench.plan, "--limit", 3)
    found = {b: evaluation(bench, *arguments, "--backend", b) for b in ("simulate", "cpu", "reference")}
    assert {facts["images"] for facts in found.values()} == {3}
    assert found["cpu"]["kl"] == pytest.approx(found["simulate"]["kl"], rel=0.3, abs=1e-4)
    assert found["reference"]["kl"] == pytest.approx(found["simulate"]["kl"], rel=0.3, abs=1e-4)
    assert found["cpu"]["top1"] is None


def test_eval_of_a_checkpoint(bench):
    alone = evaluation(bench, "--checkpoint", bench.checkpoint, "--labels", bench.labels)
    assert alone["top1"] is not None and alone["fp32_top1"] is alone["agreement"] is alone["kl"] is None
    paired = evaluation(bench, "--checkpoint", bench.checkpoint, "--weights", bench.weights)
    assert paired["kl"] > 0 and paired["top1"] is None


def test_eval_of_fp32_alone(bench):
    facts = evaluation(bench, "--weights", bench.weights, "--labels", bench.labels)
    assert facts["top1"] == facts["fp32_top1"] and (facts["agreement"], facts["kl"]) == (100.0, 0.0)


def test_tables_are_for_people(bench):
    result = succeed("eval", MODEL, "--images", bench.images, "--weights", bench.weights, "--plan", bench.plan)
    assert "quantised" in result.stdout and "agreement" in result.stdout


@pytest.mark.parametrize("form", ["plan", "checkpoint"])
def test_inspect(bench, form):
    picture = bench.root / f"{form}.png"
    arguments = ("inspect", getattr(bench, form), "--plot", picture, "--json", bench.root / "inspect.json")
    assert "Bits per layer" in succeed(*arguments).stdout
    assert Image.open(picture).size[0] > 500
    facts = json.loads((bench.root / "inspect.json").read_text())
    assert facts["mean_bits"] == 4.0 and facts["model"] == MODEL
    by_kind = {layer["kind"]: layer for layer in facts["layers"]}
    assert by_kind["qkv"]["bits"] == 4 and by_kind["qkv"]["disk_bytes"] * 2 == by_kind["qkv"]["params"]
    assert ("disk_bytes" in facts) == (form == "checkpoint")


def test_bench(bench, monkeypatch):
    monkeypatch.setattr("lampq_rt.bench.ROUND_SECONDS", 0.01)
    result = succeed("bench", MODEL, "--batch", "1,2", "--against", "bf16", "--rounds", 1, "--json", "-")
    rows = json.loads(result.stdout)
    assert [(r["batch"], r["variant"]) for r in rows] == [(b, v) for b in (1, 2) for v in ("bf16-eager", "lampq")]
    own = ("--weights", bench.weights, "--plan", bench.plan)
    result = succeed("bench", MODEL, *own, "--batch", 1, "--against", "bf16", "--rounds", 1)
    assert "bf16-eager" in result.stdout and "times as fast as" in result.stdout


def test_profile_then_a_budget_of_latency(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("LAMPQ_CACHE", str(tmp_path))
    monkeypatch.setattr("lampq_rt.latency.table.SHIPPED", tmp_path / "none")
    monkeypatch.setattr("lampq_rt.latency.timing.CALL_SECONDS", 0.001)
    monkeypatch.setattr("lampq_rt.bench.ROUND_SECONDS", 0.005)
    arguments = ("profile", MODEL, "--batch", 2, "--against", "bf16", "--rounds", 1, "--json", tmp_path / "p.json")
    assert "ops timed" in succeed(*arguments).stdout
    facts = json.loads((tmp_path / "p.json").read_text())
    assert facts["device"] == "cpu" and all(op["fresh"] for op in facts["ops"])
    assert set(facts["models"][0]["latency_ms"]) == {"lampq", "lampq-float", "lampq-mixed", "bf16-eager"}
    assert "0 ops timed" in succeed(*arguments).stdout
    torch.manual_seed(0)  # the ops of a model with another number of classes are others
    save_file(timm.create_model(MODEL).state_dict(), tmp_path / "w.safetensors")
    limit = 3 * facts["models"][0]["latency_ms"]["lampq"]
    own = ("--weights", tmp_path / "w.safetensors")
    result = succeed(
        "calibrate", MODEL, *own, "--images", bench.images, "--budget", f"latency_ms={limit}@2", "--mean-bits", 6,
        "--recipe", "uniform", "--out", tmp_path / "x.plan", "--json", tmp_path / "c.json",
    )  # fmt: skip
    assert "predicted" in result.stdout and "measured" in result.stdout and "latency_ms@2 ≤" in result.stdout
    (row,) = json.loads((tmp_path / "c.json").read_text())["latency"]
    assert row["batch"] == 2 and row["predicted_ms"] <= limit and row["measured_ms"] > 0
    compiled = succeed("compile", MODEL, *own, "--plan", tmp_path / "x.plan", "--out", tmp_path / "x.lampq")
    for text in (compiled.stdout, succeed("inspect", tmp_path / "x.plan").stdout):
        assert "predicted" in text
    line = fail("calibrate", MODEL, *own, "--images", bench.images, "--budget", "speedup=1000@2", "--recipe", "uniform",
                "--out", tmp_path / "y.plan")  # fmt: skip
    assert "speedup@2 = 1000 cannot be met; the largest possible here is" in line
    line = fail("calibrate", MODEL, *own, "--images", bench.images, "--budget", "latency_ms=1@4", "--recipe", "uniform",
                "--out", tmp_path / "y.plan")  # fmt: skip
    assert "run: lampq profile test_vit --batch 4" in line


def test_quickstart_without_latency(tmp_path):
    result = succeed("quickstart", "--no-latency", "--json", tmp_path / "q.json")
    assert "lampq calibrate MODEL" in result.stdout and "Bits per layer" not in result.stderr
    facts = json.loads((tmp_path / "q.json").read_text())
    by_recipe = {(round(p["mean_bits"]), p["recipe"]): p for p in facts["plans"]}
    assert by_recipe[3, "lampq+w"]["kl"] < 0.2 * by_recipe[3, "uniform"]["kl"]
    assert by_recipe[3, "lampq+w"]["disk_bytes"] < 0.2 * facts["fp32_bytes"]


def calibrate_arguments(bench, **changes):
    options = {"weights": bench.weights, "images": bench.images, "mean-bits": 4, "recipe": "uniform",
               "out": bench.root / "never.plan", **changes}  # fmt: skip
    return ["calibrate", MODEL, *(part for key, value in options.items() for part in (f"--{key}", value))]


def test_wrong_images(bench, tmp_path):
    assert "does not exist" in fail(*calibrate_arguments(bench, images=tmp_path / "nowhere"))
    assert "no JPEG, PNG or WebP image" in fail(*calibrate_arguments(bench, images=tmp_path))
    (tmp_path / "bad.jpg").write_bytes((bench.images / "1.jpg").read_bytes()[:700])
    line = fail(*calibrate_arguments(bench, images=tmp_path))
    assert "bad.jpg" in line and "not a readable image" in line
    line = fail("eval", MODEL, "--weights", bench.weights, "--images", tmp_path)
    assert "bad.jpg" in line
    assert not (bench.root / "never.plan").exists()


def test_wrong_budgets_and_names(bench):
    assert "0.5" in fail(*calibrate_arguments(bench, **{"mean-bits": 0.5}))
    assert "unknown budget unit 'furlongs'" in fail(*calibrate_arguments(bench, budget="furlongs=3"))
    assert "unknown recipe 'magic'" in fail(*calibrate_arguments(bench, recipe="magic"))
    assert "unknown target" in fail(*calibrate_arguments(bench, target="abacus"))
    without = [str(a) for a in calibrate_arguments(bench)]
    del without[without.index("--mean-bits") : without.index("--mean-bits") + 2]
    assert "no budget given" in fail(*without)
    assert "did you mean vit_tiny_patch16_224" in fail("bench", "vit_tny_patch16_224")
    assert "unknown variant 'magic'" in fail("bench", MODEL, "--against", "magic")
    assert "--batch '0'" in fail("bench", MODEL, "--batch", "0")


def test_options_of_bench_that_cannot_be_meant(bench, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(models, "load_model", None)  # none of them may cost a model
    assert "exclude each other" in fail("bench", MODEL, "--plan", bench.plan, "--bits", 4)
    assert "--bits 9; allowed: 2 to 8, or 16" in fail("bench", MODEL, "--bits", 9)
    assert "no CUDA GPU" in fail("bench", MODEL, "--device", "cuda")
    for command in ("bench", "profile"):
        assert "--threads 99999: this machine has" in fail(command, MODEL, "--threads", 99999)


@pytest.mark.parametrize("seed", [-1, 2**31, 99999999999999999999999])
def test_seeds_that_no_generator_takes(bench, seed):
    for arguments in (
        calibrate_arguments(bench, seed=seed),
        ("frontier", MODEL, "--images", bench.images, "--eval-images", bench.images, "--out", "x", "--seed", seed),
    ):
        result = run(*arguments)
        assert result.exit_code == 2 and "--seed" in result.output


def test_what_is_wrong_with_a_device_or_target_is_said_before_images_are_read(bench, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("lampq_rt.images.load_images", None)
    assert "no CUDA GPU" in fail(*calibrate_arguments(bench, device="cuda"))
    assert "unknown target 'gpu'; allowed: any, cpu, cuda" in fail(*calibrate_arguments(bench, target="gpu"))


def test_plan_for_other_weights(bench, tmp_path):
    arguments = ("--weights", bench.other_weights, "--plan", bench.plan)
    for line in (
        fail("compile", MODEL, *arguments, "--out", tmp_path / "x.lampq"),
        fail("eval", MODEL, *arguments, "--images", bench.images),
        fail(
            "eval", MODEL, "--weights", bench.other_weights, "--checkpoint", bench.checkpoint, "--images", bench.images
        ),
    ):
        assert "was made for test_vit with weights" in line
    assert list(tmp_path.iterdir()) == []
    line = fail("compile", "deit_tiny_patch16_224", "--weights", bench.weights, "--plan", bench.plan,
                "--out", tmp_path / "x.lampq")  # fmt: skip
    assert "was made for test_vit, not for deit_tiny_patch16_224" in line


def test_wrong_files(bench, tmp_path):
    assert "no folder" in fail(*calibrate_arguments(bench, out=tmp_path / "none" / "x.plan"))
    assert "no folder" in fail("inspect", bench.plan, "--json", tmp_path / "none" / "x.json")
    assert ".png" in fail("inspect", bench.plan, "--plot", tmp_path / "x.jpeg")
    broken = tmp_path / "broken.lampq"
    broken.write_bytes(bench.checkpoint.read_bytes()[:-50])
    assert "broken.lampq" in fail("inspect", broken)
    assert "nowhere.plan" in fail("inspect", tmp_path / "nowhere.plan")
    assert "exclude each other" in fail(
        "eval", MODEL, "--images", bench.images, "--plan", bench.plan, "--checkpoint", bench.checkpoint
    )
    assert "nothing to compare" in fail("eval", MODEL, "--images", bench.images, "--checkpoint", bench.checkpoint)
    assert "unknown backend" in fail("eval", MODEL, "--images", bench.images, "--backend", "abacus")
    if not torch.cuda.is_available():
        assert "finds no CUDA GPU" in fail("eval", MODEL, "--images", bench.images, "--backend", "cuda")
    bad = tmp_path / "labels.csv"
    bad.write_text(bench.labels.read_text().replace(",5", ",10"))
    line = fail("eval", MODEL, "--weights", bench.weights, "--images", bench.images, "--labels", bad)
    assert "row 7: label 10" in line and "0 to 9" in line


def test_weights_that_do_not_fit(bench, tmp_path):
    state = {**models.read_weights(bench.weights)}
    cases = {
        "missing": ({k: v for k, v in state.items() if k != "norm.bias"}, "lacks 1 tensors .*'norm.bias'"),
        "more": ({**state, "extra": torch.zeros(1)}, "holds 1 tensors .*'extra'"),
        "shape": ({**state, "cls_token": torch.zeros(1, 1, 3)}, r"cls_token is \(1, 1, 3\).*needs \(1, 1, 64\)"),
        "nan": ({**state, "norm.bias": torch.full((64,), float("nan"))}, "norm.bias holds NaN"),
    }
    for name, (tensors, why) in cases.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(ModelError, match=why):
            models.load_model(MODEL, tmp_path / f"{name}.safetensors")
    for name, why in (("x.pth", "pickles, which can run code"), ("none.safetensors", "does not exist")):
        with pytest.raises(ModelError, match=why):
            models.load_model(MODEL, tmp_path / name)
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        models.load_model(MODEL, tmp_path / "noise.safetensors")


def test_weights_decide_the_number_of_classes(bench):
    model = models.load_model(MODEL, bench.weights)
    assert models.classes(model) == 10 and not model.training
    assert models.weight_bytes(model) == 4 * sum(p.numel() for p in model.parameters())


def test_pretrained_weights_without_network(monkeypatch):
    monkeypatch.setattr(models, "_cached", lambda repository: None)
    monkeypatch.setattr(models, "_hub_in_reach", lambda: False)
    with pytest.raises(ModelError, match="no network to fetch timm's weights for test_vit; give a file with --weights"):
        models.load_model(MODEL)
