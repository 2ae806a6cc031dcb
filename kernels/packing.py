"""Codes at exactly their width for the disk, and the containers that weights lie in in memory.

On disk, code i of b bits (two's complement) takes bits i*b to i*b + b - 1 of one long row of bits; bit t of that row is
bit t % 8 (least significant first) of byte t // 8. Bits after the last code are zero. Eight codes fill b whole bytes,
so the work runs over groups of eight: code i of every group at once.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lampq_rt.kernels import reference

GROUP = 8
"""Codes that fill whole bytes, at any width."""

WIDTHS = range(1, 9)
"""Widths that can be packed."""


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take on disk."""
    return (count * bits + 7) // 8


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes one after the other, `bits` bits each.

    Args:
        codes: int8, any shape, signed codes in [-2^(bits-1), 2^(bits-1) - 1].
        bits: 1..8.

    Returns:
        uint8 [packed_bytes(codes.numel(), bits)].

    Raises:
        ValueError: another width or dtype, or a code out of range.
    """
    _check_bits(bits)
    if codes.dtype != torch.int8:
        raise ValueError(f"codes to pack are {codes.dtype}; expected torch.int8")
    flat = codes.reshape(-1)
    low, high = reference.code_range(bits)
    smallest, largest = (int(extreme) for extreme in flat.aminmax()) if flat.numel() else (0, 0)
    if smallest < low or largest > high:
        raise ValueError(f"codes from {smallest} to {largest} do not fit into {bits} bits ({low}..{high})")
    fields = _columns(flat.view(torch.uint8) & ((1 << bits) - 1), GROUP)
    packed = fields.new_zeros(bits, fields.shape[1])
    for field, (byte, shift) in zip(fields, _places(bits), strict=True):
        packed[byte] |= field << shift
        if shift + bits > 8:
            packed[byte + 1] |= field >> (8 - shift)
    return packed.t().flatten()[: packed_bytes(flat.numel(), bits)].clone()


def unpack_bits(packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """Undo `pack_bits`.

    Args:
        packed: uint8 [packed_bytes(prod(shape), bits)].
        bits: 1..8.
        shape: of the codes.

    Returns:
        int8, of that shape.

    Raises:
        ValueError: another width, dtype or length.
    """
    _check_bits(bits)
    count = math.prod(shape)
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (packed_bytes(count, bits),):
        raise ValueError(
            f"packed codes are {packed.dtype} {tuple(packed.shape)}; {count} codes of {bits} bits are "
            f"torch.uint8 ({packed_bytes(count, bits)},)"
        )
    columns = _columns(packed, bits)
    fields = columns.new_empty(GROUP, columns.shape[1])
    for field, (byte, shift) in zip(fields, _places(bits), strict=True):
        torch.bitwise_right_shift(columns[byte], shift, out=field)
        if shift + bits > 8:
            field |= columns[byte + 1] << (8 - shift)
    sign = 1 << (bits - 1)
    codes = fields.bitwise_and_((1 << bits) - 1).bitwise_xor_(sign).sub_(sign)  # uint8 wraps as two's complement does
    return codes.t().flatten()[:count].view(torch.int8).view(*shape)


def is_packed_int4(k: int, bits: int) -> bool:
    """True where a weight [N, k] of that width lies in memory as two codes a byte."""
    return bits <= 4 and k % reference.NIBBLE_GROUP == 0


def weight_container(codes: Tensor, bits: int) -> Tensor:
    """A weight's codes as they lie in memory.

    Args:
        codes: int8 [N, K].
        bits: width of a code.

    Returns:
        uint8 [N, K/2] (`reference.pack_int4`) where bits <= 4 and K is a multiple of 64, else the codes as they are.
    """
    return reference.pack_int4(codes) if is_packed_int4(codes.shape[-1], bits) else codes


def container_bytes(n: int, k: int, bits: int) -> int:
    """Bytes in memory of a weight [n, k] of that width, its scales not counted."""
    return n * k // 2 if is_packed_int4(k, bits) else n * k


def _check_bits(bits: int) -> None:
    if bits not in WIDTHS:
        raise ValueError(f"cannot pack codes of {bits} bits; allowed: 1..8")


def _columns(flat: Tensor, width: int) -> Tensor:
    """uint8 [L] to [width, ceil(L / width)], contiguous: element i of every group of `width` in row i."""
    return F.pad(flat, (0, -flat.numel() % width)).view(-1, width).t().contiguous()


def _places(bits: int) -> list[tuple[int, int]]:
    """Byte and bit in it at which each code of a group begins."""
    return [divmod(index * bits, 8) for index in range(GROUP)]
