"""MQuAKE (Zhong et al. 2023, https://arxiv.org/abs/2305.14795): questions of several hops, after one or more edits."""

from __future__ import annotations

from .case import Case, Probe
from .row import BadRow, Row


def mquake(row: Row) -> Case:
    """All edits of a case are made together. The questions of several hops and the single hops they are made of are
    asked as portability, each an aspect of its own."""
    wanted = row.rows("requested_rewrite")
    if not wanted:
        raise BadRow("field 'requested_rewrite': expected a list of edits, found none")
    edits = [part.edit("prompt", "subject", "target_new.str", part.maybe("target_true.str")) for part in wanted]
    aliases = tuple(row.texts("new_answer_alias"))
    new, old = row.text("new_answer"), row.maybe("answer")
    probes = [Probe("portability", q, new, old, aliases, "multi-hop") for q in row.texts("questions")]
    for part in row.rows("new_single_hops"):
        ways = tuple(part.texts("answer_alias"))
        probes.append(Probe("portability", part.text("question"), part.text("answer"), None, ways, "single-hop"))
    return Case(row.id, edits[0], tuple(probes), also=tuple(edits[1:]))
