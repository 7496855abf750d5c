"""Maps of what every state does for the answer: of one fact, and the average over many (the paper's figure 2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..edit import Edit
from ..lm import LM
from .drawing import Map
from .restoring import (
    Corrupted,
    Kind,
    State,
    known,
    noise_of,
    places_of,
    question,
    warn_if_kept,
    width_of,
    window_at,
)

ROLES = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first further token",
    "further tokens",
    "last token",
)
"""The rows of the paper's figure 2. Tokens before the subject have no effect."""


@dataclass(frozen=True, eq=False)
class Trace(Map):
    """What one fact's states do for its answer. All probabilities are of the whole answer, after the prompt."""

    edit: Edit
    answer: str
    """What p is of: by default what the model says of itself."""
    tokens: tuple[str, ...]
    """The prompt's."""
    subject: range
    """The indices of the subject's tokens."""
    clean: float
    """p(answer)."""
    corrupted: float
    """p(answer) with noise on the subject's embeddings; the mean over draws, as all that follows."""
    scores: Mapping[Kind, Tensor]
    """{kind: (tokens, layers)} p(answer) with a clean state put back; for MLP and attention in a window of layers."""
    window: int
    """Layers in that window, centred on the one that is named."""
    noise: float
    """Standard deviation of the noise."""

    @property
    def effects(self) -> Mapping[Kind, Tensor]:
        return {kind: score - self.corrupted for kind, score in self.scores.items()}

    @property
    def labels(self) -> Sequence[str]:
        return [f"{token}*" if i in self.subject else token for i, token in enumerate(self.tokens)]

    @property
    def heading(self) -> str:
        return f"{self.edit.text} → {self.answer}: p = {self.clean:.3f} clean, {self.corrupted:.3f} corrupted"

    def to_dict(self) -> dict[str, Any]:
        named = {name: getattr(self, name) for name in ("answer", "clean", "corrupted", "window", "noise")}
        scores = {kind: score.tolist() for kind, score in self.scores.items()}
        lists = {"tokens": list(self.tokens), "subject": list(self.subject), "scores": scores}
        return {"prompt": self.edit.text, **named, **lists}

    def role(self, token: int) -> str | None:
        """What part a token of the prompt plays, one of `ROLES`; None before the subject."""
        named = {len(self.tokens) - 1: "last token", self.subject[0]: ROLES[0], self.subject[-1]: ROLES[2]}
        if token < self.subject[0]:
            return None
        if token in named:
            return named[token]
        if token < self.subject[-1]:
            return "middle subject tokens"
        return "first further token" if token == self.subject[-1] + 1 else "further tokens"

    def by_role(self, kind: Kind) -> Tensor:
        """(roles, layers) the mean effect of the tokens in each role, NaN where the prompt has none."""
        effects, roles = self.effects[kind], [self.role(i) for i in range(len(self.tokens))]
        return torch.stack([effects[[i for i, role in enumerate(roles) if role == name]].mean(0) for name in ROLES])


@dataclass(frozen=True, eq=False)
class Average(Map):
    """The average indirect effect (AIE) over facts: the paper's figure 2."""

    traces: tuple[Trace, ...]

    @property
    def effects(self) -> Mapping[Kind, Tensor]:
        """{kind: (roles, layers)}. A role is averaged within each fact first, then over the facts that have it."""
        stacked: dict[Kind, Tensor] = {
            k: torch.stack([t.by_role(k) for t in self.traces]) for k in self.traces[0].scores
        }
        return {kind: found.nanmean(0).nan_to_num(0.0) for kind, found in stacked.items()}

    @property
    def labels(self) -> Sequence[str]:
        return ROLES

    @property
    def clean(self) -> float:
        """p(answer), the mean over facts."""
        return sum(t.clean for t in self.traces) / len(self.traces)

    @property
    def corrupted(self) -> float:
        """The same with noise on the subject's embeddings."""
        return sum(t.corrupted for t in self.traces) / len(self.traces)

    @property
    def heading(self) -> str:
        return f"{len(self.traces)} facts: p(answer) = {self.clean:.3f} clean, {self.corrupted:.3f} corrupted"

    def to_dict(self) -> dict[str, Any]:
        effects = {k: e.tolist() for k, e in self.effects.items()}
        return {"facts": len(self.traces), "roles": list(ROLES), "window": self.traces[0].window, "effects": effects}


def trace(
    lm: LM,
    edit: Edit,
    answer: str | None = None,
    *,
    kinds: Sequence[Kind] | None = None,
    window: int | None = None,
    noise: float | None = None,
    draws: int = 10,
    seed: int = 0,
) -> Trace:
    """The indirect effect of every state on p(answer).

    Args:
        lm: the model, as it stands (also with a patch applied).
        edit: the fact; its target plays no part.
        answer: whose probability is measured (`edit.truth`, say); by default the token that the model says next.
        kinds: what to restore; by default all that the model has.
        window: how many neighbouring MLPs or attentions are restored at once; by default 10 of 48 layers.
        noise: standard deviation of the noise; by default 3 times that of the subject's embeddings.
        draws: how many times noise is drawn; the same for every restoration.
        seed: of the noise.
    """
    noise = noise_of(lm, [edit]) if noise is None else noise
    found = _traced(lm, edit, answer, kinds, window, noise, draws, seed)
    warn_if_kept(lm, found.clean, found.corrupted, f"{edit.text!r}")
    return found


def _traced(
    lm: LM,
    edit: Edit,
    answer: str | None,
    kinds: Sequence[Kind] | None,
    window: int | None,
    noise: float,
    draws: int,
    seed: int,
) -> Trace:
    places, width, depth = places_of(lm, kinds), width_of(lm, window), len(lm.blocks)
    with lm.asked():
        asked = question(lm, edit, answer)
        run = Corrupted(lm, asked, noise, draws, seed)
        clean, corrupted = run.clean(), run.corrupted()
        tokens = range(asked.subject[0], asked.prompt)  # no noise reaches what is before the subject

        def score(kind: Kind) -> Tensor:
            wide = 1 if kind == "hidden" else width
            states: list[State] = [(window_at(x, wide, depth), token) for token in tokens for x in range(depth)]
            scores = torch.full((asked.prompt, depth), corrupted)
            scores[tokens.start :] = run.restored(places[kind], states).view(-1, depth)
            return scores

        return Trace(
            edit=edit,
            answer=answer or lm.tokenizer.decode(asked.wanted).strip(),
            tokens=tuple(lm.tokenizer.decode([i]).strip() for i in asked.tokens),
            subject=asked.subject,
            clean=clean,
            corrupted=corrupted,
            scores={kind: score(kind) for kind in places},
            window=width,
            noise=noise,
        )


def average(
    lm: LM,
    edits: Sequence[Edit],
    progress: Callable[[int, int], None] | None = None,
    *,
    kinds: Sequence[Kind] | None = None,
    window: int | None = None,
    noise: float | None = None,
    draws: int = 10,
    seed: int = 0,
) -> Average:
    """Traces of the facts that the model knows, to be averaged.

    Args:
        lm: the model.
        edits: facts. One whose `truth` the model doesn't say is left out, as in the paper.
        progress: told after each fact how many are done, of how many.
        kinds: see `trace`, as for the others.
        window: see there.
        noise: by default measured on all of the subjects.
        draws: see there.
        seed: see there.
    """
    facts = known(lm, edits)
    noise = noise_of(lm, facts) if noise is None else noise
    traces = []
    for edit in facts:
        traces.append(_traced(lm, edit, None, kinds, window, noise, draws, seed))
        if progress:
            progress(len(traces), len(facts))
    found = Average(tuple(traces))
    warn_if_kept(lm, found.clean, found.corrupted, f"{len(facts)} facts, on average")
    return found
