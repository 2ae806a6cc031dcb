"""The roofline's arithmetic, by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import roofline
from benchmarks.markdown import put_between
from benchmarks.roofline import Machine, ModelShape, Work

MACHINE = Machine(
    "toy", "sm90", bandwidth=1e9, int8=1e12, bf16=5e11, processors=10, clock=1e9, source="none", gap_s=1e-6,
    efficiency=0.5,
)  # fmt: skip
TINY = ModelShape(12, 192, 3, 768, 197, 196, 768, 1000)


def test_the_floor_is_the_longest_of_bytes_products_and_issue() -> None:
    work = Work("x", operations=2e9, executed=2e9, bytes=1e6, programs=10)
    assert roofline.floor_s(work, MACHINE) == pytest.approx(2e-3)
    assert roofline.limit(work, MACHINE) == "products"
    assert roofline.floor_s(replace(work, int8=False), MACHINE) == pytest.approx(4e-3)
    assert roofline.floor_s(replace(work, bytes=5e6), MACHINE) == pytest.approx(5e-3)
    # 10 programs of 4e7 instructions on 10 processors of 4 a clock.
    busy = replace(work, instructions=4e7)
    assert roofline.floor_s(busy, MACHINE) == pytest.approx(1e-2)
    assert roofline.limit(busy, MACHINE) == "issue"
    # A special function holds its unit for eight slots.
    assert roofline.floor_s(replace(busy, special=1e7), MACHINE) == pytest.approx(2e-2)
    assert roofline.floor_s(busy, replace(MACHINE, issue_cycles=4)) == pytest.approx(4e-2)


def test_the_prediction_rounds_tiles_up_and_adds_gaps() -> None:
    full = Work("x", operations=2e9, executed=2e9, bytes=0, programs=10)
    assert roofline.predict_s(full, MACHINE) == pytest.approx(2e-3 / 0.5 + 1e-6)
    # One tile more than processors: a second round, of which a tenth is used.
    more = replace(full, operations=2.2e9, executed=2.2e9, programs=11)
    assert roofline.predict_s(more, MACHINE) == pytest.approx(4e-3 / 0.5 + 1e-6)
    assert roofline.predict_s(replace(full, executed=3e9), MACHINE) == pytest.approx(3e-3 / 0.5 + 1e-6)
    assert roofline.predict_s(replace(full, extra_launches=2), MACHINE) == pytest.approx(2e-3 / 0.5 + 3e-6)
    floor_ms, predicted_ms = roofline.total_ms([replace(full, count=12)], MACHINE)
    assert (floor_ms, predicted_ms) == pytest.approx((24.0, 48.012))


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "wanted"),
    [(128, 0, 8, 2), (129, 0, 8, 1), (32, 0, 4, 16), (64, 98304, 4, 2), (64, 115 * 1024, 4, 1), (168, 0, 4, 3)],
)
def test_programs_per_processor(registers: int, shared: int, warps: int, wanted: int) -> None:
    assert roofline.programs_per_processor(roofline.H100, registers, shared, warps) == wanted


def test_amd_has_512_registers_a_lane() -> None:
    assert roofline.programs_per_processor(roofline.MI300X, 164, 8192, 4) == 3
    assert roofline.programs_per_processor(roofline.MI300X, 64, 32768, 4) == 2


@pytest.mark.parametrize("batch", [1, 64])
def test_the_baseline_does_the_models_work(batch: int) -> None:
    works = list(roofline.bf16_baseline(TINY, batch, roofline.H100))
    m, d = batch * 197, 192
    block = 2 * m * d * 12 * d + 4 * batch * 3 * 197**2 * 64
    ends = 2 * batch * 196 * 768 * d + 2 * batch * d * 1000
    assert sum(work.count * work.operations for work in works) == 12 * block + ends
    assert sum(work.count for work in works) == 12 * 8 + 2
    assert all(work.executed >= work.operations for work in works)
    floor_ms, predicted_ms = roofline.total_ms(works, roofline.H100)
    assert floor_ms < predicted_ms


def test_tables_go_between_their_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A page\n\nBefore.\n<!-- x:begin -->\nold\n<!-- x:end -->\nAfter.\n")
    put_between(page, "x", ["new"])
    assert page.read_text() == "# A page\n\nBefore.\n<!-- x:begin -->\nnew\n<!-- x:end -->\nAfter.\n"
    put_between(page, "y", ["other"])
    assert page.read_text().endswith("After.\n\n<!-- y:begin -->\nother\n<!-- y:end -->\n")
