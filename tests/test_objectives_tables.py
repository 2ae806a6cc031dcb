"""Tables of `benchmarks.objectives`: trainings by start and width, rates side by side."""

from __future__ import annotations

from typing import Any

from benchmarks.objectives import RATES, VARIANTS, table_of_rates, tables
from lampq_rt.calibrate.schedule import Schedule


def row(label: str, steps: int, kl: float, **more: Any) -> dict[str, Any]:
    facts = {"label": label, "model": "vit_tiny_patch16_224", "bits": 3, "steps": steps, "train_images": 9}
    return {**facts, "held_out": 7, "kl": kl, "agreement": 50.0, "seconds": 60, "machine": "m", **more}


ROWS = [
    row("blocks, fisher", 100, 0.7), row("before", 100, 1.1), row("blocks, mse", 100, 0.8),
    row("before", 100, 0.9, base="fast+w"), row("blocks, fisher, half the rates", 200, 0.4, base="fast+w"),
]  # fmt: skip


def test_trainings_from_the_same_start_stand_together() -> None:
    lines = list(tables(ROWS))
    assert sum("from `fast` at mean 3 bits, 100 steps" in line for line in lines) == 1
    assert not any("fast+w" in line for line in lines)  # rates alone were compared there
    found = [line for line in lines if line.startswith("| b")]
    assert [line.split(" | ")[0] for line in found] == ["| before", "| blocks, mse", "| blocks, fisher"]


def test_rates_stand_side_by_side() -> None:
    lines = [line.strip() for line in table_of_rates([*ROWS, row("blocks, fisher, twice the rates", 100, 0.6)])]
    assert lines[0] == "| training | steps of each block | vit_tiny, `fast`, 3 bits | vit_tiny, `fast+w`, 3 bits |"
    assert lines[2:-1] == [
        "| before | 0 | 1.100 (50.0) | 0.900 (50.0) |",
        "| blocks, fisher | 100 | 0.700 (50.0) | – |",
        "| blocks, fisher, twice the rates | 100 | 0.600 (50.0) | – |",
        "| blocks, fisher, half the rates | 200 | – | 0.400 (50.0) |",
    ]


def test_every_variant_is_a_schedule_of_its_own() -> None:
    facts = [str(Schedule(**{"steps": 9, **changes}).facts()) for changes in (VARIANTS | RATES).values()]
    assert len(set(facts)) == len(facts)
