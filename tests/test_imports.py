"""Holds the one direction of imports, `calibrate → lampq_rt → kernels`, by reading every file's imports.

Who serves a model needs no scipy, and who uses a kernel needs no model. One import the wrong way undoes that quietly.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"kernels": "lampq_rt.kernels", "lampq_rt": "lampq_rt", "calibrate": "lampq_rt.calibrate"}
REFERENCE = (Path("kernels/reference.py"), Path("kernels/containers.py"))


@dataclass(frozen=True)
class Import:
    """One imported name, in full: `from . import reference` in `kernels/ops.py` is `lampq_rt.kernels.reference`."""

    name: str
    line: int
    in_function: bool

    def is_in(self, *packages: str) -> bool:
        return any(self.name == package or self.name.startswith(package + ".") for package in packages)


def module_name(path: Path) -> str:
    """The import name of a file given relative to the checkout."""
    parts = list(path.with_suffix("").parts)
    parts[0] = PACKAGES.get(parts[0], parts[0])
    return ".".join(parts)


def imports(path: Path, source: str) -> Iterator[Import]:
    """Everything a file imports, wherever in the file, also by `import_module("…")`."""
    package = module_name(path).split(".")[:-1]

    def visit(node: ast.AST, in_function: bool) -> Iterator[Import]:
        match node:
            case ast.Import():
                yield from (Import(alias.name, node.lineno, in_function) for alias in node.names)
            case ast.ImportFrom():
                base = package[: len(package) - node.level + 1] if node.level else []
                base = ".".join([*base, *([node.module] if node.module else [])])
                yield from (Import(f"{base}.{alias.name}", node.lineno, in_function) for alias in node.names)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str() as name), *_],
            ):
                yield Import(name, node.lineno, in_function)
        in_function = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, in_function)

    yield from visit(ast.parse(source), False)


def violations(path: Path, source: str) -> list[str]:
    """What in a file goes against the rules, one line each."""
    folder, found = path.parts[0], []
    is_command = folder == "lampq_rt" and path.parts[1].startswith("cli")
    for item in imports(path, source):
        where = f"{path}:{item.line}: imports {item.name}"
        if item.is_in("kernels", "calibrate"):
            found.append(f"{where}; write lampq_rt.{item.name}")
        if folder == "kernels" and item.is_in("lampq_rt") and not item.is_in("lampq_rt.kernels"):
            found.append(f"{where}; kernels/ knows no model and no plan")
        if folder == "lampq_rt" and item.is_in("lampq_rt.calibrate"):
            if not is_command:
                found.append(f"{where}; only the commands (lampq_rt/cli*.py) may")
            elif not item.in_function:
                found.append(f"{where}; only inside the command that needs it")
        if folder in PACKAGES and item.is_in("tests", "benchmarks"):
            found.append(f"{where}; it is not installed")
        alone = path in REFERENCE and item.name.split(".")[0] not in {"torch", *sys.stdlib_module_names}
        if alone and not item.is_in("lampq_rt.kernels.containers"):
            found.append(f"{where}; the reference needs nothing but torch")
    return found


FILES = sorted(
    path.relative_to(ROOT) for folder in (*PACKAGES, "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)


def test_every_folder_was_read():
    assert {path.parts[0] for path in FILES} == {*PACKAGES, "tests", "benchmarks"}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_one_way(path):
    assert violations(path, (ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/ops.py", "from lampq_rt.plan import Plan"),
        ("kernels/ops.py", "from ..plan import Plan"),
        ("kernels/cpu/impl.py", "import lampq_rt"),
        ("kernels/reference.py", "from lampq_rt.kernels import packing"),
        ("kernels/reference.py", "import numpy as np"),
        ("kernels/containers.py", "from lampq_rt.kernels import reference"),
        ("lampq_rt/compiler.py", "def f():\n    from lampq_rt.calibrate import make_plan"),
        ("lampq_rt/adapters/timm_vit.py", "from ..calibrate import make_plan"),
        ("lampq_rt/compiler.py", "from lampq_rt import calibrate"),
        ("lampq_rt/compiler.py", "import importlib\nimportlib.import_module('lampq_rt.calibrate')"),
        ("lampq_rt/cli.py", "from lampq_rt.calibrate import make_plan"),
        ("calibrate/pipeline.py", "from tests.conftest import model"),
        ("tests/test_ops.py", "from kernels import ops"),
        ("benchmarks/bench_model.py", "import calibrate.pipeline"),
    ],
)
def test_the_rules_catch(path, source):
    assert violations(Path(path), source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/cpu/impl.py", "from ..reference import linear\nfrom lampq_rt.kernels import packing"),
        ("kernels/reference.py", "import math\nimport torch.nn.functional as F"),
        ("kernels/reference.py", "from lampq_rt.kernels.containers import pack_int4 as pack_int4"),
        ("lampq_rt/compiler.py", "from lampq_rt.kernels import ops\nfrom .plan import Plan"),
        ("lampq_rt/cli_calibrate.py", "def command():\n    from lampq_rt.calibrate import make_plan"),
        ("calibrate/pipeline.py", "import scipy\nfrom lampq_rt import Plan\nfrom lampq_rt.kernels import ops"),
    ],
)
def test_the_rules_allow(path, source):
    assert violations(Path(path), source) == []


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_lampq_rt_leaves_heavy_packages_alone():
    code = "import sys, lampq_rt; print(*{'scipy', 'matplotlib', 'lampq_rt.calibrate'}.intersection(sys.modules))"
    assert run_python(code) == ""


def test_importing_lampq_rt_needs_no_heavy_package():
    # Triton is not in the list above because timm itself may import it, where it is installed.
    code = """
import sys
for name in ("triton", "scipy", "matplotlib", "sklearn", "lampq_rt.calibrate"):
    sys.modules[name] = None  # an import of it raises ImportError
import lampq_rt
assert callable(lampq_rt.compile) and callable(lampq_rt.load)
"""
    run_python(code)
