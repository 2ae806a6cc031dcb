"""Compiles the kernels for a GPU that is not there.

Triton's compiler needs no device: PTX and SASS for NVIDIA, and AMD's assembly, come out of it on any machine. What is
compiled is what the launchers of `impl` start: `recording` puts a list in the place of the GPU, so a launch is kept
with its arguments, grid and options instead of being run. `inspection` then reads what a speed depends on.

    with recording("sm90") as launches:
        impl.attention(q, k, v, ...)          # tensors on the meta device will do
    made = compile_launch(launches[0])
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from lampq_rt.kernels.gpu import linear, start
from lampq_rt.kernels.gpu.inspection import Compiled, read_amd, read_nvidia

PROCESSORS = {"sm80": 108, "sm89": 58, "sm90": 132, "sm100": 148, "gfx942": 304}
"""What can be compiled for, with the processors of A100, L4, H100, B200 and MI300X."""


@dataclass(frozen=True)
class Launch:
    """One start of a kernel that was kept instead of run.

    Attributes:
        arch: as in `PROCESSORS`.
        kernel: the `triton.jit` function.
        grid: programs.
        values: arguments that are numbers, by the kernel's names.
        signature, constants, attributes: what the compiler sees, as the launcher would specialise it.
        options: warps, stages and what the backend takes beside them.
    """

    arch: str
    kernel: Any = field(repr=False)
    grid: tuple[int, ...]
    values: Mapping[str, Any]
    signature: Mapping[str, str] = field(repr=False)
    constants: Mapping[Any, Any] = field(repr=False)
    attributes: Mapping[Any, Any] = field(repr=False)
    options: Mapping[str, Any] = field(repr=False)

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(self.kernel.__name__)

    @property
    def warps(self) -> int:
        """Of one program."""
        return int(self.options["num_warps"])

    @property
    def programs(self) -> int:
        """That one launch starts."""
        count = 1
        for size in self.grid:
            count *= size
        return count

    @property
    def key(self) -> str:
        """Equal for launches that run the same binary."""
        constants = {path: getattr(value, "value", value) for path, value in self.constants.items()}
        parts = (self.arch, self.name, self.signature, constants, self.attributes, self.options)
        return repr(parts)


def target_of(arch: str) -> GPUTarget:
    """Triton's target.

    Raises:
        ValueError: nothing is compiled for `arch`.
    """
    if arch not in PROCESSORS:
        raise ValueError(f"unknown architecture {arch!r}; allowed: {', '.join(PROCESSORS)}")
    return GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[2:]), 32)


@contextmanager
def recording(arch: str) -> Iterator[list[Launch]]:
    """Within it, every launch is kept in the list that is given, as if on a GPU of `arch`, and nothing runs."""
    target = target_of(arch)
    backend = make_backend(target)
    launches: list[Launch] = []

    def keep(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialisation, rest = binder(*args, **options)
        parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialisation, rest)
        values = {name: getattr(value, "value", value) for name, value in bound.items()}
        values = {name: value for name, value in values.items() if isinstance(value, (bool, int, float))}
        launches.append(Launch(arch, kernel, grid, values, signature, constants, attributes, parsed.__dict__))

    run, device = JITFunction.run, start.device_of
    try:
        JITFunction.run = keep
        start.device_of = lambda index: (arch, PROCESSORS[arch], target.backend == "cuda")  # type: ignore[assignment]
        yield launches
    finally:
        JITFunction.run, start.device_of = run, device


def build(launch: Launch) -> Any:
    """Triton's compiled kernel of what `launch` would have run, with its texts by name in `asm`.

    It is kept in Triton's cache, where a later launch of the same kernel on a GPU of that kind finds it, too.
    """
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    return triton.compile(source, target=target_of(launch.arch), options=dict(launch.options))


def compile_launch(launch: Launch) -> Compiled:
    """What the compiler made of `launch`, read from its assembly."""
    made = build(launch)
    if launch.arch.startswith("gfx"):
        return read_amd(launch.arch, made.asm["amdgcn"], made.metadata.shared)
    return read_nvidia(launch.arch, made.asm["ptx"], made.asm["sass"], made.metadata.shared)


def epilogue_of(launch: Launch) -> str:
    """Of a linear: "requant", "float", "residual" or "heads"."""
    assert launch.kernel is linear.linear_kernel
    return start.NAMES[launch.values["EPILOGUE"]]
