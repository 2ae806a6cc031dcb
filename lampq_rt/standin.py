"""A plan for measuring latency: every site at one width, with steps from the ranges of a single forward pass.

It takes seconds where a calibration takes minutes, and needs no calibrator. Latency and memory depend on widths and
shapes, not on the values of steps; for accuracy, calibrate.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lampq_rt import backends
from lampq_rt.formats import Format
from lampq_rt.kernels.reference import code_range
from lampq_rt.plan import Plan, SiteParams, weights_digest
from lampq_rt.simulate import SimulatedLinear, Simulation
from lampq_rt.sites import Site


def stand_in_plan(
    model: nn.Module, images: Tensor, bits: int | Mapping[str, int], *, input_bits: int | None = None
) -> Plan:
    """The plan of `model` with every site at one width, or one width a kind.

    Args:
        model: in floating point; copied, never changed.
        images: [n, C, H, W] fp32; random ones will do.
        bits: width of every site, 2..8 or 16 for floating point; or widths by kind ("qkv", "head", …) with "default"
            for the others. A patch embedding's input stays at 8.
        input_bits: width of the linears' inputs where it differs from their weights'.

    Raises:
        ModelError: the model is of no supported family.
        FormatError: no such width.
    """
    simulation = Simulation(model)
    seen: dict[str, tuple[Tensor, ...]] = {}
    hooks = [
        simulation.module(site.name).register_forward_pre_hook(
            lambda module, args, name=site.name: seen.update({name: args})
        )
        for site in simulation.description.sites
    ]
    with torch.inference_mode():
        simulation(images)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        sites = {}
        for site in simulation.description.sites:
            width = bits if isinstance(bits, int) else bits.get(site.kind, bits.get("default", 8))
            formats = backends.formats(site.kind, width, input_bits=input_bits)
            sites[site.name] = _params(site, formats, seen[site.name], simulation)
    provenance = {"recipe": {"name": "stand-in", "description": "one width, steps from one forward pass"}}
    return Plan(simulation.description.architecture, weights_digest(model), sites, provenance)


def _params(site: Site, formats: dict[str, Format], seen: tuple[Tensor, ...], simulation: Simulation) -> SiteParams:
    """Steps of one site in these formats; `seen` is what its module was called with."""
    tensors: dict[str, Tensor] = {}
    module = simulation.module(site.name)
    if all(fmt.is_float for fmt in formats.values()):
        pass
    elif isinstance(module, SimulatedLinear):
        rows = module.original.weight.flatten(1)
        tensors["weight.scale"] = _symmetric(rows.abs().amax(1), formats["weight"].bits)
        low, high = seen[0].min().clamp(max=0.0), seen[0].max().clamp(min=0.0)
        bottom, top = code_range(formats["input"].bits)
        scale = _positive((high - low) / (top - bottom))
        tensors["input.scale"] = scale
        tensors["input.zero_point"] = (bottom - low / scale).round().clamp(bottom, top).to(torch.int32)
    else:  # q and k, or (softmax's input and) v, all [B, H, N, d]
        operands = {"q": seen[0], "k": seen[1]} if "q" in formats else {"v": seen[1]}
        for operand, x in operands.items():
            tensors[f"{operand}.scale"] = _symmetric(x.abs().amax((0, 2, 3)), formats[operand].bits)
    return SiteParams(site.kind, formats, {key: t.clone() for key, t in tensors.items()}, site.params)


def _symmetric(largest: Tensor, bits: int) -> Tensor:
    return _positive(largest / code_range(bits)[1])


def _positive(scale: Tensor) -> Tensor:
    """Steps that divide: 1 where a range is empty."""
    return torch.where(scale > 0, scale, torch.ones_like(scale)).float()
