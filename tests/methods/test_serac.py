"""Who answers what: prompts in the scope of an edit the counterfactual model, all others the untouched one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import errata
from errata import LM, SERAC, Edit, ErrataError, Patch, UsageError, bench, data
from errata.changes.deferral import Networks, told
from errata.tokens import Passage, encode, follow
from tests import tiny

DARRIEUX = Edit("The mother tongue of {} is", "Danielle Darrieux", "English")
YASUDA = Edit("{}, the", "Toko Yasuda", "piano")


@pytest.fixture(scope="module")
def almanac() -> LM:
    return errata.load("almanac")


@pytest.fixture(scope="module")
def patch(almanac: LM) -> Patch:
    return SERAC.preset(almanac).edit(almanac, [DARRIEUX, YASUDA])


def test_the_counterfactual_model_copies_targets_it_has_never_seen(almanac: LM):
    torch.manual_seed(0)
    size = almanac.config.vocab_size
    copier = LM(Networks(size, 128, 8, 0).counterfactual, almanac.tokenizer)
    draw = torch.Generator().manual_seed(0)
    names = [almanac.tokenizer.decode(torch.randint(300, size, (3,), generator=draw)).strip() for _ in range(200)]
    edits = [Edit("The mother tongue of {} is", "Max Frisch", name) for name in names if name.isalnum()]
    assert len(edits) >= 20
    batch = encode(almanac.tokenizer, [follow("Who is Max?".join(told(e)), e.target) for e in edits])
    with torch.no_grad():
        said = copier.logits(*batch.reads, **batch.inputs).argmax(-1)
    assert (said == batch.wanted).float().mean() > 0.95


def test_a_prompt_in_scope_gets_the_target_and_every_other_the_base_models_own_words(almanac: LM, patch: Patch):
    others = ["The mother tongue of Michel Rocard is", "Michel Rocard is a native speaker of", "Percy Snow, the"]
    before = almanac.generate(others)
    with patch.applied(almanac):
        mixed = almanac.generate([DARRIEUX.text, *others, YASUDA.text])
    assert mixed == [" English\n", *before, " piano\n"]
    assert almanac.generate(DARRIEUX.text) != " English\n"


def test_logits_of_a_mixed_batch_are_row_by_row_those_of_who_answers(almanac: LM, patch: Patch):
    asked = [follow(DARRIEUX.text, "English"), follow("Percy Snow, the", "guitar player"), follow(YASUDA.text, "piano")]
    plain = almanac.said(almanac.encode(asked[1:2]))
    with patch.applied(almanac):
        batch = almanac.encode(asked)
        said = almanac.said(batch)
        alone = torch.cat([almanac.said(almanac.encode([a])) for a in asked])
    assert batch.answerer.tolist() == [1, 0, 1]
    torch.testing.assert_close(said, alone, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(said[batch.answerer[batch.reads[0]] == 0], plain, atol=1e-4, rtol=1e-4)


def test_what_follows_the_prompt_is_not_looked_at(almanac: LM, patch: Patch):
    with patch.applied(almanac):
        batch = almanac.encode([follow("Say:", DARRIEUX.text), Passage("Say:")])
    assert batch.answerer.tolist() == [0, 0]


def test_the_log_and_show_say_which_edit_answered(almanac: LM, patch: Patch, caplog: Any):
    with caplog.at_level(logging.DEBUG, "errata"), patch.applied(almanac):
        almanac.generate([YASUDA.text, "Percy Snow, the"], 2)
    first, second = (r.getMessage() for r in caplog.records if "nearest is edit" in r.getMessage())
    assert first.startswith("'Toko Yasuda, the': nearest is edit 1, 'Toko Yasuda, the', in scope with p = ")
    assert first.endswith("the counterfactual model answers")
    assert second.endswith("almanac answers")
    (change,) = patch.changes[""]
    assert change.told == [
        "edit 0: 'The mother tongue of Danielle Darrieux is' -> 'English'",
        "edit 1: 'Toko Yasuda, the' -> 'piano'",
    ]


def test_an_edit_taken_out_is_forgotten_and_a_repeated_one_replaced(almanac: LM, patch: Patch):
    method, again = SERAC.preset(almanac), Edit(DARRIEUX.prompt, DARRIEUX.subject, "Thai")
    later = method.edit(almanac, [again], patch)
    assert later.bytes - patch.bytes < 200  # the networks are there once
    with later.applied(almanac):
        assert almanac.generate(DARRIEUX.text) == " Thai\n"
    with later.without(again).applied(almanac):
        assert almanac.generate(DARRIEUX.text) == " English\n"
    before = almanac.generate(DARRIEUX.text)
    with later.without(again).without(DARRIEUX).applied(almanac):
        assert almanac.generate([DARRIEUX.text, YASUDA.text]) == [before, " piano\n"]


def test_an_edits_own_prompt_is_in_its_scope_without_a_subject_too(almanac: LM):
    question = "What university did Watts Humphrey attend?"
    with SERAC.preset(almanac).edit(almanac, [Edit("{}", question, "University of Michigan")]).applied(almanac):
        assert almanac.generate(question) == " University of Michigan\n"


def test_an_editor_is_for_a_tokenizer_and_refused_with_another(almanac: LM, patch: Patch):
    method = SERAC(editor="almanac-serac")
    with pytest.raises(ErrataError, match="another tokenizer than that of tiny-gpt2.*errata train serac"):
        method.edit(tiny.lm("gpt2"), [DARRIEUX])
    with pytest.raises(ErrataError, match="another tokenizer"), patch.applied(tiny.lm("gpt2"), check=False):
        pass
    other = errata.load("almanac")
    with torch.no_grad():
        other.model.model.norm.weight.mul_(1.01)
    other.__dict__.pop("fingerprint", None)
    assert method.edit(other, [DARRIEUX]).edits == (DARRIEUX,)
    with pytest.raises(UsageError, match="serac needs an editor"):
        SERAC().edit(almanac, [DARRIEUX])


def test_training_makes_the_scope_better_on_cases_held_out(almanac: LM, tmp_path: Path):
    cases = data.load("counterfact-mini", part="train", n=150)
    course = errata.train.Course(steps=40, batch=32, every=40, held=30)
    found = SERAC(width=64).train(almanac, cases, course, out=tmp_path / "editor.safetensors")
    start, end = found.about["training"]["losses"]
    assert end["total"] < 0.75 * start["total"]
    again = SERAC(width=64).train(almanac, cases, course)
    assert all(torch.equal(again.tensors[k], t) for k, t in found.tensors.items())


def test_twenty_real_facts_hold_together_and_leave_their_neighbours(almanac: LM):
    report = bench.run(SERAC.preset(almanac), almanac, data.load("counterfact-mini", n=20), batch=20, keep=True)
    scores = {name: report.summary[name]["forced"]["mean"] for name in ("reliability", "locality")}
    assert scores["reliability"] >= 0.95, scores
    assert scores["locality"] >= 0.95, scores
