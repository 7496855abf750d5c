"""What is heard from prompts that are read once is what passes over whole texts say, on every architecture."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from errata import LM
from errata.reading import Again, read
from errata.tokens import Passage
from tests.test_replay import CONFIGS, OTHERS, build

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


def believed(lm: LM, what: str) -> bool | None:
    """Whether a model's cache was found right to go on from in every use so far; None where none was tried."""
    key = ("proven", "goes on", what)
    return None if key not in lm.memo else lm.memo[key] is not None


@pytest.mark.parametrize("kind", [*CONFIGS, *OTHERS])
@torch.no_grad()
def test_answers_and_texts_are_those_of_whole_texts_whatever_was_asked_before(kind: str):
    lm = build(kind)
    prompts, answers = asked(lm)
    assert len({len(answer) for _, answer in answers}) > 2  # or padding behind prompts is not tried
    for some in (prompts[2:3], prompts):  # one alone, then several of different lengths
        reading, again = read(lm, some, nothing), Again(lm, some, nothing)
        mine = [(0, answer) for _, answer in answers[2:3]] if len(some) == 1 else answers
        for _ in range(2):  # nothing is left behind that the next question would see
            for got, want in zip(reading.forced(mine), again.forced(mine), strict=True):
                assert (got - want).abs().max() < 1e-3 * want.std()
            for until in (None, lambda text: len(text) > 6):
                rows = [i for i in (2, 0, 3) if i < len(some)]
                assert reading.greedy(rows, 9, until) == lm.texts(again.greedy(rows, 9, until).ids)
    wrong = {"bart": ["forced", "greedy"], "recurrent_gemma": ["forced", "greedy"]}  # positions; states in the modules
    assert [what for what in ("forced", "greedy") if not believed(lm, what)] == wrong.get(kind, [])


@torch.no_grad()
def test_a_text_is_what_the_model_itself_generates():
    lm = build("qwen3")
    prompts, _ = asked(lm)
    own = lm.continued({"input_ids": torch.tensor(prompts[:1])}, max_new_tokens=8, do_sample=False)
    assert read(lm, prompts, nothing).greedy([0], 8, None) == lm.texts(own[:, len(prompts[0]) :])


def test_a_prompt_is_read_once_and_rows_whose_text_is_over_leave():
    lm = build("llama")
    prompts, answers = asked(lm)
    passes: list[tuple[int, ...]] = []
    head = lm.module(lm.blocks[0]).register_forward_hook(lambda _m, args, _o: passes.append(tuple(args[0].shape[:2])))
    with torch.no_grad():
        for _ in range(2):  # what may be shared is found out the first time
            passes.clear()
            reading = read(lm, prompts, nothing)
            reading.forced([a for a in answers if len(a[1]) == 1])
            reading.forced(answers)
            alone = [reading.greedy([row], 5, None)[0] for row in range(4)]
            assert len(set(alone)) > 1
            texts = reading.greedy([0, 1, 2, 3], 5, alone[0].startswith)
    head.remove()
    longest = max(map(len, prompts))
    assert passes[0] == (4, longest)
    assert [tokens for _, tokens in passes].count(longest) == 1
    assert {rows for rows, tokens in passes if tokens == 1} > {1}
    assert all(whole.startswith(text) for whole, text in zip(alone, texts, strict=True))


def test_each_row_has_what_is_in_place_for_it():
    lm = build("gpt2")
    prompts, _ = asked(lm)
    seen: list[list[int]] = []

    @contextmanager
    def edited(rows: list[int]) -> Iterator[None]:
        seen.append(rows)
        yield

    with torch.no_grad():
        for _ in range(2):
            seen.clear()
            reading = read(lm, prompts, edited)
            reading.forced([(3, [5, 6]), (1, [7]), (0, [8, 9])])
            reading.greedy([2, 1], 2, None)
    assert [rows for rows in seen if rows != [0]] == [[0, 1, 2, 3], [3, 0], [2, 1]]


@pytest.mark.parametrize("where", ["asked again", "in a longer text", "with a patch"])
@torch.no_grad()
def test_a_cache_that_is_wrong_only_in_one_use_is_found_out_there_and_the_log_says_so_once(where: str, caplog):
    lm = build("llama")
    prompts, answers = asked(lm)
    block = lm.module(lm.blocks[3])
    forward, count = block.forward, 0

    def faulty(hidden: torch.Tensor, *a: Any, **k: Any) -> torch.Tensor:
        nonlocal count
        out, short = forward(hidden, *a, **k), hidden.shape[1] < 3
        count += short
        wrong = {
            "asked again": count > 1,
            "in a longer text": k["position_ids"].max() > 25,
            "with a patch": bool(block._forward_hooks),
        }
        return out.roll(1, -1) if short and wrong[where] else out

    block.forward = faulty

    some = [(0, answers[1][1][:3])]
    reading, again = read(lm, prompts[:1], nothing), Again(lm, prompts[:1], nothing)
    with caplog.at_level(logging.WARNING):
        reading.forced(some)
        assert believed(lm, "forced")
        if where == "with a patch":
            block.register_forward_hook(lambda _m, _a, out: out)
        if where != "asked again":
            longer = [prompts[2] * 3] if where == "in a longer text" else prompts[:1]
            reading, again = read(lm, longer, nothing), Again(lm, longer, nothing)
        for got, want in zip(reading.forced(some), again.forced(some), strict=True):
            assert (got - want).abs().max() < 1e-3 * want.std()
    assert not believed(lm, "forced")
    assert caplog.text.count("can't be gone on from its cache") == 1


def test_a_model_whose_cache_can_not_be_gone_on_from_is_asked_anew_and_the_log_says_so(caplog):
    lm = build("llama")
    block = lm.module(lm.blocks[1])
    forward = block.forward
    block.forward = lambda hidden, *a, **k: forward(hidden * hidden.shape[1], *a, **k)  # it hangs on a pass's length
    prompts, answers = asked(lm)
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        for _ in range(2):
            found = read(lm, prompts, nothing).forced(answers)
            assert not believed(lm, "forced")
    assert caplog.text.count("can't be gone on from its cache") == 1
    assert [len(logits) for logits in found] == [len(answer) for _, answer in answers]


@torch.no_grad()
def test_without_answers_nothing_is_said():
    lm = build("bart")
    assert read(lm, asked(lm)[0], nothing).forced([]) == []
