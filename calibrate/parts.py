"""How much of a long array is worked on at once: what is made of it meanwhile must be small beside a model."""

from __future__ import annotations

SHORT = 1 << 16
"""Values that are quantised, or sorted into bins, at once: up to 30 bytes each meanwhile."""

LONG = 1 << 18
"""The same where a product of matrices follows, which long parts make faster."""


def rows(width: int, values: int = SHORT) -> int:
    """Rows of that width at once."""
    return max(1, values // width)
