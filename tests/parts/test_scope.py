"""How far a memory may reach is measured: up to the nearest input that is out of an edit's scope."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from errata import Edit
from errata.parts import scope
from errata.tokens import Passage, passage
from errata.trace import read
from tests import tiny

EDIT = Edit(tiny.PROMPT, "New Zealand", "Oslo")


def inputs(lm, text: str) -> torch.Tensor:
    """What the matrix of layer 1 is given at every token."""
    tokens, name = lm.encode([Passage(text)]), lm.site(1).name
    with torch.no_grad():
        return read(lm, [name], tokens, *tokens.mask.nonzero(as_tuple=True))[name][0]


def test_the_reach_ends_at_the_nearest_token_of_another_text_or_of_another_name_that_ends_so(tmp_path: Path):
    lm, corpus = tiny.lm("gpt2"), tmp_path / "corpus.txt"
    texts = ["The capital of Peru is Lima", "The capital of New Zealand was", "Cairo is a city"]
    corpus.write_text("\n".join(texts))
    key = inputs(lm, "The capital of New Zealand")[-1:]
    ordinary = scope.ordinary(lm, lm.site(1), str(corpus), 9)
    found = scope.reach(lm, lm.site(1), [EDIT], torch.zeros(1, dtype=torch.long), key, ordinary)
    away = {t: float((inputs(lm, t) - key).norm(dim=1).min()) for t in (*texts, "The capital of Zealand is")}
    assert away.pop(texts[1]) < min(away.values()), "a text that names the subject is not outside"
    assert float(found) == pytest.approx(min(away.values()), rel=1e-5)
    assert min(away, key=away.__getitem__) == "The capital of Zealand is"


def test_a_subject_is_in_scope_in_its_prompt_and_wherever_else_it_stands():
    found, owner = scope.inside([EDIT, tiny.EDITS[0]], ["{}", "Yes. {}"])
    assert [p.text for p in found[:3]] == ["The capital of New Zealand is", "New Zealand", "Yes. New Zealand"]
    assert [p.text[slice(*p.subject)] for p in found] == ["New Zealand"] * 3 + ["France"] * 3  # pyright: ignore
    assert owner.tolist() == [0, 0, 0, 1, 1, 1]


def test_what_is_learned_along_is_of_the_same_subject_and_by_another_prompt():
    others = [Edit("{} has its capital at", s, "Rome") for s in ("New Zealand", "Peru")]
    old = [Edit("{} has its capital at", "New Zealand", "Cairo"), Edit(tiny.PROMPT, "New Zealand", "Lima")]
    found, owner = scope.lessons([EDIT], ["{}", "Yes. {}"], ".", [*old, *others, EDIT])
    assert [p.text for p in found] == [
        "The capital of New Zealand is Oslo.",
        "Yes. The capital of New Zealand is Oslo.",
        "New Zealand has its capital at Rome.",  # the later of the two
    ]
    assert found[0] == passage(EDIT, answer="Oslo.")
    assert owner.tolist() == [0, 0, 0]


def test_a_text_is_read_as_far_as_the_model_reads(tmp_path: Path):
    """Though every character is a token, and the tokenizer adds some."""
    lm, corpus = tiny.lm("llama"), tmp_path / "corpus.txt"
    corpus.write_text("zqxj" * 50)
    assert lm.context is not None
    found = scope.ordinary(lm, lm.site(1), str(corpus), 1)
    assert lm.context - 2 * scope.SPARE < len(found.inputs) <= lm.context
