"""The picture of a sweep: quality against bytes on disk, and against latency, with the Pareto front."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lampq_rt import files
from lampq_rt.errors import DataError
from lampq_rt.frontier import Axis, Point, Quality, front

COLOURS = ("#777777", "#2b6cb0", "#e0603f", "#7fbf7b", "#8b5fbf")
"""The baseline's first, then one a recipe."""

MARKERS = ("s", "o", "^", "D", "v")
LABELS = {"kl": "KL(fp32 ‖ quantised), nats", "agreement": "agreement with fp32, %", "top1": "top-1, %"}
AXES: dict[Axis, tuple[str, float]] = {"disk_bytes": ("MB on disk", 1e6), "latency_ms": ("ms", 1.0)}


def plot(points: Sequence[Point], model: str, quality: Quality, paths: Sequence[Path], note: str = "") -> None:
    """Draw the sweep and write it to each of `paths` (.png or .svg).

    Args:
        points: of one model; at least one.
        model: for the title.
        quality: what stands on the vertical axis.
        paths: files to write.
        note: what the latencies are of, for the axis.

    Raises:
        DataError: a file could not be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    timed = any(p.latency_ms is not None for p in points)
    axes: list[Axis] = ["disk_bytes", "latency_ms"] if timed else ["disk_bytes"]
    figure = Figure(figsize=(5.2 * len(axes), 3.9), layout="constrained")
    for panel, axis in zip(figure.subplots(1, len(axes), squeeze=False)[0], axes, strict=True):
        _draw(panel, points, axis, quality)
        label, _ = AXES[axis]
        panel.set_xlabel(f"{label} ({note})" if axis == "latency_ms" and note else label)
        panel.set_ylabel(LABELS[quality])
    figure.axes[0].legend(fontsize=8, frameon=False)
    figure.suptitle(f"{model} · {points[0].images} images", fontsize=10.5)
    for path in paths:
        buffer = io.BytesIO()
        date: dict[str, Any] = {"metadata": {"Date": None}} if path.suffix == ".svg" else {}
        with rc_context({"svg.hashsalt": "lampq"}):  # equal points give equal files
            figure.savefig(buffer, format=path.suffix[1:], dpi=110, **date)
        files.write_file(path, buffer.getvalue(), what="plot", error=DataError)


def _draw(panel: Any, points: Sequence[Point], axis: Axis, quality: Quality) -> None:
    _, unit = AXES[axis]

    def place(group: Sequence[Point]) -> tuple[list[float], list[float]]:
        known = [p for p in group if getattr(p, axis) is not None and getattr(p, quality) is not None]
        return [getattr(p, axis) / unit for p in known], [getattr(p, quality) for p in known]

    best = front(points, axis, quality)
    panel.step(*place(best), where="post", color="#d8b24a", linewidth=5, alpha=0.45, zorder=1, label="Pareto front")
    panel.plot(*place(best), "o", markersize=11, markerfacecolor="none", markeredgecolor="#d8b24a", zorder=1)
    recipes = sorted({p.recipe for p in points}, key=lambda r: (r != "uniform", r))
    for index, recipe in enumerate(recipes):
        group = sorted((p for p in points if p.recipe == recipe), key=lambda p: p.asked_bits)
        style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "markersize": 5}
        panel.plot(*place(group), linewidth=1.3 if axis == "disk_bytes" else 0, label=recipe, zorder=2 + index, **style)
        for point in group:
            if getattr(point, axis) is None or getattr(point, quality) is None:
                continue
            panel.annotate(
                f"{point.asked_bits:g}",
                (getattr(point, axis) / unit, getattr(point, quality)),
                xytext=(6, 4) if index else (-6, -9),
                textcoords="offset points",
                fontsize=7,
                color=style["color"],
            )
    if quality == "kl" and all(p.kl > 0 for p in points):
        panel.set_yscale("log")
    if quality == "top1" and points[0].fp32_top1 is not None:
        panel.axhline(points[0].fp32_top1, color="#999999", linewidth=0.8, linestyle=":", label="fp32")
    panel.grid(color="#e6e6e6", linewidth=0.7, zorder=0)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8, length=2)
