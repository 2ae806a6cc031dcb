"""What a plan decided, for people: bits per layer as a table and as a picture, bytes, sensitivities, provenance."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from lampq_rt import channels, files, inputs, weights
from lampq_rt.errors import PlanError
from lampq_rt.formats import FLOAT_BITS, Format
from lampq_rt.kernels.packing import container_bytes, packed_bytes
from lampq_rt.plan import Plan, SiteParams
from lampq_rt.sites import BLOCK_LINEARS, Kind

COLUMNS = (Kind.QKV, Kind.QK, Kind.PV, Kind.PROJ, Kind.FC1, Kind.FC2)
"""Kinds inside a block, in order of execution: the columns of the tables."""

COLOURS = {
    1: "#7f0f1f",
    2: "#b2182b",
    3: "#e0603f",
    4: "#f2a65a",
    5: "#c8c04b",
    6: "#7fbf7b",
    7: "#4a9fb5",
    8: "#2b6cb0",
    16: "#777777",
}
"""A colour a width, from few bits (red) to many (blue); floating point is grey."""

FLOAT_BYTES = 4

PLOT_SUFFIXES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Layer:
    """One site of a plan.

    Attributes:
        name, kind, block: as the site's; `block` is None outside the blocks.
        bits: of its weight, or of its wider operand for a matmul.
        formats: short text by operand ("4", "8 +zp", "8 by channel").
        params: elements of the weight.
        memory_bytes: its codes in memory, in their container; 4 bytes an element in floating point.
        disk_bytes: its codes packed at exactly their width.
        sensitivity: the metric's score where the plan records one.
    """

    name: str
    kind: str
    block: int | None
    bits: int
    formats: dict[str, str]
    params: int
    memory_bytes: int
    disk_bytes: int
    sensitivity: float | None


def layers(plan: Plan) -> list[Layer]:
    """All sites in order of execution."""
    found = plan.provenance.get("sensitivity")
    scores: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    return [_layer(name, params, scores.get(name)) for name, params in plan.sites.items()]


def facts(plan: Plan) -> dict[str, Any]:
    """Everything that `lampq inspect --json` writes about a plan."""
    return {
        "model": plan.model,
        "weights_digest": plan.weights_digest,
        "mean_bits": round(plan.mean_bits, 6),
        "weight_bytes": weight_bytes(plan),
        "residual_dtype": plan.residual_dtype,
        "activations": dict(plan.activations),
        "provenance": dict(plan.provenance),
        "layers": [asdict(layer) for layer in layers(plan)],
    }


def weight_bytes(plan: Plan) -> int | None:
    """Bytes of the model's tensors in memory, as the calibrator reckoned them; None where the plan does not say."""
    costs = plan.provenance.get("costs")
    value = costs.get("weight_bytes") if isinstance(costs, Mapping) else None
    return int(value) if isinstance(value, (int, float)) else None


def size(count: float | None) -> str:
    """Bytes for people: "6.13 MB"; a dash for None."""
    if count is None:
        return "–"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"


def titled(title: str, table: Table) -> Group:
    """The table below a line of its own: rich would wrap a title at the table's width."""
    return Group(Text(title, style="italic"), table)


def summary(plan: Plan) -> Group:
    """Where the plan came from and what it costs, one line each."""
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    facts, every = plan.provenance, layers(plan)
    full = facts.get("full_costs", {}).get("weight_bytes")
    memory = weight_bytes(plan)
    share = f" ({100 * memory / full:.1f} % of fp32's {size(full)})" if memory and full else ""
    images, recipe = facts.get("images", {}), facts.get("recipe", {})
    activations = facts.get("costs", {}).get("mean_activation_bits")
    beside = f"; activations {activations:.3f}" if isinstance(activations, (int, float)) else ""
    lines = {
        "mean bits": f"{plan.mean_bits:.3f} over the blocks' linears{beside}",
        "weights in memory": f"{size(memory)}{share}",
        "codes of the weights": f"{size(sum(e.memory_bytes for e in every))} in memory, "
        f"{size(sum(e.disk_bytes for e in every))} on disk",
        "outside the blocks": "; ".join(f"{e.name}: {_formats(e)}" for e in every if e.block is None),
        "recipe": f"{recipe.get('name', '–')}: {recipe.get('description', '')}".rstrip(": "),
        "budget": ", ".join(_limit(unit, entry) for unit, entry in facts.get("budget", {}).items()),
        "objective": f"{_number(facts.get('objective'))} (gap {_number(facts.get('mip_gap'))})",
        "calibration": f"{images.get('count', '–')} images, seed {facts.get('seed', '–')}",
        "weights digest": plan.weights_digest[:16] + "…",
        "in floating point": ", ".join(entry["name"] for entry in facts.get("skipped", []))
        or "nothing but norms and sums",
    }
    if plan.activations:
        counts = Counter(plan.activations.values()).items()
        lines["activations"] = ", ".join(f"{name} in the place of the model's own in {n} MLPs" for name, n in counts)
    for label, text in lines.items():
        table.add_row(label, Text(text or "–"))
    return titled(f"Plan for {plan.model}", table)


def bits_table(plan: Plan, title: str = "Bits per layer (weight/input where they differ)") -> Group:
    """Bits by block and kind, one cell a site, with the parameter-weighted mean of each kind below."""
    every = layers(plan)
    table = Table(show_footer=True)
    table.add_column("block", "mean", justify="right")
    columns = _columns(every)
    for kind in columns:
        of_kind = [layer for layer in every if layer.kind == kind]
        weights = [layer.params or 1 for layer in of_kind]
        mean = sum(e.bits * w for e, w in zip(of_kind, weights, strict=True)) / sum(weights)
        table.add_column(kind, f"{mean:.2f}", justify="right")
    for block in sorted({layer.block for layer in every if layer.block is not None}):
        by_kind = {layer.kind: layer for layer in every if layer.block == block}
        table.add_row(str(block), *(_cell(by_kind.get(kind)) for kind in columns))
    return titled(title, table)


def sensitivity_table(plan: Plan) -> Group | None:
    """Each layer's share of the total sensitivity, percent, by block and kind; None where the plan records none."""
    every = [layer for layer in layers(plan) if layer.sensitivity is not None and layer.block is not None]
    total = sum(layer.sensitivity or 0.0 for layer in every)
    if not every or total <= 0:
        return None
    table = Table(show_footer=True)
    table.add_column("block", "sum", justify="right")
    columns = [kind for kind in _columns(every) if kind in BLOCK_LINEARS]
    share = {layer.name: 100 * (layer.sensitivity or 0.0) / total for layer in every}
    for kind in columns:
        table.add_column(kind, f"{sum(share[e.name] for e in every if e.kind == kind):.1f}", justify="right")
    for block in sorted({layer.block for layer in every if layer.block is not None}):
        by_kind = {e.kind: f"{share[e.name]:.2f}" for e in every if e.block == block}
        table.add_row(str(block), *(by_kind.get(kind, "–") for kind in columns))
    return titled("Sensitivity per layer (% of the whole)", table)


def plot(plan: Plan, path: Path) -> None:
    """Draw bits and, where the plan records it, sensitivity per layer, one panel a kind.

    Raises:
        PlanError: the file's suffix is not one of `PLOT_SUFFIXES`, or it cannot be written.
    """
    check_plot(path)
    figure = _figure(plan)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:].lower(), dpi=160)
    files.write_file(path, buffer.getvalue(), what="plot", error=PlanError)


def check_plot(path: Path) -> None:
    """Refuse a file name that no plot can have.

    Raises:
        PlanError: names the suffixes that there are.
    """
    if path.suffix.lower() not in PLOT_SUFFIXES:
        raise PlanError(f"cannot plot to {path}: its name must end in {', '.join(PLOT_SUFFIXES)}")


def _format_text(operand: str, fmt: Format) -> str:
    if operand == "weight" and fmt.scheme == "levels":
        return f"{fmt.bits} levels"
    if operand == "input" and fmt.granularity == "channel":
        return f"{fmt.bits} by channel" + (" from a table" if fmt.scheme == "table" else "")
    if operand == "input" and fmt.scheme == "table":
        return f"{fmt.bits} from a table"
    return f"{fmt.bits}" + ("" if fmt.symmetric else " +zp")


def _layer(name: str, params: SiteParams, score: Any) -> Layer:
    block = re.match(r"blocks\.(\d+)\.", name)
    memory = disk = FLOAT_BYTES * params.params
    scale = params.tensors.get("weight.scale")
    if scale is not None and params.params:
        memory = container_bytes(scale.numel(), params.params // scale.numel(), params.bits)
        if channels.by_channel(params):
            memory += sum(t.numel() * t.element_size() for t in channels.vectors(params) if t is not None)
        table = inputs.table_of(params)
        memory += 0 if table is None else table.numel()
        memory += weights.level_bytes(params)
        disk = packed_bytes(params.params, params.bits)
    return Layer(
        name=name,
        kind=str(params.kind),
        block=int(block[1]) if block else None,
        bits=params.bits,
        formats={operand: _format_text(operand, fmt) for operand, fmt in params.formats.items()},
        params=params.params,
        memory_bytes=memory,
        disk_bytes=disk,
        sensitivity=float(score) if isinstance(score, (int, float)) else None,
    )


def _columns(every: Sequence[Layer]) -> list[str]:
    present = {layer.kind for layer in every if layer.block is not None}
    return [str(kind) for kind in COLUMNS if str(kind) in present]


def _cell(layer: Layer | None) -> Text:
    if layer is None:
        return Text("–", style="dim")
    text = "float" if layer.bits == FLOAT_BITS else "/".join(dict.fromkeys(_widths(layer).values()))
    return Text(text, style=f"bold {COLOURS[layer.bits]}")


def _widths(layer: Layer) -> dict[str, str]:
    """Bits by operand."""
    return {operand: text.split()[0] for operand, text in layer.formats.items()}


def _formats(layer: Layer) -> str:
    """ "weight 4, input 8" where the operands differ, else the one width."""
    if layer.bits == FLOAT_BITS:
        return "floating point"
    widths = _widths(layer)
    if len(set(widths.values())) == 1:
        return f"{layer.bits} bits"
    return ", ".join(f"{operand} {width}" for operand, width in widths.items()) + " bits"


def _number(value: Any) -> str:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:.4g}"


def _limit(unit: str, entry: Mapping[str, Any]) -> str:
    """A budget: an upper limit, but for a speed-up."""
    if unit.startswith("speedup"):
        return f"{unit} ≥ {_number(entry.get('asked'))}"
    return f"{unit} ≤ {_number(entry.get('limit'))}"


def _figure(plan: Plan) -> Any:
    """A column a kind; bits above, sensitivity (one logarithmic scale for all) below."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    every = [layer for layer in layers(plan) if layer.block is not None]
    kinds = [kind for kind in _columns(every) if kind in BLOCK_LINEARS]
    if not kinds:
        raise PlanError("nothing to plot: the plan has no linear inside a block")
    scored = any(e.sensitivity for e in every)
    rows = 2 if scored else 1
    figure = Figure(figsize=(2.2 + 2.5 * len(kinds), 1.5 + 2.3 * rows), layout="constrained")
    axes = figure.subplots(rows, len(kinds), sharex=True, sharey="row", squeeze=False)
    for column, kind in enumerate(kinds):
        of_kind = [layer for layer in every if layer.kind == kind]
        _draw_bits(axes[0][column], of_kind)
        axes[0][column].set_title(kind, fontsize=11, fontweight="bold")
        if scored:
            _draw_sensitivity(axes[1][column], of_kind)
        axes[-1][column].set_xlabel("block")
        axes[-1][column].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        axes[-1][column].set_xlim(-0.7, max(e.block or 0 for e in every) + 0.7)
    axes[0][0].set_ylabel("bits")
    if scored:
        axes[1][0].set_ylabel("sensitivity")
    recipe = plan.provenance.get("recipe", {}).get("name", "plan")
    others = sorted({e.bits for e in layers(plan) if e.kind not in kinds})
    note = f" · attention matmuls, patch embedding and head: {', '.join(map(str, others))} bits" if others else ""
    figure.suptitle(f"{plan.model} · {recipe} · mean {plan.mean_bits:.2f} bits{note}", fontsize=10.5)
    return figure


def _draw_bits(axis: Any, of_kind: Sequence[Layer]) -> None:
    blocks = [layer.block for layer in of_kind]
    shown = [min(layer.bits, 9) for layer in of_kind]  # floating point is drawn just above 8
    axis.bar(blocks, shown, width=0.82, color=[COLOURS[layer.bits] for layer in of_kind], zorder=2)
    for layer, height in zip(of_kind, shown, strict=True):
        label = "fp" if layer.bits == FLOAT_BITS else str(layer.bits)
        axis.annotate(
            label, (layer.block, height), xytext=(0, 1.5), textcoords="offset points", ha="center", fontsize=7
        )
    axis.set_ylim(0, 9.6)
    axis.set_yticks(range(0, 9, 2))
    _plain(axis)


def _draw_sensitivity(axis: Any, of_kind: Sequence[Layer]) -> None:
    points = [(e.block, e.sensitivity, COLOURS[e.bits]) for e in of_kind if e.sensitivity]
    axis.set_yscale("log")
    if points:
        blocks, scores, colours = zip(*points, strict=True)
        axis.plot(blocks, scores, color="#bbbbbb", linewidth=1.2, zorder=1)
        axis.scatter(blocks, scores, c=list(colours), s=30, edgecolors="white", linewidths=0.6, zorder=2)
    _plain(axis)


def _plain(axis: Any) -> None:
    axis.grid(axis="y", color="#e6e6e6", linewidth=0.7, zorder=0)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8, length=2)
