"""What a linear's launch asks of the GPU, and a recorder that collects the launches of a forward pass.

The recorder reads the calls themselves, so that whatever a model is built of, the list is what its kernels will be
asked for. It also works on the meta device, where nothing is computed and no GPU is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lampq_rt.kernels import reference
from lampq_rt.kernels.gpu import configs, tables

EPILOGUE_OF = {
    "linear_requant": "requant",
    "linear_requant_channels": "requant",
    "linear_float": "float",
    "linear_residual": "residual",
    "linear_residual_layernorm": "residual",
    "linear_qkv": "heads",
}
"""The epilogue of `linear.py` that serves an op, alone or with a kernel after it."""


@dataclass(frozen=True)
class LinearWork:
    """One launch of `linear_kernel`, or of `linear_rows_kernel`.

    Attributes:
        epilogue: "requant", "float", "residual" or "heads" (with `heads` and `tokens`); "rows" for a residual with the
            LayerNorm that follows in one kernel.
        m: rows of the input.
        n: output channels.
        k: input channels.
        a_bits: 8, or 4 for packed activations; likewise w_bits and out_bits.
        w_bits: of the weight's container.
        out_bits: of the result's container; 8 where it is none.
        gelu: GELU after the bias.
        heads: attention heads.
        tokens: rows per image.
        out_dtype: dtype of a floating-point result or residual stream.
    """

    epilogue: str
    m: int
    n: int
    k: int
    a_bits: int = 8
    w_bits: int = 8
    out_bits: int = 8
    gelu: bool = False
    heads: int = 0
    tokens: int = 0
    out_dtype: torch.dtype = torch.float16

    @property
    def key(self) -> str:
        """The key of its configuration in a table."""
        return tables.linear_key(
            self.epilogue, self.m, self.n, self.k, self.a_bits, self.w_bits, self.out_bits, self.gelu
        )

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.m * self.n * self.k

    @classmethod
    def all_of_call(cls, op: str, args: Sequence[Any]) -> list[LinearWork]:
        """The launches that such a call may make: where whole rows fit on chip, it has the choice."""
        work = cls.of_call(op, args)
        if op != "linear_residual_layernorm" or work.n > configs.MAX_ROW:
            return [work]
        return [work, replace(work, epilogue="rows")]

    @classmethod
    def of_call(cls, op: str, args: Sequence[Any]) -> LinearWork:
        """The launch that a call of one of the ops in `EPILOGUE_OF` makes; `args` as in `reference.py`."""
        epilogue, operands = EPILOGUE_OF[op], args
        if epilogue == "residual":
            operands = args[1:]
        x_q, w_q = operands[:2]
        n, stored = w_q.shape
        packed = w_q.dtype == torch.uint8
        k = 2 * stored if packed else stored
        work: dict[str, Any] = {"w_bits": 4 if packed else 8, "a_bits": 8 if x_q.shape[-1] == k else 4}
        if epilogue == "residual":
            work["out_dtype"] = args[0].dtype
        elif epilogue == "heads":
            work |= {"heads": args[5], "tokens": x_q.shape[1]}
        else:
            work["gelu"] = args[5] == "gelu"
            if epilogue == "float":
                work["out_dtype"] = next(arg for arg in args if isinstance(arg, torch.dtype))
            elif any(arg is reference.INT4 for arg in args):
                work["out_bits"] = 4
        return cls(epilogue, x_q.numel() // x_q.shape[-1], n, k, **work)


class Recorder(TorchDispatchMode):
    """Collects the linears that run while it is active: `with Recorder() as recorder: model(images)`.

    Attributes:
        works: one launch a key, in order of first use.
    """

    def __init__(self) -> None:
        super().__init__()
        self.works: dict[str, LinearWork] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Note a linear, run everything."""
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "lampq" and name in EPILOGUE_OF and isinstance(args[0], Tensor) and args[0].numel():
            for work in LinearWork.all_of_call(name, args):
                self.works.setdefault(work.key, work)
        return func(*args, **(kwargs or {}))
