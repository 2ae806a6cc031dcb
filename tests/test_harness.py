"""Benchmarks' common ground: rows that are never lost, memory of a fresh process, tables in documents, the guard."""

import json
import sys

import pytest
import torch

from benchmarks import guard
from benchmarks.harness import Clock, Store, fresh_memory, rows_file, three
from benchmarks.markdown import put_between
from lampq_rt.bench import _inputs, machine
from lampq_rt.errors import BackendError, DataError


def row(variant="lampq", **changes):
    return {"kind": "speed", "model": "m", "batch": 1, "variant": variant, "threads": 1, **changes}


def test_rows_are_appended_and_the_last_counts(tmp_path):
    store = Store(tmp_path / "deep" / "rows.jsonl")
    store.append([row(ms=1), row("fp32", ms=4)])
    store.append([row(ms=2)])
    again = Store(store.path)
    assert [r["ms"] for r in again.rows] == [1, 4, 2]
    assert [r["ms"] for r in again.latest(kind="speed", model="m")] == [2, 4]
    assert again.latest(kind="memory") == []
    assert all(r["measured"].endswith("Z") and r["load"] >= 0 for r in again.rows)


def test_damaged_row_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row()) + '\n{"kind": "spe')
    with pytest.raises(DataError, match="line 2: not JSON"):
        Store(path)


def test_file_is_named_after_the_machine(tmp_path):
    path = rows_file(folder=tmp_path)
    assert path.parent == tmp_path and path.suffix == ".jsonl"
    assert set(path.stem) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") and "core" in machine(torch.device("cpu"))


def test_tables_go_between_their_markers(tmp_path):
    document = tmp_path / "results.md"
    document.write_text("before\n<!-- a:begin -->\nold\n<!-- a:end -->\nafter\n")
    put_between(document, "a", ["new"])
    assert document.read_text() == "before\n<!-- a:begin -->\nnew\n<!-- a:end -->\nafter\n"
    put_between(document, "b", ["other"])
    assert document.read_text().endswith("after\n\n<!-- b:begin -->\nother\n<!-- b:end -->\n")
    document.write_text("<!-- a:begin -->")
    with pytest.raises(DataError, match="without"):
        put_between(document, "a", [])


def test_numbers_and_clock():
    assert [three(x) for x in (1234.6, 99.94, 5.0, 0.1234)] == ["1235", "99.9", "5.00", "0.123"]
    assert Clock(None).left() == float("inf") and Clock(0.0).left() == 0.0


def test_inputs_rotate_and_stay_within_bounds():
    small, large = _inputs((1, 3, 32, 32)), _inputs((32, 3, 224, 224))
    assert len(small) == 16 and len(large) >= 2
    assert not torch.equal(small[0], small[1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident sets are read from /proc")
def test_memory_of_a_fresh_process(tmp_path):
    found = fresh_memory("test_vit", 2, "bf16-eager", 1, tmp_path)
    assert found["kind"] == "memory" and found["variant"] == "bf16-eager" and found["weight_bytes"] > 0
    assert found["resident_bytes"] > 50 << 20
    with pytest.raises(BackendError, match="unknown bench variant 'magic'"):
        fresh_memory("test_vit", 2, "magic", 1, tmp_path)


@pytest.fixture
def committed(tmp_path):
    path = tmp_path / "ratios.json"
    ratios = {"a": {"ratio": 2.0, "band": 0.1}, "b": {"ratio": 3.0, "band": 0.1}}
    path.write_text(json.dumps({"machine": machine(torch.device("cpu")), "threads": 1, "ratios": ratios}))
    return path


@pytest.fixture
def guarded(monkeypatch):
    """The guard with measures that give what the test says, one value a call."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(guard, "keep_memory", lambda: True)

    def use(**answers):
        measures = {name: iter(values).__next__ for name, values in answers.items()}
        monkeypatch.setattr(guard, "MEASURES", measures)

    yield use
    torch.set_num_threads(threads)


def check(path, **options):
    """Exit status of the guard."""
    try:
        guard.main(**{"renew": False, "file": path, "only": "", "threads": 1, **options})
    except guard.typer.Exit as stop:
        return stop.exit_code
    return 0


def test_guard_fails_when_a_ratio_fell_out_of_its_band(committed, guarded, capsys):
    guarded(a=[1.85], b=[3.5])
    assert check(committed) == 0
    guarded(a=[1.7, 1.75], b=[3.0])
    assert check(committed) == 1
    assert "worse: a is 1.75 times as fast" in " ".join(capsys.readouterr().out.split())


def test_guard_measures_again_before_it_fails(committed, guarded):
    guarded(a=[1.2, 2.0], b=[3.0])
    assert check(committed) == 0


def test_guard_does_not_fail_on_another_machine(committed, guarded, capsys):
    committed.write_text(committed.read_text().replace('"threads": 1', '"threads": 7'))
    guarded(a=[1.0, 1.0], b=[3.0])
    assert check(committed) == 0
    assert "nothing fails here" in capsys.readouterr().out


def test_guard_renews(committed, guarded):
    guarded(a=[4.0], c=[1.0])
    assert check(committed, renew=True) == 0
    ratios = json.loads(committed.read_text())["ratios"]
    assert ratios["a"] == {"ratio": 4.0, "band": 0.1} and ratios["b"]["ratio"] == 3.0
    assert ratios["c"] == {"ratio": 1.0, "band": guard.BAND}


def test_guard_times_two_calls():
    x = torch.randn(64, 64)
    with torch.inference_mode():
        ratio = guard.call_ratio(lambda: x + 1, lambda: [x + 1 for _ in range(20)])
    assert ratio > 3
