"""The questions that learned editors are taught by, where one update makes all the edits of a batch."""

from __future__ import annotations

import dataclasses
import random

import pytest

from errata.parts.outer import ROWS, apart, questions
from tests import tiny


@pytest.fixture(scope="module")
def lm():
    return tiny.trained("llama")


def left_alone(lm, cases, shared: bool) -> list[str]:
    """What nothing shall change at, in many draws."""
    found = []
    for seed in range(12):
        ids = questions(lm, cases, random.Random(seed), shared).tokens.ids
        found += lm.tokenizer.batch_decode(ids[1::ROWS], skip_special_tokens=True)
    return found


def test_cases_that_share_an_update_do_not_contradict_each_other():
    many = tiny.cases()
    again = dataclasses.replace(many[0], edit=dataclasses.replace(many[0].edit, target="Oslo"))
    subjects = {c.edit.subject for c in many[:6]}
    assert any(s in p.prompt for c in many[:6] for s in subjects - {c.edit.subject} for p in c.probes)
    found = apart([*many[:6], again])
    assert sorted(c.edit.subject for c in found) == sorted(subjects)
    for case in found:
        kept = [p for p in case.probes if p.kind != "neighbourhood"]
        (before,) = [c for c in [*many[1:6], again] if c.edit == case.edit]
        assert kept == [p for p in before.probes if p.kind != "neighbourhood"]
        assert not any(s in p.prompt for s in subjects for p in case.probes if p.kind == "neighbourhood")


def test_a_shared_update_is_not_asked_to_leave_an_edit_of_its_own_alone(lm):
    cases = apart(tiny.cases()[:4])
    subjects = [c.edit.subject for c in cases]
    assert not [text for text in left_alone(lm, cases, shared=True) if any(s in text for s in subjects)]
    assert [text for text in left_alone(lm, cases, shared=False) if any(s in text for s in subjects)]
