"""What `pip install .` puts on a machine: one import name, one command, and the files that are not Python."""

import configparser
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"kernels": "lampq_rt/kernels", "lampq_rt": "lampq_rt", "calibrate": "lampq_rt/calibrate"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy: a build leaves files beside its sources."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(out), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    with ZipFile(path) as archive:
        yield archive


def info(wheel: ZipFile, name: str) -> str:
    (path,) = (path for path in wheel.namelist() if path.endswith(f".dist-info/{name}"))
    return wheel.read(path).decode()


def test_one_name_at_top_level(wheel):
    package, metadata = sorted({path.split("/")[0] for path in wheel.namelist()})
    assert package == "lampq_rt"
    assert metadata.startswith("lampq_rt-") and metadata.endswith(".dist-info")


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_module_is_installed(wheel, folder):
    modules = [path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.py")]
    assert modules
    missing = {str(module) for module in modules if f"{FOLDERS[folder]}/{module.as_posix()}" not in wheel.namelist()}
    assert not missing, f"{missing}: is there an __init__.py in each folder?"


def test_files_that_are_not_python_are_installed(wheel):
    sources = [path.relative_to(ROOT / "kernels").as_posix() for path in (ROOT / "kernels").rglob("*.cpp")]
    expected = {"lampq_rt/py.typed", "lampq_rt/digits/digits.npz", "lampq_rt/digits/LICENSE.txt"}
    assert expected | {f"lampq_rt/kernels/{source}" for source in sources} <= set(wheel.namelist())


def test_metadata_names_the_command_and_the_licence(wheel):
    scripts = configparser.ConfigParser()
    scripts.read_string(info(wheel, "entry_points.txt"))
    assert dict(scripts["console_scripts"]) == {"lampq": "lampq_rt.cli:main"}
    assert "License-Expression: Apache-2.0" in info(wheel, "METADATA")
