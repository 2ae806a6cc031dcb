"""Small models for tests of the runtime, and plans for them that need no calibrator."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

import lampq_rt
from lampq_rt.formats import Format
from lampq_rt.kernels.reference import code_range
from lampq_rt.plan import Plan, SiteParams
from lampq_rt.simulate import Simulation, simulate
from lampq_rt.sites import Kind
from lampq_rt.standin import stand_in_plan

VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "layer_scale": {"init_values": 0.5},
    "qk_norm": {"qk_norm": True},
    "registers": {"reg_tokens": 4, "no_embed_class": True},
    "average_pool": {"global_pool": "avg", "class_token": False},
    "clip": {"pre_norm": True, "act_layer": "quick_gelu"},
    "patch_14": {"img_size": (42, 28), "patch_size": 14},
    "no_head": {"num_classes": 0},
    "map_pool": {"global_pool": "map", "class_token": False},
    "dynamic": {"dynamic_img_size": True},
    "no_bias": {"qkv_bias": False, "proj_bias": False},
}
"""Arguments of `tiny_vit` for every kind of timm ViT that is supported."""


def tiny_vit(**changes: object) -> nn.Module:
    """A small random timm ViT whose activations are spread like a trained model's."""
    from timm.models.vision_transformer import VisionTransformer

    seed = int(changes.pop("seed", 0))
    torch.manual_seed(seed)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 10}
    model = VisionTransformer(**{**options, **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    return model


def range_plan(model: nn.Module, images: Tensor, bits: dict[str, int] | int = 8) -> Plan:
    """A plan with min-max steps; `bits` for all sites, or by kind ("qkv", "pv", "head", "default")."""
    return stand_in_plan(model, images, bits)


def channel_plan(model: nn.Module, plan: Plan, images: Tensor) -> Plan:
    """`plan` with min-max steps by channel before every integer fc2, of what enters it in floating point."""
    simulation = Simulation(model)
    chosen = {name: p for name, p in plan.sites.items() if p.kind is Kind.FC2 and not p.is_float}
    seen: dict[str, Tensor] = {}
    for name in chosen:
        hook = partial(seen.__setitem__, name)
        simulation.module(name).register_forward_pre_hook(lambda _, args, hook=hook: hook(args[0].flatten(0, -2)))
    with torch.inference_mode():
        simulation(images)
    sites = {}
    for name, params in chosen.items():
        input_bits, weight_bits = (params.formats[operand].bits for operand in ("input", "weight"))
        low, high = seen[name].amin(0), seen[name].amax(0)
        bottom, top = code_range(input_bits)
        scale = (high - low).clamp(min=1e-4) / (top - bottom)
        scaled = model.get_submodule(name).weight.detach() * scale
        tensors = {
            "input.scale": scale,
            "input.zero_point": bottom - low / scale,
            "weight.scale": scaled.abs().amax(1) / code_range(weight_bits, weight=True)[1],
        }
        formats = {**params.formats, "input": Format(input_bits, "uniform", "channel", False)}
        sites[name] = replace(params, formats=formats, tensors={key: t.clone() for key, t in tensors.items()})
    return plan.with_sites(sites)


def uneven_table(bits: int, zero_point: int = 0) -> Tensor:
    """A table of that width whose levels crowd around the zero-point: the nearest one for every code."""
    places = torch.linspace(-1, 1, 1 << bits, dtype=torch.float64)
    reach = torch.where(places < 0, zero_point + 128, 127 - zero_point)
    levels = (zero_point + reach * places.sign() * places.abs() ** 1.5).round().unique()
    grid = torch.arange(-128, 128, dtype=torch.float64)
    return levels[(grid[:, None] - levels).abs().argmin(1)].to(torch.int8)


def table_plan(plan: Plan, bits: int, kinds: tuple[Kind, ...] = (Kind.FC2, Kind.PROJ)) -> Plan:
    """`plan`, its inputs at 8 bits, with levels from a table before every integer linear of these kinds."""
    sites = {}
    for name, params in plan.sites.items():
        if params.kind not in kinds or params.is_float:
            continue
        assert params.formats["input"].bits == 8, name
        zero_point = params.tensors["input.zero_point"]
        table = uneven_table(bits, 0 if zero_point.ndim else int(zero_point))
        formats = {**params.formats, "input": replace(params.formats["input"], bits=bits, scheme="table")}
        sites[name] = replace(params, formats=formats, tensors={**params.tensors, "input.table": table})
    return plan.with_sites(sites)


def uneven_levels(bits: int) -> Tensor:
    """Rising levels of that width, -127 and 127 among them, that crowd around 0 and are not symmetric."""
    places = torch.linspace(-1, 1, 1 << bits, dtype=torch.float64)
    levels = (127 * places.sign() * places.abs() ** 1.4 - 0.4 * (1 - places.abs())).round()
    steps = torch.arange(len(levels))
    rising = (levels.to(torch.int64) - steps).cummax(0).values + steps  # 7 bits have twins near 0
    return torch.minimum(rising, 127 - steps.flip(0)).to(torch.int8)


def levels_plan(plan: Plan, bits: int, kinds: tuple[Kind, ...] | None = None) -> Plan:
    """`plan` with weights of that width whose codes name uneven levels, in every integer linear (of these kinds)."""
    sites = {}
    for name, params in plan.sites.items():
        if "weight" not in params.formats or params.is_float or (kinds is not None and params.kind not in kinds):
            continue
        fmt = params.formats["weight"]
        step = params.tensors["weight.scale"] * (code_range(fmt.bits, weight=True)[1] / 127)
        formats = {**params.formats, "weight": replace(fmt, bits=bits, scheme="levels")}
        tensors = {**params.tensors, "weight.scale": step, "weight.levels": uneven_levels(bits)}
        sites[name] = replace(params, formats=formats, tensors=tensors)
    return plan.with_sites(sites)


def softmax_plan(plan: Plan, bits: int, scheme: str) -> Plan:
    """`plan` with every integer P in codes of that scheme and width."""
    fmt = Format(bits, scheme, "row")
    return plan.with_sites(
        {
            name: replace(params, formats={**params.formats, "p": fmt})
            for name, params in plan.sites.items()
            if params.kind is Kind.PV and not params.is_float
        }
    )


def rms(x: Tensor) -> float:
    """Root of the mean square."""
    return float(x.pow(2).mean().sqrt())


def assert_paths_agree(model: nn.Module, plan: Plan, images: Tensor, noise_below: float = 0.5) -> None:
    """Kernels and simulation lie within half of the quantisation error from the reference, which is a share of fp32."""
    with torch.inference_mode():
        wanted, truth = model(images), lampq_rt.compile(model, plan, backend="reference")(images)
        came = lampq_rt.compile(model, plan)(images)
        simulated = simulate(model, plan)(images)
    noise = rms(truth - wanted)
    assert 0 < noise < noise_below * rms(wanted)
    assert rms(came - truth) <= 0.5 * noise and rms(simulated - truth) <= 0.5 * noise


def by_width(found: Iterable[tuple[str, SiteParams]]) -> dict[str, dict[int, SiteParams]]:
    """Steps as they were `searched`, by site and width."""
    table: dict[str, dict[int, SiteParams]] = {}
    for name, params in found:
        table.setdefault(name, {})[params.bits] = params
    return table
