"""What cannot be written is refused before the work that fills it, in every command that writes."""

import os
from pathlib import Path

import pytest

from lampq_rt import files
from lampq_rt.errors import DataError
from tests.commands import fail
from tests.test_cli import MODEL

PROC = Path("/proc/lampq")
"""In a folder where not even root can make a file."""


@pytest.fixture
def occupied(tmp_path):
    """A folder with something foreign in it, and a file."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    return tmp_path


@pytest.fixture
def no_work(monkeypatch):
    """Loading a model or images would be too late for a refusal."""

    def late(*arguments, **options):
        raise AssertionError("the work had begun")

    for name in ("models.load_model", "images.load_images", "images.list_images", "plan_io.load"):
        monkeypatch.setattr(f"lampq_rt.{name}", late)


@pytest.mark.parametrize("names", [None, ("a", "b")])
def test_a_place_is_left_as_it_was(tmp_path, names):
    files.check_place(tmp_path / "x", what="thing", error=DataError, names=names)
    assert list(tmp_path.iterdir()) == []


def test_what_may_be_replaced_passes(tmp_path):
    (tmp_path / "x.plan").mkdir()
    (tmp_path / "x.plan" / "a").write_text("old")
    files.check_place(tmp_path / "x.plan", what="plan", error=DataError, names=("a", "b"))
    files.check_place(tmp_path / "x.plan" / "a", what="file", error=DataError)
    assert (tmp_path / "x.plan" / "a").read_text() == "old" and os.listdir(tmp_path / "x.plan") == ["a"]


@pytest.mark.parametrize("command", ["calibrate", "compile", "frontier", "profile", "tune", "inspect"])
def test_destinations_are_checked_first(occupied, no_work, monkeypatch, command):
    given = {
        "calibrate": ("--images", occupied, "--mean-bits", 4, "--out"),
        "compile": ("--plan", occupied, "--out"),
        "frontier": ("--images", occupied, "--eval-images", occupied, "--out"),
        "inspect": ("--plot",),
    }.get(command, ("--out",))
    name, ending = (occupied / "x.plan", ".png") if command == "inspect" else (MODEL, "")
    folder, file = occupied / "folder", occupied / "file"
    for path in (folder, file):
        path.rename(f"{path}{ending}")
    folder, file = (Path(f"{path}{ending}") for path in (folder, file))
    why = "holds other things" if command in ("calibrate", "frontier") else "it is a folder"
    assert why in fail(command, name, *given, folder)
    if command in ("calibrate", "frontier"):
        assert "a file of this name" in fail(command, name, *given, file)
    if command not in ("profile", "tune"):  # these make the folder of a table
        assert "there is no folder" in fail(command, name, *given, occupied / "none" / f"x{ending}")
    if PROC.parent.is_dir():
        assert f"/proc/lampq{ending}" in fail(command, name, *given, f"{PROC}{ending}")
    assert sorted(path.name for path in occupied.iterdir()) == [f"file{ending}", f"folder{ending}"]


@pytest.mark.parametrize("command", ["quickstart", "calibrate", "compile", "eval", "bench", "frontier", "profile"])
def test_json_is_checked_first(occupied, no_work, command):
    given = {
        "quickstart": (),
        "calibrate": (MODEL, "--images", occupied, "--mean-bits", 4, "--out", occupied / "x.plan"),
        "compile": (MODEL, "--plan", occupied, "--out", occupied / "x.lampq"),
        "eval": (MODEL, "--images", occupied),
        "frontier": (MODEL, "--images", occupied, "--eval-images", occupied, "--out", occupied / "x.sweep"),
    }.get(command, (MODEL,))
    assert "cannot write JSON" in fail(command, *given, "--json", occupied / "folder")
    assert "there is no folder" in fail(command, *given, "--json", occupied / "none" / "x.json")


def test_the_state_of_a_training_is_checked_first(occupied, no_work):
    (occupied / "x.plan.training").mkdir()
    given = (MODEL, "--images", occupied, "--mean-bits", 4, "--out", occupied / "x.plan")
    assert "x.plan.training: it is a folder" in fail("calibrate", *given, "--recipe", "lampq+rec")
