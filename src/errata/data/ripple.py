"""RippleEdits (Cohen et al. 2024, https://arxiv.org/abs/2307.12976): what should and should not follow from an edit.

An edit is one sentence with the new answer at its end (`The mother tongue of X is French.`); subject and target are
found by the shape of the sentences, which come from some fifty templates.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..documents import said
from .case import Case, Kind, Probe
from .row import BadRow, Row

ASPECTS: dict[str, Kind] = {
    "Logical_Generalization": "portability",
    "Compositionality_I": "portability",
    "Compositionality_II": "portability",
    "Subject_Aliasing": "portability",
    "Relation_Specificity": "neighbourhood",
    "Forgetfulness": "neighbourhood",
}
SENTENCES = [
    re.compile(pattern)
    for pattern in (
        r"(?P<s>.+) (?:is followed by|follows) (?P<t>.+)",
        r"The number of children (?P<s>.+) has is (?P<t>.+)",
        r"The name of the award (?P<s>.+) won is (?P<t>.+)",
        r"The name of the [a-z ]+ which (?P<s>.+) (?:is associated with|is part of|plays in|is a member of"
        r"|is the capital of) is (?P<t>.+)",
        r"The name of the currency in (?P<s>.+?) is (?P<t>.+)",
        r"The [a-z ]+ (?:of|held by) (?P<s>.+?) (?:is|are) (?P<t>.+)",
    )
]


def ripple(row: Row) -> Case:
    """One edit and its tests, grouped by the paper's six criteria. The truth is the original fact's answer."""
    prompt, subject, target = _parts(row.text("edit.prompt"))
    known = row.maybe("edit.original_fact.prompt")
    edit = row.made(prompt, subject, target, _parts(known)[2] if known else None, "edit.prompt")
    probes = [p for aspect, kind in ASPECTS.items() for p in _probes(row, aspect, kind, edit.target)]
    return Case(row.id, edit, tuple(probes), row.maybe("edit.relation"))


def _parts(sentence: str) -> tuple[str, str, str]:
    """Prompt with its subject, subject and answer of a sentence."""
    sentence = sentence.strip().removesuffix(".")
    for shape in SENTENCES:
        if found := shape.fullmatch(sentence):
            return sentence[: found.start("t")].strip(), found["s"], found["t"]
    raise BadRow(f"field 'edit.prompt': {sentence!r} has none of the shapes that RippleEdits' sentences have")


def _probes(row: Row, aspect: str, kind: Kind, target: str) -> Iterator[Probe]:
    for test in row.rows(aspect):
        for query in test.rows("test_queries"):
            answers = [way for answer in query.rows("answers") for way in _ways(answer)]
            if answers and query.get("prompt"):
                other = target if kind == "neighbourhood" else None
                yield Probe(kind, query.text("prompt"), answers[0], other, tuple(answers[1:]), aspect)


def _ways(answer: Row) -> list[str]:
    """All ways to write an answer."""
    aliases = answer.get("aliases") or []
    if not isinstance(aliases, list):
        raise BadRow(f"field {answer.within + 'aliases'!r}: expected a list of texts, found {said(aliases)}")
    named = [("value", answer.get("value")), *(("aliases", alias) for alias in aliases)]
    return [answer.as_text(name, way) for name, way in named if way is not None and way != ""]
