"""Which kernels a model starts at a batch, recorded from the code that starts them, and what work each is.

One block of the real model is compiled by a plan and run on the meta device while `offline.recording` keeps the
launches, so that operands, configurations and options are those of `device="cuda"`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from benchmarks.gpu.models import timing_plan
from benchmarks.roofline import ModelShape, Work
from lampq_rt.kernels.gpu import offline
from lampq_rt.kernels.gpu.inspection import Compiled

FORMATS = {"W8A8": (8, 8), "W4A8": (4, 8), "W4A4": (4, 4)}
"""(weight bits, input bits) of every linear; attention has 8."""

SIZES = {"i8": 1, "u8": 1, "fp16": 2, "bf16": 2, "i32": 4, "fp32": 4}


@dataclass(frozen=True)
class Started:
    """A launch and how often a forward pass makes it."""

    launch: offline.Launch
    count: int


@cache
def shape_of(name: str) -> ModelShape:
    """Sizes of a timm model, without its weights."""
    import timm

    with torch.device("meta"):
        model = timm.create_model(name)
    block, weight = model.blocks[0], model.patch_embed.proj.weight
    return ModelShape(
        len(model.blocks), model.embed_dim, block.attn.num_heads, block.mlp.fc1.out_features, model.pos_embed.shape[1],
        model.patch_embed.num_patches, weight[0].numel(), model.head.out_features,
    )  # fmt: skip


@cache
def _one_block(name: str, bits: int, input_bits: int) -> Any:
    import timm

    import lampq_rt

    torch.manual_seed(0)
    model = timm.create_model(name, depth=1).eval()
    compiled = lampq_rt.compile(model, timing_plan(model, bits, input_bits), backend="triton")
    return compiled.model.to("meta")


def started(name: str, form: str, batch: int, arch: str) -> list[Started]:
    """The launches of one forward pass of `batch` images.

    Args:
        name: a timm model.
        form: as in `FORMATS`.
        batch: images.
        arch: as in `offline.PROCESSORS`.
    """
    shape, model = shape_of(name), _one_block(name, *FORMATS[form])
    side = model.patch_embed.img_size[0]

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    with torch.inference_mode(), offline.recording(arch) as launches:
        model.patch_embed(empty(batch, 3, side, side))
        model.head(empty(batch, shape.width))
        outside = len(launches)
        model.blocks[0].advance(empty(batch, shape.tokens, shape.width, dtype=torch.float16), None, None)
    return [Started(launch, 1 if i < outside else shape.depth) for i, launch in enumerate(launches)]


def work_of(one: Started, made: Compiled) -> Work:
    """The launch as the roofline sees it; `made` is its kernel, compiled."""
    launch = one.launch
    function = {
        "linear_kernel": _linear, "attention_kernel": _attention, "layernorm_quantize_kernel": _layernorm,
        "quantize_kernel": _quantize,
    }[launch.name]  # fmt: skip
    operations, executed, traffic, rounds, extra = function(launch)
    repeated = rounds - 1

    def issued(all_: float, in_loops: float) -> float:
        return (all_ + repeated * in_loops) * launch.warps

    return Work(
        label(launch), operations, executed, traffic, launch.programs,
        issued(made.instructions, made.loop_instructions),
        issued(made.mix.get("special", 0), made.loop_mix.get("special", 0)),
        count=one.count, extra_launches=extra,
    )  # fmt: skip


def label(launch: offline.Launch) -> str:
    """A kernel's name for people: epilogue, containers, tile."""
    v = launch.values
    if launch.name == "linear_kernel":
        containers = f"a{4 if v['A_PACKED'] else 8}w{4 if v['B_PACKED'] else 8}"
        out = "-pack" if v["OUT_PACKED"] else ""
        split = f" split {v['SPLIT_K']}" if v["SPLIT_K"] > 1 else ""
        name = offline.epilogue_of(launch) + ("-gelu" if v["GELU"] else "") + out
        even = "" if v["EVEN_K"] else " (K masked)"
        return f"{name} {containers} {v['BLOCK_M']}x{v['BLOCK_N']}x{v['BLOCK_K']}{split}{even}"
    if launch.name == "attention_kernel":
        tiles = "+".join(str(v[f"TILE_{i}"]) for i in range(3) if v[f"TILE_{i}"])
        return f"attention {v['BLOCK_M']} rows, {tiles} columns{', packs' if v['OUT_PACKED'] else ''}"
    if launch.name == "layernorm_quantize_kernel":
        return f"layernorm {v['BLOCK_M']}x{v['BLOCK_D']}{', packs' if v['OUT_PACKED'] else ''}"
    return "quantize"


Facts = tuple[float, float, float, int, int]
"""(operations, executed operations, bytes, runs of a loop's body, launches beside it)."""


def _linear(launch: offline.Launch) -> Facts:
    v = launch.values
    m, n, k, split = v["M"], v["N"], v["K"], v["SPLIT_K"]
    out = SIZES[launch.signature["out_ptr"].lstrip("*")] * (0.5 if v["OUT_PACKED"] else 1)
    out *= 2 if offline.epilogue_of(launch) == "residual" else 1  # read and written
    traffic = m * k / (2 if v["A_PACKED"] else 1) + n * k / (2 if v["B_PACKED"] else 1) + m * n * out + 12 * n
    steps = math.ceil(math.ceil(k / v["BLOCK_K"]) / split)
    executed = launch.programs * 2 * v["BLOCK_M"] * v["BLOCK_N"] * v["BLOCK_K"] * steps
    # Splitting K zeroes two buffers first.
    return 2 * m * n * k, executed, traffic, steps, 2 if split > 1 else 0


def _attention(launch: offline.Launch) -> Facts:
    v = launch.values
    tokens, d, heads = v["TOKENS"], v["HEAD_DIM"], launch.grid[1] * launch.grid[2]  # of all images
    rounds = 1 if v["ON_CHIP"] else math.ceil(tokens / v["TILE_0"])
    columns = v["TILE_0"] * rounds if not v["ON_CHIP"] else v["TILE_0"] + v["TILE_1"] + v["TILE_2"]
    products = 2 if v["ON_CHIP"] else 3  # two passes over K
    out = SIZES[launch.signature["out_ptr"].lstrip("*")] * (0.5 if v["OUT_PACKED"] else 1)
    executed = launch.programs * 2 * products * v["BLOCK_M"] * columns * v["BLOCK_D"]
    traffic = heads * d * (2 * tokens + v["PADDED"] + out * tokens)
    return 4 * heads * tokens**2 * d, executed, traffic, rounds, 0


def _layernorm(launch: offline.Launch) -> Facts:
    v = launch.values
    out = 0.5 if v["OUT_PACKED"] else 1
    return 0, 0, v["M"] * v["D"] * (SIZES[launch.signature["x_ptr"].lstrip("*")] + out), 1, 0


def _quantize(launch: offline.Launch) -> Facts:
    out = 0.5 if launch.values["OUT_PACKED"] else 1
    return 0, 0, launch.values["count"] * (SIZES[launch.signature["x_ptr"].lstrip("*")] + out), 1, 0
