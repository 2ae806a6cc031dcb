"""Bit packing: the documented bit order, every width, odd lengths, and the containers in memory."""

from __future__ import annotations

import pytest
import torch

from lampq_rt.kernels import packing, reference

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8)


def _codes(shape: tuple[int, ...], bits: int, seed: int = 0) -> torch.Tensor:
    low, high = reference.code_range(bits)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int8)


def _naive(codes: torch.Tensor, bits: int) -> list[int]:
    """The documented order, bit by bit."""
    row = [int(code) >> t & 1 for code in codes.flatten().tolist() for t in range(bits)]
    row += [0] * (-len(row) % 8)
    return [sum(bit << t for t, bit in enumerate(row[i : i + 8])) for i in range(0, len(row), 8)]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (9,), (3, 5), (10, 63), (2, 3, 17)])
def test_order_and_round_trip(bits: int, shape: tuple[int, ...]) -> None:
    codes = _codes(shape, bits)
    packed = packing.pack_bits(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == _naive(codes, bits)
    assert len(packed) == packing.packed_bytes(codes.numel(), bits)
    assert torch.equal(packing.unpack_bits(packed, bits, shape), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_extreme_codes(bits: int) -> None:
    low, high = reference.code_range(bits)
    codes = torch.tensor([low, high, high, low, low, low, high, high, low], dtype=torch.int8)
    assert torch.equal(packing.unpack_bits(packing.pack_bits(codes, bits), bits, (9,)), codes)


def test_not_contiguous_and_untouched() -> None:
    codes = _codes((6, 10), 5).t()
    before = codes.clone()
    for bits in (5, 8):
        assert torch.equal(packing.unpack_bits(packing.pack_bits(codes, bits), bits, (10, 6)), codes)
    packing.pack_bits(codes, 8).zero_()
    assert torch.equal(codes, before)


def test_empty() -> None:
    for bits in (3, 8):
        packed = packing.pack_bits(torch.empty(0, 4, dtype=torch.int8), bits)
        assert packed.shape == (0,)
        assert packing.unpack_bits(packed, bits, (0, 4)).shape == (0, 4)


def test_refusals_name_what_came_and_what_is_allowed() -> None:
    codes = torch.tensor([3, -4, 4], dtype=torch.int8)
    with pytest.raises(ValueError, match=r"-4 to 4 do not fit into 3 bits \(-4\.\.3\)"):
        packing.pack_bits(codes, 3)
    with pytest.raises(ValueError, match="9 bits; allowed: 1..8"):
        packing.pack_bits(codes, 9)
    with pytest.raises(ValueError, match="expected torch.int8"):
        packing.pack_bits(codes.int(), 4)
    with pytest.raises(ValueError, match=r"10 codes of 3 bits are torch.uint8 \(4,\)"):
        packing.unpack_bits(torch.zeros(5, dtype=torch.uint8), 3, (10,))
    with pytest.raises(ValueError, match="torch.int8"):
        packing.unpack_bits(torch.zeros(4, dtype=torch.int8), 3, (10,))


@pytest.mark.parametrize(("k", "bits", "halved"), [(192, 4, True), (192, 2, True), (192, 5, False), (63, 4, False)])
def test_containers(k: int, bits: int, halved: bool) -> None:
    codes = _codes((10, k), bits)
    container = packing.weight_container(codes, bits)
    assert (container.dtype == torch.uint8) == halved
    assert torch.equal(reference.dense_weight(container), codes)
    assert container.numel() * container.element_size() == packing.container_bytes(10, k, bits)
    assert packing.weight_container(codes.to("meta"), bits).shape == container.shape
