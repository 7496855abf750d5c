"""KnowEdit (Zhang et al. 2024, https://arxiv.org/abs/2401.01286): the tasks that edit one fact and probe around it.

Its probes are grouped by aspect: `{"portability": {"Reasoning": [{"prompt": ..., "ground_truth": ...}]}}`. An answer
is a text, a list of ways to write it, or a list of such lists.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

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


def _probes(row: Row, field: str, kind: Kind, other: str | None) -> Iterator[Probe]:
    groups = row.get(field) or {}
    if not isinstance(groups, dict):
        raise BadRow(f"field {field!r}: expected groups of prompts by name, found {type(groups).__name__}")
    for aspect, asked in groups.items():
        for question in asked or ():
            name = f"{field}.{aspect}"
            if not isinstance(question, dict) or not isinstance(question.get("prompt"), str):
                raise BadRow(f"field {name!r}: expected a prompt and its ground_truth, found {question!r}")
            answers = _ways(row, name, question.get("ground_truth"))
            if not answers:
                log.warning("%s, field %r: %r has no answer and is left out", row.place, name, question["prompt"])
                continue
            yield Probe(kind, question["prompt"], answers[0], other, tuple(answers[1:]), aspect)


def _ways(row: Row, field: str, found: Any) -> list[str]:
    """All ways to write an answer, the first one first."""
    if isinstance(found, list):
        return [way for part in found for way in _ways(row, field, part)]
    if found is None or isinstance(found, str):
        return [found] if found and found.strip() else []
    raise BadRow(f"field {field!r}: expected a text or a list of texts, found {found!r}")
