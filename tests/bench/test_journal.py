from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from errata import ErrataError, UsageError
from errata.bench.journal import FILE, Journal, opened

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.timeout(600)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_killed_at_twenty_random_moments_gives_the_same_report(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.broken_off", str(tmp_path), str(os.getpid())],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == 20
    assert found["rows"] == 2 * 3 * 5


def test_what_was_added_is_found_again(tmp_path: Path):
    with opened(tmp_path, {"seed": 1}) as journal:
        journal.add({"kind": "a", "text": "é\u2028\n", "number": 0.1 + 0.2})
        journal.cell("x").add("b", size=1)
    with opened(tmp_path, {"seed": 1}) as journal:
        assert journal.of("a") == [{"kind": "a", "text": "é\u2028\n", "number": 0.1 + 0.2}]
        assert journal.cell("x").past("b") == [{"kind": "b", "cell": "x", "size": 1}]
        assert journal.cell("y").past("b") == []


@pytest.mark.parametrize("torn", [b'{"kind": "c"', b"\xc3", b'{"kind": "c"}'])
def test_a_torn_last_line_is_cut_off(torn: bytes, tmp_path: Path):
    with opened(tmp_path, {}) as journal:
        journal.add({"kind": "a"})
    with (tmp_path / FILE).open("ab") as file:
        file.write(torn)
    with opened(tmp_path, {}) as journal:
        assert [r["kind"] for r in journal.records] == ["run", "a"]
        journal.add({"kind": "d"})
    with opened(tmp_path, {}) as journal:
        assert [r["kind"] for r in journal.records] == ["run", "a", "d"]


def test_a_record_is_on_disk_when_add_returns(tmp_path: Path):
    with opened(tmp_path, {}) as journal:
        journal.add({"kind": "a"})
        assert json.loads((tmp_path / FILE).read_text().splitlines()[-1]) == {"kind": "a"}


def test_a_damaged_line_before_the_end_is_no_torn_one(tmp_path: Path):
    (tmp_path / FILE).write_text('{"kind": "run", "plan": {}}\n{"kind": \n{"kind": "a"}\n')
    with pytest.raises(ErrataError, match="damaged in line 2"), opened(tmp_path, {}):
        pass


def test_another_run_is_not_gone_on_with(tmp_path: Path):
    with opened(tmp_path, {"n": 5, "model": "a"}):
        pass
    with pytest.raises(UsageError, match="its n is 5, not 6"), opened(tmp_path, {"n": 6, "model": "a"}):
        pass


PLAN = {"n": 5, "method": {"a": {"rate": 1}, "a-b": {}}}
"""Two methods, one's name the beginning of the other's."""


def begun(folder: Path) -> None:
    with opened(folder, PLAN) as journal:
        for cell in ("before", "a single", "a sequential", "a-b sequential"):
            journal.cell(cell).add("group", outcomes=[])
        for cell in ("a sequential", "a-b sequential"):
            state = journal.cell(cell).state(7)
            assert state is not None
            state.touch()


def cells(folder: Path, plan: dict[str, object] = PLAN, again: tuple[str, ...] = ()) -> set[str]:
    with opened(folder, plan, again) as journal:
        return journal.cells


def test_a_method_is_run_again_and_no_other(tmp_path: Path):
    begun(tmp_path)
    changed = {**PLAN, "method": {"a": {"rate": 2}}}
    with pytest.raises(UsageError, match="its method a is .*give --again a"):
        cells(tmp_path, changed)
    assert cells(tmp_path, changed, ("a",)) == {"before", "a-b sequential"}
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["a-b-sequential-0000007.safetensors"]
    assert cells(tmp_path, changed) == {"before", "a-b sequential"}  # also the next time, with its new settings
    with opened(tmp_path, changed) as journal:
        assert journal.of("run")[-1]["plan"]["method"] == {"a": {"rate": 2}, "a-b": {}}


def test_what_is_refused_drops_nothing(tmp_path: Path):
    begun(tmp_path)
    with pytest.raises(UsageError, match="its n is"):
        cells(tmp_path, {**PLAN, "n": 6}, ("a",))
    assert cells(tmp_path) == {"before", "a single", "a sequential", "a-b sequential"}


def test_a_kill_at_any_byte_of_running_again_loses_no_other_method(tmp_path: Path):
    begun(tmp_path)
    before = (tmp_path / FILE).read_bytes()
    changed = {**PLAN, "method": {"a": {"rate": 2}}}
    cells(tmp_path, changed, ("a",))
    after = (tmp_path / FILE).read_bytes()
    assert after.startswith(before)
    dropped = len(before) + after[len(before) :].index(b"\n") + 1
    for size in (*range(len(before), len(after), 7), dropped - 1, dropped):
        (tmp_path / FILE).write_bytes(after[:size])
        kept = (
            {"before", "a-b sequential"}
            if size >= dropped
            else {"before", "a single", "a sequential", "a-b sequential"}
        )
        if size >= dropped:
            assert cells(tmp_path, changed) == kept
        else:
            assert cells(tmp_path) == kept
            assert cells(tmp_path, changed, ("a",)) == {"before", "a-b sequential"}


def test_two_processes_do_not_write_in_one_folder(tmp_path: Path):
    with opened(tmp_path, {}), pytest.raises(UsageError, match="another process"), opened(tmp_path, {}):
        pass


def test_a_cell_that_begins_anew_forgets_what_was_before():
    journal = Journal()
    cell, other = journal.cell("x"), journal.cell("y")
    cell.add("group", size=4)
    other.add("group", size=4)
    cell.add("anew", batch=2)
    cell.add("group", size=2)
    assert [r["size"] for r in cell.past("group")] == [2]
    assert [r["size"] for r in other.past("group")] == [4]
