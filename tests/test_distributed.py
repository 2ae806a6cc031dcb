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
import torch.distributed as dist
from PIL import Image
from safetensors.torch import save_file

from lampq_rt import Plan
from lampq_rt.calibrate import Budget, distributed, make_plan
from lampq_rt.calibrate.distributed import SINGLE, UNIT, Shard, generator
from lampq_rt.errors import DataError
from tests.trainings import shorten_trainings

ROOT = Path(__file__).resolve().parents[1]
MODEL = "test_vit"
IMAGES = 2 * UNIT + 3
RECIPES_OF_ALL = ("repq", "lampq+", "lampq+w", "lampq+relu")


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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.plan", "2.plan"]
    check_equal(*plans)
    first, second = (dict(plan.provenance) for plan in plans)
    assert first["images"]["count"] == IMAGES and first["refine"] == second["refine"]


def check_equal(one, two):
    """The same bits and codes; steps, new parameters and what was measured within 1e-6."""
    assert [(n, s.formats, s.bits) for n, s in one.sites.items()] == [
        (n, s.formats, s.bits) for n, s in two.sites.items()
    ]
    for name, site in one.sites.items():
        for key, tensor in site.tensors.items():
            torch.testing.assert_close(two.sites[name].tensors[key], tensor, rtol=1e-6, atol=0)
    for name, tensor in one.edits.items():
        torch.testing.assert_close(two.edits[name], tensor, rtol=1e-6, atol=1e-7)
    first, second = (dict(plan.provenance) for plan in (one, two))
    assert first["images"] == second["images"] and first["proposals"] == second["proposals"]
    assert first["sensitivity"] == pytest.approx(second["sensitivity"], rel=1e-6)


@pytest.fixture(scope="module")
def shared_out(tmp_path_factory):
    """Plans of `RECIPES_OF_ALL` by two processes, each in its own folder."""
    root = tmp_path_factory.mktemp("together")
    code = f"from tests import test_distributed as t; t.work_together({str(root)!r})"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**environment, "WORLD_SIZE": "2", "RANK": rank})
        for rank in "01"
    ]
    assert [process.wait(timeout=400) for process in started] == [0, 0]
    return root


def work_together(root):
    """What each of the processes of `shared_out` does."""
    dist.init_process_group("gloo")
    shard = distributed.current()
    for recipe in RECIPES_OF_ALL:
        plan_of_all(recipe, shard).save(Path(root) / f"{recipe} {shard.rank}.plan")
    dist.destroy_process_group()


def plan_of_all(recipe, shard):
    """This process's copy of a plan that all make together; recipes that train do it shortly."""
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=10, depth=2).eval()
    images = torch.randn(IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    budget = Budget(mean_bits=3.5 if recipe in ("lampq+", "lampq+w") else 4)
    own = torch.stack(shard.share(list(images)))
    with pytest.MonkeyPatch.context() as patch:
        shorten_trainings(patch)
        return make_plan(model, own, budget=budget, recipe=recipe, shard=shard)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES_OF_ALL)
def test_rewrites_compensation_and_training_see_the_images_of_all(shared_out, recipe):
    """Rewrites made from a process's own images alone once gave every process another model."""
    one, two = (Plan.load(shared_out / f"{recipe} {rank}.plan") for rank in (0, 1))
    assert one.digest == two.digest
    check_equal(plan_of_all(recipe, SINGLE), one)


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


def test_what_needs_all_images_is_refused_before_anything_is_measured():
    images = torch.zeros(8, 3, 16, 16)
    with pytest.raises(DataError, match=re.escape("recipe lampq+f needs all images in one process")) as caught:
        make_plan(None, images, budget=Budget(mean_bits=4), recipe="lampq+f", shard=Shard(0, 2))
    assert "(free widths); 2 processes came; allowed in several: adalog, fast, fast+w, lampq," in str(caught.value)


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
