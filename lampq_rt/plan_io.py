"""A plan as a folder: `plan.json`, which a person can read and diff, and `plan.safetensors` (docs/plan.md).

The same plan always gives the same bytes. `plan.json` names the SHA-256 of the tensor file and of its own values, so
that files of two plans are not mixed up, and neither a flipped bit nor a width edited by hand, for which the steps
would be wrong, goes unseen. Checkpoints hold the same document and the same tensors in one file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from lampq_rt import files
from lampq_rt.edits import ACTIVATIONS
from lampq_rt.errors import FormatError, PlanError
from lampq_rt.formats import Format
from lampq_rt.kernels import reference
from lampq_rt.plan import RESIDUAL_DTYPES, Plan, SiteParams
from lampq_rt.quantizers import QUANTIZERS, flaw, levels
from lampq_rt.sites import OPERANDS, Kind
from lampq_rt.version import __version__

VERSION = 1
JSON_NAME, TENSORS_NAME = "plan.json", "plan.safetensors"
JSON_LIMIT, TENSORS_LIMIT = 64 << 20, 8 << 30
MAX_SITES, MAX_PARAMS, MAX_DEPTH = 10_000, 1 << 40, 16

EDITS = "edits"
"""Stands where a tensor's name has its site; the rest names a parameter."""

_FORMAT = "lampq_rt plan"
_TEXTS = ("format", "version", "written_by", "model", "weights_digest", "residual_dtype")
_KEYS = (*_TEXTS, "mean_bits", "provenance", "sites")
_REPLACED = "activations"
"""A key that only plans have which replace some."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+){0,15}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


_Wanted = tuple[torch.dtype, int, tuple[float, float] | None]
"""dtype, number of dimensions, smallest and largest value (None for steps)."""

_FINITE = (-math.inf, math.inf)
"""The range of zero-points of channels, which are real numbers."""


def save(plan: Plan, path: str | Path) -> None:
    """Write `plan` as a folder, replacing a plan that is there.

    Raises:
        PlanError: the plan holds what a file cannot (a provenance that is not JSON), or the folder could not be
            written; then nothing has changed on disk.
    """
    tensors = named_tensors(plan)
    data = safetensors.torch.save(tensors)
    content = document(plan)
    parse(content, tensors, "plan to be saved")
    content["tensors"] = {"file": TENSORS_NAME, "sha256": hashlib.sha256(data).hexdigest()}
    content["sha256"] = _digest(content)
    written: dict[str, files.Content] = {JSON_NAME: _text(content).encode(), TENSORS_NAME: data}
    files.write_folder(path, written, what="plan", error=PlanError)


def load(path: str | Path) -> Plan:
    """Read a plan's folder. Whether it fits a model is checked by `lampq_rt.compile`.

    Raises:
        PlanError: a file is missing, unreadable, altered or malformed; the message names the file and the field.
    """
    folder = Path(path)
    if os.path.isfile(folder):
        raise PlanError(f"cannot read plan {files.shown(path)}: it is a file, not a folder with {JSON_NAME} in it")
    where = f"plan {files.shown(folder / JSON_NAME)}"
    raw = files.read_file(folder / JSON_NAME, what="plan", error=PlanError, limit=JSON_LIMIT)
    content = files.parse_json(raw, where=where, error=PlanError)
    _check_version(content, where)
    _check_keys(content, (*_keys(content), "tensors", "sha256"), where)
    written = content.pop("sha256")
    everything = dict(content)
    entry = content.pop("tensors")
    _check_keys(entry, ("file", "sha256"), f"{where}: tensors")
    if entry["file"] != TENSORS_NAME:
        raise PlanError(f"{where}: tensors.file: expected {TENSORS_NAME!r}, got {entry['file']!r:.80}")
    plan = parse(content, _load_tensors(folder / TENSORS_NAME, entry["sha256"]), where)
    if written != _digest(everything):
        raise PlanError(f"{where}: altered since it was written; steps fit only the formats that they were made for")
    return plan


def _load_tensors(path: Path, digest: Any) -> dict[str, Tensor]:
    where = f"plan {files.shown(path)}"
    data = files.read_file(path, what="plan", error=PlanError, limit=TENSORS_LIMIT)
    found = hashlib.sha256(data).hexdigest()
    if digest != found:
        came = f"its SHA-256 is {found[:16]}…, {JSON_NAME} says {digest!r:.18}…"
        raise PlanError(f"{where}: altered, truncated, or of another plan: {came}")
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as cause:
        raise PlanError(f"{where}: not a safetensors file ({files.reason(cause)})") from None


def _digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of the values in `plan.json`, whatever the white space between them."""
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


def document(plan: Plan) -> dict[str, Any]:
    """The plan without its tensors, as it stands in JSON. Sites keep their order; provenance is sorted by key.

    Raises:
        PlanError: the provenance is not JSON-able, or holds a number that is not finite.
    """
    sites = {
        name: {
            "kind": params.kind.value,
            "params": params.params,
            "formats": {operand: fmt.to_json() for operand, fmt in params.formats.items()},
        }
        for name, params in plan.sites.items()
    }
    values = (
        _FORMAT,
        VERSION,
        f"lampq_rt {__version__}",
        plan.model,
        plan.weights_digest,
        plan.residual_dtype,
        plan.mean_bits,
        _plain(plan.provenance, "provenance"),
        sites,
    )
    content = dict(zip(_KEYS, values, strict=True))
    return {**content, _REPLACED: dict(sorted(plan.activations.items()))} if plan.activations else content


def named_tensors(plan: Plan) -> dict[str, Tensor]:
    """All tensors as "<site>/<key>" and "edits/<parameter>", on the CPU and contiguous, sharing no memory."""
    groups = {**{name: params.tensors for name, params in plan.sites.items()}, EDITS: plan.edits}
    return {
        f"{name}/{key}": tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensors in groups.items()
        for key, tensor in sorted(tensors.items())
    }


def parse(content: Any, tensors: Mapping[str, Tensor], where: str) -> Plan:
    """The plan that `document` and `named_tensors` describe, everything checked that can be without the model.

    Args:
        content: what JSON gave.
        tensors: by "<site>/<key>", or "edits/<parameter>".
        where: what the messages start with.

    Raises:
        PlanError: names the field or the tensor, what came and what is allowed.
    """
    _check_version(content, where)
    _check_keys(content, _keys(content), where)
    for key in ("written_by", "model"):
        fits = isinstance(content[key], str) and 0 < len(content[key]) <= 200 and content[key].isprintable()
        _expect(fits, f"{where}: {key}", "a short text", content[key])
    digest, dtype, mean = content["weights_digest"], content["residual_dtype"], content["mean_bits"]
    fits = isinstance(digest, str) and bool(_DIGEST.fullmatch(digest))
    _expect(fits, f"{where}: weights_digest", "64 hexadecimal digits", digest)
    _expect(dtype in RESIDUAL_DTYPES, f"{where}: residual_dtype", " or ".join(RESIDUAL_DTYPES), dtype)
    _expect(type(mean) in (int, float) and 0 <= mean <= 16, f"{where}: mean_bits", "a number from 0 to 16", mean)
    _expect(isinstance(content["provenance"], dict), f"{where}: provenance", "an object", content["provenance"])
    provenance = _plain(content["provenance"], f"{where}: provenance")
    entries = content["sites"]
    fits = isinstance(entries, dict) and 0 < len(entries) <= MAX_SITES
    _expect(fits, f"{where}: sites", f"an object with 1 to {MAX_SITES} sites", entries)
    by_site: dict[str, dict[str, Tensor]] = {EDITS: {}, **{name: {} for name in entries}}
    for name, tensor in tensors.items():
        site, _, key = name.partition("/")
        if site not in by_site:
            raise PlanError(f"{where}: sites: no entry for {site!r:.80}, of which there is a tensor {key!r:.80}")
        by_site[site][key] = tensor
    sites = {name: _parse_site(name, entry, by_site[name], where) for name, entry in entries.items()}
    edits, activations = _parse_edits(by_site[EDITS], where), _parse_activations(content.get(_REPLACED, {}), where)
    return Plan(content["model"], digest, sites, provenance, dtype, edits, activations)


def _parse_edits(edits: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    for name, tensor in edits.items():
        path = f"{where}: edit of {name!r:.80}"
        _expect(len(name) <= 200 and _NAME.fullmatch(name), path, "a parameter's qualified name", name)
        fits = tensor.dtype == torch.float32 and bool(tensor.isfinite().all())
        _expect(fits, path, "finite numbers in torch.float32", f"{tensor.dtype} {list(tensor.shape)}")
    return edits


def _parse_activations(found: Any, where: str) -> dict[str, str]:
    path = f"{where}: {_REPLACED}"
    _expect(isinstance(found, dict) and len(found) <= MAX_SITES, path, "an object with names of modules", found)
    for name, activation in found.items():
        _expect(len(name) <= 200 and _NAME.fullmatch(name), path, "a module's qualified name", name)
        _expect(activation in list(ACTIVATIONS), f"{path}[{name!r:.80}]", " or ".join(ACTIVATIONS), activation)
    return found


def _parse_site(name: str, entry: Any, tensors: dict[str, Tensor], where: str) -> SiteParams:
    path = f"{where}: sites[{name!r:.80}]"
    _expect(len(name) <= 200 and _NAME.fullmatch(name), path, "a module's qualified name", name)
    _check_keys(entry, ("kind", "params", "formats"), path)
    kinds = [kind.value for kind in Kind]
    _expect(entry["kind"] in kinds, f"{path}.kind", " or ".join(kinds), entry["kind"])
    kind, params = Kind(entry["kind"]), entry["params"]
    fits = type(params) is int and 0 <= params <= MAX_PARAMS
    _expect(fits, f"{path}.params", f"a whole number from 0 to {MAX_PARAMS}", params)
    _check_keys(entry["formats"], OPERANDS.get(kind, ("weight", "input")), f"{path}.formats")
    formats = {name: _parse_format(value, f"{path}.formats.{name}") for name, value in entry["formats"].items()}
    wanted = _wanted_tensors(formats)
    for key, tensor in tensors.items():
        if key not in wanted:
            raise PlanError(f"{path}: there is a tensor {key!r:.80} that its formats do not use")
        _check_tensor(tensor, *wanted[key], f"{path}: tensor {key}")
    for key in wanted:
        if key not in tensors and key != "weight.codes":
            raise PlanError(f"{path}: the tensor {key} is missing")
    for key, tensor in tensors.items():
        if wrong := flaw(key, tensor, formats):
            raise PlanError(f"{path}: tensor {key} {wrong}")
    return SiteParams(kind, formats, tensors, params)


def _parse_format(value: Any, path: str) -> Format:
    try:
        fmt = Format.from_json(value, path)
    except FormatError as error:
        raise PlanError(str(error)) from None
    _expect(type(fmt.bits) is int, f"{path}.bits", "2..8 or 16", fmt.bits)
    schemes = ("float", *QUANTIZERS.names())
    _expect(fmt.scheme in schemes, f"{path}.scheme", " or ".join(schemes), fmt.scheme)
    return fmt


def _wanted_tensors(formats: Mapping[str, Format]) -> dict[str, _Wanted]:
    """What each tensor must be that a site of these formats may hold."""
    wanted: dict[str, _Wanted] = {}
    for operand, fmt in formats.items():
        if not fmt.has_steps:
            continue
        wanted[f"{operand}.scale"] = (torch.float32, 0 if fmt.granularity == "tensor" else 1, None)
        if not fmt.symmetric and operand == "input" and fmt.granularity == "channel":
            wanted[f"{operand}.zero_point"] = (torch.float32, 1, _FINITE)
        elif not fmt.symmetric:
            wanted[f"{operand}.zero_point"] = (torch.int32, 0, reference.code_range(fmt.code_bits))
        if operand == "input" and fmt.scheme == "table":
            wanted["input.table"] = (torch.int8, 1, reference.code_range(fmt.code_bits))
        if operand == "weight" and fmt.scheme == "levels":
            wanted["weight.levels"] = (torch.int8, 1, (-levels.TOP, levels.TOP))
        if operand == "weight":
            wanted["weight.codes"] = (torch.int8, 2, reference.code_range(fmt.bits, weight=True))
    return wanted


def _check_tensor(tensor: Tensor, dtype: torch.dtype, dims: int, codes: tuple[float, float] | None, path: str) -> None:
    if tensor.dtype != dtype or tensor.dim() != dims or tensor.numel() == 0:
        came = f"{tensor.dtype} {list(tensor.shape)}"
        raise PlanError(f"{path}: expected {dtype} with {dims} dimensions and something in it, got {came}")
    if codes is None and not bool(((tensor > 0) & tensor.isfinite()).all()):
        raise PlanError(f"{path}: steps must be positive and finite")
    if codes == _FINITE:
        if not bool(tensor.isfinite().all()):
            raise PlanError(f"{path}: zero-points must be finite")
        return
    if codes is not None and not codes[0] <= int(tensor.min()) <= int(tensor.max()) <= codes[1]:
        came = f"{int(tensor.min())}..{int(tensor.max())}"
        raise PlanError(f"{path}: codes of this format lie in {codes[0]}..{codes[1]}, got {came}")


def _check_version(content: Any, where: str) -> None:
    """Refuse what is no plan, or one of another version; first, because other versions may have other keys."""
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise PlanError(f'{where}: not a plan of lampq_rt; expected an object with "format": {json.dumps(_FORMAT)}')
    version = content.get("version")
    fits = type(version) is int and version == VERSION
    _expect(fits, f"{where}: version", f"{VERSION}, which this lampq_rt {__version__} reads", version)


def _keys(content: Mapping[str, Any]) -> tuple[str, ...]:
    """Those that it must have."""
    return (*_KEYS, _REPLACED) if _REPLACED in content else _KEYS


def _check_keys(value: Any, keys: tuple[str, ...], path: str) -> None:
    """Refuse what is not an object with exactly these keys."""
    if not isinstance(value, dict):
        raise PlanError(f"{path}: expected an object with {', '.join(keys)}; got {value!r:.80}")
    missing = [key for key in keys if key not in value]
    unknown = [key for key in value if key not in keys]
    if missing or unknown:
        what = f"{missing[0]!r} is missing" if missing else f"unknown key {unknown[0]!r:.80}"
        raise PlanError(f"{path}: {what}; expected the keys {', '.join(keys)}")


def _expect(fits: object, path: str, allowed: str, came: object) -> None:
    if not fits:
        raise PlanError(f"{path}: expected {allowed}; got {came!r:.80}")


def _plain(value: Any, path: str, depth: int = 0) -> Any:
    """`value` as JSON gives it back, keys sorted; PlanError where JSON cannot hold it."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) < 1 << 64:
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, str) and value.encode(errors="replace").decode() == value:
        return str(value)
    if isinstance(value, (list, tuple)) and depth < MAX_DEPTH:
        return [_plain(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(value)]
    if isinstance(value, Mapping) and depth < MAX_DEPTH and all(isinstance(key, str) for key in value):
        return {_plain(k, path): _plain(value[k], f"{path}.{files.shown(k)}", depth + 1) for k in sorted(value)}
    raise PlanError(f"{path}: expected plain JSON values, numbers finite; got {value!r:.80} ({type(value).__name__})")


def _text(content: Mapping[str, Any]) -> str:
    """JSON with one key a line, and one operand a line among the sites."""
    parts = []
    for key, value in content.items():
        if key == "sites":
            lines = (f"  {json.dumps(name)}: {_site_text(site)}" for name, site in value.items())
            text = "{\n" + ",\n".join(lines) + "\n }"
        else:
            text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False).replace("\n", "\n ")
        parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _site_text(site: Mapping[str, Any]) -> str:
    formats = ",\n".join(f"   {json.dumps(operand)}: {json.dumps(fmt)}" for operand, fmt in site["formats"].items())
    return f'{{"kind": {json.dumps(site["kind"])}, "params": {site["params"]}, "formats": {{\n{formats}}}}}'
