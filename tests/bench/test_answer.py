"""What is asked in padded batches is what a plain pass over one text says."""

from __future__ import annotations

import pytest
import torch

from errata import LM, Case, ErrataError, Probe
from errata import ask as asking
from errata.ask import Answer, ask, ask_cases, ended, stopped, tolerant
from errata.tokens import batches


def plainly(lm: LM, prompt: str, answer: str) -> tuple[list[int], list[int], float]:
    """Ids, argmax and mean log-probability of an answer by one plain pass over the joined text."""
    ids = lm.tokenizer(f"{prompt} {answer}")["input_ids"]
    start = len(lm.tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        said = lm.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    places = range(start - 1, len(ids) - 1)
    wanted = ids[start:]
    mean = sum(said[p, i].item() for p, i in zip(places, wanted, strict=True)) / len(wanted)
    return wanted, [int(said[p].argmax()) for p in places], mean


def test_answers_are_those_of_plain_passes_in_the_order_of_the_probes(lm: LM, cases: list[Case]):
    probes = [p for c in cases for p in c.probes]
    assert len({len(lm.tokenizer(p.answer)["input_ids"]) for p in probes}) > 1  # or padding is not tried
    for probe, found in zip(probes, ask(lm, probes), strict=True):
        for spoken, text in ((found.answer, probe.answer), (found.other, probe.other)):
            if text is None:
                assert spoken is None
                continue
            ids, argmax, logprob = plainly(lm, probe.prompt, text)
            assert (list(spoken.ids), list(spoken.argmax)) == (ids, argmax)
            assert spoken.logprob == pytest.approx(logprob, abs=1e-4)
        assert found.text == stopped(lm.generate(probe.prompt, max_new_tokens=asking.NEW_TOKENS))
        assert found.unasked is None


def test_a_model_in_training_mode_is_asked_without_dropout_and_stays_as_it_was(gpt2: LM, cases: list[Case]):
    quiet = ask(gpt2, cases[0].probes)
    gpt2.model.train()
    try:
        assert ask(gpt2, cases[0].probes) == quiet
        assert gpt2.model.training
    finally:
        gpt2.model.eval()


def test_groups_come_back_as_groups(gpt2: LM, cases: list[Case]):
    found = ask_cases(gpt2, [cases[0].probes, (), cases[1].probes[:1]])
    assert [len(g) for g in found] == [len(cases[0].probes), 0, 1]
    assert found[2][0].answer.ids == ask(gpt2, cases[1].probes[:1])[0].answer.ids


def test_a_question_that_can_not_be_asked_says_why_and_costs_no_other(cases: list[Case]):
    from tests import tiny

    lm = tiny.trained("llama")
    good = cases[0].probes[0]
    long = Probe("paraphrase", "It is known. " * 60 + "The capital of France is", "Rome")
    odd = Probe("paraphrase", "The capital of France is", "Ω", "Paris")  # no letter of this vocabulary
    alone = ask(lm, [good])[0]
    found = ask(lm, [good, long, odd, good])
    assert [a.answer.ids for a in (found[0], found[3])] == [alone.answer.ids] * 2
    assert [a.text for a in (found[0], found[3])] == [alone.text] * 2
    assert found[1].answer is found[1].text is None
    assert "tokens" in found[1].unasked["answer"]
    assert set(found[1].unasked) == {"answer", "text"}
    assert set(found[2].unasked) == {"answer"}
    assert found[2].other is not None
    assert found[2].text == alone.text


def test_a_prompt_without_room_for_an_answer_is_read_but_not_continued(gpt2: LM, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(asking, "NEW_TOKENS", gpt2.context)
    full = Probe("paraphrase", "The capital of France is", "Rome")
    found = ask(gpt2, [full])[0]
    assert found.answer is not None
    assert found.text is None
    assert "don't fit" in found.unasked["text"]


def test_batches_hold_every_row_once_within_the_limit():
    lengths = [3, 50, 7, 7, 120, 1, 30, 30]
    found = list(batches(lengths, most=100))
    assert sorted(i for b in found for i in b) == list(range(8))
    assert all(len(b) * max(lengths[i] for i in b) <= 100 or len(b) == 1 for b in found)
    assert len(found) < 8


def test_halving_finds_the_items_that_fail():
    def double(items: list[int]) -> list[int]:
        if 3 in items or 7 in items:
            raise ErrataError(f"no {items}")
        return [2 * i for i in items]

    found = tolerant(double, list(range(9)))
    assert [f for f in found if not isinstance(f, ErrataError)] == [0, 2, 4, 8, 10, 12, 16]
    assert [str(found[i]) for i in (3, 7)] == ["no [3]", "no [7]"]
    assert tolerant(double, []) == []


def test_only_errors_of_errata_are_an_answer():
    def broken(_items: list[int]) -> list[int]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        tolerant(broken, [1, 2])


def test_an_answer_is_plain_values():
    assert Answer(text="x").to_dict() == {"answer": None, "other": None, "text": "x", "unasked": None}


def test_ending_early_changes_no_answer():
    """Wherever a text is said to have ended, more of it makes no other answer; and it is said as soon as it can be."""
    texts = (
        "Paris. It is",
        "J. R. R. Tolkien. He",
        "St. Louis.\nThe",
        'is "Rome." Then',
        "3.5 and 4! Next",
        " \n\nIs",
        "",
    )
    for text in texts:
        cut = next((i for i in range(len(text) + 1) if ended(text[:i])), None)
        if cut is not None:
            assert {stopped(text[:i]) for i in range(cut, len(text) + 1)} == {stopped(text)}
    assert ended("Paris. It")
    assert not any(map(ended, ("Paris", "Paris.", "3.", "J. R", "St. Lou")))


def test_a_batch_is_over_when_every_answer_has_ended(lm: LM):
    prompts = ["The capital of Peru is", "Yes"]
    whole, asked = lm.generate(prompts, 20), []

    def until(text: str) -> bool:
        asked.append(text)
        return len(text) > 4

    found = lm.generate(prompts, 20, until)
    assert all(w.startswith(f) for w, f in zip(whole, found, strict=True))
    assert all(len(f) > 4 for f in found)
    assert len(asked) < 2 * 20
