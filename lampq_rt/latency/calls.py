"""Which ops a model runs under a plan: read from the calls of a forward pass that computes nothing.

The model is built on the meta device and run on fake tensors of the device in question, so that the list needs neither
weights nor that device, and follows whatever the modules do: fusions, containers of codes, conversions at the edges of
floating-point islands. A call is known by what its time depends on: op, shapes, dtypes and strides of its tensors, and
its options; steps and zero-points are left out. Widths count only where an op does more or less work for them.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lampq_rt.adapters import adapter_for
from lampq_rt.backends import Formats
from lampq_rt.formats import FLOAT_BITS
from lampq_rt.plan import SiteParams
from lampq_rt.quantizers.table import ENTRIES
from lampq_rt.sites import Description, Site

_BY_CHANNEL = {f"lampq::{op}_channels": f"lampq::{op}" for op in ("quantize", "linear_requant")}
"""Ops with a step a channel, and those with one step that do the same work: in a table they are one entry."""

_FREE = "table"
"""An argument left out: what looking levels up adds to the op that makes the codes is below what a table can tell."""

CLAMPED = 7
"""Stands for any width below 8 where an op clamps for it."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor argument.

    Attributes:
        dtype: of its elements.
        shape: of it.
        stride: None where it is contiguous.
        is_weight: True for parameters and buffers, of which every layer has its own.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None
    is_weight: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def __str__(self) -> str:
        stride = "" if self.stride is None else f":{','.join(map(str, self.stride))}"
        return f"{short(self.dtype)}[{','.join(map(str, self.shape))}{stride}]"


@dataclass(frozen=True)
class Call:
    """One call of an op.

    Attributes:
        op: name with namespace and overload, "lampq::linear_float.default".
        args: name and value of every argument: `TensorSpec`s in the place of tensors.
    """

    op: str
    args: tuple[tuple[str, Any], ...]

    @property
    def key(self) -> str:
        """Its entry in a table: op, tensors, then options."""
        texts = [text for name, value in self.args if (text := _text(name, value))]
        return f"{self.op.removesuffix('.default')}({', '.join(texts)})"

    @property
    def weight_bytes(self) -> int:
        """Bytes of the parameters and buffers that it reads."""
        specs = (leaf for _, value in self.args for leaf in tree_leaves(value))
        return sum(spec.nbytes for spec in specs if isinstance(spec, TensorSpec) and spec.is_weight)


@dataclass(frozen=True)
class Counted:
    """A call and how often a forward pass makes it."""

    call: Call
    count: int


Calls = Mapping[str, Counted]
"""The calls of a forward pass by key."""


class CallRecorder(TorchDispatchMode):
    """Collects the calls made while it is active. Views are left out: they move no data.

    Args:
        weights: tensors that count as weights.
        device: "cpu" or "cuda": whose kernels will run.
    """

    def __init__(self, weights: Sequence[Tensor], device: str) -> None:
        super().__init__()
        self.device = device
        self.calls: dict[str, Counted] = {}
        self._weights = {id(tensor) for tensor in weights}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Note a call that computes, run everything."""
        kwargs = dict(kwargs or {})
        result = func(*args, **kwargs)
        before = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        after = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        if before and (writes or not all(_shares(t, before) for t in after)):
            call = self._call(func, args, kwargs)
            seen = self.calls.get(call.key)
            self.calls[call.key] = Counted(call, 1 if seen is None else seen.count + 1)
        return result

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        found = []
        for index, argument in enumerate(func._schema.arguments):
            if index < len(args):
                value = args[index]
            elif argument.name in kwargs:
                value = kwargs[argument.name]
            else:
                continue
            if argument.name == _FREE or (argument.name == "levels" and (value is None or self.device == "cpu")):
                continue  # on a CPU, levels are looked up once, when the weight is laid out anew
            found.append((argument.name, self._spec(func._schema.name, argument.name, value)))
        call = Call(str(func._schema.name) + "." + func._overloadname, tuple(found))
        return _with_one_step(call) if func._schema.name in _BY_CHANNEL else call

    def _spec(self, op: str, name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            dtype, shape = value.dtype, tuple(value.shape)
            if name == "w_q" and dtype == torch.uint8 and self.device == "cpu":
                dtype, shape = torch.int8, (shape[0], 2 * shape[1])  # unpacked once: the op keeps it in oneDNN's layout
            stride = None if value.is_contiguous() else tuple(value.stride())
            return TensorSpec(dtype, shape, stride, id(value) in self._weights)
        if isinstance(value, (list, tuple)):
            return tuple(self._spec(op, name, part) for part in value)
        if name.endswith("bits") and value != FLOAT_BITS:
            clamps = self.device == "cpu" and op.startswith("lampq::linear_requant") and value < 8
            return CLAMPED if clamps else 4 if name == "p_bits" else 8
        if isinstance(value, torch.device):
            return None
        return value


class Tracer:
    """Reads the calls of one model under any choice of formats.

    Args:
        model: in floating point, of a supported family; its weights are not looked at.
        input_size: (C, H, W) of an image.
        device: "cpu" or "cuda": whose kernels will run.
        residual_dtype: of the residual stream on a GPU.

    Raises:
        ModelError: the model is of no supported family.
    """

    def __init__(
        self, model: nn.Module, input_size: Sequence[int], device: str, residual_dtype: str = "float16"
    ) -> None:
        self.adapter = adapter_for(model)
        self.description: Description = self.adapter.describe(model)
        self.input_size, self.device, self.residual_dtype = tuple(input_size), device, residual_dtype
        self._blank = copy.deepcopy(model).to("meta").eval()
        self._sites = {site.name: site for site in self.description.sites}

    def shortened(self, blocks: int) -> Tracer:
        """The same model with its first `blocks` blocks only."""
        short_ = copy.copy(self)
        short_._blank = self.adapter.shortened(self._blank, blocks)
        short_.description = self.adapter.describe(short_._blank)
        short_._sites = {site.name: site for site in short_.description.sites}
        return short_

    def calls(self, formats: Mapping[str, Formats], batch: int) -> Calls:
        """The calls of a forward pass of `batch` images with every site in these formats."""
        sites = {name: blank_params(site, formats[name]) for name, site in self._sites.items()}
        integer = self.adapter.integer(self._blank, sites, "native", self.residual_dtype)
        images = torch.empty((batch, *self.input_size), device="meta")
        if self.device != "cpu":  # the meta device stands for a GPU everywhere in the runtime
            return self._record(integer, images)
        fake, cpu = FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu")
        for module in integer.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:  # islands have a GPU's precision on the meta device
                        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
                        tensors[name] = FakeTensor(fake, tensor.detach().to("meta", dtype), cpu)  # type: ignore
        with fake:
            return self._record(integer, FakeTensor(fake, images, cpu))

    def _record(self, integer: nn.Module, images: Tensor) -> Calls:
        weights = [*integer.parameters(), *integer.buffers()]
        weights += [t for m in integer.modules() for t in m._parameters.values() if t is not None]
        with torch.inference_mode(), CallRecorder(weights, self.device) as recorder:
            integer(images)
        return recorder.calls


def blank_params(site: Site, formats: Formats) -> SiteParams:
    """Parameters of a site in these formats, with steps of one and codes without values."""
    tensors = {f"{o}.scale": torch.ones(site.step_shape(o, f.granularity)) for o, f in formats.items() if f.has_steps}
    if "input" in formats and formats["input"].granularity == "channel":
        tensors["input.zero_point"] = torch.zeros_like(tensors["input.scale"])
    if "input" in formats and formats["input"].scheme == "table":
        tensors["input.table"] = torch.zeros(ENTRIES, dtype=torch.int8)
    if "weight" in formats and formats["weight"].scheme == "levels":
        first = -(1 << formats["weight"].bits - 1)
        tensors["weight.levels"] = torch.arange(first, -first, dtype=torch.int8)
    if "weight.scale" in tensors:
        tensors["weight.codes"] = torch.empty((site.out_features, site.in_features), dtype=torch.int8, device="meta")
    return SiteParams(site.kind, dict(formats), tensors, site.params)


def fingerprint(calls: Calls, batch: int) -> str:
    """What tells models apart whose forward passes differ: 16 hexadecimal digits of the calls and their counts."""
    text = "\n".join(f"{counted.count} {key}" for key, counted in sorted(calls.items()))
    return hashlib.sha256(f"{batch}\n{text}".encode()).hexdigest()[:16]


def short(dtype: torch.dtype) -> str:
    """ "f32", "u8", …"""
    name = str(dtype).removeprefix("torch.")
    return name.replace("bfloat", "bf").replace("float", "f").replace("uint", "u").replace("int", "i")


def _with_one_step(call: Call) -> Call:
    """The call of an op in `_BY_CHANNEL` as that of the op with one step: vectors become numbers."""
    numbers: dict[str, tuple[str, float | int]] = {
        "inv_scale": ("inv_scale", 1.0), "offset": ("zero_point", 0),
        "out_inv_scale": ("out_inv_scale", 1.0), "out_offset": ("out_zero_point", 0),
    }  # fmt: skip
    op, _, overload = call.op.rpartition(".")
    args = tuple(numbers.get(name, (name, value)) for name, value in call.args)
    return Call(f"{_BY_CHANNEL[op]}.{overload}", args)


def _text(name: str, value: Any) -> str:
    """An argument in a key; empty for what the time does not depend on."""
    if value is None or type(value) is float or name.endswith("zero_point") or name.startswith("eps"):
        return ""
    if isinstance(value, TensorSpec):
        return str(value)
    if isinstance(value, tuple):
        return f"{name}=({' '.join(str(part) for part in value)})"
    return f"{name}={short(value) if isinstance(value, torch.dtype) else value}"


def _shares(tensor: Tensor, others: Sequence[Tensor]) -> bool:
    """True where the tensor's memory is that of one of `others`."""
    storage = tensor.untyped_storage()._cdata
    return any(other.untyped_storage()._cdata == storage for other in others)
