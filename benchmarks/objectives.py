"""What each objective, order, rounding, drop and rate of training buys, from the same start, on real weights.

    python -m benchmarks.objectives --data DIR [--model deit_tiny_patch16_224] [--base fast+w] [--bits 4] \
        [--steps 240] [--train-images 768] [--only blocks] [--rates] [--out docs/calibration.md]

DIR holds `weights/NAME.safetensors` and `calib1000/`. The start is the plan of recipe `fast`, or of another named by
`--base`, made anew for every row (the same bits every time). KL to fp32 and agreement are of the integer runtime on
images of `calib1000` that neither calibrate nor train. A step of order "blocks" runs one block and one of order
"together" all of them, so the same number of steps is about the same work, but for what `suffix` runs behind each
block. `--rates` compares learning rates of one training in place of trainings.

Every finished row is kept in benchmarks/results/objectives.jsonl and not computed again; a row that was stopped goes on
from its state beside that file, which a second run at the same time would get in the way of.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import lampq_rt
from benchmarks.markdown import put_between
from benchmarks.results import answers
from lampq_rt import images, models
from lampq_rt.bench import machine
from lampq_rt.calibrate import RECIPES, Budget, Material, calibrate
from lampq_rt.calibrate.schedule import Schedule
from lampq_rt.evaluate import kl_divergence

ROWS = Path(__file__).parent / "results" / "objectives.jsonl"
USUAL_BASE = "fast"
CALIBRATION = 32
HELD_OUT = 200

ANSWERS: dict[str, Any] = {"blocks": 0.0, "answers": 1.0, "edge": 0.0}
"""The divergence of the answers alone, codes from the middle."""

SLOWER: dict[str, Any] = {**ANSWERS, "codes": 0.003, "factors": 0.0005, "rest": 0.0001}
"""The same at lower rates."""

FINISH = 150
"""Steps of all together behind the blocks, in the rows that have them."""

FISHER: dict[str, Any] = {"order": "blocks", "objective": "fisher"}


def at_rates(codes: float, factors: float | None = None, rest: float | None = None) -> dict[str, Any]:
    """Blocks by `fisher` at these shares of the default rates; steps and norms have the codes' where none is named."""
    factors = codes if factors is None else factors
    rest = factors if rest is None else rest
    usual = Schedule()
    return {**FISHER, "codes": codes * usual.codes, "factors": factors * usual.factors, "rest": rest * usual.rest}


VARIANTS: dict[str, dict[str, Any]] = {
    "before": {"steps": 0},
    "answers alone": ANSWERS,
    "answers alone, kept": {**ANSWERS, "rounding": "kept"},
    "answers alone, at lower rates": SLOWER,
    "answers alone, at lower rates, fast codes": {**SLOWER, "codes": 0.01},
    "together, mse, kept": {"rounding": "kept"},
    "together, tokens, kept": {"objective": "tokens", "rounding": "kept"},
    "together, mse": {},
    "together, aph": {"objective": "aph"},
    "together, fisher": {"objective": "fisher"},
    "together, mse, drop": {"drop": 0.5},
    "together, mse, adaround": {"rounding": "adaround"},
    "together, mse, adaround, drop": {"rounding": "adaround", "drop": 0.5},
    "blocks, mse": {"order": "blocks"},
    "blocks, aph": {"order": "blocks", "objective": "aph"},
    "blocks, fisher": FISHER,
    "blocks, aph, then answers": {"order": "blocks", "objective": "aph", "finish": FINISH},
    "blocks, fisher, then answers": {**FISHER, "finish": FINISH},
    "blocks, fisher, drop": {**FISHER, "drop": 0.5},
    "blocks, suffix": {"order": "blocks", "objective": "suffix"},
    "blocks, mse, adaround (AdaLog)": {"order": "blocks", "rounding": "adaround"},
    "blocks, aph, adaround, drop (APHQ-ViT)": {
        "order": "blocks", "objective": "aph", "rounding": "adaround", "drop": 0.5,
    },
    "blocks, fisher, adaround, drop (FIMA-Q)": {**FISHER, "rounding": "adaround", "drop": 0.5},
}  # fmt: skip
"""What is compared, by label: what differs from the default schedule. Names in brackets: whose training it is like."""

RATES: dict[str, dict[str, Any]] = {
    "before": VARIANTS["before"],
    "blocks, fisher": FISHER,
    "blocks, fisher, twice the rates": at_rates(2.0),
    "blocks, fisher, half the rates": at_rates(0.5),
    "blocks, fisher, a quarter of the rates": at_rates(0.25),
    "blocks, fisher, half the codes' rate": at_rates(0.5, 1.0),
    "blocks, fisher, half the steps' rate": at_rates(1.0, 0.5, 1.0),
}
"""What `--rates` compares."""

console = Console()


def main(
    data: Annotated[Path, typer.Option(help="Folder with weights/ and calib1000/.")],
    out: Annotated[Path | None, typer.Option(help="Markdown file with the markers.")] = None,
    model: Annotated[str, typer.Option(help="Name of the model.")] = "deit_tiny_patch16_224",
    base: Annotated[str, typer.Option(help="Recipe of the plan to start from.")] = USUAL_BASE,
    bits: Annotated[int, typer.Option(help="Mean bits.")] = 4,
    steps: Annotated[int, typer.Option(help="Of training; of each block in order `blocks`.")] = 240,
    train_images: Annotated[int, typer.Option(help="Images to train on.")] = 768,
    statistics: Annotated[int, typer.Option(help="Images to measure an objective's statistics on.")] = 32,
    only: Annotated[str, typer.Option(help="Only the row of this label, or those whose labels contain it.")] = "",
    held_out: Annotated[int, typer.Option(help="Images to compare on.")] = HELD_OUT,
    rates: Annotated[bool, typer.Option("--rates", help="Compare learning rates, not trainings.")] = False,
) -> None:
    """Fill in the rows that are missing and write the table of all."""
    work = {
        "model": model, "base": base, "bits": bits, "steps": steps, "train_images": train_images, "held_out": held_out,
    }  # fmt: skip
    done = {_key(row): row for row in _read()}
    compared = RATES if rates else VARIANTS
    wanted = [only] if only in compared else [label for label in compared if only in label]
    if not wanted:
        raise typer.BadParameter(f"--only {only!r} is in none of: {'; '.join(compared)}")
    if base not in RECIPES:
        raise typer.BadParameter(f"--base {base!r}; allowed: {', '.join(RECIPES)}")
    labels = [label for label in wanted if _key({**work, "label": label}) not in done]
    if labels:
        for row in rows(data, work, labels, statistics):
            done[_key(row)] = row
            with ROWS.open("a") as file:
                file.write(json.dumps(row) + "\n")
    if out is not None:
        put_between(out, "objectives", tables(list(done.values())))
        put_between(out, "rates", table_of_rates(list(done.values())))


def rows(data: Path, work: dict[str, Any], labels: list[str], statistics: int) -> Iterator[dict[str, Any]]:
    """One row a label."""
    model = models.load_model(work["model"], data / "weights" / f"{work['model']}.safetensors")
    preprocessing, every = images.preprocessing(work["model"]), images.list_images(data / "calib1000")
    chosen = images.choose(every, CALIBRATION, seed=0)
    others = images.spread([path for path in every if path not in set(chosen)], work["held_out"])
    rest = [path for path in every if path not in set(others)]
    pixels = images.load_images(others, preprocessing)
    exact = answers(model, pixels)
    state = ROWS.with_suffix(".training")
    material = Material(images.load_images(images.choose(rest, work["train_images"], seed=0), preprocessing), state)
    calibration = calibrate(model, images.load_images(chosen, preprocessing), material=material)
    for label in labels:
        changes = {"steps": work["steps"], "statistics": statistics, **(VARIANTS | RATES)[label]}
        recipe = replace(RECIPES.get(work["base"]), name=label, schedule=Schedule(**changes))
        if label not in RECIPES:
            RECIPES.register(label)(recipe)
        start = time.perf_counter()
        plan = calibration.plan(Budget(mean_bits=work["bits"]), label)
        seconds = time.perf_counter() - start
        found = answers(lampq_rt.compile(model, plan), pixels)
        agreement = float((found.argmax(1) == exact.argmax(1)).double().mean()) * 100
        row = {
            "label": label, **work, "kl": round(float(kl_divergence(exact, found).mean()), 4),
            "agreement": round(agreement, 1), "seconds": round(seconds), "schedule": recipe.schedule.facts(),
            "version": lampq_rt.__version__, "machine": machine(torch.device("cpu")),
        }  # fmt: skip
        state.unlink(missing_ok=True)
        console.print({key: row[key] for key in ("label", "kl", "agreement", "seconds")})
        yield row


def tables(found: list[dict[str, Any]]) -> Iterator[str]:
    """A Markdown table of the trainings for each model, start, width and number of steps."""
    order = list(VARIANTS)
    for group in sorted({_key(row)[1:] for row in found if row["label"] not in RATES}):
        mine = [row for row in found if _key(row)[1:] == group and row["label"] in VARIANTS]
        name, base, bits, steps, train, held_out = group
        yield f"\n**{name}**, from `{base}` at mean {bits} bits, {steps} steps (of each block, in order `blocks`) on"
        yield f"{train} images; KL to fp32 in nats on {held_out} images that trained nothing ({mine[0]['machine']}):\n"
        yield "| training | KL | agreement % | minutes |"
        yield "|---|---|---|---|"
        for row in sorted(mine, key=lambda row: order.index(row["label"])):
            yield f"| {row['label']} | {row['kl']:.3f} | {row['agreement']:.1f} | {row['seconds'] / 60:.0f} |"


def table_of_rates(found: list[dict[str, Any]]) -> Iterator[str]:
    """A Markdown table: a column a model, start and width, a line a rate and number of steps; KL (agreement)."""
    groups = sorted({_place(row) for row in found if row["label"] in RATES and row["label"] not in VARIANTS})
    cells = {}
    for row in found:
        if row["label"] in RATES and _place(row) in groups:
            steps = 0 if row["label"] == "before" else row["steps"]
            cells[row["label"], steps, _place(row)] = f"{row['kl']:.3f} ({row['agreement']:.1f})"
    heads = (f"{name.split('_patch')[0]}, `{base}`, {bits} bits" for name, base, bits in groups)
    yield "\n| training | steps of each block | " + " | ".join(heads) + " |"
    yield "|---" * (2 + len(groups)) + "|"
    order = list(RATES)
    for label, steps in sorted({key[:2] for key in cells}, key=lambda key: (key[1], order.index(key[0]))):
        line = (cells.get((label, steps, group), "–") for group in groups)
        yield f"| {label} | {steps} | " + " | ".join(line) + " |"
    yield ""


def _place(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["model"], row.get("base", USUAL_BASE), row["bits"]  # the first rows kept name no start


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return (row["label"], *_place(row), *(row[key] for key in ("steps", "train_images", "held_out")))


def _read() -> list[dict[str, Any]]:
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.is_file() else []


if __name__ == "__main__":
    typer.run(main)
