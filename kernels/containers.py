"""How codes lie in memory, in plain torch: part of the reference, which gives out all names of this file.

Codes of activations travel in one of three containers, named by the dtype that a producer is asked for: `int8` holds
the signed code; `uint8` holds code + 128 (what VNNI instructions read); `int4` is two codes a byte, a uint8
tensor [..., K/2] in the order of `pack_int4`, which a consumer knows by its width. Zero-points are always those of
the signed code. Weights are int8 [N, K], or packed uint8 [N, K/2]. Packed codes of a weight may name levels from a
table (docs/numerics.md, "Levels of weights on chip"); an int8 weight holds the levels themselves.
"""

import torch
from torch import Tensor

OFFSET = 128
"""What the uint8 container adds to a signed code."""

INT4 = torch.int4  # type: ignore[attr-defined]  # torch's stubs do not know it yet
"""Names the container with two codes a byte."""

NIBBLE_GROUP = 64
"""Channels of K that share 32 bytes: byte j holds channel j (low nibble) and channel j + 32 (high nibble)."""

LEVELS = 16
"""Entries of a weight's table of levels, one for each packed code."""


def store_codes(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Signed codes (any dtype) in the int8, uint8 or int4 container."""
    if dtype == INT4:
        return pack_int4(codes.to(torch.int8))
    return (codes + OFFSET).to(torch.uint8) if dtype == torch.uint8 else codes.to(torch.int8)


def load_codes(stored: Tensor, width: int | None = None) -> Tensor:
    """Signed codes, int32, of a container; `width` is the number of codes in a row, by which int4 is known."""
    if width is not None and stored.shape[-1] != width:
        return unpack_int4(stored).to(torch.int32)
    codes = stored.to(torch.int32)
    return codes - OFFSET if stored.dtype == torch.uint8 else codes


def pack_int4(codes: Tensor) -> Tensor:
    """Two 4-bit codes a byte.

    Args:
        codes: int8 [..., K], -8..7, K a multiple of 64.

    Returns:
        uint8 [..., K/2]; see `NIBBLE_GROUP` for the order.
    """
    groups = codes.unflatten(-1, (-1, 2, NIBBLE_GROUP // 2)).to(torch.uint8)
    return ((groups[..., 0, :] & 15) | (groups[..., 1, :] << 4)).flatten(-2)


def unpack_int4(packed: Tensor) -> Tensor:
    """Undo `pack_int4`: uint8 [..., K/2] to int8 [..., K]."""
    groups = packed.unflatten(-1, (-1, NIBBLE_GROUP // 2)).to(torch.int16)
    nibbles = torch.stack((groups & 15, groups >> 4), dim=-2)
    return ((nibbles ^ 8) - 8).to(torch.int8).flatten(-3)


def dense_weight(w_q: Tensor, levels: Tensor | None = None) -> Tensor:
    """int8 [N, K]: what multiplies the activations, the codes of a weight in either container, or their levels.

    Args:
        w_q: int8 [N, K], or packed uint8 [N, K/2].
        levels: int8 [16], -127..127, the level of signed code c at c + 8; with a packed weight only.
    """
    if levels is None:
        return unpack_int4(w_q) if w_q.dtype == torch.uint8 else w_q
    assert w_q.dtype == torch.uint8, "an int8 weight holds the levels themselves"
    return levels[unpack_int4(w_q).to(torch.int32) + LEVELS // 2]


def column_constant(w_q: Tensor, zero_point: int, levels: Tensor | None = None) -> Tensor:
    """int32 [N]: -zero_point * sum_k w[n, k] (rule 4), of the weight that `dense_weight` gives."""
    return (-zero_point * dense_weight(w_q, levels).to(torch.int64).sum(1)).to(torch.int32)
