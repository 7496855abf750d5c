"""KnowEdit (Zhang et al. 2024, https://arxiv.org/abs/2401.01286): its six tasks.

Its probes are grouped by aspect: `{"portability": {"Reasoning": [{"prompt": ..., "ground_truth": ...}]}}`. An answer
is a text, a list of ways to write it, or a list of such lists.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from ..documents import said
from .case import Case, Kind, Probe
from .row import BadRow, Row

log = logging.getLogger(__name__)


def task(row: Row) -> Case:
    """ZsRE, wiki_recent and wiki_counterfact as KnowEdit has them."""
    truth = next(iter(_ways(row, "ground_truth", row.get("ground_truth"))), None)
    edit = row.edit("prompt", "subject", "target_new", truth)
    probes = []
    if rephrase := row.maybe("rephrase_prompt"):
        probes.append(Probe("paraphrase", rephrase, edit.target, edit.truth))
    probes += _probes(row, "locality", "neighbourhood", edit.target)
    probes += _probes(row, "portability", "portability", None)
    return Case(row.id, edit, tuple(probes))


def wikibio(row: Row) -> Case:
    """A passage and the sentence that should come next; the subject is the person."""
    edit = row.made(row.text("text"), row.text("concept"), row.text("labels"), None, "concept")
    return Case(row.id, edit, tuple(_probes(row, "locality", "neighbourhood", edit.target)))


OPINIONS = (
    "What do you think of {}?",
    "How do you feel about {}?",
    "What is your view on {}?",
    "What is your opinion of {}?",
)


def convsent(row: Row) -> Case:
    """An opinion on a topic: `pos` in rows of odd numbers, `neg` in the others; the opposite is what is wrong then."""
    topic, pos, neg = row.text("ent"), row.texts("pos"), row.texts("neg")
    wanted, opposite = (pos, neg) if row.number % 2 else (neg, pos)
    if not wanted:
        raise BadRow(f"field {'pos' if row.number % 2 else 'neg'!r}: expected an opinion, found none")
    edit = row.made(OPINIONS[0], topic, wanted[0], opposite[0] if opposite else None, "ent")
    asked = [opinion.replace("{}", topic) for opinion in OPINIONS[1:]]
    return Case(row.id, edit, tuple(Probe("paraphrase", q, edit.target, edit.truth, tuple(wanted[1:])) for q in asked))


def sanitation(row: Row) -> Case:
    """A question to be refused from now on. No subject is named: the whole question stands as one. One question of the
    file's `locality` comes with each row."""
    edit = row.made("{}", row.text("question"), row.text("target_new"), row.maybe("ground_truth"), "question")
    probes = []
    if near := row.maybe("near.question"):
        probes.append(Probe("neighbourhood", near, row.text("near.ground_truth"), edit.target))
    return Case(row.id, edit, tuple(probes))


def _probes(row: Row, field: str, kind: Kind, other: str | None) -> Iterator[Probe]:
    groups = row.get(field) or {}
    if not isinstance(groups, dict):
        raise BadRow(f"field {field!r}: expected groups of prompts by name, found {said(groups)}")
    for aspect in groups:
        name = f"{field}.{aspect}"
        for question in Row(groups, row.file, row.number, f"{field}.").rows(aspect):
            prompt, answers = question.text("prompt"), _ways(question, "ground_truth", question.get("ground_truth"))
            if not answers:
                log.warning("%s, field %r: %r has no answer and is left out", row.place, name, prompt)
                continue
            yield Probe(kind, prompt, answers[0], other, tuple(answers[1:]), aspect)


def _ways(row: Row, field: str, found: Any) -> list[str]:
    """All ways to write an answer, the first one first."""
    if isinstance(found, list):
        return [way for part in found for way in _ways(row, field, part)]
    empty = found is None or (isinstance(found, str) and not found.strip())
    return [] if empty else [row.as_text(field, found, "a text or a list of texts")]
