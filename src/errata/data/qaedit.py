"""QAEdit (Yang et al. 2025, The Mirage of Model Editing, https://arxiv.org/abs/2502.11177): questions people do ask."""

from __future__ import annotations

from .. import text as texts
from .case import Case, Probe
from .row import Row


def qaedit(row: Row) -> Case:
    """A question, its answer, another wording, and unrelated questions that should keep their answers."""
    prompt, subject = row.text("prompt"), row.text("subject")
    if " " in subject and prompt.count(subject) == 1 and texts.find(prompt, subject) is None:
        prompt = prompt.replace(subject, "{}")  # a question that lacks a space: "Which Thomas Hardynovel ..."
    edit = row.made(prompt, subject, row.text("target"), None, "prompt")
    probes = []
    if rephrase := row.maybe("rephrase"):
        probes.append(Probe("paraphrase", rephrase, edit.target))
    for part in row.rows("locality"):
        probes.append(Probe("neighbourhood", part.text("loc"), part.text("loc_ans"), edit.target))
    return Case(row.id, edit, tuple(probes))
