"""Which tile sizes a kernel runs with: from a tuned table where one fits, else by rule.

A rule of thumb for a Hopper: two programs an SM overlap one's epilogue with the other's products, so a tile should
need at most 113 KB of shared memory and 128 registers a thread; and there should be at least one tile an SM, which
small batches get from 64-row tiles and from splitting K.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import triton


@dataclass(frozen=True)
class LinearConfig:
    """Tile of `linear_kernel`.

    Attributes:
        block_m: rows a tile, at least 64 for wgmma.
        block_n: columns a tile, at least 64 (a multiple, for packed output).
        block_k: channels a step.
        split_k: programs that share one tile's channels.
        group_m: row tiles that run one after the other over the same weights.
        warps: 4 or 8.
        stages: depth of the load pipeline.
        registers: most registers a thread may have; 255 leaves it to the compiler.
    """

    block_m: int = 128
    block_n: int = 128
    block_k: int = 128
    split_k: int = 1
    group_m: int = 8
    warps: int = 8
    stages: int = 3
    registers: int = 255

    def shared_bytes(self, a_bits: int, w_bits: int) -> int:
        """Shared memory that the load pipeline takes; 4-bit operands are unpacked beside it."""
        loads = self.stages * self.block_k * (self.block_m * a_bits + self.block_n * w_bits) // 8
        unpacked = self.block_k * (self.block_m * (a_bits < 8) + self.block_n * (w_bits < 8))
        return loads + unpacked

    def accumulator_registers(self) -> int:
        """Registers a thread for the int32 sums."""
        return self.block_m * self.block_n // (32 * self.warps)

    def to_json(self) -> dict[str, int]:
        """As it stands in a table."""
        return asdict(self)


LINEAR_CANDIDATES = tuple(
    LinearConfig(m, n, k, warps=w, stages=s)
    for m, n, k, w, s in (
        (128, 128, 128, 8, 3), (128, 128, 128, 4, 3), (128, 128, 64, 8, 4), (128, 256, 64, 8, 3), (128, 256, 128, 8, 3),
        (256, 128, 64, 8, 3), (128, 64, 128, 4, 4), (64, 128, 128, 4, 4), (64, 256, 64, 4, 4), (64, 64, 128, 4, 4),
        (64, 64, 64, 4, 5), (64, 128, 256, 4, 2), (128, 128, 256, 8, 2),
    )
) + tuple(LinearConfig(128, 128, k, stages=s, registers=128) for k, s in ((64, 4), (128, 3)))  # fmt: skip
"""What the tuner tries, before it drops what a GPU cannot hold.

The last two hold a 128 x 128 tile to 128 registers, of which the compiler alone takes 135 to 222: two programs then
share a processor of a Hopper, at the price of some 20 instructions that spill in the epilogue.

Triton waits for a Hopper's int8 products at the end of every step (it overlaps them with the next only where sums are
fp32), so a step of 256 channels waits half as often as one of 128.
"""

SHARED_LIMIT = {"sm80": 163 * 1024, "sm86": 99 * 1024, "sm89": 99 * 1024, "sm90": 227 * 1024, "sm100": 227 * 1024,
                "gfx942": 64 * 1024}  # fmt: skip
"""Shared memory of one program, bytes."""

MAX_ACCUMULATORS = 128
MAX_ROW_ACCUMULATORS = {8: 96, 4: 64}
"""By the narrower of the operands' containers: unpacking takes registers, too (384 columns spill on a Hopper)."""


def feasible(config: LinearConfig, arch: str, a_bits: int = 8, w_bits: int = 8) -> bool:
    """False where a configuration needs more shared memory or registers than the GPU has: not worth compiling."""
    limit = SHARED_LIMIT.get(arch, 99 * 1024)
    return config.shared_bytes(a_bits, w_bits) <= limit and config.accumulator_registers() <= MAX_ACCUMULATORS


def register_limit(config: LinearConfig, arch: str) -> dict[str, int]:
    """The compiler's option for it; AMD's has none."""
    return {"maxnreg": config.registers} if config.registers < 255 and arch.startswith("sm") else {}


RULE = (LinearConfig(), LinearConfig(64, 128, 128, warps=4), LinearConfig(64, 64, 128, warps=4, stages=4))
RULE_AMD = tuple(LinearConfig(m, n, 128, warps=w, stages=2) for m, n, w in ((128, 128, 8), (64, 128, 4), (64, 64, 4)))
"""Largest first. 64 KB of LDS hold two stages; nothing of this has been measured on AMD."""


def linear_config(m: int, n: int, k: int, processors: int, arch: str, a_bits: int = 8, w_bits: int = 8) -> LinearConfig:
    """The rule: the largest tile that still gives every processor one; K split where even the smallest does not."""
    for config in RULE_AMD if arch.startswith("gfx") else RULE:
        tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
        if tiles >= processors and feasible(config, arch, a_bits, w_bits):
            return config
    tiles = triton.cdiv(m, 64) * triton.cdiv(n, 64)
    split = 1
    while tiles * split * 2 <= processors and k // (split * 2) >= 384:
        split *= 2
    smallest = LinearConfig(64, 64, 128, split_k=split, warps=4, stages=4)
    for stages in (4, 3) if not arch.startswith("gfx") else ():
        if feasible(config := replace(smallest, stages=stages), arch, a_bits, w_bits):
            return config
    return replace(smallest, stages=2)


MAX_ROW = 512
"""The widest residual stream whose rows one program can hold (`linear_rows_kernel`)."""

ROWS_CANDIDATES = tuple(
    LinearConfig(m, MAX_ROW, k, warps=w, stages=s)
    for m, k, w, s in (
        (64, 128, 8, 3), (64, 64, 8, 4), (64, 128, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 8, 2),
    )
)  # fmt: skip
"""What the tuner tries for it; block_n stands for the whole row, whatever its width."""


def row_tiles(width: int) -> tuple[int, int]:
    """Up to two powers of two, at least 64 and at most 256, that cover `width` <= 512: the fewest columns."""
    sizes = (64, 128, 256)
    covers = [(a, b) for a in sizes for b in (0, *sizes) if b <= a and a + b >= width]
    return min(covers, key=lambda tiles: (sum(tiles), tiles[1] > 0))


def rows_feasible(config: LinearConfig, width: int, arch: str, a_bits: int = 8, w_bits: int = 8) -> bool:
    """As `feasible`, for whole rows; the epilogue keeps the sums a second time in fp32."""
    whole = replace(config, block_n=sum(row_tiles(width)))
    limit = SHARED_LIMIT.get(arch, 99 * 1024)
    most = MAX_ROW_ACCUMULATORS[min(a_bits, w_bits)]
    return whole.shared_bytes(a_bits, w_bits) <= limit and whole.accumulator_registers() <= most


@dataclass(frozen=True)
class AttentionConfig:
    """Tile of `attention_kernel`: rows a program, widths of up to three column tiles (0: absent), one pass or two."""

    block_m: int
    tiles: tuple[int, int, int]
    on_chip: bool
    warps: int
    stages: int = 2


MAX_TOKENS_ON_CHIP = 256
LONG_TILE = 128


def column_tiles(tokens: int) -> tuple[int, int, int]:
    """Up to three powers of two, each at least 32 (int8 dots need that), that cover `tokens` <= 256."""
    best = (256, 0, 0)
    sizes = (32, 64, 128, 256)
    for a in sizes:
        for b in (0, *sizes):
            for c in (0, *sizes):
                fits = a >= b >= c and a + b + c >= tokens
                # Fewer columns first, then fewer tiles.
                if fits and (a + b + c, (b > 0) + (c > 0)) < (sum(best), (best[1] > 0) + (best[2] > 0)):
                    best = (a, b, c)
    return best


def attention_config(tokens: int, head_dim: int, arch: str, p_scheme: str = "rowmax") -> AttentionConfig:
    """On chip up to 256 tokens; 64 rows a program keep the logits within a thread's registers.

    With fp16 weights of P ("log2") beside them, one tile of 256 columns needs twice as many threads, or two passes
    where heads are wide. On AMD always four warps, see `attention_options`.

    A Hopper's wgmma takes 64 rows of four warps. Eight would all do the same 64 rows' logits and exponentials twice, so
    they take 128 rows there, or are four.
    """
    amd, hopper = arch.startswith("gfx"), arch == "sm90"
    if tokens <= MAX_TOKENS_ON_CHIP:
        tiles = column_tiles(tokens)
        crowded = p_scheme == "log2" and tiles[0] == 256
        if not crowded or head_dim <= 96:
            rows = 128 if crowded and hopper else 64
            return AttentionConfig(rows, tiles, True, 8 if crowded and not amd else 4)
    return AttentionConfig(64, (LONG_TILE, 0, 0), False, 4 if head_dim <= 64 or amd or hopper else 8)


def attention_options(arch: str) -> dict[str, int]:
    """What the compiler must be told beside the tile.

    On AMD, 16x16 matrix instructions: four warps then have 16 of the 64 rows each in both products, and the codes of P
    go from one to the other in registers. With 32x32 the second product splits rows and columns between warps, and P
    passes through LDS in single bytes (112 `ds_write_b8` at 197 tokens).
    """
    return {"matrix_instr_nonkdim": 16} if arch.startswith("gfx") else {}


def layernorm_blocks(width: int) -> tuple[int, int]:
    """Rows a program and columns rounded up to a power of two: about 2,048 values for 4 warps."""
    block_d = max(triton.next_power_of_2(width), 64)
    return max(1, min(8, 2048 // block_d)), block_d


def heads_blocks(head_dim: int) -> tuple[int, int]:
    """Tokens a program and head channels rounded up: at most 4,096 values each of q, k and v for 4 warps."""
    block_d = max(32, triton.next_power_of_2(head_dim))
    return max(16, min(64, 4096 // block_d)), block_d
