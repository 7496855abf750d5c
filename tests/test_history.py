"""A folder of patches: what a model carries, what conflicts, and what taking one back does to the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import errata
from errata import LM, Edit, ErrataError, Patch, UsageError
from errata.changes import Dense, LowRank
from errata.cli import main
from errata.history import LOCK, MANIFEST, History, conflicts, diff, effect
from tests import tiny

BASE = {"fingerprint": "f" * 32, "name": "tiny"}
FRANCE, KENYA = Edit(tiny.PROMPT, "France", "Lima"), Edit(tiny.PROMPT, "Kenya", "Paris")


def patch_of(*edits: Edit, key: int = 0, base: dict[str, str] = BASE) -> Patch:
    """A rank-one change for each edit, whose keys are unit vectors from `key` on."""
    n = len(edits)
    right = torch.eye(16)[key : key + n]
    draw = torch.Generator().manual_seed(key)
    change = LowRank(torch.arange(n), torch.randn(8, n, generator=draw), right)
    steps = [{"method": "rome", "settings": {}, "edits": n}]
    return Patch({"layer": (change,)}, edits, about={"base": base, "steps": steps, "versions": {}})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "corrections"


def total(patch: Patch) -> torch.Tensor:
    return sum((c.delta for c in patch.changes.get("layer", ())), start=torch.zeros(8, 16))


def test_what_was_added_is_carried_in_order_and_read_again(folder: Path):
    a, b = patch_of(FRANCE), patch_of(KENYA, key=3)
    History(folder).add(a, "a")
    History.open(folder).add(b, "b")
    history = History.open(folder)
    assert [e.file for e in history.active] == ["a.safetensors", "b.safetensors"]
    assert history.base == BASE
    assert history.patch().edits == (FRANCE, KENYA)
    assert torch.equal(total(history.patch()), total(a + b))
    assert history.conflicts() == []
    assert not (folder / LOCK).exists()


def test_a_disk_that_is_full_leaves_nothing_of_what_was_to_be_added(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def full(path: Path, content: str) -> None:
        raise ErrataError("no space")

    with monkeypatch.context() as m, pytest.raises(ErrataError):
        m.setattr("errata.store.write", full)
        History(folder).add(patch_of(FRANCE), "a")
    assert not folder.exists()
    with monkeypatch.context() as m, pytest.raises(ErrataError):
        m.setattr("errata.store.write", lambda path, _: full(path, "") if path.name == MANIFEST else path.touch())
        History(folder).add(patch_of(FRANCE), "a")
    assert not folder.exists()
    History(folder).add(patch_of(FRANCE), "a")
    with monkeypatch.context() as m, pytest.raises(ErrataError):
        m.setattr("errata.store.write", full)
        History(folder).add(patch_of(KENYA, key=3), "b")
    assert {f.name for f in folder.iterdir()} == {MANIFEST, "a.safetensors"}


def test_the_same_question_with_another_answer_is_refused_unless_anyway(folder: Path):
    history = History(folder)
    history.add(patch_of(FRANCE), "a")
    other = Edit("The  capital of {} is", "france", "Oslo")
    with pytest.raises(UsageError, match="is to be both 'Lima' and 'Oslo'"):
        history.add(patch_of(other, key=3), "b")
    assert [e.file for e in History.open(folder).entries] == ["a.safetensors"]
    assert not (folder / "b.safetensors").exists()
    (found,) = history.add(patch_of(other, key=3), "b", anyway=True)
    assert (found.kind, found.first, found.second) == ("target", FRANCE, other)
    assert History.open(folder).conflicts() == [found]


def test_the_same_correction_in_two_patches_is_refused(folder: Path):
    history = History(folder)
    history.add(patch_of(FRANCE), "a")
    with pytest.raises(UsageError, match="is corrected twice"):
        history.add(patch_of(FRANCE, key=3), "b")


@pytest.mark.parametrize("asked", ["The capital of {} is:", "the capital of\u00a0{} is", "The capital-of ‘{}’ is"])
def test_a_question_is_the_same_however_it_is_written(asked: str, folder: Path):
    history = History(folder)
    history.add(patch_of(FRANCE), "a")
    with pytest.raises(UsageError, match="is to be both"):
        history.add(patch_of(Edit(asked, "FRANCE", "Oslo"), key=3), "b")
    with pytest.raises(UsageError, match="is corrected twice"):
        history.add(patch_of(Edit(asked, "France", "“lima”"), key=3), "b")
    assert history.add(patch_of(Edit("The capital of {}# is", "France", "Oslo"), key=3), "b") == []  # as C is not C#


def test_of_several_patches_all_are_taken_in_or_none(folder: Path):
    history = History(folder)
    history.add(patch_of(FRANCE), "a")
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    peru, other = Edit(tiny.PROMPT, "Peru", "Oslo"), Edit(tiny.PROMPT, "Kenya", "Oslo")
    for last in (
        patch_of(other, key=7),
        patch_of(FRANCE, key=7),
        Patch(),
    ):  # against a new one, an old one; nothing in it
        coming = {"b": patch_of(KENYA, key=3), "c": patch_of(peru, key=5), "d": last}
        with pytest.raises(UsageError):
            history.add_all(coming)
        assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
        assert [e.file for e in history.entries] == ["a.safetensors"]
    assert history.add_all({"b": patch_of(KENYA, key=3), "c": patch_of(peru, key=5)}) == []
    assert [e.file for e in History.open(folder).active] == ["a.safetensors", "b.safetensors", "c.safetensors"]


def test_the_same_patch_again_is_left_as_it_is(folder: Path):
    history = History(folder)
    history.add(patch_of(FRANCE), "a")
    before = history.entries
    assert history.add(patch_of(FRANCE), "a") == []
    assert History.open(folder).entries == before
    with pytest.raises(UsageError, match="is there already; give another name"):
        history.add(patch_of(KENYA, key=3), "a")


KILLED = """
import os, sys
from errata.history import History
from tests.test_history import KENYA, patch_of
History._save = lambda self: os.kill(os.getpid(), 9)
History.open(sys.argv[1]).add(patch_of(KENYA, key=3), "b")
"""
"""What is killed between the patch and the manifest."""


@pytest.mark.parametrize("carried", [[], ["a.safetensors"]])
def test_a_merge_that_was_killed_is_done_by_the_same_command(carried: list[str], folder: Path):
    if carried:
        History(folder).add(patch_of(FRANCE), "a")
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder)], cwd=Path(__file__).parent.parent, timeout=100)
    assert done.returncode == -9
    assert (folder / "b.safetensors").exists()
    assert [e.file for e in History.open(folder).active] == carried
    with pytest.raises(UsageError, match="is there already, and no entry names it"):
        History.open(folder).add(patch_of(Edit(tiny.PROMPT, "Peru", "Oslo"), key=5), "b")
    History.open(folder).add(patch_of(KENYA, key=3), "b")
    assert [e.file for e in History.open(folder).active] == [*carried, "b.safetensors"]
    assert {f.name for f in folder.iterdir()} - {LOCK} == {MANIFEST, *carried, "b.safetensors"}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"format": "1"}, "is damaged"),
        ({"format": 2}, "written by a newer errata"),
        ({"base": "x"}, "is damaged"),
        ({"base": {"name": 5, "fingerprint": "f"}}, "its base is"),
        ({"entries": 5}, "is damaged"),
        ({"entries": [{}]}, "is damaged"),
        ("file", "an entry's file is '../a.safetensors'"),
        ("state", "state or methods of an entry is of another type"),
        ("edits", "edits of an entry is of another type"),
    ],
)
def test_a_manifest_that_says_something_else_is_damaged_and_leads_nowhere(change: Any, why: str, folder: Path):
    History(folder).add(patch_of(FRANCE), "a")
    found = json.loads((folder / MANIFEST).read_text())
    wrong = {"file": "../a.safetensors", "state": "gone", "edits": "1"}
    if isinstance(change, str):
        found["entries"][0][change] = wrong[change]
    else:
        found |= change
    (folder / MANIFEST).write_text(json.dumps(found))
    with pytest.raises(ErrataError, match=why):
        History.open(folder)
    (folder / MANIFEST).write_text('{"format": 1, "format": 1, "base": null, "entries": []}')
    with pytest.raises(ErrataError, match="is damaged"):
        History.open(folder)


def test_keys_that_overlap_are_named_and_taken_in(folder: Path):
    history = History(folder)
    history.add(patch_of(FRANCE, key=2), "a")
    (found,) = history.add(patch_of(KENYA, key=2), "b")
    assert (found.kind, found.cosine, found.files) == ("keys", pytest.approx(1.0), ("a.safetensors", "b.safetensors"))
    assert history.add(patch_of(Edit(tiny.PROMPT, "Peru", "Oslo"), key=5), "c") == []


def test_codebooks_overlap_where_their_balls_meet():
    def book(edit: Edit, at: float) -> Patch:
        from errata.changes import Codebook

        zero, keys = torch.zeros(1, dtype=torch.long), torch.full((1, 4), at)
        return Patch({"m": (Codebook.of(zero, keys, torch.zeros(1, 3), torch.ones(1), zero[None], zero),)}, (edit,))

    near, far = book(KENYA, 0.9), book(KENYA, 1.1)
    assert [c.kind for c in conflicts({"a": book(FRANCE, 0.0), "b": near})] == ["keys"]
    assert conflicts({"a": book(FRANCE, 0.0), "b": far}) == []


def test_a_patch_on_top_of_what_is_carried_takes_its_place(folder: Path):
    a = patch_of(FRANCE)
    on_top = a + patch_of(KENYA, key=3)
    history = History(folder)
    history.add(a, "a")
    assert history.add(on_top, "b") == []
    assert [(e.file, e.state, e.by) for e in history.entries] == [
        ("a.safetensors", "replaced", "b.safetensors"),
        ("b.safetensors", "active", None),
    ]
    assert torch.equal(total(history.patch()), total(on_top))  # nothing is added twice


def test_a_patch_or_one_edit_of_it_is_taken_back_and_no_file_is_lost(folder: Path):
    history = History(folder)
    history.add(patch_of(FRANCE, KENYA), "a")
    history.add(patch_of(Edit(tiny.PROMPT, "Peru", "Oslo"), key=5), "b")
    before = history.patch()
    left = history.revert("a", FRANCE)
    assert [e.subject for e in left.edits] == ["Kenya", "Peru"]  # in the place where it was
    torch.testing.assert_close(total(left), total(before.without(FRANCE)))
    assert [(e.file, e.state) for e in History.open(folder).entries] == [
        ("a.safetensors", "replaced"),
        ("a-2.safetensors", "active"),
        ("b.safetensors", "active"),
    ]
    assert [e.subject for e in history.revert("a-2").edits] == ["Peru"]
    assert {f.name for f in folder.glob("*.safetensors")} == {
        "a.safetensors",
        "a-2.safetensors",
        "b.safetensors",
    }
    with pytest.raises(UsageError, match=r"carries no 'a.safetensors'; it carries b.safetensors"):
        history.revert("a")


def test_another_models_patch_a_changed_file_and_a_foreign_folder_are_refused(folder: Path, tmp_path: Path):
    history = History(folder)
    history.add(patch_of(FRANCE), "a")
    with pytest.raises(ErrataError, match="the patch is for other"):
        history.add(patch_of(KENYA, key=3, base={"fingerprint": "0" * 32, "name": "other"}), "b")
    with pytest.raises(UsageError, match="no name for a file"):
        history.add(patch_of(KENYA, key=3), "../b")
    patch_of(KENYA).save(folder / "a.safetensors")
    with pytest.raises(ErrataError, match="not the file that was added"):
        history.patch()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(UsageError, match=f"holds no {MANIFEST}"):
        History.open(tmp_path / "mine")


def test_only_one_process_writes_and_reading_needs_no_lock(folder: Path):
    history = History(folder)
    history.add(patch_of(FRANCE), "a")
    (folder / LOCK).write_text(f"{os.getpid()}\n")
    with pytest.raises(ErrataError, match=f"process {os.getpid()} is writing"):
        history.add(patch_of(KENYA, key=3), "b")
    assert len(History.open(folder).patch().edits) == 1
    (folder / LOCK).unlink()
    behind = History(folder)  # read before another one wrote
    history.add(patch_of(KENYA, key=3), "b")
    behind.add(patch_of(Edit(tiny.PROMPT, "Peru", "Oslo"), key=5), "c")
    assert [e.file for e in History.open(folder).entries] == [f"{x}.safetensors" for x in "abc"]


def test_diff_tells_edits_and_weights_apart():
    a, b = patch_of(FRANCE, KENYA), patch_of(Edit(tiny.PROMPT, "France", "Oslo"), Edit(tiny.PROMPT, "Peru", "Oslo"))
    found = diff(a, b)
    assert [e["subject"] for e in found["only_a"]] == ["Kenya"]
    assert [e["subject"] for e in found["only_b"]] == ["Peru"]
    assert [[x["target"] for x in pair] for pair in found["otherwise"]] == [["Lima", "Oslo"]]
    (weights,) = found["weights"]
    assert (weights["norm_apart"], weights["cosine"]) == (0.0, pytest.approx(1.0))  # the same numbers, other edits
    dense = Patch({"other": (Dense(torch.zeros(1, dtype=torch.long), torch.ones(2, 2)),)}, (KENYA,))
    one, other = diff(a, dense)["weights"]
    assert (one["norm_b"], other["norm_a"], other["norm_b"], other["cosine"]) == (0.0, 0.0, 2.0, None)


@pytest.fixture(scope="module")
def almanac() -> LM:
    return errata.load("almanac")


def test_taking_one_back_is_measured_on_the_others(almanac: LM, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """In the shell, on almanac: two independent corrections; one goes, the other stays."""
    rome = errata.ROME.preset(almanac)
    facts = [c.edit for c in errata.data.load("counterfact-mini", n=2)]
    for name, patch in zip("ab", rome.each(almanac, facts), strict=True):
        patch.save(tmp_path / f"{name}.safetensors")

    def run(*args: str) -> dict:
        with pytest.raises(SystemExit) as ended:
            main([*args, "--json"])
        said = capsys.readouterr()
        assert ended.value.code == 0, said.err
        return json.loads(said.out)

    home = str(tmp_path / "corrections")
    found = run("merge", home, *(str(tmp_path / f"{x}.safetensors") for x in "ab"), "--out", str(tmp_path / "all"))
    assert (found["carries"], found["conflicts"]) == (2, [])
    assert Patch.load(tmp_path / "all").edits == tuple(facts)
    assert len(run("diff", home, str(tmp_path / "a.safetensors"))["only_a"]) == 1

    (goes, stays) = run("revert", home, "a", "--dry-run")["effect"]
    assert goes["before"]["says_target"]
    assert not goes["after"]["says_target"]
    assert (goes["stays"], stays["stays"]) == (False, True)
    assert stays["after"]["says_target"]
    assert [e["state"] for e in run("log", home)["entries"]] == ["active", "active"]
    run("revert", home, "a", "--model", "none")
    assert [e["state"] for e in run("log", home)["entries"]] == ["reverted", "active"]
    assert effect(almanac, History.open(home).patch(), Patch())[0]["before"]["says_target"]
