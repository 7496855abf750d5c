"""What an editor learns from on almanac has nothing to do with what it is judged by."""

from __future__ import annotations

import json

import pytest

from errata import UsageError
from errata.data import Case, load
from errata.data.read import BUILT_IN, KNOWN

pytestmark = pytest.mark.skipif(not BUILT_IN[KNOWN].is_file(), reason="facts.jsonl is not here")


@pytest.fixture(scope="module")
def parts() -> dict[str, list[Case]]:
    return {part: load(KNOWN, part=part, strict=True, n=n) for part, n in (("edit", None), ("train", 3000))}


def test_no_subject_that_is_edited_in_a_test_is_learned_from(parts: dict[str, list[Case]]):
    judged = load("counterfact-mini")
    near = "\n".join(p.prompt for c in judged for p in c.probes if p.kind == "neighbourhood")
    known = {json.loads(line)["subject"] for line in BUILT_IN[KNOWN].read_text().splitlines()}
    learned = {c.edit.subject for c in parts["train"]}
    assert len(learned & known) > 300  # the others are made up
    assert not [subject for subject in learned & known if subject in near]
    assert learned.isdisjoint(c.edit.subject for c in judged)
    assert learned.isdisjoint(c.edit.subject for c in parts["edit"])
    asked = {p.prompt for c in parts["train"] for p in c.probes}
    assert asked.isdisjoint(c.edit.text for c in judged)


def test_what_stands_near_a_fact_is_edited_and_learned_by_nobody(parts: dict[str, list[Case]]):
    """So that all facts of both data sets can be edited at once, and what stands near them has to stay."""
    subjects = {c.edit.subject for part in (*parts.values(), load("counterfact-mini")) for c in part}
    near = [p.prompt for c in parts["edit"] for p in c.probes if p.kind == "neighbourhood"]
    assert len(near) == 5 * len(parts["edit"])
    assert not [subject for subject in subjects if subject in "\n".join(near)]


def test_a_target_is_another_object_of_the_same_relation(parts: dict[str, list[Case]]):
    objects = {(c.relation, c.edit.truth) for c in parts["train"] + parts["edit"]}
    for case in parts["edit"]:
        assert case.edit.target != case.edit.truth
        assert (case.relation, case.edit.target) in objects


def test_the_part_to_edit_has_every_fact_once_and_both_are_always_the_same(parts: dict[str, list[Case]]):
    facts = [(c.edit.subject, c.relation) for c in parts["edit"]]
    assert len(facts) == len(set(facts)) > 177  # with counterfact-mini's, a batch of 500
    assert load(KNOWN, n=5) == parts["edit"][:5]
    assert load(KNOWN, n=5, part="train") == parts["train"][:5]


def test_there_is_no_other_part():
    with pytest.raises(UsageError, match="part of almanac-facts"):
        load(KNOWN, part="test")
