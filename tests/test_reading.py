"""What is heard from prompts that are read once is what passes over whole texts say, on every architecture."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from errata import LM
from errata.reading import Again, Once, read
from errata.tokens import Passage
from tests.test_replay import CONFIGS, build

PROMPTS = ("The capital of New Zealand is", "Cuba", "Today we learn. People in Kenya govern from", "Yes. Peru is")
ANSWERS = ((0, "Lima"), (0, "Oslo Rome Paris"), (2, "Oslo Rome"), (2, "Cairo"), (3, "a country"), (1, "Madrid"))


@contextmanager
def nothing(_rows: list[int]) -> Iterator[None]:
    yield


def ids(lm: LM, text: str) -> list[int]:
    tokens = lm.encode([Passage(text)])
    return tokens.ids[0].tolist()


def asked(lm: LM) -> tuple[list[list[int]], list[tuple[int, list[int]]]]:
    bare = len(ids(lm, "Lima")) - len(lm.tokenizer("Lima", add_special_tokens=False)["input_ids"])
    return [ids(lm, p) for p in PROMPTS], [(row, ids(lm, answer)[bare:]) for row, answer in ANSWERS]


@pytest.mark.parametrize("kind", CONFIGS)
def test_answers_and_texts_are_those_of_whole_passes(kind: str):
    lm = build(kind)
    prompts, answers = asked(lm)
    once, again = read(lm, prompts, nothing), Again(lm, prompts, nothing)
    assert isinstance(once, Once)
    assert len({len(answer) for _, answer in answers}) > 2  # or padding behind prompts is not tried
    with torch.no_grad():
        for _ in range(2):  # nothing is left behind that the next question would see
            for got, want in zip(once.forced(answers), again.forced(answers), strict=True):
                assert (got - want).abs().max() < 1e-4 * want.std()
            for until in (None, lambda text: len(text) > 6):
                assert once.greedy([2, 0, 3], 9, until) == again.greedy([2, 0, 3], 9, until)


def test_a_prompt_is_read_once_and_rows_whose_text_is_over_leave():
    lm = build("llama")
    prompts, answers = asked(lm)
    passes: list[tuple[int, ...]] = []
    head = lm.module(lm.blocks[0]).register_forward_hook(lambda _m, args, _o: passes.append(tuple(args[0].shape[:2])))
    with torch.no_grad():
        lm.memo["goes on"] = True  # what was found out before
        reading = read(lm, prompts, nothing)
        reading.forced([a for a in answers if len(a[1]) == 1])
        assert passes == [(4, max(map(len, prompts)))]
        reading.forced(answers)
        (first,) = reading.greedy([0], 1, None)
        passes.clear()
        reading.greedy([0, 1, 2, 3], 5, lambda text: text.startswith(first))
    head.remove()
    assert passes[0][0] < 4
    assert all(tokens == 1 for _, tokens in passes)


def test_each_row_has_what_is_in_place_for_it():
    lm = build("gpt2")
    prompts, _ = asked(lm)
    seen: list[list[int]] = []

    @contextmanager
    def edited(rows: list[int]) -> Iterator[None]:
        seen.append(rows)
        yield

    with torch.no_grad():
        read(lm, prompts, nothing)
        reading = read(lm, prompts, edited)
        reading.forced([(3, [5, 6]), (1, [7]), (0, [8, 9])])
        reading.greedy([2, 1], 2, None)
    assert seen == [[0, 1, 2, 3], [3, 0], [2, 1]]


def test_a_model_whose_cache_can_not_be_gone_on_from_is_asked_anew_and_the_log_says_so(caplog):
    lm = build("llama")
    block = lm.module(lm.blocks[1])
    forward = block.forward
    block.forward = lambda hidden, *a, **k: forward(hidden * hidden.shape[1], *a, **k)  # it hangs on a pass's length
    prompts, answers = asked(lm)
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        for _ in range(2):
            reading = read(lm, prompts, nothing)
            assert isinstance(reading, Again)
    assert caplog.text.count("can't be gone on from its cache") == 1
    assert [len(found) for found in reading.forced(answers)] == [len(answer) for _, answer in answers]
