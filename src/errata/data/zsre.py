"""ZsRE in the form of MEND (Mitchell et al. 2022, https://arxiv.org/abs/2110.11309), with EasyEdit's portability."""

from __future__ import annotations

from .case import Case, Probe
from .row import Row


def mend(row: Row) -> Case:
    """`alt` is the new answer to the question `src`. The neighbour is a question of Natural Questions, as it stands."""
    answers = row.texts("answers")
    edit = row.edit("src", "subject", "alt", answers[0] if answers else None)
    probes = []
    if rephrase := row.maybe("rephrase"):
        probes.append(Probe("paraphrase", rephrase, edit.target, edit.truth))
    if near := row.maybe("loc"):
        probes.append(Probe("neighbourhood", near, row.text("loc_ans"), edit.target))
    if onward := row.maybe("portability.New Question"):
        probes.append(Probe("portability", onward, row.text("portability.New Answer")))
    return Case(row.id, edit, tuple(probes))
