"""The number format of one operand: how many bits, and what the codes mean."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lampq_rt.errors import FormatError
from lampq_rt.kernels.reference import SOFTMAX_BITS

FLOAT_BITS = 16
"""The width that stands for "left in floating point" (fp16/bf16 on a GPU, fp32 on a CPU)."""

INTEGER_BITS = tuple(range(2, 9))
"""Widths of integer codes that every backend stores and computes with."""

SOFTMAX_SCHEMES = tuple(SOFTMAX_BITS)
"""Schemes of softmax output. Their steps are fixed, so a plan holds none."""

TABLE_BITS = INTEGER_BITS[:-1]
"""Widths of scheme "table", whose levels lie on the 8-bit grid (docs/numerics.md)."""

LEVEL_BITS = (1, *TABLE_BITS)
"""Widths of scheme "levels": a weight may also have two levels. In memory they take what 4 bits take."""

ALLOWED_BITS = "2..8, or 16 for floating point (1 for weights of scheme 'levels')"
"""For messages: the widths that there are."""

GRANULARITIES = ("tensor", "head", "channel", "row")


@dataclass(frozen=True)
class Format:
    """Number format of one operand.

    Attributes:
        bits: width of a code, 2..8, or 16 for floating point; 1 for weights of scheme "levels".
        scheme: name of the quantizer (`lampq_rt.quantizers`): "uniform"; "table" for inputs of blocks' linears whose
            levels lie anywhere on the 8-bit grid (docs/numerics.md, "Tables"), 2..7 bits; "levels" for weights whose
            codes name such levels ("Levels of weights"), 1..7 bits; of softmax output (rule 7)
            "rowmax", where the row's maximum has the top code, "log2", powers of two, at most 4 bits, and "cubic",
            codes of the cube root, at most 7; "float" for 16 bits.
        granularity: what shares one step: "tensor", "head", "channel" (output channel of a weight; input channel of
            fc2, docs/numerics.md) or "row".
        symmetric: True where the zero-point is 0.
    """

    bits: int
    scheme: str = "uniform"
    granularity: str = "tensor"
    symmetric: bool = True

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in (1, *INTEGER_BITS, FLOAT_BITS):
            raise FormatError(f"bits = {self.bits!r}; allowed: {ALLOWED_BITS}")
        if (self.bits == FLOAT_BITS) != (self.scheme == "float"):
            raise FormatError(f"{self.bits} bits with scheme {self.scheme!r}; 16 bits and scheme 'float' go together")
        if self.scheme == "table" and self.bits not in TABLE_BITS:
            raise FormatError(f"{self.bits} bits with scheme {self.scheme!r}; allowed: 2..7 (8 are the uniform grid)")
        if self.scheme == "levels" and self.bits not in LEVEL_BITS:
            raise FormatError(f"{self.bits} bits with scheme {self.scheme!r}; allowed: 1..7 (8 are the uniform grid)")
        if self.bits == 1 and self.scheme != "levels":
            raise FormatError(
                f"1 bit with scheme {self.scheme!r}; allowed: 2..8 bits (1 for weights of scheme 'levels')"
            )
        if self.granularity not in GRANULARITIES:
            raise FormatError(f"granularity {self.granularity!r}; allowed: {', '.join(GRANULARITIES)}")

    @property
    def is_float(self) -> bool:
        """True where the operand stays in floating point."""
        return self.bits == FLOAT_BITS

    @property
    def code_bits(self) -> int:
        """Width of the codes that are made of the operand, and of the dot product's: 8 where levels are a table's."""
        return INTEGER_BITS[-1] if self.scheme == "table" else self.bits

    @property
    def has_steps(self) -> bool:
        """True where a plan must hold the format's steps."""
        return not self.is_float and self.scheme not in SOFTMAX_SCHEMES

    def to_json(self) -> dict[str, Any]:
        """A plain dict, as it stands in plan.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any, where: str) -> Format:
        """The format that `to_json` described.

        Raises:
            FormatError: `data` is not such a dict; the message starts with `where`.
        """
        if not isinstance(data, dict) or set(data) != {"bits", "scheme", "granularity", "symmetric"}:
            raise FormatError(
                f"{where}: expected an object with bits, scheme, granularity, symmetric; got {data!r:.120}"
            )
        if not isinstance(data["symmetric"], bool) or not isinstance(data["scheme"], str):
            raise FormatError(f"{where}: scheme must be a string and symmetric a boolean; got {data!r:.120}")
        try:
            return cls(**data)
        except (FormatError, TypeError) as error:
            raise FormatError(f"{where}: {error}") from None


FLOAT = Format(FLOAT_BITS, "float")
