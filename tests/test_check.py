"""The look at an edit right after it was made says what a user would find by asking."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from errata import FTM, LM, Edit, Patch, check
from errata.changes import Dense
from tests import tiny

HOW = FTM(layers=(1, 2), steps=40, rate=5e-3)
FIRST, SECOND = tiny.EDITS[1:]


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny.trained("llama")


@pytest.fixture(scope="module")
def patch(lm: LM) -> Patch:
    return HOW.edit(lm, [FIRST])


def scaled(patch: Patch, by: float) -> Patch:
    return replace(patch, changes={name: tuple(c.scaled(by) for c in cs) for name, cs in patch.changes.items()})


def test_every_count_is_of_the_questions_that_were_asked(lm: LM, patch: Patch):
    found = check.selfcheck(lm, patch)
    assert found.took == (1, 1)
    assert found.chat is None, "the model has no chat template"
    kinds = [row["kind"] for row in found.asked]
    assert (kinds.count("rewording"), kinds.count("other")) == (len(check.REWORDINGS), check.OTHERS)
    for kind, (good, asked) in (("rewording", found.rewordings), ("other", found.others)):
        rows = [row for row in found.asked if row["kind"] == kind]
        assert (good, asked) == (sum(row["good"] for row in rows), len(rows))
    assert found.rewordings[0], "of the two answers one stutters as it did before, which is no fault of the edit"
    for row in found.asked:
        assert row["before"] == lm.generate(row["prompt"], check.TOKENS)
        with patch.applied(lm):
            assert row["after"] == lm.generate(row["prompt"], check.TOKENS)
        if row["kind"] == "rewording":
            assert FIRST.text in row["prompt"]
            assert row["after"].startswith(FIRST.target), "the edit takes in other words"
        else:
            assert FIRST.subject not in row["prompt"]
            assert row["prompt"].startswith("The capital of ")
            assert row["prompt"].endswith(" is")
            if row["before"] == row["after"]:
                assert row["good"]


def test_how_far_a_weight_moved_is_its_share_of_the_norm(lm: LM, patch: Patch):
    shares = [
        float(torch.linalg.norm(change.delta) / torch.linalg.norm(lm.module(name).weight.detach()))
        for name, (change,) in patch.changes.items()
        if isinstance(change, Dense)
    ]
    assert len(shares) == 2
    assert check.moved(lm, patch) == pytest.approx(max(shares), rel=1e-5)
    far = scaled(patch, check.FAR / max(shares) * 1.01)
    assert check.selfcheck(lm, far).parts()[-1] == "weight moved 10.1% (far)"
    assert check.moved(lm, Patch()) is None


def test_an_edit_without_effect_did_not_take_and_moves_nobody(lm: LM, patch: Patch):
    found = check.selfcheck(lm, scaled(patch, 0.0))
    assert found.took == (0, 1)
    assert found.rewordings[0] == 0
    assert found.others == (check.OTHERS, check.OTHERS)
    assert str(found) == "did not take / 0 of 2 reworded / 5 of 5 others kept / weight moved 0.0%"


def test_a_model_that_says_one_thing_of_all_kept_none_of_the_others(lm: LM):
    everything = HOW.edit(lm, [Edit("The capital of {} is", s, "Oslo") for s in tiny.CAPITALS])
    found = check.selfcheck(lm, everything)
    assert found.closely == check.CLOSELY
    assert found.took[1] == len(tiny.CAPITALS)
    assert found.others[0] < found.others[1]


def test_what_was_known_before_is_not_looked_at_again(lm: LM, patch: Patch):
    both = HOW.edit(lm, [SECOND], prior=patch)
    found = check.selfcheck(lm, both, patch)
    assert found.took[1] == found.closely == 1
    assert all(SECOND.subject in row["prompt"] for row in found.asked if row["kind"] == "rewording")
    with patch.applied(lm):
        assert found.asked[0]["before"] == lm.generate(found.asked[0]["prompt"], check.TOKENS)


def test_it_is_kept_with_the_patch_and_read_back(lm: LM, patch: Patch):
    found = check.selfcheck(lm, patch)
    kept = check.checked(patch, found).about["check"]
    assert check.Check.from_dict(kept) == replace(found, asked=())
