"""Sites: the places of a model that can be quantised, and what is known about each without running it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What a site is; LampQ's "type" (AAAI-26, section 4.1)."""

    PATCH_EMBED = "patch_embed"
    QKV = "qkv"
    PROJ = "proj"
    FC1 = "fc1"
    FC2 = "fc2"
    QK = "qk"
    PV = "pv"
    HEAD = "head"


BLOCK_LINEARS = (Kind.QKV, Kind.PROJ, Kind.FC1, Kind.FC2)
"""The kinds whose bits the allocator chooses, and over which `mean_bits` is taken."""

MATMULS = (Kind.QK, Kind.PV)

OPERANDS = {Kind.QK: ("q", "k"), Kind.PV: ("p", "v")}
"""Operands of the attention matmuls; every other kind has ("weight", "input")."""


@dataclass(frozen=True)
class Site:
    """One place in the model that can be quantised.

    Attributes:
        name: fully qualified name of the module (`blocks.3.attn.qkv`); `blocks.3.attn.qk` and `blocks.3.attn.pv` for
            the matmuls.
        kind: see `Kind`.
        block: index of the transformer block, or None outside the blocks.
        in_features: K, the length of a row of the input; head dimension or number of tokens for a matmul.
        out_features: N, the number of output channels; number of tokens or head dimension for a matmul.
        rows: rows of the input per image (tokens; 1 for a pooled head; heads x tokens for a matmul).
        heads: attention heads of the block, 0 outside the blocks.
        params: elements of the weight; 0 for a matmul.
    """

    name: str
    kind: Kind
    block: int | None
    in_features: int
    out_features: int
    rows: int
    heads: int
    params: int

    @property
    def is_matmul(self) -> bool:
        """True for QK^T and PV, whose operands are both activations."""
        return self.kind in MATMULS

    @property
    def operands(self) -> tuple[str, str]:
        """Names of the two operands, as in keys of plans."""
        return OPERANDS.get(self.kind, ("weight", "input"))

    def step_shape(self, operand: str, granularity: str) -> tuple[int, ...]:
        """Shape of the steps of an operand that a plan holds; KeyError for a granularity that has none ("row")."""
        channels = self.in_features if operand == "input" else self.out_features
        return {"channel": (channels,), "head": (self.heads,), "tensor": ()}[granularity]

    @property
    def macs(self) -> int:
        """Multiply-accumulates per image."""
        return self.rows * self.in_features * self.out_features


@dataclass(frozen=True)
class Skipped:
    """A module that stays in floating point, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Description:
    """What an adapter found in a model.

    Attributes:
        architecture: timm name, or the class name where there is none.
        sites: all sites in order of execution.
        skipped: modules with weights that no site covers.
    """

    architecture: str
    sites: tuple[Site, ...]
    skipped: tuple[Skipped, ...]

    @property
    def image_bytes(self) -> int:
        """Codes that the widest linear reads and writes for one image, a byte each."""
        return max((s.rows * (s.in_features + s.out_features) for s in self.sites if not s.is_matmul), default=0)

    def site(self, name: str) -> Site:
        """The site called `name`; KeyError where there is none."""
        for site in self.sites:
            if site.name == name:
                return site
        raise KeyError(name)
