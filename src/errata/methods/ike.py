"""IKE: the edit is told to the model, after demonstrations of how such a fact is to be taken.

A context is found by retrieval when the edit is made and kept in the patch whole, so that the patch needs no training
set and no encoder. The paper tells the model one fact; which of several a prompt is about, `changes.Context` finds out.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..changes import WHOLE, Context
from ..changes.context import APART
from ..changes.remembered import write
from ..data import Case, load
from ..edit import Edit
from ..errors import ErrataError
from ..lm import LM
from ..method import Method
from ..patch import Patch
from ..words import Words

log = logging.getLogger(__name__)

SENTENCES = "all-MiniLM-L6-v2"
"""The sentence encoder of the paper's and EasyEdit's settings."""
KINDS = ("copy", "update", "retain")


@dataclass(frozen=True, kw_only=True)
class ICE(Method, name="ice"):
    """In-context editing without demonstrations: "New Fact: ..." is put before the prompt."""

    paper = "Zheng et al. 2023, Can We Edit Factual Knowledge by In-Context Learning? (its PROMPT baseline)"
    source = "https://arxiv.org/abs/2305.12740"

    scope: float = 0.0
    """How much of a subject's words a prompt must name for its fact to be told: 0 tells the nearest to every prompt."""

    def patch(self, lm: LM, edits: Sequence[Edit], prior: Patch) -> Patch:
        texts = [(e.subject, e.text, self.context(lm, e)) for e in edits]
        owners, scope = torch.arange(len(edits)), torch.full((len(edits),), self.scope)
        return Patch({WHOLE: (Context(owners, *write(texts), scope),)})

    def context(self, lm: LM, edit: Edit) -> str:
        """What is put before a prompt."""
        return f"New Fact: {fact(edit)}\nPrompt: "


@dataclass(frozen=True, kw_only=True)
class Retrieval(ICE, name="retrieval"):
    """The baseline: a store of facts; the one a prompt is about, if any, is put before it. Nothing is trained."""

    paper = "the baseline of Thede et al. 2025, Understanding the Limits of Lifelong Knowledge Editing in LLMs"
    source = "https://arxiv.org/abs/2503.05683"

    scope: float = 0.8
    """How much of a subject's words, by weight, a prompt must name for its fact to be told."""


@dataclass(frozen=True, kw_only=True)
class IKE(ICE, name="ike"):
    """In-context Knowledge Editing: the fact after demonstrations that copy, update and retain."""

    paper = "Zheng et al. 2023, Can We Edit Factual Knowledge by In-Context Learning?"
    source = "https://arxiv.org/abs/2305.12740"

    k: int = 32
    """Demonstrations; as many as fit the model's context are used, the nearest of them."""
    ratio: tuple[int, int, int] = (1, 3, 4)
    """Of those that copy (the fact itself), update (a paraphrase) and retain (a neighbour, whose answer stays)."""
    examples: str = "counterfact-mini"
    """The cases that demonstrations are made of: a data set or a file. One about an edit's own subject is not used."""
    part: str = "train"
    """Which part of that file; `edit` for one that is a single list."""
    encoder: str = "auto"
    """How near two facts are: tf-idf, or the name of a sentence-transformers model. auto: all-MiniLM-L6-v2 where
    sentence-transformers is installed, tf-idf elsewhere."""

    def prepare(self, lm: LM) -> None:
        self._shelf(lm)

    def context(self, lm: LM, edit: Edit) -> str:
        cases, nearest = self._shelf(lm)
        near = (cases[i] for i in nearest(fact(edit)) if cases[i].edit.subject != edit.subject)
        kinds = itertools.cycle(_spread(self.ratio))
        demonstrations = [demonstration(case, next(kinds)) for case in itertools.islice(near, self.k)]
        return "".join(reversed(demonstrations)) + super().context(lm, edit)  # the nearest stands next to the fact

    def _shelf(self, lm: LM) -> tuple[list[Case], Callable[[str], list[int]]]:
        """The cases that demonstrations are made of, and how they are ordered by nearness to a fact."""
        key = "ike", self.examples, self.part, self.encoder
        if key not in lm.memo:
            cases = load(self.examples, part=self.part)
            lm.memo[key] = cases, by_nearness([fact(c.edit) for c in cases], self.encoder)
        return lm.memo[key]


def fact(edit: Edit) -> str:
    """An edit as a sentence."""
    return f"{_line(edit.text)} {_line(edit.target)}"


def demonstration(case: Case, kind: str) -> str:
    """A new fact and a prompt with what is to be said, in EasyEdit's form. A case that lacks such a probe copies."""
    probes = {"update": "paraphrase", "retain": "neighbourhood"}
    probe = next((p for p in case.probes if p.kind == probes.get(kind)), None)
    asked = fact(case.edit) if probe is None else f"{_line(probe.prompt)} {_line(probe.answer)}"
    return f"New Fact: {fact(case.edit)}\nPrompt: {asked}{APART}"


def by_nearness(texts: Sequence[str], encoder: str) -> Callable[[str], list[int]]:
    """A function that orders these texts by nearness to another, the nearest first.

    Raises:
        ErrataError: sentence-transformers is asked for by name and is not installed.
    """
    installed = importlib.util.find_spec("sentence_transformers") is not None
    if encoder == "tf-idf" or (encoder == "auto" and not installed):
        log.debug("examples are chosen by tf-idf")
        index = Words(texts)
        return lambda text: _ordered(index.cosine(text), len(texts))
    if not installed:
        raise ErrataError(
            f"the encoder {encoder!r} needs sentence-transformers, which is not installed; "
            "pip install 'errata[retrieval]', or take encoder=tf-idf"
        )
    return _by_sentence(texts, SENTENCES if encoder == "auto" else encoder)


def _by_sentence(texts: Sequence[str], name: str) -> Callable[[str], list[int]]:
    from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports]

    model: Any = SentenceTransformer(name)
    known = model.encode(list(texts), convert_to_tensor=True, normalize_embeddings=True)

    def ordered(text: str) -> list[int]:
        asked = model.encode(text, convert_to_tensor=True, normalize_embeddings=True)
        return (known @ asked).argsort(descending=True, stable=True).tolist()

    return ordered


def _ordered(scores: dict[int, float], n: int) -> list[int]:
    return sorted(range(n), key=lambda i: -scores.get(i, 0.0))


def _spread(ratio: Sequence[int]) -> list[str]:
    """The kinds of demonstration by their shares, each spread evenly over the whole."""
    places = [((i + 0.5) / n, kind) for kind, n in zip(KINDS, ratio, strict=True) for i in range(n)]
    return [kind for _, kind in sorted(places)]


def _line(text: str) -> str:
    """A text on one line: a line break is what ends a demonstration's parts."""
    return " ".join(text.split())
