"""The outer loop of learned editors: what an update does to the questions about its edit, with gradients.

Every edit of a batch has a model of its own: its update stands beside the weights on its own rows, so that a batch of
single edits costs what as many questions cost. Or all edits share one update (`weights`), as MALMEN's do.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import kl_div, linear, log_softmax
from torch.nn.utils.rnn import pad_sequence

from ..data import Case, Probe
from ..effects import hooked
from ..lm import LM, Site
from ..tokens import Tokens, follow
from ..trace import adding
from .taps import nll

ROWS = 2
"""Questions on an edit: one that it should answer (its own prompt or a paraphrase), one that it should leave alone."""
FAR = 0.2
"""How often that is something unrelated and no neighbour."""


@dataclass(frozen=True, eq=False)
class Questions:
    """Those on a batch of edits, `ROWS` on each, and what the unedited model answers where nothing shall change."""

    tokens: Tokens
    keep: Tensor
    """(m,) bool, at the reads: whether nothing shall change there."""
    before: Tensor
    """Log-probabilities there, (kept reads, vocabulary)."""


def questions(lm: LM, cases: Sequence[Case], draw: random.Random, shared: bool = False) -> Questions:
    """Draw the questions of a batch.

    Args:
        lm: the unedited model.
        cases: one of each edit.
        draw: what is drawn by.
        shared: whether one update makes all the edits. What it shall leave alone then is no question on another of
            them, which it changes as it should, but on that one's neighbours.
    """
    found = []
    for number, case in enumerate(cases):
        other = cases[(number + 1) % len(cases)]
        same, near = _of("paraphrase", case), _of("neighbourhood", case)
        asked = draw.choice(same) if same and draw.random() < 0.5 else case.probes[0]
        far = (_of("neighbourhood", other) or near) if shared else []
        stays = draw.choice(near) if near and draw.random() > FAR else _unrelated(other, far or other.probes, draw)
        found += [follow(p.prompt, p.answer) for p in (asked, stays)]
    tokens = lm.encode(found)
    keep = tokens.reads[0] % ROWS == 1
    alone = tokens[1::ROWS]
    with torch.no_grad():
        before = log_softmax(lm.logits(*alone.reads, **alone.inputs), -1)
    return Questions(tokens, keep, before)


def _of(kind: str, case: Case) -> list[Probe]:
    return [p for p in case.probes if p.kind == kind]


def _unrelated(other: Case, probes: Sequence[Probe], draw: random.Random) -> Probe:
    """A question on another case; one that its edit would change, with the answer that it has now where it is known."""
    asked = draw.choice(probes)
    return replace(asked, answer=other.edit.truth or asked.answer) if asked.kind != "neighbourhood" else asked


def apart(cases: Sequence[Case]) -> list[Case]:
    """Cases that one update can satisfy: one of each subject, and no neighbour that asks about another's subject."""
    found = {c.edit.subject: c for c in cases}
    return [
        replace(
            c, probes=tuple(p for p in c.probes if p.kind != "neighbourhood" or not any(s in p.prompt for s in found))
        )
        for c in found.values()
    ]


def losses(lm: LM, asked: Questions) -> tuple[Tensor, Tensor]:
    """Of the model as it is now: mean NLL of what shall be said, and mean KL where nothing shall change."""
    logits = lm.logits(*asked.tokens.reads, **asked.tokens.inputs)
    said = nll(logits, asked.tokens)[::ROWS].mean()
    now = log_softmax(logits[asked.keep], -1)
    return said, kl_div(now, asked.before, log_target=True, reduction="batchmean")


def own(sites: Sequence[Site], factors: Mapping[str, tuple[Tensor, Tensor, Tensor]]) -> AbstractContextManager[None]:
    """While inside, every edit's rows see its own update, left^T right.

    Args:
        sites: the matrices.
        factors: by matrix: the edit each row belongs to, (m,); left (m, d_out); right (m, d_in).
    """
    hooks = []
    for site in sites:
        owner, left, right = factors[site.name]
        order, sizes = owner.argsort(stable=True), owner.bincount().tolist()
        L, R = (pad_sequence(list(t[order].split(sizes)), batch_first=True) for t in (left, right))

        def added(x: Tensor, L: Tensor = L, R: Tensor = R) -> Tensor:
            return x.reshape(len(R), -1, x.shape[-1]) @ R.mT @ L

        hooks.append(adding(site.module, added))
    return hooked(*hooks)


def weights(sites: Sequence[Site], deltas: Mapping[str, Tensor]) -> AbstractContextManager[None]:
    """While inside, every row sees the same updates (d_out, d_in), where there are some."""
    some = [(site, deltas[site.name]) for site in sites if site.name in deltas]
    return hooked(*(adding(site.module, lambda x, delta=delta: linear(x, delta)) for site, delta in some))
