"""Tables of levels are optimal, and steps by channel are taken where they help."""

from __future__ import annotations

import itertools

import pytest
import torch

from lampq_rt.calibrate.linear_steps import LinearSteps
from lampq_rt.calibrate.observe import LinearObservation
from lampq_rt.calibrate.search import SEARCHES
from lampq_rt.calibrate.search.table import best_table, code_histogram
from lampq_rt.formats import Format
from lampq_rt.quantizers.table import flaw
from lampq_rt.sites import Kind, Site


def cost(histogram: torch.Tensor, levels: torch.Tensor) -> float:
    codes = torch.arange(-128, 128, dtype=torch.float64)
    nearest = (codes[:, None] - levels.double()).square().amin(1)
    return float((histogram.double() * nearest).sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 7])
def test_tables_are_valid_and_beat_uniform_levels(bits: int) -> None:
    source = torch.Generator().manual_seed(0)
    values = (torch.randn(20000, generator=source).abs().pow(2) * 9 - 100).round().clamp(-128, 127)
    histogram = torch.bincount((values + 128).long(), minlength=256).double()
    table = best_table(histogram, bits)
    assert table.dtype == torch.int8 and table.shape == (256,) and flaw(table, bits) is None
    uniform = torch.linspace(float(values.min()), float(values.max()), 1 << bits).round()
    assert cost(histogram, table.unique()) < 0.7 * cost(histogram, uniform)
    codes = torch.arange(-128, 128, dtype=torch.float64)
    own = float((histogram * (codes - table.double()).square()).sum())
    assert own == pytest.approx(cost(histogram, table.unique()), rel=1e-6)  # every code has its nearest level


def test_few_codes_by_brute_force() -> None:
    histogram = torch.zeros(256)
    places = torch.tensor([10, 11, 40, 90, 91, 200, 230])
    histogram[places] = torch.tensor([5.0, 1.0, 3.0, 2.0, 2.0, 7.0, 1.0])
    near = ((-118, -117, -116), (-88, -72, -60, -55, -48), (-38, -37, -20), (72, 73, 76, 80))
    best = min(cost(histogram, torch.tensor([*levels])) for levels in itertools.product(*near))
    assert cost(histogram, best_table(histogram, 2).unique()) <= best + 1e-6


def test_an_empty_histogram_gives_a_table() -> None:
    assert flaw(best_table(torch.zeros(256), 4), 4) is None


def test_histogram_weighs_rows_and_columns() -> None:
    codes = torch.tensor([[0, 1], [1, 127]])
    found = code_histogram(codes, torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0]))
    assert found[128] == 3.0 and found[129] == 5.0 + 6.0 and found[255] == 10.0 and float(found.sum()) == 24.0


def steps(rows: torch.Tensor, bits: int, scheme: str) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(3)
    weight = torch.randn(16, rows.shape[1], generator=source)
    seen = LinearObservation(rows, float(rows.min()), float(rows.max()))
    site = Site("blocks.0.mlp.fc2", Kind.FC2, 0, rows.shape[1], 16, len(rows), 0, weight.numel())
    formats = {"weight": Format(bits, "uniform", "channel", True), "input": Format(bits, scheme, "channel", False)}
    return LinearSteps(SEARCHES.get("output-error"), seen, weight, True, "gptq")(site, formats)


def test_an_outlier_channel_gets_its_own_step() -> None:
    rows = torch.randn(256, 32, generator=torch.Generator().manual_seed(1))
    plain, outlier = (
        steps(rows, 8, "uniform"),
        steps(rows * torch.cat((torch.tensor([300.0]), torch.ones(31))), 8, "uniform"),
    )
    assert float(plain["input.scale"].max() / plain["input.scale"].min()) == pytest.approx(1.0)
    assert float(outlier["input.scale"][0] / outlier["input.scale"][1:].median()) > 3.0
    assert outlier["weight.codes"].dtype == torch.int8 and outlier["input.zero_point"].dtype == torch.float32


def test_dead_channels_keep_positive_steps() -> None:
    rows = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    rows[:, 5] = 0.0
    for some in (rows, torch.zeros_like(rows)):
        found = steps(some, 4, "table")
        assert bool((found["input.scale"] > 0).all()) and bool(found["input.scale"].isfinite().all())
        assert flaw(found["input.table"], 4) is None
