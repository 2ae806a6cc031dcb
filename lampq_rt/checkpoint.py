"""One file that holds a compiled model: codes packed at exactly their width, the plan, the architecture (docs/plan.md).

The file is in safetensors format. Its header's metadata has one entry, "lampq_rt", with the text

    checkpoint 1 sha256 <64 hexadecimal digits> <JSON: architecture, plan, sites of the linears, …>

(one entry, because safetensors writes several in no fixed order). The digest is that of the whole file with the digits
replaced by zeros, so that no bit can change unseen, neither in the data nor in the header.

Loading rebuilds the skeleton on the meta device, swaps in integer modules as the plan says, and fills them. What
follows from the plan and the codes (column constants, products of scales, steps of the attention) is computed again, by
the functions that computed it first; `save` compares bit by bit and stores whatever would come out differently.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lampq_rt import backends, files, plan_io, weights
from lampq_rt.edits import replace_activations
from lampq_rt.errors import CheckpointError, FormatError, ModelError, PlanError
from lampq_rt.kernels import packing, reference
from lampq_rt.plan import Plan, SiteParams
from lampq_rt.sites import Description, Site
from lampq_rt.version import __version__

if TYPE_CHECKING:
    from lampq_rt.compiler import CompiledModel

VERSION = 1
SIZE_LIMIT, HEADER_LIMIT = 16 << 30, 100 << 20
"""Bytes; more is refused unread. The second is safetensors' own."""

ENTRY = "lampq_rt"
CODES, STATE, PLAN = "codes/", "state/", "plan/"
"""Prefixes of the tensors' names: packed codes by module, other state by name, the plan's by site and key."""

_INTRODUCTION = re.compile(r"checkpoint (\d{1,9}) sha256 ([0-9a-f]{64}) ")
_KEYS = {"written_by", "architecture", "plan", "linears", "codes_of_plan", "edits_of_state"}
_NO_DIGEST = "0" * 64


def save(model: CompiledModel, path: str | Path) -> None:
    """Write `model` to `path`. The same model always gives the same bytes; where writing fails, nothing changes.

    Raises:
        CheckpointError: the architecture cannot be rebuilt without the original model, or the file cannot be written.
    """
    try:
        data = _encoded(model)
    except (ModelError, PlanError, FormatError, CheckpointError) as error:
        raise CheckpointError(f"cannot write checkpoint {files.shown(path)}: {error}") from None
    files.write_file(path, data, what="checkpoint", error=CheckpointError)


def load(path: str | Path, device: str | torch.device | None = None) -> CompiledModel:
    """Read what `save` wrote. Needs neither the original weights nor the network.

    Args:
        path: of the file.
        device: where the model is to lie, as for `compile`; None is the CPU.

    Raises:
        CheckpointError: the file is missing, truncated, altered, malformed, of another version, or its parts do not
            fit together.
        BackendError: the device cannot run it.
    """
    target = backends.resolve(device)
    data = files.read_file(path, what="checkpoint", error=CheckpointError, limit=SIZE_LIMIT)
    where = f"checkpoint {files.shown(path)}"
    try:
        content, tensors = _decoded(data)
        del data
        return _filled(content, tensors, target)
    except (ModelError, PlanError, FormatError, CheckpointError) as error:
        raise CheckpointError(f"{where}: {error}") from None


@dataclass(frozen=True)
class _Blank:
    """An integer model whose weights are still on the meta device.

    Attributes:
        module: the skeleton with integer modules in place of its sites.
        linears: site by the name of its integer linear in `module`.
        weights: shape [N, K] of the codes, by the same name.
        image_bytes: see `Description`.
    """

    module: nn.Module
    linears: Mapping[str, str]
    weights: Mapping[str, tuple[int, int]]
    image_bytes: int


def _blank(architecture: Mapping[str, Any], plan: Plan) -> _Blank:
    """What `compile` would make of such a model and plan, without weights.

    Raises:
        CheckpointError, PlanError, FormatError, ModelError: the two do not fit together or cannot be built.
    """
    from lampq_rt.adapters.timm_vit import TimmVit
    from lampq_rt.compiler import check_sites

    adapter = TimmVit()
    skeleton = adapter.skeleton(architecture)
    description = adapter.describe(skeleton)
    check_sites(description, plan)
    replace_activations(skeleton, plan.activations)
    module = adapter.integer(skeleton, plan.sites, "native", plan.residual_dtype)
    pairs = _paired(module, description, plan)
    return _Blank(
        module,
        {name: site.name for name, site in pairs.items()},
        {name: (site.out_features, site.in_features) for name, site in pairs.items()},
        description.image_bytes,
    )


def _paired(module: nn.Module, description: Description, plan: Plan) -> dict[str, Site]:
    """The site of each integer linear: both come in order of execution."""
    from lampq_rt.modules import IntegerLinear

    linears = {name: linear for name, linear in module.named_modules() if isinstance(linear, IntegerLinear)}
    sites = [site for site in description.sites if not site.is_matmul and not plan.sites[site.name].is_float]
    pairs = dict(zip(linears, sites, strict=True))
    for name, site in pairs.items():
        linear, params = linears[name], plan.sites[site.name]
        found = (linear.out_features, linear.in_features, linear.w_bits)
        assert found == (site.out_features, site.in_features, params.bits), (name, site.name)
    return pairs


def _derived(blank: _Blank, codes: Mapping[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """State that follows from the plan and the int8 [N, K] codes of each linear, by its name in the state dict."""
    from lampq_rt.modules import IntegerLinear, product_scale

    known = {name: tensor for name, tensor in blank.module.state_dict().items() if not tensor.is_meta}
    for name, site in blank.linears.items():
        linear = blank.module.get_submodule(name)
        assert isinstance(linear, IntegerLinear), name
        params = plan.sites[site]
        known[f"{name}.w_q"], levels = weights.container(codes[name], params)
        if levels is not None:
            known[f"{name}.levels"] = levels
        known[f"{name}.column"] = reference.column_constant(
            weights.values(codes[name], params), linear.input.zero_point
        )
        if not linear.has_gamma:
            known[f"{name}.scale"] = product_scale(params, torch.device("cpu"))
    return known


def _contained(blank: _Blank, state: Mapping[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """int8 [N, K] codes of each linear, as they lie in the model."""
    found = {}
    for name, site in blank.linears.items():
        try:
            found[name] = weights.contained_codes(state[f"{name}.w_q"], plan.sites[site])
        except ValueError as error:
            raise CheckpointError(f"codes of {name}: {error}") from None
    return found


def _encoded(model: CompiledModel) -> bytearray:
    """The file's content."""
    plan = model.plan
    blank = _blank(model.architecture, plan)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.model.state_dict().items()}
    codes = _contained(blank, state, plan)
    derived = _derived(blank, codes, plan)
    if state.keys() != blank.module.state_dict().keys():
        odd = sorted(state.keys() ^ blank.module.state_dict().keys())[0]
        raise CheckpointError(f"the model's tensors are not those of its architecture and plan: {odd}")
    tensors = {
        f"{STATE}{name}": tensor.clone()  # no two share memory: safetensors would refuse
        for name, tensor in state.items()
        if name not in derived or not _same(derived[name], tensor)
    }
    for name, site in blank.linears.items():
        tensors[f"{CODES}{name}"] = packing.pack_bits(codes[name], plan.sites[site].bits)
    decided = {f"{site}/weight.codes": name for name, site in blank.linears.items()}
    of_plan = plan_io.named_tensors(plan)
    repeated = [key for key, name in decided.items() if key in of_plan and _same(of_plan[key], codes[name])]
    edits = _found_edits(plan, state)
    repeated += [f"{plan_io.EDITS}/{name}" for name in edits]
    tensors |= {f"{PLAN}{key}": tensor for key, tensor in of_plan.items() if key not in repeated}
    content = {
        "written_by": f"lampq_rt {__version__}",
        "architecture": model.architecture,
        "plan": plan_io.document(plan),
        "linears": dict(blank.linears),
        "codes_of_plan": [key.removesuffix("/weight.codes") for key in repeated if key in decided],
        "edits_of_state": edits,
    }
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    introduction = f"checkpoint {VERSION} sha256 {_NO_DIGEST} "
    data = bytearray(safetensors.torch.save(tensors, {ENTRY: introduction + text}))
    start = data.index(introduction.encode()) + introduction.index(_NO_DIGEST)
    data[start : start + len(_NO_DIGEST)] = hashlib.sha256(data).hexdigest().encode()
    return data


def _decoded(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON content and the tensors of a file, its digest checked.

    Raises:
        CheckpointError: it is no checkpoint, of another version, truncated, or altered.
    """
    text = _entry(data)
    found = _INTRODUCTION.match(text)
    if found is None:
        raise CheckpointError(f"damaged, or not a checkpoint of lampq_rt: it begins with {text[:40]!r}")
    if int(found[1]) != VERSION:
        raise CheckpointError(f"its version is {found[1]}; this lampq_rt {__version__} reads version {VERSION}")
    start = data.find(found[0].encode()) + found.start(2)
    end = start + len(_NO_DIGEST)
    digest = hashlib.sha256(memoryview(data)[:start])
    digest.update(_NO_DIGEST.encode())
    digest.update(memoryview(data)[end:])
    if digest.hexdigest() != found[2]:
        came = f"its SHA-256 is {digest.hexdigest()[:16]}…, the file says {found[2][:16]}…"
        raise CheckpointError(f"damaged: {came}; copy it again or compile again")
    content = files.parse_json(text[found.end() :], where="header", error=CheckpointError)
    if not isinstance(content, dict) or set(content) != _KEYS:
        raise CheckpointError(f"header: expected the keys {', '.join(sorted(_KEYS))}; got {content!r:.80}")
    try:
        return content, safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as cause:
        raise CheckpointError(f"not a safetensors file ({files.reason(cause)})") from None


def _entry(data: bytes) -> str:
    """The text of our metadata entry in a safetensors header."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > HEADER_LIMIT:
        what = f"{len(data)} bytes long" if len(data) < 8 else f"its header would have {size} bytes"
        raise CheckpointError(f"damaged, or not a checkpoint of lampq_rt: {what}")
    if size > len(data) - 8:
        what = f"its header would have {size} bytes, the whole file has {len(data)}"
        raise CheckpointError(f"truncated, or not a checkpoint of lampq_rt: {what}")
    header = files.parse_json(data[8 : 8 + size], where="header", error=CheckpointError)
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    text = metadata.get(ENTRY) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise CheckpointError(f"not a checkpoint of lampq_rt: there is no {ENTRY!r} in the metadata of its header")
    return text


def _filled(content: Mapping[str, Any], tensors: Mapping[str, Tensor], target: torch.device) -> CompiledModel:
    """The compiled model that a file's content describes."""
    from lampq_rt.compiler import CompiledModel

    groups: dict[str, dict[str, Tensor]] = {CODES: {}, STATE: {}, PLAN: {}}
    for name, tensor in tensors.items():
        prefix, _, rest = name.partition("/")
        if f"{prefix}/" not in groups:
            raise CheckpointError(f"there is a tensor {name!r:.80} that no checkpoint has")
        groups[f"{prefix}/"][rest] = tensor
    plan = plan_io.parse(content["plan"], groups[PLAN], "plan")
    blank = _blank(content["architecture"], plan)
    if content["linears"] != blank.linears:
        raise CheckpointError("its integer linears are not those that this version of lampq_rt builds from its plan")
    codes = _unpacked(groups[CODES], blank, plan)
    plan = plan.with_sites(_with_codes(content["codes_of_plan"], codes, blank, plan))
    state = _state(groups[STATE], _derived(blank, codes, plan), blank)
    plan = replace(plan, edits={**plan.edits, **_edits(content["edits_of_state"], state)})
    blank.module.load_state_dict(state, assign=True)
    fallbacks = backends.fallbacks(plan.sites, target)
    compiled = CompiledModel(blank.module, plan, dict(content["architecture"]), fallbacks, blank.image_bytes)
    return compiled.to(target).eval().requires_grad_(False)


def _unpacked(packed: Mapping[str, Tensor], blank: _Blank, plan: Plan) -> dict[str, Tensor]:
    """int8 [N, K] codes by the name of the linear."""
    if packed.keys() != blank.linears.keys():
        odd = sorted(packed.keys() ^ blank.linears.keys())[0]
        raise CheckpointError(f"codes of {odd!r:.80}: {'not in the plan' if odd in packed else 'missing'}")
    codes = {}
    for name, site in blank.linears.items():
        try:
            codes[name] = packing.unpack_bits(packed[name], plan.sites[site].bits, blank.weights[name])
        except ValueError as error:
            raise CheckpointError(f"codes of {name}: {error}") from None
    return codes


def _with_codes(sites: Any, codes: Mapping[str, Tensor], blank: _Blank, plan: Plan) -> dict[str, SiteParams]:
    """Sites whose plan decided the rounding, with their codes put back."""
    names = {site: name for name, site in blank.linears.items()}
    if not isinstance(sites, list) or not all(isinstance(site, str) and site in names for site in sites):
        raise CheckpointError(f"codes_of_plan: expected a list of integer linears; got {sites!r:.80}")
    result = {}
    for site in sites:
        params = plan.sites[site]
        result[site] = replace(params, tensors={**params.tensors, "weight.codes": codes[names[site]].clone()})
    return result


def _state(stored: Mapping[str, Tensor], derived: Mapping[str, Tensor], blank: _Blank) -> dict[str, Tensor]:
    """Everything that the blank model needs: what is stored, and what follows.

    Raises:
        CheckpointError: a tensor that is missing, unknown, or of another shape or kind of number.
    """
    wanted = blank.module.state_dict()
    unknown = sorted(stored.keys() - wanted.keys())
    if unknown:
        raise CheckpointError(f"there is a tensor {unknown[0]!r:.80} that its architecture and plan do not have")
    state = {**derived, **stored}
    for name, like in wanted.items():
        tensor = state.get(name)
        if tensor is None:
            raise CheckpointError(f"the tensor {name} is missing")
        kinds_fit = tensor.dtype == like.dtype or (tensor.is_floating_point() and like.is_floating_point())
        if tensor.shape != like.shape or not kinds_fit:
            came = f"{tensor.dtype} {list(tensor.shape)}"
            raise CheckpointError(f"the tensor {name} is {came}; expected {like.dtype} {list(like.shape)}")
    return state


def _found_edits(plan: Plan, state: Mapping[str, Tensor]) -> dict[str, str]:
    """By name of an edit, the tensor of the state that is the same: most edits are norms and biases as they run."""
    by_bytes = {(t.shape, t.numpy().tobytes()): name for name, t in state.items() if t.dtype == torch.float32}
    found = {}
    for name, edit in plan.edits.items():
        tensor = edit.detach().cpu().contiguous()
        twin = by_bytes.get((tensor.shape, tensor.numpy().tobytes()))
        if twin is not None:
            found[name] = twin
    return found


def _edits(names: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `_found_edits`."""
    fits = isinstance(names, dict) and all(isinstance(twin, str) and twin in state for twin in names.values())
    if not fits:
        raise CheckpointError(f"edits_of_state: expected tensors of the state by parameter; got {names!r:.80}")
    return {name: state[twin].detach().clone() for name, twin in names.items()}


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
