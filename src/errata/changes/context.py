"""Text put before a prompt: in-context editing (IKE, ICE) and retrieval."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from ..lm import LM, Reader
from ..tokens import prefix
from ..words import Words
from .change import Change
from .remembered import Remembered

log = logging.getLogger(__name__)

APART = "\n\n"
"""What stands behind every demonstration of a context."""
ROUNDING = 1e-6
"""So much less is as near: a prompt that names every word of a subject names all of it."""


@dataclass(frozen=True, eq=False)
class Context(Remembered, kind="context"):
    """The text of the nearest remembered edit is put before a prompt that is near enough.

    Near is how much of the edit's subject the prompt names: the share of its words, each weighted by how few of the
    remembered subjects have it. Among equals the one whose whole question is most alike (tf-idf cosine) is taken, then
    the later one.

    The texts of an edit are its subject, its question, and what is put before a prompt: demonstrations, each with an
    empty line behind it, and the fact. Where all don't fit the model's context, the first demonstrations are left out.
    """

    form: ClassVar = {**Remembered.form, "scope": "float32 n"}

    scope: Tensor
    """(n,) how near a prompt has to be, from 0 (any prompt) to 1 (it names the whole subject)."""

    each = ("scope",)

    def reader(self, lm: LM) -> Reader:
        return _Before(self, lm)

    @property
    def told(self) -> list[str]:
        near = zip(self.owners.tolist(), self.scope.tolist(), self.texts, strict=True)
        return [f"edit {i}, to a prompt that names {s:.0%} of {t[0]!r}: {t[2]!r}" for i, s, t in near]

    def join(self, later: Change) -> tuple[Change, ...]:
        return (self.and_later(later),) if isinstance(later, Context) else (self, later)

    @cached_property
    def _subjects(self) -> Words:
        return Words([subject for subject, _, _ in self.texts])

    @cached_property
    def _questions(self) -> Words:
        return Words([question for _, question, _ in self.texts])

    def nearest(self, prompt: str) -> tuple[int, float]:
        """Which edit is nearest to a prompt, and how near it is."""
        named, alike = self._subjects.share(prompt), self._questions.cosine(prompt)
        near = max(range(len(self.texts)), key=lambda i: (named.get(i, 0.0), alike.get(i, 0.0), i))
        return near, named.get(near, 0.0)


class _Before:
    """Puts a context before prompts of one model."""

    answerer = None

    def __init__(self, context: Context, lm: LM) -> None:
        self.context, self.lm = context, lm

    def read(self, prompts: Sequence[str], room: int) -> list[tuple[str, str] | None]:
        found = (self._before(prompt, room) for prompt in prompts)
        return [None if before is None else (before, "") for before in found]

    def _before(self, prompt: str, room: int) -> str | None:
        near, score = self.context.nearest(prompt)
        _, question, text = self.context.texts[near]
        inside = score >= float(self.context.scope[near]) - ROUNDING
        log.debug(
            "%r: nearest is edit %d, %r, at %.2f%s",
            *(prompt, int(self.context.owners[near]), question, score, "" if inside else ", out of its scope"),
        )
        return self._fitted(text, prompt, room) if inside else None

    def _fitted(self, text: str, prompt: str, room: int) -> str:
        """The text with as few demonstrations left out, the first ones first, as the model's context asks for."""
        most, whole = self.lm.context, text
        while most is not None and APART in text and self._length(text + prompt) + room > most:
            text = text.partition(APART)[2]
        if text != whole:
            left = whole.count(APART) - text.count(APART)
            log.info(
                "%d of %d demonstrations don't fit the %s tokens of %s and are left out",
                *(left, whole.count(APART), most, self.lm.name),
            )
        return text

    def _length(self, text: str) -> int:
        bare = self.lm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return len(prefix(self.lm.tokenizer)) + len(bare)
