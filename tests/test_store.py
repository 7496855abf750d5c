from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from errata import ErrataError, UsageError, store
from errata.store import Store, write


def one(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"C": torch.full((2, 3), value)}


def never() -> dict[str, torch.Tensor]:
    raise AssertionError("computed again")


def test_what_was_computed_is_kept_for_the_same_key(tmp_path: Path):
    store = Store(tmp_path)
    store.get({"model": "a", "layer": 1}, one)
    assert torch.equal(store.get({"layer": 1, "model": "a"}, never)["C"], one()["C"])


def test_what_was_computed_for_one_model_is_never_anothers(tmp_path: Path):
    """Pitfalls 7 and 8: one projector file for all models."""
    store = Store(tmp_path)
    store.get({"model": "a", "layer": 1}, one)
    assert store.get({"model": "b", "layer": 1}, lambda: one(2.0))["C"][0, 0] == 2.0
    assert store.get({"model": "a", "layer": 1}, never)["C"][0, 0] == 1.0


@pytest.mark.parametrize("content", [b"", b"no safetensors", b"\x08\0\0\0\0\0\0\0{"])
def test_a_damaged_file_is_computed_again_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes):
    store = Store(tmp_path)
    store.get({"a": 1}, one)
    (path,) = tmp_path.iterdir()
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(store.get({"a": 1}, one)["C"], one()["C"])
    assert "is damaged" in caplog.text
    assert torch.equal(store.get({"a": 1}, never)["C"], one()["C"])


def test_a_store_that_cannot_be_written_costs_time_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "file").write_text("")
    assert torch.equal(Store(tmp_path / "file" / "store").get({"a": 1}, one)["C"], one()["C"])
    assert "not kept for the next time" in caplog.text


def test_what_is_dropped_is_computed_again(tmp_path: Path):
    store = Store(tmp_path)
    store.get({"a": 1}, one)
    store.drop({"a": 1})
    store.drop({"a": 1})
    assert store.load({"a": 1}) is None


def test_the_folder_is_the_environments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("ERRATA_STORE", str(tmp_path / "here"))
    assert Store().folder == tmp_path / "here"
    monkeypatch.delenv("ERRATA_STORE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Store().folder == tmp_path / "errata"


def test_a_written_file_has_the_rights_of_any_other(tmp_path: Path):
    write(tmp_path / "ours", "text")
    (tmp_path / "theirs").write_text("text")
    assert stat.S_IMODE(os.stat(tmp_path / "ours").st_mode) == stat.S_IMODE(os.stat(tmp_path / "theirs").st_mode)
    assert (tmp_path / "ours").read_text() == "text"


@pytest.mark.parametrize("letters", [200, 255])
def test_any_name_that_the_disk_takes_can_be_written(letters: int, tmp_path: Path):
    path = tmp_path / ("z" * letters)
    write(path, "text")
    assert path.read_text() == "text"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_one_and_what_it_leads_to_is_written(tmp_path: Path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "new"


# Processes that die


def gone(code: str, *args: object) -> int:
    """The number of a process that has run some code and killed itself where the code says `die()`."""
    start = (
        "import os, sys\nfrom pathlib import Path\nfrom errata import store\ndie = lambda: os.kill(os.getpid(), 9)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", start + code, *map(str, args)])
    assert process.wait(100) == -9
    return process.pid


def test_what_a_killed_process_had_begun_is_swept_away_and_what_a_living_one_has_is_not(tmp_path: Path):
    gone("place = store.temporary(Path(sys.argv[1])); place.mkdir(); (place / 'half').touch(); die()", tmp_path)
    ours = store.temporary(tmp_path)
    ours.touch()
    foreign = tmp_path / f"{store.TEMPORARY}-00000000-1-abcd"  # of another machine, on a shared disk
    foreign.touch()
    write(tmp_path / "file", "text")
    assert {p.name for p in tmp_path.iterdir()} == {ours.name, foreign.name, "file"}


def test_the_lock_of_a_killed_process_falls_and_that_of_a_living_one_holds(tmp_path: Path):
    lock = tmp_path / "lock"
    code = "with store.locked(Path(sys.argv[1]), 'writing'): die()"
    gone(code, lock)
    assert lock.exists()
    with store.locked(lock, "writing"), pytest.raises(ErrataError, match=rf"process {os.getpid()} is writing; wait"):
        with store.locked(lock, "writing"):
            pass
    with store.locked(lock, "writing"):
        pass


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path):
    with pytest.raises(RuntimeError), store.whole_folder(tmp_path / "new") as place:
        (place / "half").touch()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    gone("with store.whole_folder(sys.argv[1]) as place: (place / 'half').touch(); die()", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with store.whole_folder(tmp_path / "new") as place:
        (place / "whole").touch()
    assert [p.name for p in tmp_path.iterdir()] == ["new"]  # and nothing of the killed one
    with pytest.raises(UsageError, match="not an empty folder"), store.whole_folder(tmp_path / "new"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file/new' can't be written"), store.whole_folder(tmp_path / "file" / "new"):
        pass
