"""The contract tells a method that breaks a promise which one it is."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from errata import FTM, LM, ROME, Edit, Patch, UsageError, testing
from errata.changes import Dense
from tests import tiny

FACTS = (*tiny.EDITS[:2], Edit(tiny.PROMPT, "Japan", "Paris"))
SETTINGS: dict[str, Any] = {"layers": (1,), "steps": 5, "rate": 5e-3}


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny.trained("llama")


def test_a_method_that_keeps_the_contract_is_let_pass(lm: LM, corpus_file: str):
    testing.check_method(tiny.small_settings(ROME, lm, corpus_file), lm, FACTS)


@dataclass(frozen=True, kw_only=True)
class Idle(FTM):
    def patch(self, lm: LM, edits: Sequence[Edit], prior: Patch) -> Patch:
        return Patch()


@dataclass(frozen=True, kw_only=True)
class Drawn(FTM):
    """Draws beside its seed."""

    def patch(self, lm: LM, edits: Sequence[Edit], prior: Patch) -> Patch:
        return super().patch(lm, edits, prior).scaled(1 + random.random())


@dataclass(frozen=True, kw_only=True)
class Half(FTM):
    def patch(self, lm: LM, edits: Sequence[Edit], prior: Patch) -> Patch:
        made = super().patch(lm, edits, prior)
        changes = {n: tuple(Dense(c.owners, c.delta.to(lm.dtype)) for c in cs) for n, cs in made.changes.items()}
        return replace(made, changes=changes)


@dataclass(frozen=True, kw_only=True)
class Together(FTM):
    """Makes of several edits by themselves one patch."""

    def patches(self, lm: LM, edits: Sequence[Edit]) -> list[Patch]:
        return [self.patch(lm, edits, Patch())] * len(edits)


@dataclass(frozen=True, kw_only=True)
class Remembering(FTM):
    """Does nothing for a model that it has met."""

    def patch(self, lm: LM, edits: Sequence[Edit], prior: Patch) -> Patch:
        met = lm.memo.setdefault("met", [])
        met.append(edits)
        return super().patch(lm, edits, prior) if len(met) == 1 else Patch()


@dataclass(frozen=True, kw_only=True)
class Writing(FTM):
    """Writes into the model's own weights, after its first edit."""

    def patch(self, lm: LM, edits: Sequence[Edit], prior: Patch) -> Patch:
        made = super().patch(lm, edits, prior)
        if edits[0] != FACTS[0]:
            with torch.no_grad():
                next(lm.model.parameters()).add_(1)
        return made


BREAKS = {
    Idle: {"the_edit_takes", "every_edit_of_a_batch_takes", "a_later_edit_stands_on_the_earlier_ones"},
    Drawn: {"the_same_seed_gives_the_same_patch", "edits_in_shared_passes_are_those_made_alone"},
    Half: {"the_dtype_follows_the_model"},
    Together: {"edits_in_shared_passes_are_those_made_alone"},
    Remembering: {"a_sequence_goes_on_from_a_file"},
    Writing: {"the_dtype_follows_the_model"},
}


@pytest.mark.parametrize("kind", BREAKS, ids=lambda k: k.__name__.lower())
def test_a_broken_promise_is_named(kind: type[FTM]):
    with pytest.raises(AssertionError, match="ft-m breaks") as told:
        testing.check_method(kind(**SETTINGS), tiny.trained("llama"), FACTS)
    named = {line.partition(":")[0] for line in str(told.value).splitlines()[1:]}
    assert named >= BREAKS[kind]
    assert named <= {promise.__name__ for promise in testing.PROMISES}
    if kind not in (Idle, Writing):  # which do nothing, or break the model
        assert len(named) < 6, "what is kept is not named"


def test_the_contract_wants_three_edits(lm: LM):
    with pytest.raises(UsageError, match="about three edits, not 1"):
        testing.check_method(FTM(**SETTINGS), lm, FACTS[:1])
