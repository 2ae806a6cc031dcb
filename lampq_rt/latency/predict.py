"""A plan's latency from a table of single ops and three measured models.

    latency(plan) = f_int * sum of its integer ops' milliseconds
                    + f_convert * sum of those between integers and floating point + f_float * sum of the others'

An op takes longer inside a model than alone: caches and branch predictors have seen other things, Python calls lie
between, and the more so where it follows an op of another library. The three factors are such that three models come
out as they were measured: 8 bits everywhere, floating point everywhere, and every third linear in floating point. All
other plans are predicted. What plans have in common is covered by the same factors.

For the calibrator the same is split into a part for each site and one for each pair of neighbours: what an op does
depends on its own format and on the next one's (docs/latency.md), so that

    latency = constant + sum_i node(i, width_i) + sum_i edge(i, width_i, width_{i+1})

is exact; node and edge are differences of whole forward passes in which one site, or two, have another width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from lampq_rt import backends
from lampq_rt.backends import Formats
from lampq_rt.errors import TableError
from lampq_rt.formats import FLOAT_BITS, INTEGER_BITS
from lampq_rt.latency.calls import Call, Calls, Counted, Tracer, fingerprint
from lampq_rt.latency.table import FLOAT, MIXED, OURS, LatencyTable, ModelEntry
from lampq_rt.runner import BUCKETS, micro_batch_for
from lampq_rt.sites import BLOCK_LINEARS, Description, Site

REFERENCE = 8
"""Width of every site in the model that is measured as a whole."""

WIDTHS = (*INTEGER_BITS, FLOAT_BITS)
TRACED_BLOCKS = 2
"""Blocks that show every pair of neighbours: the first has none before it, the last none behind."""

FAMILIES = ("integer", "conversion", "other")
CONVERSIONS = ("quantize", "layernorm_quantize", "linear_float", "linear_residual", "heads_quantize")
"""Ops of ours that read or write floating point."""

Factors = tuple[float, float, float]
"""By family."""

Chosen = Mapping[str, Formats]
Nodes = Mapping[str, Mapping[int, float]]
Edges = Mapping[tuple[str, str], Mapping[tuple[int, int], float]]


@dataclass(frozen=True)
class Shares:
    """Milliseconds more than with 8 bits everywhere (less where negative).

    Attributes:
        nodes: by site (attention matmuls: integer widths only) and width.
        edges: by two neighbouring linears and their widths; pairs that never cost anything are left out.
    """

    nodes: Nodes
    edges: Edges


class Predictor:
    """Predicts plans of one model at one batch size.

    Args:
        table: of the machine that serves.
        model: in floating point; its weights are not looked at.
        input_size: (C, H, W) of an image.
        batch: images at once.

    Raises:
        ModelError: the model is of no supported family.
    """

    def __init__(self, table: LatencyTable, model: nn.Module, input_size: Sequence[int], batch: int) -> None:
        self.table, self.batch = table, batch
        self._tracer = Tracer(model, input_size, table.device)
        self.description = self._tracer.description
        self._short = _shortened(self._tracer)
        self._pure: dict[int, Calls] = {}
        self._factors: tuple[LatencyTable, Factors] | None = None
        self._hint = f"lampq profile {self.description.architecture} --batch {batch} --device {table.device}"

    @property
    def reference(self) -> Calls:
        """The calls of the model with 8 bits everywhere."""
        return self._uniform(REFERENCE)

    @property
    def fingerprint(self) -> str:
        """Key of the model's entry in the table."""
        return fingerprint(self.reference, self.batch)

    @property
    def entry(self) -> ModelEntry:
        """The whole model's measured latencies.

        Raises:
            TableError: the table has none; the message says what fills it.
        """
        found = self.table.models.get(self.fingerprint)
        if found is None:
            name, where = self.description.architecture, self.table.where
            raise TableError(f"no latencies of {name} at batch {self.batch} for {where}; run: {self._hint}")
        return found

    def calls(self, chosen: Chosen) -> Calls:
        """The calls of a forward pass, in the pieces that the runner makes of the batch."""
        return self._pieces(self._tracer, chosen)

    def latency_ms(self, chosen: Chosen) -> float:
        """Predicted milliseconds of a forward pass with the sites in these formats.

        Raises:
            TableError: the table lacks a call, or the model.
        """
        return self._price(self.calls(chosen))

    def factors(self) -> Factors:
        """How many times as long ops take inside the model as alone, by family (see `FAMILIES`).

        Raises:
            TableError: the table lacks a call, or the model.
        """
        if self._factors is None or self._factors[0] is not self.table:
            self._factors = (self.table, self._solved())
        return self._factors[1]

    def _solved(self) -> Factors:
        """From as many of the measured models as the table has: one factor of all ops, two, or three."""
        times, sums = self.entry.latency_ms, self._sums(self.reference)
        common = times[OURS] / sum(sums)
        if FLOAT not in times:
            return (common, common, common)
        floating = times[FLOAT] / self._sums(self._uniform(FLOAT_BITS))[2]
        rest = times[OURS] - floating * sums[2]
        two = max(rest, 0.0) / (sums[0] + sums[1])
        if MIXED not in times:
            return (two, two, floating)
        mixed = self._sums(self.calls(third_floating(self.description)))
        left = times[MIXED] - floating * mixed[2]
        determinant = sums[0] * mixed[1] - sums[1] * mixed[0]
        if not determinant:
            return (two, two, floating)
        integer = (rest * mixed[1] - left * sums[1]) / determinant
        convert = (left * sums[0] - rest * mixed[0]) / determinant
        # Two nearly equal latencies, and noise in both, may give nonsense: then two factors are safer.
        return (integer, convert, floating) if integer > 0.0 and convert > 0.0 else (two, two, floating)

    def shares(self) -> Shares:
        """What each site and each pair of neighbours adds at each width.

        Raises:
            TableError: the table lacks a call, or the model.
        """
        factors = self.factors()
        return split(self.description, self._short.description, self._short_calls, lambda c: self._price(c, factors))

    def needed(self) -> dict[str, Counted]:
        """Every call that a prediction may ask for, one a key."""
        found: dict[str, Counted] = {}

        def note(calls: Calls) -> float:
            found.update(calls)
            return 0.0

        split(self.description, self._short.description, self._short_calls, note)
        for width in (REFERENCE, FLOAT_BITS):  # attention in floating point, too
            note(self._short_calls(uniform(self._short.description, width)))
        for float_matmuls in (True, False):
            note(self._short_calls(_islands(self._short.description, float_matmuls)))
        return found

    def _short_calls(self, chosen: Chosen) -> Calls:
        return self._pieces(self._short, chosen)

    def _pieces(self, tracer: Tracer, chosen: Chosen) -> Calls:
        total: dict[str, Counted] = {}
        for size, times in kernel_batches(self.batch, self.description.image_bytes, self.table).items():
            for key, counted in tracer.calls(chosen, size).items():
                before = total[key].count if key in total else 0
                total[key] = Counted(counted.call, before + counted.count * times)
        return total

    def _uniform(self, width: int) -> Calls:
        if width not in self._pure:
            self._pure[width] = self.calls(uniform(self.description, width))
        return self._pure[width]

    def _price(self, calls: Calls, factors: Factors | None = None) -> float:
        """Milliseconds of these calls inside the model."""
        return sum(f * ms for f, ms in zip(factors or self.factors(), self._sums(calls), strict=True))

    def _sums(self, calls: Calls) -> tuple[float, float, float]:
        """Milliseconds of these calls alone, by family."""
        missing = [key for key in calls if key not in self.table.calls]
        if missing:
            raise TableError(
                f"the latency table of {self.table.where} lacks {len(missing)} of the {len(calls)} ops that "
                f"{self.description.architecture} runs at batch {self.batch}; run: {self._hint}"
            )
        sums = [0.0, 0.0, 0.0]
        for key, counted in calls.items():
            sums[family(counted.call)] += self.table.calls[key] * counted.count
        return sums[0], sums[1], sums[2]


def family(call: Call) -> int:
    """Index in `FAMILIES`."""
    namespace, _, op = call.op.removesuffix(".default").partition("::")
    if namespace != "lampq":
        return 2
    return int(op in CONVERSIONS or (op == "attention" and dict(call.args)["out_bits"] == FLOAT_BITS))


def third_floating(description: Description) -> dict[str, Formats]:
    """Every third of the blocks' linears in floating point, 8 bits elsewhere."""
    floating = {site.name: backends.formats(site.kind, FLOAT_BITS) for site in _linears(description)[::3]}
    return {**uniform(description, REFERENCE), **floating}


def kernel_batches(batch: int, image_bytes: int, table: LatencyTable) -> dict[int, int]:
    """Images that the kernels see at once, and how often, when `batch` come: on a GPU, `runner`'s padded pieces."""
    if table.device == "cpu":
        return {batch: 1}
    micro = micro_batch_for(image_bytes, table.l2_bytes)
    found: dict[int, int] = {}
    while batch > 0:
        piece = min(batch, BUCKETS[-1])
        bucket = next(b for b in BUCKETS if b >= piece)
        size = min(bucket, micro or bucket)
        found[size] = found.get(size, 0) + bucket // size
        batch -= piece
    return found


def uniform(description: Description, width: int) -> dict[str, Formats]:
    """Every site at one width."""
    return {site.name: backends.formats(site.kind, width) for site in description.sites}


def split(
    description: Description,
    short: Description,
    trace: Callable[[Chosen], Calls],
    price: Callable[[Calls], float],
) -> Shares:
    """Node and edge costs of a model from forward passes of a shortened one.

    Args:
        description: of the model.
        short: of one with the same blocks, but fewer of them.
        trace: the shortened model's calls under a choice of formats.
        price: milliseconds of calls.
    """
    reference = uniform(short, REFERENCE)
    base = price(trace(reference))
    widths = _classes(short, reference, trace)
    others = [w for w in dict.fromkeys(widths.values()) if w != widths[REFERENCE]]

    def above(*changes: tuple[Site, int]) -> float:
        formats = {site.name: backends.formats(site.kind, width) for site, width in changes}
        return price(trace({**reference, **formats})) - base

    nodes: dict[tuple[str, ...], dict[int, float]] = {}
    roles = _roles(short)
    for site in short.sites:
        if not site.is_matmul and roles[site.name] not in nodes:
            nodes[roles[site.name]] = {REFERENCE: 0.0, **{w: above((site, w)) for w in others}}
    edges: dict[tuple[str, str], dict[tuple[int, int], float]] = {}
    for one, two in pairwise(_linears(short)):
        if (one.kind, two.kind) not in edges:
            edges[one.kind, two.kind] = {
                (a, b): above((one, a), (two, b)) - nodes[roles[one.name]][a] - nodes[roles[two.name]][b]
                for a in others
                for b in others
            }
    return _spread(description, widths, nodes, edges)


def _spread(
    description: Description,
    widths: Mapping[int, int],
    nodes: Mapping[tuple[str, ...], Mapping[int, float]],
    edges: Mapping[tuple[str, str], Mapping[tuple[int, int], float]],
) -> Shares:
    """The costs of roles as those of all sites, of classes of widths as those of all widths."""
    stands_for = {w: REFERENCE if c == widths[REFERENCE] else c for w, c in widths.items()}
    roles = _roles(description)
    by_site = {
        site.name: {w: 0.0 if site.is_matmul else nodes[roles[site.name]][c] for w, c in stands_for.items()}
        for site in description.sites
    }
    by_pair = {}
    for one, two in pairwise(_linears(description)):
        costs = edges[one.kind, two.kind]
        if any(abs(ms) > 1e-9 for ms in costs.values()):
            by_pair[one.name, two.name] = {
                (a, b): costs.get((stands_for[a], stands_for[b]), 0.0) for a in WIDTHS for b in WIDTHS
            }
    return Shares(by_site, by_pair)


def _classes(short: Description, reference: Chosen, trace: Callable[[Chosen], Calls]) -> dict[int, int]:
    """A width that stands for each: the first of those with which the linears run the same calls."""
    first: dict[frozenset[tuple[str, int]], int] = {}
    found = {}
    for width in WIDTHS:
        changed = {s.name: backends.formats(s.kind, width) for s in short.sites if not s.is_matmul}
        calls = trace({**reference, **changed})
        found[width] = first.setdefault(frozenset((key, c.count) for key, c in calls.items()), width)
    return found


def _linears(description: Description) -> list[Site]:
    return [site for site in description.sites if site.kind in BLOCK_LINEARS]


def _roles(description: Description) -> dict[str, tuple[str, ...]]:
    """What decides a site's costs: its kind and the kinds of the linears before and behind it."""
    linears = _linears(description)
    kinds = ["", *(str(site.kind) for site in linears), ""]
    around = {s.name: (str(s.kind), kinds[i], kinds[i + 2]) for i, s in enumerate(linears)}
    return {site.name: around.get(site.name, (str(site.kind),)) for site in description.sites}


def _shortened(tracer: Tracer) -> Tracer:
    """Two blocks in the place of many, where all are alike."""
    by_block: dict[int, list[tuple[object, ...]]] = {}
    for s in tracer.description.sites:
        if s.block is not None:
            by_block.setdefault(s.block, []).append((s.kind, s.in_features, s.out_features, s.rows, s.heads))
    alike = all(sites == by_block[0] for sites in by_block.values()) if 0 in by_block else False
    if not alike:
        raise TableError(f"latency budgets need blocks that are all alike; {tracer.description.architecture}'s differ")
    return tracer.shortened(TRACED_BLOCKS) if len(by_block) > TRACED_BLOCKS else tracer


def _islands(description: Description, float_matmuls: bool) -> dict[str, Formats]:
    """Attention matmuls in floating point among integer linears, or the other way round."""
    linears, matmuls = (REFERENCE, FLOAT_BITS) if float_matmuls else (FLOAT_BITS, REFERENCE)
    return {s.name: backends.formats(s.kind, matmuls if s.is_matmul else linears) for s in description.sites}
