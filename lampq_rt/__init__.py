"""lampq_rt: layer-wise mixed-precision Vision Transformers that are really small and really fast.

import lampq_rt
from lampq_rt.calibrate import Budget, make_plan

plan = make_plan(model, images, budget=Budget(mean_bits=4))      # offline, once
fast = lampq_rt.compile(model, plan)                             # any number of times
fast.save("deit_small.lampq");  fast = lampq_rt.load("deit_small.lampq")
"""

from __future__ import annotations

from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parent.parent
if (_CHECKOUT / "setup.py").is_file() and (_CHECKOUT / "kernels" / "__init__.py").is_file():
    # An uninstalled (or editable) checkout: `lampq_rt.kernels` and `lampq_rt.calibrate` lie beside this package.
    __path__.append(str(_CHECKOUT))

from lampq_rt import errors  # noqa: E402
from lampq_rt.checkpoint import load  # noqa: E402
from lampq_rt.compiler import compile  # noqa: E402, A004
from lampq_rt.formats import Format  # noqa: E402
from lampq_rt.plan import Plan  # noqa: E402
from lampq_rt.version import __version__  # noqa: E402

__all__ = ["Format", "Plan", "__version__", "compile", "errors", "load"]
