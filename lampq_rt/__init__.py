"""lampq_rt: small and fast Vision Transformers with a bit-width of its own for every layer.

    import lampq_rt
    from lampq_rt.calibrate import Budget, make_plan

    plan = make_plan(model, images, budget=Budget(mean_bits=4), recipe="fast+w")  # offline, once
    fast = lampq_rt.compile(model, plan)                                          # any number of times
    fast.save("deit_small.lampq");  fast = lampq_rt.load("deit_small.lampq")

This package never imports `lampq_rt.calibrate`, which serving does not need: who calibrates imports it.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

_CHECKOUT = Path(__file__).resolve().parent.parent
if (_CHECKOUT / "setup.py").is_file() and (_CHECKOUT / "kernels" / "__init__.py").is_file():
    # An uninstalled (or editable) checkout: `lampq_rt.kernels` and `lampq_rt.calibrate` lie beside this package.
    __path__.append(str(_CHECKOUT))

from lampq_rt import errors  # noqa: E402
from lampq_rt.version import __version__  # noqa: E402

if TYPE_CHECKING:
    from lampq_rt.checkpoint import load
    from lampq_rt.compiler import compile  # noqa: A004
    from lampq_rt.formats import Format
    from lampq_rt.plan import Plan

__all__ = ["Format", "Plan", "__version__", "compile", "errors", "load"]

_HOMES = {"Format": "formats", "Plan": "plan", "compile": "compiler", "load": "checkpoint"}
"""Where the public names live; they are imported when first asked for."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


if Path(next(iter(sys.argv), "")).stem != "lampq":
    # Graphs saved by torch.export ask for torch.ops.lampq. Only our own command imports torch later, in the commands
    # that need it: over a second, which `lampq --help` and a mistyped option should not cost.
    import_module(f"{__name__}.kernels.ops")
