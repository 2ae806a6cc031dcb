"""The transformer block on codes, and how a timm VisionTransformer is rebuilt from such blocks.

Between two residual additions everything stays integer where the plan says so; a part that the plan leaves in
floating point takes and gives floating point, and its neighbours quantise or dequantise inside their own ops, in the
precision of `modules_float.Stream`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from lampq_rt.errors import ModelError
from lampq_rt.kernels.reference import NIBBLE_GROUP
from lampq_rt.modules import (
    FLOAT_STEP,
    IntegerAttention,
    IntegerHead,
    IntegerLinear,
    IntegerPatchConv,
    QuantizingNorm,
    Step,
    softmax_attention,
)
from lampq_rt.modules_float import Advanced, Part, Stream
from lampq_rt.plan import SiteParams
from lampq_rt.programs import Programs
from lampq_rt.sites import Description, Kind


class AttentionPart(Part):
    """x += proj(attention(qkv(norm(x)))), each of the three integer or in floating point."""

    qkv: Any  # IntegerLinear or nn.Linear, as proj
    proj: Any

    def __init__(
        self, block: Block, prefix: str, sites: Mapping[str, SiteParams], backend: str, stream: Stream
    ) -> None:
        super().__init__()
        self.stream = stream
        attn = block.attn
        self.heads, self.head_dim = attn.num_heads, attn.head_dim
        qkv, proj = sites[f"{prefix}.attn.qkv"], sites[f"{prefix}.attn.proj"]
        qk, pv = sites[f"{prefix}.attn.qk"], sites[f"{prefix}.attn.pv"]
        gamma = getattr(block.ls1, "gamma", None)
        self.qkv = _linear(attn.qkv, qkv, None, backend)
        self.proj = _linear(attn.proj, proj, gamma, backend)
        self.norm = _norm(block.norm1, self.qkv, backend)
        self.scale = nn.Identity() if isinstance(self.proj, IntegerLinear) else block.ls1
        self.q_norm, self.k_norm = attn.q_norm, attn.k_norm
        self.matmuls = None if qk.is_float else IntegerAttention(qk, pv, self.heads, self.head_dim, backend)
        out_step = self.proj.input if isinstance(self.proj, IntegerLinear) else FLOAT_STEP
        # A group of channels that share bytes must not cross heads.
        self.out_step = replace(out_step, packs=out_step.packs and self.head_dim % NIBBLE_GROUP == 0)
        self.plain = isinstance(self.qkv, IntegerLinear) and isinstance(self.q_norm, nn.Identity)

    @property
    def reader(self) -> nn.Module:
        """See `Part.reader`."""
        return cast(nn.Module, self.qkv)

    @property
    def only_kernels(self) -> bool:
        """See `Part.only_kernels`."""
        integer = self.plain and self.matmuls is not None and isinstance(self.proj, IntegerLinear)
        return integer and isinstance(self.norm, QuantizingNorm) and self.norm.is_layernorm

    def islands(self) -> list[nn.Module]:
        """See `Part`; norms of q and k that precede integer matmuls are part of an op, in fp32."""
        norms = (self.q_norm, self.k_norm) if self.matmuls is None else ()
        return _floating(self.norm, self.qkv, *norms, self.proj, self.scale)

    def advance(self, x: Tensor, normed: Tensor, follower: Part | None) -> Advanced:
        """See `Part.advance`."""
        out = self._mixed_tokens(normed, self.out_step)
        return _add_linear(x, self.proj, self.scale, out, follower, out_is_float=self.matmuls is None)

    def _mixed_tokens(self, x: Tensor, out: Step) -> Tensor:
        """What enters the projection: codes in its format from integer matmuls, else floating point."""
        dtype = self.island(x)
        table = self.proj.table if isinstance(self.proj, IntegerLinear) else None
        if self.matmuls is not None and self.plain:
            return self.matmuls(*self.matmuls.heads_from_codes(self.qkv, x), out, dtype, table)
        if not isinstance(self.qkv, IntegerLinear):
            qkv = self.qkv(x)
        else:  # codes of q, k and v are made from fp32: nothing is rounded between two steps (rule 1)
            qkv = self.qkv.to_float(x, dtype if self.matmuls is None else torch.float32)
        if self.matmuls is not None:
            return self.matmuls(*self.matmuls.heads_from_float(qkv, self.q_norm, self.k_norm), out, dtype, table)
        q, k, v = qkv.unflatten(-1, (3, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        return softmax_attention(self.q_norm(q), self.k_norm(k), v)


class MlpPart(Part):
    """x += fc2(act(fc1(norm(x)))), each linear integer or in floating point."""

    def __init__(
        self, block: Block, prefix: str, sites: Mapping[str, SiteParams], backend: str, stream: Stream
    ) -> None:
        super().__init__()
        self.stream = stream
        mlp = block.mlp
        self.fc1 = _linear(mlp.fc1, sites[f"{prefix}.mlp.fc1"], None, backend)
        self.fc2 = _linear(mlp.fc2, sites[f"{prefix}.mlp.fc2"], getattr(block.ls2, "gamma", None), backend)
        self.norm = _norm(block.norm2, self.fc1, backend)
        self.scale = nn.Identity() if isinstance(self.fc2, IntegerLinear) else block.ls2
        self.act = mlp.act
        self.activation = _fused_activation(mlp.act, self.fc1, self.fc2)

    @property
    def reader(self) -> nn.Module:
        """See `Part.reader`."""
        return self.fc1

    def advance(self, x: Tensor, normed: Tensor, follower: Part | None) -> Advanced:
        """See `Part.advance`."""
        dtype = self.island(x)
        if not isinstance(self.fc1, IntegerLinear):
            hidden = self.act(self.fc1(normed))
        elif self.activation is not None:
            if isinstance(self.fc2, IntegerLinear):
                hidden = self.fc1.to_codes(normed, self.fc2, self.activation)
            else:
                hidden = self.fc1.to_float(normed, dtype, self.activation)
            return _add_linear(x, self.fc2, self.scale, hidden, follower, out_is_float=False)
        else:
            if isinstance(self.fc2, IntegerLinear):
                dtype = torch.float32  # nothing is rounded between two steps (rule 1)
            hidden = self.act(self.fc1.to_float(normed, dtype))
        return _add_linear(x, self.fc2, self.scale, hidden, follower, out_is_float=True)

    @property
    def only_kernels(self) -> bool:
        """See `Part.only_kernels`."""
        integer = self.activation is not None and isinstance(self.fc2, IntegerLinear)
        return integer and isinstance(self.norm, QuantizingNorm) and self.norm.is_layernorm

    def islands(self) -> list[nn.Module]:
        """See `Part`."""
        return _floating(self.norm, self.fc1, self.fc2, self.scale)


class FloatPart(Part):
    """x + scale(layer(norm(x))) as the original computes it, for a half that no site covers."""

    def __init__(self, norm: nn.Module, layer: nn.Module, scale: nn.Module, stream: Stream) -> None:
        super().__init__()
        self.norm, self.layer, self.scale, self.stream = norm, layer, scale, stream

    def advance(self, x: Tensor, normed: Tensor, follower: Part | None) -> Advanced:
        """See `Part.advance`."""
        x = x + self.scale(self.layer(normed)).to(x.dtype)
        return x, None if follower is None else follower.enter(x)

    def islands(self) -> list[nn.Module]:
        """See `Part`."""
        return [self.norm, self.layer, self.scale]


class IntegerBlock(nn.Module):
    """One pre-norm transformer block: attention, then MLP."""

    attention: Any  # a `Part`, as mlp
    mlp: Any

    def __init__(self, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.attention, self.mlp = attention, mlp

    def advance(self, x: Tensor, normed: Tensor | None, follower: Part | None) -> Advanced:
        """See `Part.advance`; without `normed`, x is normalised here."""
        if normed is None:
            normed = self.attention.enter(x)
        x, normed = self.attention.advance(x, normed, self.mlp)
        assert normed is not None
        return self.mlp.advance(x, normed, follower)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, N, D] to [B, N, D]; `x` is left as it is."""
        if attn_mask is not None or is_causal:
            raise ModelError("attention masks are not supported by quantised models")
        return self.advance(x.clone(memory_format=torch.contiguous_format), None, None)[0]


class IntegerBlocks(nn.Sequential):
    """The blocks in a row; one copy of the residual stream at the start instead of one a block.

    Args:
        blocks: `IntegerBlock`s, and originals where nothing in a block could be quantised.
        stream: precision of the residual stream.
    """

    def __init__(self, *blocks: nn.Module, stream: Stream) -> None:
        super().__init__(*blocks)
        self.stream = stream
        parts = [part for block in blocks if isinstance(block, IntegerBlock) for part in (block.attention, block.mlp)]
        whole = len(parts) == 2 * len(blocks) and all(part.only_kernels for part in parts)
        self._programs = Programs(self, whole and all(part.norm.backend == "native" for part in parts))

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] to [B, N, D] of the same dtype; `x` is left as it is.

        Kernels write rows of the stream, and tokens of a model without a class token come transposed.
        """
        if self._programs.serves(x):
            return self._programs(x.contiguous(), self._run)
        stream = x.to(self.stream.dtype(x.device), copy=True, memory_format=torch.contiguous_format)
        return self._run(stream).to(x.dtype)

    def _run(self, stream: Tensor) -> Tensor:
        """The new residual stream; may write to `stream`."""
        normed: Tensor | None = None
        blocks = list(self)
        for block, after in zip(blocks, [*blocks[1:], None], strict=True):
            if isinstance(block, IntegerBlock):
                follower = after.attention if isinstance(after, IntegerBlock) else None
                stream, normed = block.advance(stream, normed, follower)
            else:
                stream = block(stream.float()).to(stream.dtype)
        return stream

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IntegerBlocks:
        self._programs.forget()
        return super()._apply(fn, recurse)

    def __getitem__(self, index: Any) -> Any:
        """A block, or a run of them that keeps the dtype of the stream."""
        if isinstance(index, slice):
            return IntegerBlocks(*list(self)[index], stream=self.stream)
        return super().__getitem__(index)


def integer_vit(
    model: VisionTransformer,
    description: Description,
    sites: Mapping[str, SiteParams],
    backend: str,
    stream: Stream,
) -> nn.Module:
    """A copy of a timm VisionTransformer that runs the integer ops of `backend` at its sites.

    Weights that become codes are not copied first, so that the peak is one floating-point model and one integer model.
    """
    replaced = [s for s in description.sites if not s.is_matmul and not sites[s.name].is_float]
    kept: dict[int, Any] = {id(p): p for s in replaced for p in model.get_submodule(s.name).parameters()}
    twin = copy.deepcopy(model, memo=kept)
    names = {site.name for site in description.sites}
    blocks: list[nn.Module] = []
    for index, block in enumerate(twin.blocks):
        prefix = f"blocks.{index}"
        attention, mlp = f"{prefix}.attn.qkv" in names, f"{prefix}.mlp.fc1" in names
        if not attention and not mlp:
            blocks.append(block)
            continue
        blocks.append(
            IntegerBlock(
                AttentionPart(block, prefix, sites, backend, stream)
                if attention
                else FloatPart(block.norm1, block.attn, block.ls1, stream),
                MlpPart(block, prefix, sites, backend, stream)
                if mlp
                else FloatPart(block.norm2, block.mlp, block.ls2, stream),
            )
        )
    twin.blocks = IntegerBlocks(*blocks, stream=stream)
    for site in replaced:
        if site.kind is Kind.PATCH_EMBED:
            conv = twin.patch_embed.proj
            linear = IntegerLinear(conv.weight.flatten(1), conv.bias, sites[site.name], backend=backend)
            twin.patch_embed.proj = IntegerPatchConv(linear, conv.kernel_size)
        elif site.kind is Kind.HEAD:
            head = twin.get_submodule(site.name)
            setattr(
                twin, site.name, IntegerHead(IntegerLinear(head.weight, head.bias, sites[site.name], backend=backend))
            )
    return twin.float().eval()


def _linear(linear: nn.Linear, params: SiteParams, gamma: Tensor | None, backend: str) -> nn.Module:
    if params.is_float:
        return linear
    return IntegerLinear(linear.weight, linear.bias, params, gamma, backend)


def _norm(norm: nn.Module, linear: nn.Module, backend: str) -> nn.Module:
    return QuantizingNorm(norm, backend) if isinstance(linear, IntegerLinear) else norm


def _floating(*modules: nn.Module) -> list[nn.Module]:
    """Those that the plan leaves in floating point."""
    return [module for module in modules if not isinstance(module, (IntegerLinear, QuantizingNorm))]


def _add_linear(
    x: Tensor, linear: nn.Module, scale: nn.Module, hidden: Tensor, follower: Part | None, *, out_is_float: bool
) -> Advanced:
    """x + scale(linear(hidden)), in place where the linear is integer, and the follower's view of it."""
    if isinstance(linear, IntegerLinear):
        codes = linear.quantize(hidden) if out_is_float else hidden
        norm = None if follower is None else follower.norm
        if isinstance(norm, QuantizingNorm) and norm.is_layernorm:
            assert follower is not None and isinstance(follower.reader, IntegerLinear)
            return x, linear.add_to_and_norm(x, codes, norm, follower.reader)
        linear.add_to(x, codes)
    else:
        x = x + scale(linear(hidden)).to(x.dtype)
    return x, None if follower is None else follower.enter(x)


def _fused_activation(act: nn.Module, fc1: nn.Module, fc2: nn.Module) -> str | None:
    """What fc1's op applies in the place of `act`, or None where torch has to apply it."""
    if not isinstance(fc1, IntegerLinear):
        return None
    if type(act).__name__ == "GELU" and getattr(act, "approximate", "none") == "none":
        return "gelu"  # the erf form
    if type(act) is nn.ReLU and isinstance(fc2, IntegerLinear) and fc2.clips_below_zero:
        return "none"
    return None
