"""CounterFact (Meng et al. 2022, https://arxiv.org/abs/2202.05262) in the two forms that are about."""

from __future__ import annotations

from .case import Case, Probe
from .row import Row


def rome(row: Row) -> Case:
    """The authors' own form: a `requested_rewrite`, paraphrases and neighbours.

    `generation_prompts` are what the model writes on from; `attribute_prompts` are not used.
    """
    asked = "requested_rewrite"
    truth = row.text(f"{asked}.target_true.str")
    edit = row.edit(f"{asked}.prompt", f"{asked}.subject", f"{asked}.target_new.str", truth)
    same = [Probe("paraphrase", p, edit.target, truth) for p in row.texts("paraphrase_prompts")]
    near = [Probe("neighbourhood", p, truth, edit.target) for p in row.texts("neighborhood_prompts")]
    openings, references = tuple(row.texts("generation_prompts")), tuple(row.texts("references"))
    relation = row.maybe(f"{asked}.relation_id")
    return Case(row.id, edit, (*same, *near), relation, openings=openings, references=references)


def flat(row: Row) -> Case:
    """EasyEdit's form: one paraphrase and one neighbour in fields of their own; any of them may be missing."""
    edit = row.edit("prompt", "subject", "target_new", row.maybe("ground_truth"))
    probes = []
    if rephrase := row.maybe("rephrase_prompt"):
        probes.append(Probe("paraphrase", rephrase, edit.target, edit.truth))
    if near := row.maybe("locality_prompt"):
        probes.append(Probe("neighbourhood", near, row.text("locality_ground_truth"), edit.target))
    return Case(row.id, edit, tuple(probes))
