"""timm's VisionTransformer: ViT, DeiT (also distilled), DINOv2, register tokens, LayerScale, qk-norm, any pooling."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import Attention, Mlp, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from lampq_rt.edits import shared_copy
from lampq_rt.errors import ModelError
from lampq_rt.plan import SiteParams
from lampq_rt.simulate import SimulatedLinear, SimulatedPV, SimulatedQK
from lampq_rt.sites import Description, Kind, Site, Skipped


class TimmVit:
    """Adapter of timm's `VisionTransformer` and its subclasses."""

    def matches(self, model: nn.Module) -> bool:
        """See `Adapter.matches`."""
        return isinstance(model, VisionTransformer)

    def describe(self, model: nn.Module) -> Description:
        """See `Adapter.describe`."""
        assert isinstance(model, VisionTransformer)
        sites: list[Site] = []
        reasons: dict[str, str] = {}
        tokens = _tokens(model)
        reason = patch_embed_obstacle(model.patch_embed)
        if reason:
            reasons["patch_embed"] = reason
        else:
            conv = model.patch_embed.proj
            fan_in = conv.in_channels * conv.kernel_size[0] * conv.kernel_size[1]
            patches = tokens - model.num_prefix_tokens
            sites.append(
                _linear_site("patch_embed.proj", Kind.PATCH_EMBED, None, fan_in, conv.out_channels, patches, 0)
            )
        for index, block in enumerate(model.blocks):
            _describe_block(index, block, tokens, sites, reasons)
        for name in ("head", "head_dist"):
            head = getattr(model, name, None)
            if isinstance(head, nn.Linear):
                rows = 1 if model.global_pool else tokens
                sites.append(_linear_site(name, Kind.HEAD, None, head.in_features, head.out_features, rows, 0))
        if not sites:
            found = Counter(
                type(m).__name__ for m in model.modules() if next(m.parameters(recurse=False), None) is not None
            )
            parts = ", ".join(f"{count} {name}" for name, count in sorted(found.items()))
            raise ModelError(f"nothing to quantise in this {type(model).__name__}: found {parts or 'no parameters'}")
        return Description(architecture_name(model), tuple(sites), _skipped(model, sites, reasons))

    def simulate(self, model: nn.Module) -> nn.Module:
        """See `Adapter.simulate`."""
        description = self.describe(model)
        twin = shared_copy(model)
        for site in description.sites:
            if site.kind is Kind.QK:
                name = site.name.removesuffix(".qk")
                _replace(twin, name, _SimulatedAttention(twin.get_submodule(name)))
        for site in description.sites:
            if not site.is_matmul:
                linear = twin.get_submodule(site.name)
                assert isinstance(linear, (nn.Linear, nn.Conv2d))
                _replace(twin, site.name, SimulatedLinear(linear))
        return twin

    def integer(
        self, model: nn.Module, sites: Mapping[str, SiteParams], backend: str, residual_dtype: str = "float16"
    ) -> nn.Module:
        """See `Adapter.integer`."""
        from lampq_rt.modules_float import Stream
        from lampq_rt.modules_vit import integer_vit

        stream = Stream(getattr(torch, residual_dtype))
        return integer_vit(model, self.describe(model), sites, backend, stream)

    def shortened(self, model: nn.Module, blocks: int) -> nn.Module:
        """See `Adapter.shortened`."""
        twin: Any = copy.copy(model)
        twin._modules = {**model._modules, "blocks": nn.Sequential(*list(twin.blocks)[:blocks])}
        return twin

    def architecture(self, model: nn.Module) -> dict[str, Any]:
        """See `Adapter.architecture`."""
        from lampq_rt.adapters import timm_architecture

        return timm_architecture.describe(model)

    def skeleton(self, architecture: Mapping[str, Any]) -> nn.Module:
        """See `Adapter.skeleton`."""
        from lampq_rt.adapters import timm_architecture

        return timm_architecture.build(architecture)


def architecture_name(model: nn.Module) -> str:
    """timm's name of the model, or its class name where it was built by hand."""
    config = getattr(model, "pretrained_cfg", None) or {}
    name = config.get("architecture") if isinstance(config, Mapping) else getattr(config, "architecture", None)
    return name or type(model).__name__


def patch_embed_obstacle(embed: PatchEmbed) -> str | None:
    """Why the patch embedding cannot be quantised, or None."""
    if type(embed) is not PatchEmbed:
        return f"{type(embed).__name__} is not timm's PatchEmbed"
    conv = embed.proj
    if not isinstance(conv, nn.Conv2d) or conv.kernel_size != conv.stride or conv.padding != (0, 0) or conv.groups != 1:
        return "its convolution is not one of disjoint patches"
    return None


def attention_obstacle(block: Block) -> str | None:
    """Why a block's attention cannot be quantised, or None."""
    if type(block) is not Block:
        return f"{type(block).__name__} is not timm's pre-norm Block"
    attn = block.attn
    if type(attn) is not Attention:
        return f"{type(attn).__name__} is not timm's Attention"
    if getattr(attn, "gate", None) is not None or not isinstance(attn.norm, nn.Identity):
        return "gated or normalised attention output"
    norms = (attn.q_norm, attn.k_norm)
    if not all(isinstance(n, nn.Identity) for n in norms) and not all(isinstance(n, nn.LayerNorm) for n in norms):
        return f"qk-norm is a {type(attn.q_norm).__name__}, not a LayerNorm"
    return None


def mlp_obstacle(block: Block) -> str | None:
    """Why a block's MLP cannot be quantised, or None."""
    if type(block) is not Block:
        return f"{type(block).__name__} is not timm's pre-norm Block"
    mlp = block.mlp
    if type(mlp) is not Mlp or not isinstance(mlp.fc1, nn.Linear):
        return f"{type(mlp).__name__} is not timm's Mlp of two linears"
    if not isinstance(mlp.norm, nn.Identity):
        return "normalisation inside the MLP"
    return None


def _describe_block(index: int, block: Block, tokens: int, sites: list[Site], reasons: dict[str, str]) -> None:
    prefix = f"blocks.{index}"
    reason = attention_obstacle(block)
    if reason:
        reasons[f"{prefix}.attn"] = reason
    else:
        attn = block.attn
        heads, d = attn.num_heads, attn.head_dim
        qkv, proj = attn.qkv, attn.proj
        sites += [
            _linear_site(f"{prefix}.attn.qkv", Kind.QKV, index, qkv.in_features, qkv.out_features, tokens, heads),
            Site(f"{prefix}.attn.qk", Kind.QK, index, d, tokens, heads * tokens, heads, 0),
            Site(f"{prefix}.attn.pv", Kind.PV, index, tokens, d, heads * tokens, heads, 0),
            _linear_site(f"{prefix}.attn.proj", Kind.PROJ, index, proj.in_features, proj.out_features, tokens, heads),
        ]
    reason = mlp_obstacle(block)
    if reason:
        reasons[f"{prefix}.mlp"] = reason
    else:
        for name, kind, linear in (("fc1", Kind.FC1, block.mlp.fc1), ("fc2", Kind.FC2, block.mlp.fc2)):
            k, n = linear.in_features, linear.out_features
            sites.append(_linear_site(f"{prefix}.mlp.{name}", kind, index, k, n, tokens, 0))


def _linear_site(name: str, kind: Kind, block: int | None, k: int, n: int, rows: int, heads: int) -> Site:
    return Site(name, kind, block, k, n, rows, heads, k * n)


def _tokens(model: VisionTransformer) -> int:
    """Tokens per image at the model's own input size."""
    patches = getattr(model.patch_embed, "num_patches", None)
    if patches is None:
        raise ModelError(f"{architecture_name(model)} was built without an image size; give it one (img_size=…)")
    return patches + model.num_prefix_tokens


def _skipped(model: nn.Module, sites: list[Site], reasons: Mapping[str, str]) -> tuple[Skipped, ...]:
    """Modules with matrix weights that no site covers, named at the level that a reason was given for."""
    covered = {site.name for site in sites}
    skipped: dict[str, Skipped] = {}
    for name, module in model.named_modules():
        if name in covered or not isinstance(module, (nn.Linear, nn.Conv2d)):
            continue
        owner = next((o for o in reasons if name == o or name.startswith(f"{o}.")), name)
        skipped.setdefault(owner, Skipped(owner, reasons.get(owner, "not part of a standard block")))
    return tuple(skipped.values())


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


class _SimulatedAttention(nn.Module):
    """timm's Attention with its two matmuls as sites."""

    def __init__(self, attn: Attention) -> None:
        super().__init__()
        self.num_heads, self.head_dim = attn.num_heads, attn.head_dim
        self.qkv, self.q_norm, self.k_norm, self.proj = attn.qkv, attn.q_norm, attn.k_norm, attn.proj
        self.qk, self.pv = SimulatedQK(), SimulatedPV()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, N, D] to [B, N, D]."""
        if attn_mask is not None or is_causal:
            raise ModelError("attention masks are not supported by quantised models")
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # [B, H, N, d]
        out = self.pv(self.qk(self.q_norm(q), self.k_norm(k)), v)
        return self.proj(out.transpose(1, 2).flatten(2))
