"""Integer modules: codes, scales and the calls into `lampq_rt.kernels.ops`. They know no model family.

Everything that an op needs is a buffer (tensors) or a `Step` (numbers from the plan), which also says in which
container codes of activations lie on a device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lampq_rt import channels, inputs, weights
from lampq_rt.formats import FLOAT_BITS
from lampq_rt.kernels import reference
from lampq_rt.kernels.ops import ops
from lampq_rt.plan import SiteParams


@dataclass(frozen=True)
class Step:
    """How one activation tensor is quantised: numbers only, so that tracing sees constants.

    Where the step is one a channel, or a table gives the levels, the `IntegerLinear` that reads the codes holds that
    (`vectors`, `table`): buffers move with their module, and change with it.

    Attributes:
        inv_scale: fp32(1 / scale), as a Python float; 1 where a channel has its own.
        zero_point: of the signed code; 0 where a channel has its own.
        bits: of the codes that are made, 2..8 (8 where a table gives the levels); 16 for floating point.
        packs: True where a GPU may store two codes a byte.
    """

    inv_scale: float
    zero_point: int
    bits: int
    packs: bool = False

    @classmethod
    def of(cls, params: SiteParams, operand: str = "input", *, width: int = 0) -> Step:
        """The step of a linear's input, `width` codes a row; floating point where the site is."""
        fmt = params.formats[operand]
        if fmt.is_float:
            return FLOAT_STEP
        packs = fmt.code_bits <= 4 and width > 0 and width % reference.NIBBLE_GROUP == 0
        if operand == "input" and channels.by_channel(params):
            return cls(1.0, 0, fmt.code_bits, packs)
        zero_point = params.tensors.get(f"{operand}.zero_point")
        inv_scale = params.tensors[f"{operand}.scale"].reciprocal()
        return cls(float(inv_scale), 0 if zero_point is None else int(zero_point), fmt.code_bits, packs)

    def container(self, x: Tensor, backend: str) -> torch.dtype:
        """The container of these codes on x's device (see `reference.py`)."""
        if x.device.type == "cpu" and backend != "triton":
            return torch.uint8
        return reference.INT4 if self.packs else torch.int8


FLOAT_STEP = Step(1.0, 0, FLOAT_BITS)

Vectors = tuple[Tensor, Tensor]
"""fp32 [K] twice: 1/step and zero-point of every channel of a linear's input."""


class IntegerLinear(nn.Module):
    """A linear on codes. Buffers are those of design rule 5: y = (acc + column) * scale + bias.

    Where the plan gives every channel of its input a step (`channels`), `input_inv_scale` and `input_offset` are
    fp32 [K], which whoever makes the codes takes from here; else None. So is `table`, int8 [256], where the plan gives
    its input levels from a table: what comes, and what the dot product reads, are then levels of the 8-bit grid.
    `levels`, int8 [16], are those of the weight's packed codes where its scheme is "levels" (`weights.container`).

    Args:
        weight: fp32 [N, K].
        bias: fp32 [N] or None.
        params: formats and steps of the site; not floating point.
        gamma: fp32 [N], LayerScale to fold into scale and bias, or None.
        backend: see `lampq_rt.compiler.BACKENDS`.
    """

    w_q: Tensor
    scale: Tensor
    column: Tensor
    bias: Tensor | None
    input_inv_scale: Tensor | None
    input_offset: Tensor | None
    table: Tensor | None
    levels: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        params: SiteParams,
        gamma: Tensor | None = None,
        backend: str = "native",
    ) -> None:
        super().__init__()
        self.backend = backend
        self.w_bits = params.formats["weight"].bits
        self.out_features, self.in_features = weight.shape
        self.input = Step.of(params, width=self.in_features)
        self.has_gamma = gamma is not None
        codes = weights.weight_codes(weight.detach().float(), params)
        w_q, levels = weights.container(codes, params)
        values = weights.values(codes, params)
        self.register_buffer("w_q", w_q)
        self.register_buffer("levels", levels)
        self.register_buffer("scale", product_scale(params, weight.device, gamma))
        self.register_buffer("column", reference.column_constant(values, self.input.zero_point))
        if channels.by_channel(params):
            bias = channels.folded_bias(bias, values, params, gamma)
        elif bias is not None:
            bias = bias.detach().float()
            bias = bias.clone() if gamma is None else bias * gamma.detach().float()
        self.register_buffer("bias", bias)
        inv_scale, offset = channels.vectors(params)
        self.register_buffer("input_inv_scale", inv_scale)
        self.register_buffer("input_offset", offset)
        table = inputs.table_of(params)
        self.register_buffer("table", None if table is None else table.clone())

    @property
    def vectors(self) -> Vectors | None:
        """What makes codes for this linear beside `input`; None where it has one step for all channels."""
        if self.input_inv_scale is None or self.input_offset is None:
            return None
        return self.input_inv_scale, self.input_offset

    def codes(self, x: Tensor) -> tuple[float, int, int, torch.dtype, Tensor | None]:
        """The ops' last arguments where they make codes for this linear.

        Args:
            x: any tensor on the device where the codes will lie.

        Returns:
            1/step, zero-point, bits (2..8), container, and `table`, int8 [256] or None. Where the input has steps by
            channel, `vectors` hold what the first two do not say.
        """
        step = self.input
        return step.inv_scale, step.zero_point, step.bits, step.container(x, self.backend), self.table

    @property
    def clips_below_zero(self) -> bool:
        """True where 0 is the input's least code: then making codes is a ReLU already, at no cost."""
        least, _ = reference.code_range(self.input.bits)
        if self.input_offset is None:
            return self.input.zero_point == least
        return bool((self.input_offset == least).all())

    def quantize(self, x: Tensor) -> Tensor:
        """Codes in this linear's input format.

        Args:
            x: fp32, fp16 or bf16 [..., K].

        Returns:
            [..., K] in `input`'s container on x's device; uint8 [..., K/2] where that is int4.
        """
        if self.vectors is not None:
            return ops(self.backend).quantize_channels(x, *self.vectors, *self.codes(x)[2:])
        return ops(self.backend).quantize(x, *self.codes(x))

    def to_codes(self, x_q: Tensor, reader: IntegerLinear, activation: str = "none") -> Tensor:
        """Codes [..., N] for the next linear.

        Args:
            x_q: codes [..., K].
            reader: whose input they are.
            activation: "none" or "gelu".
        """
        args, run = (x_q, self.w_q, self.scale, self.column, self.bias, activation), ops(self.backend)
        if reader.vectors is not None:
            tail = (*reader.vectors, *reader.codes(x_q)[2:])
            return run.linear_requant_channels(*args, *tail, levels=self.levels)
        return run.linear_requant(*args, *reader.codes(x_q), levels=self.levels)

    def to_float(self, x_q: Tensor, dtype: torch.dtype = torch.float32, activation: str = "none") -> Tensor:
        """[..., N] in `dtype`."""
        args = (x_q, self.w_q, self.scale, self.column, self.bias, activation)
        return ops(self.backend).linear_float(*args, dtype, levels=self.levels)

    def add_to(self, x: Tensor, x_q: Tensor) -> None:
        """x += the result, in place.

        Args:
            x: fp32, fp16 or bf16 [..., N]; the sum is formed in fp32.
            x_q: codes [..., K] as `quantize` makes them.
        """
        args = (x, x_q, self.w_q, self.scale, self.column, self.bias)
        ops(self.backend).linear_residual(*args, levels=self.levels)

    def add_to_and_norm(self, x: Tensor, x_q: Tensor, norm: QuantizingNorm, reader: IntegerLinear) -> Tensor:
        """x += the result, in place, and the new x normalised.

        Args:
            x: fp32, fp16 or bf16 [..., N]; the sum is formed in fp32.
            x_q: codes [..., K] as `quantize` makes them.
            norm: of a LayerNorm over N (`is_layernorm`).
            reader: whose input the codes are; with one step for all channels.

        Returns:
            Codes [..., N] in the container of `reader`'s input.
        """
        args = (x, x_q, self.w_q, self.scale, self.column, self.bias)
        tail = (*norm.layernorm(), *reader.codes(x))
        return ops(self.backend).linear_residual_layernorm(*args, *tail, levels=self.levels)

    def extra_repr(self) -> str:
        """For print(model)."""
        steps = "" if self.vectors is None else " by channel"
        steps += "" if self.table is None else " from a table"
        widths = f"weight={self.w_bits} bits, input={self.input.bits} bits{steps}"
        return f"{self.in_features}, {self.out_features}, {widths}"


class QuantizingNorm(nn.Module):
    """A normalisation that gives codes in the format of the linear that follows.

    Args:
        norm: the original; a LayerNorm is fused with the quantisation, any other is run as it is.
    """

    def __init__(self, norm: nn.Module, backend: str) -> None:
        super().__init__()
        self.norm, self.backend = norm, backend

    @property
    def is_layernorm(self) -> bool:
        """True where the kernels have the normalisation."""
        return isinstance(self.norm, nn.LayerNorm)

    def layernorm(self) -> tuple[Tensor | None, Tensor | None, float]:
        """Weight, bias and eps of the LayerNorm."""
        assert isinstance(self.norm, nn.LayerNorm)
        return self.norm.weight, self.norm.bias, self.norm.eps

    def forward(self, x: Tensor, reader: IntegerLinear) -> Tensor:
        """Floating point [..., D] to codes [..., D] for `reader`."""
        if self.is_layernorm:
            return ops(self.backend).layernorm_quantize(x, *self.layernorm(), *reader.codes(x))
        return ops(self.backend).quantize(self.norm(x.float()), *reader.codes(x))


class IntegerAttention(nn.Module):
    """Both attention matmuls on codes, softmax between them.

    Args:
        qk: parameters of the QK^T site.
        pv: parameters of the PV site.
        heads: number of heads.
        head_dim: channels of a head.
    """

    steps: Tensor
    logit_scale: Tensor
    v_scale: Tensor

    def __init__(self, qk: SiteParams, pv: SiteParams, heads: int, head_dim: int, backend: str = "native") -> None:
        super().__init__()
        self.backend, self.heads = backend, heads
        self.p_bits, self.p_scheme = pv.formats["p"].bits, pv.formats["p"].scheme
        self.qk_bits, self.v_bits = qk.bits, pv.formats["v"].bits
        q, k, v = qk.tensors["q.scale"], qk.tensors["k.scale"], pv.tensors["v.scale"]
        steps = torch.cat([q, k, v]).reciprocal().repeat_interleave(head_dim)
        self.register_buffer("steps", steps)  # 1/step of every column of qkv, fp32 [3*H*d]
        self.register_buffer("logit_scale", reference.logit_scale(q, k, head_dim))
        self.register_buffer("v_scale", v.clone())

    def heads_from_codes(self, qkv: IntegerLinear, x_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v codes from the codes that enter the qkv linear.

        Args:
            qkv: the linear, of 3*H*d outputs.
            x_q: codes [B, N, K] as `qkv.quantize` makes them.

        Returns:
            q and k, int8 [B, H, N, d], and v transposed, int8 [B, H, d, N_pad], zero in the padding.
        """
        args = (x_q, qkv.w_q, qkv.scale, qkv.column, qkv.bias, self.heads, self.steps, self.qk_bits, self.v_bits)
        return ops(self.backend).linear_qkv(*args, levels=qkv.levels)

    def heads_from_float(self, qkv: Tensor, q_norm: nn.Module, k_norm: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """Codes as `heads_from_codes`, from floating point [B, N, 3*H*d]; q and k pass their LayerNorms, if any."""
        tail = (self.heads, self.steps, self.qk_bits, self.v_bits)
        if isinstance(q_norm, nn.LayerNorm) and isinstance(k_norm, nn.LayerNorm):
            norms = (True, q_norm.weight, q_norm.bias, k_norm.weight, k_norm.bias, q_norm.eps)
            return ops(self.backend).heads_quantize(qkv, *norms, *tail)
        return ops(self.backend).heads_quantize(qkv, False, None, None, None, None, 0.0, *tail)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Step,
        dtype: torch.dtype = torch.float32,
        table: Tensor | None = None,
    ) -> Tensor:
        """Codes (or `dtype` where `out` is floating point) [B, N, H*d] for the output projection, which has `table`."""
        if out.bits != FLOAT_BITS:
            dtype = out.container(q, self.backend)
        p, tail = (self.p_bits, self.p_scheme), (out.inv_scale, out.zero_point, out.bits, dtype, table)
        return ops(self.backend).attention(q, k, v, self.logit_scale, self.v_scale, *p, *tail)

    def extra_repr(self) -> str:
        """For print(model)."""
        p = f"p={self.p_bits} bits ({self.p_scheme})"
        return f"heads={self.heads}, qk={self.qk_bits} bits, {p}, v={self.v_bits} bits"


class IntegerHead(nn.Module):
    """A classifier on floating-point features: quantise, multiply, dequantise."""

    def __init__(self, linear: IntegerLinear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """fp32 [..., K] to fp32 [..., N]."""
        return self.linear.to_float(self.linear.quantize(x))


class IntegerPatchConv(nn.Module):
    """A convolution of disjoint patches as a linear on codes.

    Args:
        linear: weight [N, C*ph*pw].
        patch: (ph, pw).
    """

    def __init__(self, linear: IntegerLinear, patch: tuple[int, int]) -> None:
        super().__init__()
        self.linear, self.patch = linear, patch
        # Codes are made before the patches are gathered: two of one byte would have to part.
        linear.input = replace(linear.input, packs=False)

    def forward(self, images: Tensor) -> Tensor:
        """fp32 [B, C, H, W] to fp32 [B, N, H/ph, W/pw]; a remainder of H or W is left out, as a convolution does."""
        (ph, pw), (height, width) = self.patch, images.shape[-2:]
        rows, columns = height // ph, width // pw
        codes = self.linear.quantize(images[..., : rows * ph, : columns * pw])
        patches = codes.unflatten(-1, (columns, pw)).unflatten(-3, (rows, ph))  # [B, C, rows, ph, columns, pw]
        x_q = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [B, rows*columns, C*ph*pw]
        return self.linear.to_float(x_q).transpose(1, 2).unflatten(2, (rows, columns))


def product_scale(params: SiteParams, device: torch.device, gamma: Tensor | None = None) -> Tensor:
    """fp32 [N]: step of the input times steps of the weight (times LayerScale), rounded once (rule 5).

    Steps by channel are in the weight already.
    """
    product = params.tensors["weight.scale"].double()
    if not channels.by_channel(params):
        product = product * params.tensors["input.scale"].double()
    product = product.to(device)
    return (product if gamma is None else product * gamma.detach().double()).float()


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Floating-point attention of [B, H, N, d], to [B, N, H*d]."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
