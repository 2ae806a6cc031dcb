"""What a model's kernels cannot be faster than, and what they may take: arithmetic on counts, nothing is run.

A kernel needs its bytes from memory, its products from the matrix units, and an issue slot for every instruction of
every warp. It takes at least the longest of the three:

    floor = max(bytes / bandwidth, operations / peak, warp instructions / (processors x schedulers x clock))

The floor takes operations as the model defines them and the processors as always busy. `predict` is less kind: whole
tiles are computed, the last wave of tiles leaves processors idle, a machine gives `efficiency` of its ceilings, and
between two kernels of a graph lies a gap. Every ceiling of the machines below is an ASSUMPTION until it is measured;
replace it with `dataclasses.replace(H100, bandwidth=...)`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """A GPU, as far as this model sees it.

    Attributes:
        name: as people call it.
        arch: what kernels are compiled for.
        bandwidth: of its memory, bytes/s.
        int8: operations/s of the int8 matrix units, a product and a sum being two.
        bf16: floating-point operations/s of the bf16 matrix units.
        processors: SMs or CUs.
        clock: Hz.
        source: where the ceilings come from.
        schedulers: of one processor, each starting an instruction of a warp every `issue_cycles`.
        issue_cycles: 4 where a warp of 64 runs on 16 lanes.
        special_slots: issue slots for which exp2, tanh and the like occupy their unit.
        lanes: threads of a warp.
        registers: of one processor, 32 bits each.
        shared_bytes: of one processor.
        max_warps: of one processor.
        gap_s: between two kernels of a CUDA graph.
        efficiency: part of every ceiling that a good kernel reaches.
    """

    name: str
    arch: str
    bandwidth: float
    int8: float
    bf16: float
    processors: int
    clock: float
    source: str
    schedulers: int = 4
    issue_cycles: int = 1
    special_slots: int = 8
    lanes: int = 32
    registers: int = 65536
    shared_bytes: int = 228 * 1024
    max_warps: int = 64
    gap_s: float = 1.5e-6
    efficiency: float = 0.65


H100 = Machine(
    "H100 SXM", "sm90", 3.0e12, 1600e12, 798e12, 132, 1.755e9,
    "80-90 % of the vendor's peaks of 3.35 TB/s, 1979 TOP/s",
)  # fmt: skip
A100 = Machine(
    "A100 80GB", "sm80", 1.8e12, 560e12, 280e12, 108, 1.41e9, "90 % of the vendor's peaks of 2.04 TB/s, 624 TOP/s",
    shared_bytes=164 * 1024,
)  # fmt: skip
L4 = Machine(
    "L4", "sm89", 0.27e12, 218e12, 109e12, 58, 2.04e9, "90 % of the vendor's peaks of 0.3 TB/s, 242 TOP/s; boost clock",
    shared_bytes=100 * 1024, max_warps=48,
)  # fmt: skip
B200 = Machine("B200", "sm100", math.nan, math.nan, math.nan, 148, math.nan, "occupancy only: Triton uses no tcgen05")
MI300X = Machine(
    "MI300X", "gfx942", math.nan, math.nan, math.nan, 304, math.nan, "occupancy only: no ceilings looked into",
    issue_cycles=4, lanes=64, registers=131072, shared_bytes=64 * 1024, max_warps=32,
)  # fmt: skip
MACHINES = {machine.arch: machine for machine in (H100, A100, L4, B200, MI300X)}


@dataclass(frozen=True)
class Work:
    """One kernel of a model.

    Attributes:
        name: for people.
        operations: that the model asks for.
        executed: with the padding of whole tiles.
        bytes: least traffic with memory: every operand once.
        programs: tiles.
        instructions: that one program issues, over all its warps; 0 where not known.
        special: of these, on the special-function unit.
        int8: False for bf16 products.
        count: times in one forward pass.
        extra_launches: small kernels that go with it, of which only the gap is counted.
    """

    name: str
    operations: float
    executed: float
    bytes: float
    programs: int
    instructions: float = 0.0
    special: float = 0.0
    int8: bool = True
    count: int = 1
    extra_launches: int = 0


def floor_s(work: Work, machine: Machine) -> float:
    """Seconds that one run of a kernel takes at the very least."""
    return max(
        work.bytes / machine.bandwidth,
        work.operations / _peak(work, machine),
        work.programs * _slots(work, machine) / (machine.processors * _rate(machine)),
    )


def predict_s(work: Work, machine: Machine) -> float:
    """Seconds that one run of a kernel may take, with the gap before it."""
    rounds = math.ceil(work.programs / machine.processors)
    busy = max(
        work.bytes / machine.bandwidth,
        rounds * machine.processors * work.executed / work.programs / _peak(work, machine),
        rounds * _slots(work, machine) / _rate(machine),
    )
    return busy / machine.efficiency + (1 + work.extra_launches) * machine.gap_s


def total_ms(works: Iterable[Work], machine: Machine) -> tuple[float, float]:
    """(floor, prediction) of one forward pass in milliseconds."""
    works = list(works)
    return (
        1e3 * sum(work.count * floor_s(work, machine) for work in works),
        1e3 * sum(work.count * predict_s(work, machine) for work in works),
    )


def limit(work: Work, machine: Machine) -> str:
    """What holds a kernel back: "bytes", "products" or "issue"."""
    found = {
        "bytes": work.bytes / machine.bandwidth,
        "products": work.operations / _peak(work, machine),
        "issue": work.programs * _slots(work, machine) / (machine.processors * _rate(machine)),
    }
    return max(found, key=lambda name: found[name])


def programs_per_processor(machine: Machine, registers: int, shared_bytes: int, warps: int) -> int:
    """How many programs a processor holds at once, by registers, shared memory and warps."""
    a_warp = machine.lanes * 8 * math.ceil(max(registers, 1) / 8)
    by_registers = machine.schedulers * (machine.registers // machine.schedulers // a_warp) // warps
    reserved = 1024 if machine.lanes == 32 else 0
    by_shared = machine.shared_bytes // (shared_bytes + reserved) if shared_bytes + reserved else machine.max_warps
    return min(by_registers, by_shared, machine.max_warps // warps)


def _peak(work: Work, machine: Machine) -> float:
    return machine.int8 if work.int8 else machine.bf16


def _slots(work: Work, machine: Machine) -> float:
    """Issue slots of one program."""
    return max(work.instructions, work.special * machine.special_slots)


def _rate(machine: Machine) -> float:
    """Issue slots a second of one processor."""
    return machine.schedulers * machine.clock / machine.issue_cycles


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Vision Transformer for square images."""

    depth: int
    width: int
    heads: int
    hidden: int
    tokens: int
    patches: int
    patch_values: int
    classes: int


TILES = ((128, 128), (128, 64), (64, 64))


def bf16_baseline(shape: ModelShape, batch: int, machine: Machine) -> Iterator[Work]:
    """The kernels of a compiled bf16 model in a CUDA graph, modelled the same way: ASSUMED to be eight a block.

    Bias lies in the products' epilogues, residual addition and LayerNorm are one kernel, GELU is one of its own. In the
    baseline's favour, its kernels need no issue slots, and each product has the best of a few tiles.
    """
    m, d, h = batch * shape.tokens, shape.width, shape.hidden
    head_dim = d // shape.heads

    def product(name: str, rows: int, n: int, k: int, count: int) -> Work:
        def made(tile: tuple[int, int]) -> Work:
            programs = math.ceil(rows / tile[0]) * math.ceil(n / tile[1])
            executed = programs * 2 * tile[0] * tile[1] * k
            traffic = 2 * (rows * k + n * k + rows * n)
            return Work(name, 2 * rows * n * k, executed, traffic, programs, int8=False, count=count)

        return min(map(made, TILES), key=lambda work: predict_s(work, machine))

    def pointwise(name: str, values: int, count: int) -> Work:
        return Work(name, 0, 0, 2 * values, max(1, values // 8192), int8=False, count=count)

    heads = batch * shape.heads
    tiles, columns = math.ceil(shape.tokens / 128), 64 * math.ceil(shape.tokens / 64)
    yield product("patch embedding", batch * shape.patches, d, shape.patch_values, 1)
    yield product("qkv", m, 3 * d, d, shape.depth)
    yield Work(
        "attention", 4 * heads * shape.tokens**2 * head_dim, 4 * heads * tiles * 128 * columns * head_dim,
        2 * 4 * m * d, heads * tiles, int8=False, count=shape.depth,
    )  # fmt: skip
    yield product("proj", m, d, d, shape.depth)
    yield pointwise("add, norm", 4 * m * d, 2 * shape.depth)
    yield product("fc1", m, h, d, shape.depth)
    yield pointwise("gelu", 2 * m * h, shape.depth)
    yield product("fc2", m, d, h, shape.depth)
    yield product("head", batch, shape.classes, d, 1)
