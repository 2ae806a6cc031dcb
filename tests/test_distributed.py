"""Calibration over two processes: the same plan as one makes, bit by bit, and errors that are said once."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from lampq_rt import Plan
from lampq_rt.calibrate import Budget, make_plan
from lampq_rt.calibrate.distributed import SINGLE, UNIT, Shard, generator
from lampq_rt.errors import DataError

ROOT = Path(__file__).resolve().parents[1]
MODEL = "test_vit"
IMAGES = 2 * UNIT + 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("distributed")
    torch.manual_seed(0)
    save_file(timm.create_model(MODEL, num_classes=10).state_dict(), root / "w.safetensors")
    (root / "images").mkdir()
    for index in range(IMAGES):
        pixels = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(index))
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(root / "images" / f"{index:02}.png")
    rows = "".join(f"{index:02}.png,{index % 10}\n" for index in range(IMAGES))
    (root / "labels.csv").write_text("file,label\n" + rows)
    return root


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def calibrate(data, out, *more, processes):
    """The command in so many processes; each one's status and what it wrote to standard error, and rank 0's output."""
    command = [sys.executable, "-m", "lampq_rt.calibrate", MODEL, "--weights", data / "w.safetensors", "--images",
               data / "images", "--calib-images", IMAGES, "--mean-bits", "4.5", "--out", out, *more]  # fmt: skip
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = []
    for rank in range(processes):
        env = {**shared, "WORLD_SIZE": str(processes), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen([str(part) for part in command], cwd=ROOT, env=env, **pipes))
    done = [process.communicate(timeout=240) for process in started]
    return [p.returncode for p in started], [err for _, err in done], [out for out, _ in done]


@pytest.mark.slow
def test_two_processes_make_the_plan_of_one(data, tmp_path):
    plans = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.plan"
        labels = ("--labels", data / "labels.csv", "--recipe", "lampq")
        codes, errors, texts = calibrate(data, out, *labels, "--json", "-", processes=processes)
        assert codes == [0] * processes, errors
        assert json.loads(texts[0])["images"] == IMAGES
        assert all(text == "" for text in texts[1:])
        plans.append(Plan.load(out))
    one, two = plans
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.plan", "2.plan"]
    assert {n: s.bits for n, s in one.sites.items()} == {n: s.bits for n, s in two.sites.items()}
    for name, site in one.sites.items():
        assert site.formats == two.sites[name].formats
        for key, tensor in site.tensors.items():
            torch.testing.assert_close(two.sites[name].tensors[key], tensor, rtol=1e-6, atol=0)
    first, second = (dict(plan.provenance) for plan in plans)
    assert first["images"] == second["images"] and first["images"]["count"] == IMAGES
    assert first["sensitivity"] == pytest.approx(second["sensitivity"], rel=1e-6)
    assert first["proposals"] == second["proposals"] and first["refine"] == second["refine"]


@pytest.mark.slow
def test_a_mistake_in_one_process_ends_both_with_one_line(data, tmp_path):
    broken = tmp_path / "images"
    broken.mkdir()
    for path in (data / "images").iterdir():
        (broken / path.name).write_bytes(path.read_bytes()[: 200 if path.name == "18.png" else None])
    codes, errors, _ = calibrate(data, tmp_path / "x.plan", "--images", broken, processes=2)
    assert codes == [2, 2]
    assert errors[0].count("error: ") == 1 and "18.png" in errors[0]  # an image of the second process
    assert "error" not in errors[1] and "Traceback" not in "".join(errors)
    assert not (tmp_path / "x.plan").exists()
    few = ("--calib-images", 5)
    codes, errors, _ = calibrate(data, tmp_path / "x.plan", *few, processes=2)
    assert codes == [2, 2] and "5 images are too few for 2 processes" in errors[0]


@pytest.mark.parametrize("recipe", ["fast", "lampq+", "lampq+f", "lampq+rec"])
def test_what_needs_all_images_is_refused_before_anything_is_measured(recipe):
    images = torch.zeros(8, 3, 16, 16)
    with pytest.raises(DataError, match=re.escape(f"recipe {recipe} needs all images in one process")) as caught:
        make_plan(None, images, budget=Budget(mean_bits=4), recipe=recipe, shard=Shard(0, 2))
    assert "2 processes came; allowed in several: adalog, lampq," in str(caught.value)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("count", [24, 27, 80])
def test_shares_are_whole_units_in_order(world, count):
    shares = [Shard(rank, world).share(range(count)) for rank in range(world)]
    assert [i for share in shares for i in share] == list(range(count))
    assert all(len(share) % UNIT == 0 for share in shares[:-1]) and all(shares)
    with pytest.raises(DataError, match="too few for 11 processes"):
        Shard(0, 11).share(range(80))


def test_one_process_needs_nobody():
    x = torch.randn(3, 2)
    assert SINGLE.gather(x) is x and SINGLE.objects(5) == [5] and SINGLE.together(lambda: 7) == 7
    with pytest.raises(DataError, match="^mine$"):
        SINGLE.together(lambda: (_ for _ in ()).throw(DataError("mine")))


def test_draws_depend_on_seed_and_keys_alone():
    first, again, others = (torch.rand(4, generator=generator(*keys)) for keys in ((0, 1, "a"), (0, 1, "a"), (0, 2)))
    assert torch.equal(first, again) and not torch.equal(first, others)
