"""Plans for tests of the runtime, made without the calibrator: steps from the range of one batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lampq_rt import backends
from lampq_rt.adapters.timm_vit import architecture_name
from lampq_rt.formats import Format
from lampq_rt.kernels import reference
from lampq_rt.plan import Plan, SiteParams, weights_digest
from lampq_rt.simulate import Simulation
from lampq_rt.sites import Site


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
    """A plan with min-max steps; `bits` for all sites, or by the last part of a site's name ("qkv", "pv", "head")."""
    simulation = Simulation(model)
    seen: dict[str, tuple[Tensor, ...]] = {}
    for site in simulation.description.sites:
        module = simulation.module(site.name)
        module.register_forward_hook(lambda _m, args, _out, name=site.name: seen.__setitem__(name, args))
    with torch.no_grad():
        simulation(images)
    sites = {}
    for site in simulation.description.sites:
        width = bits if isinstance(bits, int) else bits.get(site.kind, bits.get("default", 8))
        formats = backends.formats(site.kind, width)
        weight = None if site.is_matmul else model.get_submodule(site.name).weight.detach().flatten(1)
        tensors = {} if width == 16 else _steps(site, formats, seen[site.name], weight)
        sites[site.name] = SiteParams(site.kind, formats, tensors, site.params)
    return Plan(architecture_name(model), weights_digest(model), sites)


def _steps(
    site: Site, formats: dict[str, Format], args: tuple[Tensor, ...], weight: Tensor | None
) -> dict[str, Tensor]:
    if site.is_matmul:
        names = {"qk": {"q": 0, "k": 1}, "pv": {"v": 1}}[site.kind]
        return {f"{n}.scale": _symmetric(args[i].transpose(0, 1).flatten(1), formats[n].bits) for n, i in names.items()}
    low, high = reference.code_range(formats["input"].bits)
    smallest, largest = min(float(args[0].min()), 0.0), max(float(args[0].max()), 0.0)
    scale = torch.tensor((largest - smallest) / (high - low) or 1.0)
    zero_point = torch.tensor(low - round(smallest / float(scale)), dtype=torch.int32)
    assert weight is not None
    return {
        "weight.scale": _symmetric(weight, formats["weight"].bits),
        "input.scale": scale,
        "input.zero_point": zero_point.clamp(low, high),
    }


def _symmetric(rows: Tensor, bits: int) -> Tensor:
    return (rows.abs().amax(1) / reference.code_range(bits)[1]).clamp_min(1e-6)
