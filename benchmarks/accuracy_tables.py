"""Tables of the rows that `benchmarks.results` keeps: all of them, the aims, and the few that the README shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]

SHORT = {"deit_tiny_patch16_224": "DeiT-Tiny", "vit_tiny_patch16_224": "ViT-Tiny"}
README_RECIPES = ("uniform", "lampq", "fast", "lampq+", "fast+w", "lampq+w")
CHOOSING = ("lampq+", "lampq+w")
"""Recipes that stand beside the aims: they choose bits where there is a choice, at fewer than 8."""

WIDTHS = (8, 6, 5, 4, 3)


@dataclass(frozen=True)
class Aim:
    """What a plan without training should keep to.

    Attributes:
        lost: points of top-1, at most.
        agreement: percent of images with fp32's answer, at least; 0 where none is asked for.
    """

    lost: float
    agreement: float = 0.0

    def __str__(self) -> str:
        return f"{self.lost:g}" + (f" ({self.agreement:g})" if self.agreement else "")

    def missed(self, row: Row) -> bool:
        """True for a row that does not keep to it."""
        return bool(row["lost"] > self.lost or row["agreement"] < self.agreement)


AIMS: Mapping[int, tuple[Aim, Aim]] = {
    8: (Aim(0.3, 98), Aim(0.5, 97)), 6: (Aim(0.5, 96), Aim(1.5, 94)), 4: (Aim(5), Aim(10)), 3: (Aim(20), Aim(35)),
}  # fmt: skip
"""By mean bits, of the models of `SHORT`."""

TRAINING_AIMS: Mapping[int, float] = {4: 2 / 3, 3: 1 / 2}
"""By mean bits: what training should leave of the points that `lampq+` loses, at most."""

TRAINED: Mapping[str, str] = {"lampq+rec": "lampq+", "lampq+w+rec": "lampq+w"}
"""What trains, and what it starts from. Aims are set for the first."""

FOR_WHOM: Mapping[str, str] = {
    "lampq+w": "the default: weights' bits chosen by layer; activations have 8, which integer units compute on anyway",
    "fast+w": "sooner, and for large models: the same bits in every layer; a mean of 4.5 is served with 4",
    "lampq+w+rec": "for 3 and 4 bits: `lampq+w`, then training on some hundred images, without labels",
    "lampq+": "activations as narrow as the weights, LampQ's convention, which published W4A4 figures share",
    "fast": "the same, with the same bits in every layer",
    "lampq+a": "`lampq+` with 8 bits for q, k, v and softmax output, which have no weights",
    "lampq+rec": "`lampq+`, then such a training",
    "lampq": "LampQ on plain rounding, to compare with",
}
"""The recipes of the README's choice, and for whom each is."""


def everything(rows: Sequence[Row]) -> Iterator[str]:
    """A table a model and size of the calibration set."""
    for name, count in sorted({(r["model"], r["calib_images"]) for r in rows}):
        group = [r for r in rows if (r["model"], r["calib_images"]) == (name, count)]
        yield f"\n**{name}**, {count} calibration images, {group[0]['images']} evaluation images, "
        yield f"fp32 top-1 {group[0]['fp32_top1']} % ({group[0]['machine']})\n"
        yield "| mean bits | recipe | top-1 % | points lost | agreement % | KL (nats) | on disk | as stored | seconds |"
        yield "|---|---|---|---|---|---|---|---|---|"
        for r in sorted(group, key=lambda r: (-r["bits"], r["recipe"] != "uniform", r["recipe"])):
            label = f"W{r['bits']}A{r['bits']}" if r["recipe"] == "uniform" else f"{r['mean_bits']:.2f}"
            yield (
                f"| {label} | {r['recipe']} | {r['top1']} | {r['lost']} | {r['agreement']} | {r['kl']} | "
                f"{r['disk_percent']} % | {r['memory_percent']} % | {_seconds(r)} |"
            )


def aims(rows: Sequence[Row]) -> Iterator[str]:
    """The aims beside what comes near them, a table a size of the calibration set."""
    for count in sorted({r["calib_images"] for r in rows}):
        found = _by_key(rows, count)
        yield f"\nPoints lost (agreement in %), {count} calibration images:\n"
        columns = (f"aim | {name} `fast` | " + " | ".join(f"`{r}`" for r in CHOOSING) for name in SHORT.values())
        yield "| mean bits | " + " | ".join(columns) + " |"
        yield "|---" * (1 + (2 + len(CHOOSING)) * len(SHORT)) + "|"
        for bits, each in AIMS.items():
            cells = []
            for name, aim in zip(SHORT, each, strict=True):
                cells += [str(aim), _judged(found.get((name, "fast", bits)), aim)]
                for recipe in CHOOSING:
                    cells.append("as `fast`" if bits == 8 else _judged(found.get((name, recipe, bits)), aim))
            yield f"| {bits} | " + " | ".join(cells) + " |"


def training(rows: Sequence[Row]) -> Iterator[str]:
    """What is left of the loss after training, beside the aims, which are set for 32 calibration images."""
    yield "\n| recipe | calibration images | bits | | before | after | aim | KL before, after | less KL | minutes |"
    yield "|---" * 10 + "|"
    counts = sorted({row["calib_images"] for row in rows})
    for recipe, count in ((recipe, count) for recipe in TRAINED for count in counts):
        found = _by_key(rows, count)
        for bits, share in TRAINING_AIMS.items():
            for name, label in SHORT.items():
                before, after = found.get((name, TRAINED[recipe], bits)), found.get((name, recipe, bits))
                if before is None or after is None:
                    continue
                aim = Aim(round(share * before["lost"], 1)) if TRAINED[recipe] == "lampq+" else None
                yield (
                    f"| `{recipe}` | {count} | {bits} | {label} | {_cell(before)} | "
                    f"{_cell(after) if aim is None else _judged(after, aim)} | {aim or '–'} | "
                    f"{before['kl']:.3f}, {after['kl']:.3f} | {100 * (1 - after['kl'] / before['kl']):.0f} % | "
                    f"{'–' if after['seconds'] is None else round(after['seconds'] / 60)} |"
                )
    yield ""


def short(rows: Sequence[Row]) -> Iterator[str]:
    """The README's table: points lost and agreement at 32 calibration images."""
    found = _by_key(rows, 32)
    yield "\n| model | mean bits | " + " | ".join(f"`{recipe}`" for recipe in README_RECIPES) + " |"
    yield "|---" * (2 + len(README_RECIPES)) + "|"
    for name, label in SHORT.items():
        for bits in WIDTHS:
            cells = [_cell(found.get((name, recipe, bits))) for recipe in README_RECIPES]
            yield f"| {label} | {bits} | " + " | ".join(cells) + " |"
    yield ""


def recipes(rows: Sequence[Row], widths: Sequence[int] = (4, 3), count: int = 32) -> Iterator[str]:
    """The README's choice of recipes: what each loses at those mean bits, and how long a plan takes."""
    found = _by_key(rows, count)
    columns = " | ".join(f"{name} at {bits} bits" for name in SHORT.values() for bits in widths)
    yield f"\n| recipe | for whom | {columns} | seconds a plan |"
    yield "|---" * (3 + len(SHORT) * len(widths)) + "|"
    for recipe, reader in FOR_WHOM.items():
        plans = [[(name, recipe, bits) for bits in widths] for name in SHORT]
        own = [found.get(key) for keys in plans for key in keys]
        lost = ("–" if row is None else f"{row['lost']:.1f}" for row in own)
        firsts = (next((found[key] for key in keys if key in found), None) for keys in plans)
        seconds = ("–" if row is None or row["seconds"] is None else f"{row['seconds']:.0f}" for row in firsts)
        yield f"| `{recipe}` | {reader} | " + " | ".join(lost) + f" | {', '.join(seconds)} |"
    yield f"\nPoints of top-1 lost on {rows[0]['images']:,} images at these mean bits, {count} calibration images."
    yield f"Seconds for {' and '.join(SHORT.values())} at the first of these widths measured, on one thread of a"
    yield "busy machine (`benchmarks.results`).\n"


def _by_key(rows: Sequence[Row], count: int) -> dict[tuple[str, str, int], Row]:
    return {(r["model"], r["recipe"], r["bits"]): r for r in rows if r["calib_images"] == count}


def _judged(row: Row | None, aim: Aim) -> str:
    return _cell(row) + (", missed" if row is not None and aim.missed(row) else "")


def _seconds(row: Row) -> str:
    """Time of a plan; none is known where the process was halted meanwhile."""
    return "–" if row["seconds"] is None else str(row["seconds"])


def _cell(row: Row | None) -> str:
    return "–" if row is None else f"{row['lost']:.1f} ({row['agreement']:.1f})"
