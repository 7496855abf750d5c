from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import pytest
import torch

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
