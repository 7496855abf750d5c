"""Damaged and odd documents are refused in a sentence, or taken as what they say: a short run of the benchmark."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import errata
from benchmarks import mutated
from errata import ErrataError, UsageError, store
from errata.bench import Plan
from errata.easyeditor import MELOHyperParams, ROMEHyperParams


@pytest.fixture(scope="module")
def lm() -> errata.LM:
    return errata.load("almanac", device="cpu")


def run(lm: errata.LM, rows: int = 0, patches: int = 0, documents: int = 0) -> tuple[Counter[str], list[str]]:
    told: list[str] = []
    return mutated.run(rows, patches, documents, 11, lm, told.append), told


def test_documents_are_refused_in_a_sentence_or_taken_as_what_they_say(lm: errata.LM):
    counts, told = run(lm, rows=400, patches=150, documents=150)
    assert told == []
    for kind in ("rows", "cases", "signed patches", "runs", "hparams"):
        assert counts[f"{kind} taken"] > 10
        assert counts[f"{kind} refused"] > 10
    assert counts["patches refused"] > 50


def test_a_digest_that_is_not_looked_at_is_noticed(lm: errata.LM, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store, "digest", lambda *_: "the same")
    counts, told = run(lm, patches=150)
    assert counts["wrong"] > 5
    assert any("a damaged patch was taken" in one for one in told)


def test_a_row_that_is_misread_is_noticed(lm: errata.LM, monkeypatch: pytest.MonkeyPatch):
    read = mutated.corrections

    def shifted(path: Path) -> list[Any]:
        """Each row with the target of the one before."""
        found = read(path)
        targets = [one.edit.target for one in found]
        edits = [replace(o.edit, target=t) for o, t in zip(found, targets[-1:] + targets[:-1], strict=True)]
        return [replace(o, edit=e) for o, e in zip(found, edits, strict=True)]

    monkeypatch.setattr(mutated, "corrections", shifted)
    _, told = run(lm, rows=60)
    assert any("no row says" in one for one in told)


def test_a_run_that_is_misread_is_noticed(lm: errata.LM, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mutated.Plan, "load", lambda _: (Plan(), {}))
    _, told = run(lm, documents=20)
    assert any("the file says" in one for one in told)


def test_what_a_sentence_quotes_is_short_and_has_no_control_characters():
    with pytest.raises(UsageError) as told:
        errata.Edit("x" * 5000, "New Zealand", "Oslo")
    assert len(str(told.value)) < 400
    assert str(ErrataError("a\x1b[2J \ud800 b\nc")) == "a\\x1b[2J \\ud800 b\nc"


def test_a_group_in_the_place_of_a_value_is_no_setting():
    """A key of EasyEdit's whose value is lost would be left out in silence."""
    rome = {"model_name": "almanac", "layers": [3]}
    for value in ({}, {"a": 1}):
        with pytest.raises(UsageError, match="v_num_grad_steps|steps"):
            ROMEHyperParams(**rome, v_num_grad_steps=value).settings(errata.load("almanac"))
    grouped = MELOHyperParams(model_name="almanac", grace={"num_iter": 40})
    assert grouped.settings(errata.load("almanac"))["steps"] == 40
