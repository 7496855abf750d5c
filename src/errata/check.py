"""A look at an edit right after it was made: did it take, does it hold in other words, and what else moved?

    check = errata.check.selfcheck(lm, patch)
    print(check)        # took / in chat / 2 of 2 reworded / 5 of 5 others kept / weight moved 2.1%

It takes no data: rewordings are made by machine, and the other subjects are well-known names, of which those are asked
that the model has the clearest answers for. It is a smoke test, not a measurement; that is `errata.bench`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch

from .ask import Asking, Reply, ask, reply, says, took
from .bench.metrics import kept_answer
from .changes import share, total
from .data import Probe
from .edit import Edit
from .lm import LM
from .patch import Patch
from .text import plain
from .tokens import follow

CLOSELY = 4
"""Edits that are looked at closely; of more, as many at even distances. Whether they took is asked of all."""
OTHERS = 5
"""Questions about other subjects for an edit."""
TOKENS, CHAT_TOKENS = 12, 32
"""At most so many tokens of an answer are looked at."""
FAR = 0.1
"""A weight that moves by this share of its norm or more has moved far."""

REWORDINGS = ("It is often asked, and easy to say: {}", "Tell me about {subject}. {}")
"""Other ways to put a prompt, `{}`."""

SUBJECTS = {
    "countries": ("France", "Japan", "Brazil", "Egypt", "Canada", "Poland", "India"),
    "cities": ("London", "Tokyo", "Berlin", "Chicago", "Madrid", "Cairo", "Sydney"),
    "people": (
        *("Albert Einstein", "William Shakespeare", "Napoleon Bonaparte", "Marie Curie"),
        *("Wolfgang Amadeus Mozart", "Barack Obama", "Charles Darwin"),
    ),
    "companies": ("Microsoft", "Toyota", "Google", "Volkswagen", "Samsung", "Boeing", "Nokia"),
    "works": ("Hamlet", "Star Wars", "Titanic", "Don Quixote", "Romeo and Juliet", "The Odyssey", "Doctor Who"),
    "things": ("the iPhone", "gold", "the piano", "football", "Windows", "the telephone", "wine"),
}
"""Well-known names by kind. A template is asked about those of the kind that it suits best."""


@dataclass(frozen=True)
class Check:
    """What was found. Pairs are (so many, of so many)."""

    took: tuple[int, int]
    """Edits whose prompt the model answers with the target."""
    rewordings: tuple[int, int]
    """Rewordings that get the target."""
    chat: tuple[int, int] | None
    """Edits that get the target as a user's turn; None where there is no chat template, or they were made in a chat."""
    others: tuple[int, int]
    """Questions of the same template about other subjects that keep their answer."""
    moved: float | None
    """The largest share of its norm that a weight moved by; None where no weight is changed."""
    stutters: int = 0
    """Edits to which the model says the same again and again."""
    closely: int = 0
    """Edits that were looked at closely: in rewordings, in chat, and for others."""
    asked: tuple[dict[str, Any], ...] = field(default=(), repr=False)
    """Every question that was asked closely: `kind`, `prompt`, `before`, `after`, `good`."""

    def __str__(self) -> str:
        return " / ".join(self.parts())

    def parts(self) -> list[str]:
        """What there is to say, part by part."""
        return list(self._parts())

    def _parts(self) -> Iterator[str]:
        good, n = self.took
        yield ("took" if good else "did not take") if n == 1 else f"{good} of {n} took"
        if self.stutters:
            yield "the answer stutters" if n == 1 else f"{self.stutters} stutter"
        if self.chat is not None:
            good, asked = self.chat
            yield ("in chat" if good else "not in chat") if asked == 1 else f"{good} of {asked} in chat"
        if self.rewordings[1]:
            yield "{} of {} reworded".format(*self.rewordings)
        if self.others[1]:
            yield "{} of {} others kept".format(*self.others)
        if self.moved is not None:
            yield f"weight moved {self.moved:.1%}{' (far)' * (self.moved >= FAR)}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and `Patch.about`; the questions are left out."""
        values = {name: value for name, value in asdict(self).items() if name != "asked"}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Check:
        """The check that `to_dict` gave."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
        return cls(**values)


def selfcheck(
    lm: LM, patch: Patch, prior: Patch | None = None, replies: Sequence[tuple[Reply, Reply]] | None = None
) -> Check:
    """Look at the edits of a patch that are not in `prior`.

    Args:
        lm: the unedited model.
        patch: with its edits.
        prior: what they were made on top of.
        replies: what the model says to each of them before and after, where that is known.
    """
    prior = prior or Patch()
    edits = patch.edits[len(prior.edits) :] if patch.edits[: len(prior.edits)] == prior.edits else patch.edits
    replies = replies or list(zip(reply(lm, edits, prior), reply(lm, edits, patch), strict=True))
    some = _spread(edits, CLOSELY)
    questions = [*_rewordings(some), *_chats(lm, some), *_others(lm, prior, some)]
    return Check(
        took=(sum(took(*pair) for pair in replies), len(edits)),
        stutters=sum(after.stutters and not before.stutters for before, after in replies),
        moved=moved(lm, patch),
        closely=len(some),
        **_asked(lm, prior, patch, questions),
    )


def checked(patch: Patch, check: Check) -> Patch:
    """The patch with what was found in its `about`."""
    return replace(patch, about={**patch.about, "check": check.to_dict()})


def moved(lm: LM, patch: Patch) -> float | None:
    """The largest share of its norm by which a patch moves a weight; None where it moves none."""
    deltas = {name: total(changes) for name, changes in patch.changes.items()}
    shares = [share(delta, lm.site(name)) for name, delta in deltas.items() if delta is not None]
    return max((one for one in shares if one is not None), default=None)


# What is asked


def _rewordings(edits: Sequence[Edit]) -> list[tuple[str, Probe]]:
    return [("rewording", replace(Probe.of(e), prompt=_reworded(e, form))) for e in edits for form in REWORDINGS]


def _reworded(edit: Edit, form: str) -> str:
    return form.replace("{subject}", edit.subject).replace("{}", edit.text)


def _chats(lm: LM, edits: Sequence[Edit]) -> list[tuple[str, Probe]]:
    if not getattr(lm.tokenizer, "chat_template", None):
        return []
    return [("chat", replace(Probe.of(e), chat=True)) for e in edits if not e.chat]


def _others(lm: LM, prior: Patch, edits: Sequence[Edit]) -> list[tuple[str, Probe]]:
    """For every edit, questions of its template about other subjects, which the model answers most clearly."""
    found: list[tuple[str, Probe]] = []
    with prior.applied(lm) if prior else nullcontext():
        for edit in edits:
            if not any(c.isalpha() for c in "".join(edit.around)):
                continue  # the template says nothing
            found += [("other", p) for p in _clearest(lm, edit, {plain(e.subject) for e in edits})]
    return found


def _clearest(lm: LM, edit: Edit, taken: set[str]) -> list[Probe]:
    """Questions about the kind of subjects that the template suits best."""
    kinds = [[name for name in names if plain(name) not in taken] for names in SUBJECTS.values()]
    texts = [name.join(edit.around) for names in kinds for name in names]
    with lm.asked():
        batch = lm.encode([follow(text, None, chat=edit.chat) for text in texts])
        said = lm.logits(torch.arange(len(batch), device=lm.device), batch.last, **batch.inputs)
    sure = said.softmax(-1).max(-1).values.split([len(names) for names in kinds])
    starts = [0, *accumulate(len(names) for names in kinds)]
    best = max(range(len(kinds)), key=lambda k: float(sure[k].mean()))
    order = sure[best].argsort(descending=True)[:OTHERS].tolist()
    # The answer is none that is scored: whether it stays what it was is.
    return [Probe("neighbourhood", texts[starts[best] + i], edit.target, edit.target, chat=edit.chat) for i in order]


def _asked(lm: LM, prior: Patch, patch: Patch, questions: Sequence[tuple[str, Probe]]) -> dict[str, Any]:
    """The fields of a check that questions answer."""
    texts = []
    for applied in (prior, patch):
        with applied.applied(lm) if applied else nullcontext():
            texts.append(_texts(lm, questions))
    rows: list[dict[str, Any]] = []
    for (kind, probe), before, after in zip(questions, *texts, strict=True):
        good = kept_answer(probe, before, after) if kind == "other" else says(after, [probe.answer], before)
        rows.append({"kind": kind, "prompt": probe.prompt, "before": before, "after": after, "good": bool(good)})
    counts = {k: [row["good"] for row in rows if row["kind"] == k] for k in ("rewording", "chat", "other")}
    pairs = {k: (sum(goods), len(goods)) for k, goods in counts.items()}
    return {
        "rewordings": pairs["rewording"],
        "chat": pairs["chat"] if counts["chat"] else None,
        "others": pairs["other"],
        "asked": tuple(rows),
    }


def _texts(lm: LM, questions: Sequence[tuple[str, Probe]]) -> list[str]:
    """What the model says, in a chat at more length: there it answers in sentences."""
    out = [""] * len(questions)
    for chat, tokens in ((True, CHAT_TOKENS), (False, TOKENS)):
        rows = [i for i, (_, p) in enumerate(questions) if p.chat == chat]
        answers = ask(lm, [questions[i][1] for i in rows], asking=Asking(new_tokens=tokens))
        for i, answer in zip(rows, answers, strict=True):
            out[i] = answer.text or ""
    return out


def _spread(edits: Sequence[Edit], most: int) -> list[Edit]:
    """At most so many of the edits, at even distances."""
    if len(edits) <= most:
        return list(edits)
    return [edits[round(i * (len(edits) - 1) / (most - 1))] for i in range(most)]
