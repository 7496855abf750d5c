"""Answers of several sentences: UnKE (Deng et al. 2024, https://arxiv.org/abs/2405.15349) and AKEW (Wu et al. 2024,
https://arxiv.org/abs/2402.18909).

UnKE names no subject. The whole question stands as one, so that a method that writes at the subject's last token writes
at the end of the question, as UnKE itself does.
"""

from __future__ import annotations

from .case import Case, Probe
from .row import BadRow, Row


def unke(row: Row) -> Case:
    """A question, its long answer, and questions about parts of it."""
    edit = row.made("{}", row.text("question"), row.text("answer"), None, "question")
    probes = []
    if rephrase := row.maybe("para_question"):
        probes.append(Probe("paraphrase", rephrase, edit.target))
    asked, answers = row.texts("sub_question"), row.texts("sub_answer")
    if len(asked) != len(answers):
        raise BadRow(f"field 'sub_answer': expected {len(asked)} answers, found {len(answers)}")
    pairs = zip(asked, answers, strict=True)
    probes += [Probe("portability", q, a.rstrip("."), None, (a,), "sub-question") for q, a in pairs]
    return Case(row.id, edit, tuple(probes))


def akew(row: Row) -> Case:
    """CounterFact with a passage in place of the new object; the facts in the passage are asked as portability."""
    asked = "requested_rewrite"
    prompt = row.maybe(f"{asked}.question") or row.maybe(f"{asked}.prompt_full") or row.text(f"{asked}.prompt")
    subject, passage = row.text(f"{asked}.subject"), row.text(f"{asked}.fact_new_uns")
    edit = row.made(prompt, subject, passage, None, f"{asked}.prompt")
    probes = [Probe("paraphrase", p, edit.target) for p in row.texts("paraphrase_prompts")]
    for part in row.rows(f"{asked}.unsfact_triplets_GPT"):
        question = part.text("prompt").replace("{}", part.text("subject"))
        probes.append(Probe("portability", question, part.text("target"), None, (), "sub-question"))
    return Case(row.id, edit, tuple(probes), row.maybe(f"{asked}.relation_id"))
