"""SERAC: edits are remembered as texts; a classifier says what prompts they are about, a small model answers those.

The counterfactual model reads an edit and a prompt and says the edit's target in its place: it has to copy, and a model
of two blocks can be written that does (`changes.deferral.write_copier`). Only the classifier is learned.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid

from ..changes import WHOLE, Deferral
from ..changes.deferral import Asked, Networks, refuse_other_vocabulary, told, vocabulary, written
from ..changes.remembered import write
from ..data import Case
from ..edit import Edit
from ..editor import Editor
from ..lm import LM
from ..patch import Patch
from ..tokens import Tokens, encode, follow
from ..train import Losses, Trained


@dataclass(frozen=True, kw_only=True)
class SERAC(Trained, name="serac"):
    """Semi-parametric editing: a memory of edits, a scope classifier, and a counterfactual model that reads the edit.

    The paper's classifier and model are pretrained; these are small, of the model's own vocabulary, and are not.
    """

    paper = "Mitchell et al. 2022, Memory-Based Model Editing at Scale"
    source = "https://arxiv.org/abs/2206.06520"

    width: int = 128
    """Of the counterfactual model."""
    scope: int = 64
    """The length of the classifier's token vectors."""

    # Editing

    def patch(self, lm: LM, edits: Sequence[Edit], prior: Patch) -> Patch:
        _, network = self.ready(lm)
        if ("serac", self.editor) not in lm.memo:  # one copy for all patches
            lm.memo["serac", self.editor] = network.numbers
        numbers, shape = lm.memo["serac", self.editor], torch.tensor(network.shape)
        texts = [(e.prompt, e.subject, e.target) for e in edits]
        owners = torch.arange(len(edits))
        return Patch({WHOLE: (Deferral(owners, *write(texts), numbers, shape, vocabulary(lm)),)})

    def accept(self, editor: Editor, lm: LM) -> None:
        """An editor knows a tokenizer, not a model: one that was trained with another model of the same will do."""
        base = {"fingerprint": lm.fingerprint, "name": lm.name}
        replace(editor, about={**editor.about, "base": base}).check(self.name, lm)
        refuse_other_vocabulary(editor.tensors["vocabulary"], lm)

    # Training

    def network(self, lm: LM) -> nn.Module:
        size = lm.model.get_output_embeddings().weight.shape[0]
        end = lm.tokenizer("a\n", add_special_tokens=False)["input_ids"][-1]
        made = Networks(size, self.width, self.scope, end)
        made.register_buffer("vocabulary", vocabulary(lm))
        return made

    def learn(self, lm: LM, network: Any, cases: Sequence[Case], draw: random.Random) -> Losses:
        loss = scope_loss(lm, network, [_lesson(case, cases, draw) for case in cases])
        loss.backward()
        return {"total": loss.item()}

    def judge(self, lm: LM, network: Any, cases: Sequence[Case], draw: random.Random) -> Losses:
        loss = scope_loss(lm, network, [_lesson(case, cases, draw) for case in cases])
        return {"total": loss.item(), "answer": answer_loss(lm, network, [c.edit for c in cases]).item()}


@dataclass(frozen=True)
class Lesson:
    """An edit with what is to be told apart."""

    edit: Edit
    inside: str
    """A prompt in its scope."""
    outside: tuple[str, ...]
    """Prompts that are not: the same question about others, another question about its subject."""


def scope_loss(lm: LM, network: Networks, lessons: Sequence[Lesson]) -> Tensor:
    """Mean negative log-probability of the right verdict; prompts inside count as much as those outside together."""
    texts = [x.inside for x in lessons] + [
        text for kind in zip(*(x.outside for x in lessons), strict=True) for text in kind
    ]
    odds = network.scope.pairs(written(lm, [x.edit for x in lessons]), Asked.of(lm, texts))
    return -logsigmoid(odds[0]).mean() - logsigmoid(-odds[1:]).mean()


def answer_loss(lm: LM, network: Networks, edits: Sequence[Edit]) -> Tensor:
    """Mean negative log-probability of the target and of the line break after it, given the edit and its prompt."""
    passages = [follow(e.text.join(told(e)), e.target) for e in edits]
    tokens = ended(encode(lm.tokenizer, passages, device=lm.device), network.shape[-1])
    copier = LM(network.counterfactual, lm.tokenizer)
    return cross_entropy(copier.logits(*tokens.reads, **tokens.inputs), tokens.wanted)


def ended(tokens: Tokens, end: int) -> Tokens:
    """The batch with an end token behind every row, as a part of its target."""
    rows, place = torch.arange(len(tokens)), tokens.last + 1
    ids, mask, target = (torch.nn.functional.pad(t, (0, 1)) for t in (tokens.ids, tokens.mask, tokens.target))
    ids[rows, place], mask[rows, place], target[rows, place] = end, 1, True
    return Tokens(ids, mask, tokens.subject, target)


# What is drawn


def _lesson(case: Case, cases: Sequence[Case], draw: random.Random) -> Lesson:
    """A case, mostly with another subject in the place of its own."""
    own = case.edit
    subject = own.subject if draw.random() < 0.3 else _name(cases, draw)
    alike = [c for c in cases if c is case or (c.relation == case.relation and c.relation is not None)]
    asked = questions(case) + questions(draw.choice(alike))
    edit = Edit(draw.choice(asked) if draw.random() < 0.3 else own.prompt, subject, own.target)
    inside = _fill(draw.choice(asked) if draw.random() < 0.6 else own.prompt, subject)
    if draw.random() < 0.2:  # something unrelated is said first
        before = draw.choice(cases)
        inside = f"{_fill(draw.choice(questions(before)), _name(cases, draw))} {before.edit.target}. {inside}"
    strangers = [c for c in cases if c.relation != case.relation or (c.relation is None and c is not case)]
    near = [p.prompt for p in case.probes if p.kind == "neighbourhood"]
    return Lesson(
        edit,
        inside,
        (
            _fill(draw.choice(asked), _alike(subject, cases, draw)),
            _fill(draw.choice(questions(draw.choice(strangers))), subject) if strangers else _name(cases, draw),
            draw.choice(near) if near else _fill(own.prompt, _name(cases, draw)),
            _fill(draw.choice(asked), _name(cases, draw)),
        ),
    )


@cache
def questions(case: Case) -> tuple[str, ...]:
    """The ways a case asks for its fact, with {} for the subject."""
    subject = case.edit.subject
    asked = [p.prompt for p in case.probes if p.kind == "paraphrase" and subject in p.prompt]
    ways = (before + "{}" + after for before, _, after in (text.rpartition(subject) for text in asked))
    return case.edit.prompt, *(way for way in ways if way.count("{}") == 1)


def _fill(template: str, subject: str) -> str:
    return template.replace("{}", subject)


def _name(cases: Sequence[Case], draw: random.Random) -> str:
    """A name made of words of the cases' subjects."""
    words = [draw.choice(draw.choice(cases).edit.subject.split()) for _ in range(draw.choice((1, 2, 2, 3)))]
    return " ".join(words)


def _alike(subject: str, cases: Sequence[Case], draw: random.Random) -> str:
    """Another name, often one that shares a word."""
    words, other = subject.split(), _name(cases, draw)
    if len(words) > 1 and draw.random() < 0.6:
        words[draw.randrange(len(words))] = draw.choice(other.split())
        other = " ".join(words)
    return other if other != subject else f"{other} {_name(cases, draw)}"
