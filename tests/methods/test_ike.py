"""Facts told before the prompt: what is told, to which prompts, within what room; only prompts are looked at."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from errata import ICE, IKE, LM, Edit, ErrataError, Patch, Retrieval, sequential
from errata.bench.answer import ask
from errata.data import Probe, load
from errata.methods import ike
from errata.tokens import Passage, follow, passage
from tests import tiny

FRENCH = Edit("The mother tongue of {} is", "Danielle Darrieux", "English")
BORN = Edit("{} was born in", "Danielle Darrieux", "London")
OTHER = Edit("The mother tongue of {} is", "Montesquieu", "Thai")


class Roomy(LM):
    """A tiny model as if it could read on for ever."""

    context = None


@pytest.fixture(scope="module")
def lm() -> LM:
    made = tiny.lm("qwen3")
    return Roomy(made.model, made.tokenizer)


def told(lm: LM, prompt: str) -> str:
    return lm.tokenizer.decode(lm.encode([Passage(prompt)]).ids[0])


def test_ice_tells_the_fact_in_the_form_of_the_paper(lm: LM):
    with ICE().edit(lm, [FRENCH]).applied(lm):
        said = told(lm, "Danielle Darrieux speaks")
    assert said == ("New Fact: The mother tongue of Danielle Darrieux is English\nPrompt: Danielle Darrieux speaks")
    assert told(lm, "Danielle Darrieux speaks") == "Danielle Darrieux speaks"


def test_ike_demonstrates_copying_updating_and_retaining_the_nearest_cases_last(lm: LM):
    (text,) = (c.texts[0][2] for c in IKE(k=8, encoder="tf-idf").edit(lm, [FRENCH]).changes[""])
    *shown, fact = text.split("\n\n")
    assert fact == "New Fact: The mother tongue of Danielle Darrieux is English\nPrompt: "
    assert len(shown) == 8
    cases = {ike.fact(c.edit): c for c in load("counterfact-mini", part="train")}
    kinds = {"efficacy": 0, "paraphrase": 0, "neighbourhood": 0}
    for demonstration in shown:
        new, prompt = demonstration.split("\nPrompt: ")
        case = cases[new.removeprefix("New Fact: ")]
        (kind,) = {p.kind for p in case.probes if prompt == " ".join(f"{p.prompt} {p.answer}".split())}
        kinds[kind] += 1
    assert kinds == {"efficacy": 1, "paraphrase": 3, "neighbourhood": 4}
    assert "The mother tongue of" in shown[-1]


def test_no_demonstration_is_about_the_subject_that_is_edited(lm: LM, tmp_path: Path):
    rows = [
        {"prompt": f"The mother tongue of {s} is", "subject": s, "target_new": t, "rephrase_prompt": f"{s} speaks"}
        for s, t in (("Danielle Darrieux", "LEAK"), ("Max Frisch", "Thai"))
    ]
    (tmp_path / "own.json").write_text(json.dumps(rows))
    method = IKE(examples=str(tmp_path / "own.json"), part="edit", encoder="tf-idf")
    with method.edit(lm, [FRENCH]).applied(lm):
        said = told(lm, FRENCH.text)
    assert "LEAK" not in said
    assert "New Fact: The mother tongue of Max Frisch is Thai" in said


def test_as_few_demonstrations_as_possible_are_left_out_for_the_context_and_the_log_says_so(caplog: Any):
    lm = tiny.lm("gpt2")
    lm.model.config.n_positions = 400
    patch = IKE(k=8, encoder="tf-idf").edit(lm, [FRENCH])
    whole = patch.changes[""][0].texts[0][2]
    with caplog.at_level(logging.INFO, "errata"), patch.applied(lm):
        said = told(lm, FRENCH.text)
        room = 400 - len(lm.encode([Passage(FRENCH.text)]).ids[0])
    assert room >= 32  # left for the answer
    kept = said.count("\n\n")
    assert 0 < kept < 8
    assert (whole + FRENCH.text).endswith(said)  # the nearest stay
    next_one = whole.split("\n\n")[8 - kept - 1] + "\n\n"
    assert len(lm.tokenizer(next_one)["input_ids"]) > room - 32
    assert f"{8 - kept} of 8 demonstrations don't fit the 400 tokens" in caplog.text


def test_only_prompts_that_name_the_subject_are_told_and_each_its_own_fact(lm: LM):
    patch = Retrieval().edit(lm, [FRENCH, BORN, OTHER])
    with patch.applied(lm):
        assert "is English" in told(lm, "Yes. The mother tongue of Danielle Darrieux is")
        assert "born in London" in told(lm, "Where Danielle Darrieux was born:")
        assert "is Thai" in told(lm, "Montesquieu, a native speaker of")
        for apart in ("The mother tongue of Max Frisch is", "Danielle Steel was born in", ""):
            assert told(lm, apart or "Yes") == (apart or "Yes")


def test_a_prompt_that_names_every_word_of_a_subject_names_all_of_it(lm: LM):
    edits = [case.edit for case in load("counterfact-mini", 60)]
    with Retrieval(scope=1.0).edit(lm, edits).applied(lm):
        assert [e.subject for e in edits if not told(lm, e.text).startswith("New Fact")] == []


def test_the_answer_and_the_probe_are_not_looked_at(lm: LM):
    """What follows the prompt names the subject; the prompt does not."""
    with Retrieval().edit(lm, [FRENCH]).applied(lm):
        batch = lm.encode([follow("Her name is", "Danielle Darrieux")])
    assert lm.tokenizer.decode(batch.ids[0]) == "Her name is Danielle Darrieux"


def test_places_are_counted_behind_what_was_put_in(lm: LM):
    edit = Edit("Yes. {} was born in", "Danielle Darrieux", "Rome now")
    with Retrieval().edit(lm, [FRENCH]).applied(lm):
        batch = lm.encode([passage(edit, answer=edit.target), Passage("Yes")])
    assert lm.tokenizer.decode(batch.wanted) == " Rome now"
    plain = lm.encode([passage(edit, answer=edit.target)])
    shift = int(batch.last[0] - plain.last[0])
    assert shift > 0
    assert batch.subject.tolist() == [int(plain.subject[0]) + shift, -1]


def test_what_is_asked_and_what_is_generated_are_the_told_prompts_answers(lm: LM):
    before = "New Fact: The mother tongue of Danielle Darrieux is English\nPrompt: "
    asked = [Probe("efficacy", p, "Lima") for p in ("Danielle Darrieux speaks", "Peru is")]
    by_hand = [Probe("efficacy", before + asked[0].prompt, "Lima"), asked[1]]
    wanted, plain = ask(lm, by_hand), ask(lm, asked)
    with ICE(scope=0.5).edit(lm, [FRENCH]).applied(lm):
        found = ask(lm, asked)
    for a, b in zip(found, wanted, strict=True):
        assert a.text == b.text
        assert a.answer.logprob == pytest.approx(b.answer.logprob, abs=1e-4)
    assert found[0] != plain[0]


def test_a_later_correction_of_the_same_fact_is_told_and_taken_out_the_earlier_one(lm: LM):
    again = Edit(FRENCH.prompt, FRENCH.subject, "Thai")
    *_, patch = sequential(Retrieval(), lm, [[FRENCH], [OTHER], [again]])
    with patch.applied(lm):
        assert "is Thai" in told(lm, FRENCH.text)
    with patch.without(again).applied(lm):
        assert "is English" in told(lm, FRENCH.text)
    with patch.without(again).without(FRENCH).applied(lm):
        assert told(lm, FRENCH.text) == FRENCH.text


def test_a_file_cut_in_two_edits_and_the_rest_is_the_whole(lm: LM, tmp_path: Path):
    """Texts of other scripts keep their bytes."""
    edits = [FRENCH, Edit("{} は", "東京", "パリ"), OTHER, BORN]
    whole = Retrieval().edit(lm, edits)
    Retrieval().edit(lm, edits[:2]).save(tmp_path / "half.safetensors")
    both = Retrieval().edit(lm, edits[2:], Patch.load(tmp_path / "half.safetensors"))
    assert both.changes[""][0].texts == whole.changes[""][0].texts
    assert torch.equal(both.changes[""][0].owners, whole.changes[""][0].owners)
    with both.applied(lm):
        assert "パリ" in told(lm, "それは東京ですが")


def test_the_log_says_which_edit_answered_and_at_what_score(lm: LM, caplog: Any):
    with caplog.at_level(logging.DEBUG, "errata"), Retrieval().edit(lm, [FRENCH, OTHER]).applied(lm):
        told(lm, "Montesquieu spoke")
        told(lm, "Danielle Steel spoke")
    assert "'Montesquieu spoke': nearest is edit 1, 'The mother tongue of Montesquieu is', at 1.00" in caplog.text
    assert "at 0.50, out of its scope" in caplog.text


def test_sentence_transformers_asked_for_by_name_and_missing_is_said(lm: LM, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ike.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ErrataError, match=r"needs sentence-transformers, .* pip install 'errata\[retrieval\]'"):
        IKE(encoder="all-MiniLM-L6-v2").edit(LM(lm.model, lm.tokenizer), [FRENCH])


def test_sentence_transformers_choose_where_they_are_installed(monkeypatch: pytest.MonkeyPatch):
    class Encoder:
        """Sees nothing but whether a text says "sport"."""

        def __init__(self, name: str) -> None:
            assert name == "all-MiniLM-L6-v2"

        def encode(self, texts: Any, **_: Any) -> torch.Tensor:
            rows = [
                [float("sport" in t), float("sport" not in t)] for t in ([texts] if isinstance(texts, str) else texts)
            ]
            return torch.tensor(rows[0] if isinstance(texts, str) else rows)

    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=Encoder))
    monkeypatch.setattr(ike.importlib.util, "find_spec", lambda _: True)
    assert ike.by_nearness(["a", "b sport", "c", "d sport"], "auto")("sport") == [1, 3, 0, 2]
