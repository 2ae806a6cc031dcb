"""The plan: the format, steps and edits chosen for every site, with where they came from.

The contract between calibrator and runtime (docs/plan.md). This module holds the data; `plan_io` reads and writes the
folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lampq_rt.errors import PlanError
from lampq_rt.formats import Format
from lampq_rt.sites import BLOCK_LINEARS, Kind

RESIDUAL_DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class SiteParams:
    """Formats and steps of one site: everything that a simulation or a kernel needs beside the weight.

    Attributes:
        kind: what the site is.
        formats: one `Format` per operand ("weight" and "input"; "q" and "k"; "p" and "v").
        tensors: steps by key: "weight.scale" fp32 [N]; "input.scale" fp32 [] and "input.zero_point" int32 [], or both
            fp32 [K] where the input's format is by channel (then the weight's steps are those of W * input.scale);
            "input.table" int8 [256] where its scheme is "table"; "weight.levels" int8 [2^bits] where its scheme is
            "levels";
            "q.scale", "k.scale", "v.scale" fp32 [H]; optional "weight.codes" int8 [N, K] where rounding was decided
            elsewhere. A floating-point site has none.
        params: elements of the weight, for means and sizes; 0 for a matmul.
    """

    kind: Kind
    formats: Mapping[str, Format]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    params: int = 0

    @property
    def is_float(self) -> bool:
        """True where the whole site stays in floating point."""
        return all(f.is_float for f in self.formats.values())

    @property
    def bits(self) -> int:
        """The width of the site: of its weight, or of its wider operand for a matmul."""
        return self.formats["weight"].bits if "weight" in self.formats else max(f.bits for f in self.formats.values())


@dataclass(frozen=True)
class Plan:
    """Bits, formats and steps for every site of one model with one set of weights.

    Attributes:
        model: timm name, or class name where the model has none.
        weights_digest: `weights_digest` of the model that the plan was made for.
        sites: by site name, in order of execution.
        provenance: JSON-able facts: calibration images, metric, allocator, budgets, objective, gap, versions.
        residual_dtype: dtype of the residual stream and of 16-bit layers on a GPU: "float16", "bfloat16" or "float32".
        edits: fp32 parameters of the model that the plan replaces, by name (see `edits`).
        activations: names of `edits.ACTIVATIONS`, by the name of the model's module that each replaces.
    """

    model: str
    weights_digest: str
    sites: Mapping[str, SiteParams]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    residual_dtype: str = "float16"
    edits: Mapping[str, Tensor] = field(default_factory=dict)
    activations: Mapping[str, str] = field(default_factory=dict)

    @property
    def mean_bits(self) -> float:
        """Parameter-weighted mean width of the blocks' linears (LampQ, section 4.1); 0.0 where there are none."""
        linears = [s for s in self.sites.values() if s.kind in BLOCK_LINEARS]
        total = sum(s.params for s in linears)
        return sum(s.bits * s.params for s in linears) / total if total else 0.0

    @property
    def digest(self) -> str:
        """SHA-256 over weights digest, formats, tensors, edits and activations, hexadecimal.

        Equal plans compile to equal models.
        """
        digest = hashlib.sha256(self.weights_digest.encode())
        for name, params in self.sites.items():
            digest.update(f"{name}|{params.kind}|{sorted(params.formats.items())}|".encode())
            for key in sorted(params.tensors):
                update_digest(digest, key, params.tensors[key])
        for name in sorted(self.edits):
            update_digest(digest, name, self.edits[name])
        for name, activation in sorted(self.activations.items()):
            digest.update(f"{name}|{activation}|".encode())
        return digest.hexdigest()

    def with_sites(self, sites: Mapping[str, SiteParams]) -> Plan:
        """A copy with these sites replaced."""
        return replace(self, sites={**self.sites, **sites})

    def check_weights(self, model: nn.Module) -> None:
        """Refuse a model whose weights are not those that the plan was made for.

        Raises:
            PlanError: the digests differ; the message names both.
        """
        found = weights_digest(model)
        if found != self.weights_digest:
            raise PlanError(
                f"this plan was made for {self.model} with weights {self.weights_digest[:16]}…, "
                f"but the model given has weights {found[:16]}…; calibrate again for these weights"
            )

    def save(self, path: str | Path) -> None:
        """Write the plan as a folder (`plan.json`, `plan.safetensors`); see `plan_io.save`."""
        from lampq_rt import plan_io

        plan_io.save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan's folder; see `plan_io.load` for what is refused."""
        from lampq_rt import plan_io

        return plan_io.load(Path(path))

    def diff(self, other: Plan) -> list[str]:
        """Differences to `other`, one line each, for people."""
        from lampq_rt import plan_diff

        return plan_diff.diff(self, other)


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the model's state, hexadecimal. Device does not matter."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        update_digest(digest, name, tensor)
    return digest.hexdigest()


def update_digest(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    """Feed name, dtype, shape and bytes of a tensor to a digest."""
    data = tensor.detach().cpu().contiguous()
    digest.update(f"{name}|{data.dtype}|{tuple(data.shape)}|".encode())
    digest.update(data.flatten().view(torch.uint8).numpy().data)
