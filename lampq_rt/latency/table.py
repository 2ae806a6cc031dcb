"""Latency tables: milliseconds of op calls on one machine, kept as JSON. The format is in docs/latency.md.

A table belongs to one machine, device and number of threads. Ours lie beside this file, the user's own in the cache
folder; both are found by the machine's name, and the user's entries win.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from lampq_rt import bench, files
from lampq_rt.errors import TableError
from lampq_rt.kernels.cpu.native import cache_folder
from lampq_rt.runner import l2_bytes

SCHEMA = 1
DEVICES = ("cpu", "cuda")
SHIPPED = Path(__file__).resolve().parent / "tables"
LARGEST = 32 << 20
"""Bytes that a table's file may have."""

OURS = bench.OURS
"""Name of the integer model, 8 bits everywhere, among a model's latencies."""
FLOAT = "lampq-float"
"""Name of the compiled model whose plan leaves every site in floating point."""
MIXED = "lampq-mixed"
"""Name of the compiled model whose plan leaves every third of the blocks' linears in floating point."""
COMPILED = (OURS, FLOAT, MIXED)


@dataclass(frozen=True)
class ModelEntry:
    """A whole model at one batch size.

    Attributes:
        name: timm's name; others with the same calls share the entry.
        batch: images at once.
        latency_ms: median milliseconds by variant: "lampq" with 8 bits everywhere, "lampq-float" with none,
            "lampq-mixed" with both, and the baselines of `bench`.
    """

    name: str
    batch: int
    latency_ms: Mapping[str, float]


@dataclass(frozen=True)
class LatencyTable:
    """What was timed on one machine.

    Attributes:
        machine: processor or GPU, as `bench.machine` names it.
        device: "cpu" or "cuda".
        threads: of PyTorch, on a CPU.
        l2_bytes: of a GPU's L2 cache, which decides on micro-batches; 0 on a CPU.
        versions: of what a latency depends on, when the table was last written.
        written: date of that, ISO.
        calls: milliseconds by `Call.key`.
        models: by `calls.fingerprint` of the model with 8 bits everywhere.
    """

    machine: str
    device: str
    threads: int
    l2_bytes: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    written: str = ""
    calls: Mapping[str, float] = field(default_factory=dict)
    models: Mapping[str, ModelEntry] = field(default_factory=dict)

    @property
    def file_name(self) -> str:
        """ "cpu-amd-epyc-2-cores-1-thread.json"."""
        words = [self.device, *re.findall(r"[a-z0-9]+", self.machine.lower())]
        threads = [str(self.threads), "thread" if self.threads == 1 else "threads"] if self.device == "cpu" else []
        return "-".join([*words, *threads]) + ".json"

    @property
    def where(self) -> str:
        """The machine, for people."""
        threads = f", {self.threads} thread{'' if self.threads == 1 else 's'}" if self.device == "cpu" else ""
        return f"{self.machine}{threads}"

    def updated(self, calls: Mapping[str, float], models: Mapping[str, ModelEntry]) -> LatencyTable:
        """With these entries added, today, by the present versions."""
        return replace(
            self,
            versions=bench.versions(),
            written=date.today().isoformat(),
            calls={**self.calls, **calls},
            models={**self.models, **models},
        )

    def save(self, path: Path) -> None:
        """Write it; its folder is made where it is missing.

        Raises:
            TableError: it cannot be written.
        """
        data = {
            "schema": SCHEMA,
            "machine": self.machine,
            "device": self.device,
            "threads": self.threads,
            "l2_bytes": self.l2_bytes,
            "versions": dict(self.versions),
            "written": self.written,
            "calls": dict(sorted(_all_rounded(self.calls).items())),
            "models": {
                key: {"name": m.name, "batch": m.batch, "latency_ms": _all_rounded(m.latency_ms)}
                for key, m in sorted(self.models.items(), key=lambda item: (item[1].name, item[1].batch))
            },
        }  # fmt: skip
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as cause:
            raise TableError(f"cannot write latency table {files.shown(path)}: {files.reason(cause)}") from None
        text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        files.write_file(path, text.encode(), what="latency table", error=TableError)

    @classmethod
    def load(cls, path: Path) -> LatencyTable:
        """Read it.

        Raises:
            TableError: it cannot be read or is malformed; the message names the field.
        """
        where = f"latency table {files.shown(path)}"
        text = files.read_file(path, what="latency table", error=TableError, limit=LARGEST)
        return _parsed(files.parse_json(text, where=where, error=TableError), where)


def empty(device: torch.device) -> LatencyTable:
    """A table of the present machine without entries."""
    on_gpu = device.type == "cuda"
    return LatencyTable(bench.machine(device), device.type, 0 if on_gpu else torch.get_num_threads(), l2_bytes(device))


def user_path(table: LatencyTable) -> Path:
    """Where the user's own table of that machine lies."""
    return cache_folder() / "latency" / table.file_name


def find(device: torch.device) -> LatencyTable:
    """The present machine's table: ours with the user's own on top; without entries where there is neither.

    Raises:
        TableError: one of them is malformed.
    """
    found = empty(device)
    for path in (SHIPPED / found.file_name, user_path(found)):
        if path.is_file():
            loaded = LatencyTable.load(path)
            found = replace(loaded, calls={**found.calls, **loaded.calls}, models={**found.models, **loaded.models})
    return found


def required(device: str) -> LatencyTable:
    """The present machine's table.

    Raises:
        TableError: there is none; the message says how to come by one.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise TableError("a latency budget for a GPU, but there is none here; give the table of one: --latency-table")
    found = find(torch.device(device))
    if not found.calls:
        others = _other_threads(found)
        known = f" (there are tables for {', '.join(map(str, others))} threads)" if others else ""
        raise TableError(f"no latency table for {found.where}{known}; `lampq profile` makes one")
    return found


def _other_threads(table: LatencyTable) -> list[int]:
    """Numbers of threads that this machine has tables for beside that one's."""
    pattern = re.sub(r"\d+-threads?\.json$", "*.json", table.file_name)
    paths = [path for folder in (SHIPPED, user_path(table).parent) for path in folder.glob(pattern)]
    counts = {int(match[1]) for path in paths if (match := re.search(r"-(\d+)-threads?\.json$", path.name))}
    return sorted(counts - {table.threads})


def _parsed(data: Any, where: str) -> LatencyTable:
    """The table that JSON stands for, every field looked at."""
    if not isinstance(data, dict):
        raise TableError(f"{where}: an object is needed, not {type(data).__name__}")
    if data.get("schema") != SCHEMA:
        raise TableError(f"{where}: schema is {data.get('schema')!r}; this version reads {SCHEMA}")
    for name in ("machine", "written"):
        if not isinstance(data.get(name), str):
            raise TableError(f"{where}: {name} is {data.get(name)!r:.80}; a text is needed")
    if data.get("device") not in DEVICES:
        raise TableError(f"{where}: device is {data.get('device')!r:.80}; allowed: {', '.join(DEVICES)}")
    for name in ("threads", "l2_bytes"):
        if type(data.get(name)) is not int or data[name] < 0:
            raise TableError(f"{where}: {name} is {data.get(name)!r:.80}; a whole number from 0 is needed")
    versions = data.get("versions")
    if not isinstance(versions, dict) or not all(isinstance(v, str) for v in versions.values()):
        raise TableError(f"{where}: versions must be an object of texts")
    return LatencyTable(
        data["machine"],
        data["device"],
        data["threads"],
        data["l2_bytes"],
        versions,
        data["written"],
        _times(data.get("calls"), f"{where}: calls"),
        _models(data.get("models"), f"{where}: models"),
    )


def _models(data: Any, where: str) -> dict[str, ModelEntry]:
    if not isinstance(data, dict):
        raise TableError(f"{where} must be an object, by model")
    found = {}
    for key, entry in data.items():
        at = f"{where}.{key}"
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise TableError(f"{at}: an object with name, batch and latency_ms is needed")
        if type(entry.get("batch")) is not int or entry["batch"] < 1:
            raise TableError(f"{at}.batch is {entry.get('batch')!r:.80}; a whole number from 1 is needed")
        times = _times(entry.get("latency_ms"), f"{at}.latency_ms")
        if OURS not in times:
            raise TableError(f"{at}.latency_ms lacks {OURS!r}")
        found[key] = ModelEntry(entry["name"], entry["batch"], times)
    return found


def _times(data: Any, where: str) -> dict[str, float]:
    if not isinstance(data, dict):
        raise TableError(f"{where} must be an object of milliseconds")
    for key, ms in data.items():
        if isinstance(ms, bool) or not isinstance(ms, (int, float)) or not (math.isfinite(ms) and ms > 0):
            raise TableError(f"{where}: {key!r:.120} is {ms!r:.40}; positive milliseconds are needed")
    return {key: float(ms) for key, ms in data.items()}


def _all_rounded(times: Mapping[str, float]) -> dict[str, float]:
    """Four significant digits: more than the measurement has."""
    return {key: float(f"{ms:.4g}") for key, ms in times.items()}
