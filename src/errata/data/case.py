"""What judges an edit. A Case is an edit and its probes, and a Probe is a question with its right and wrong answer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

from ..edit import Edit, said
from ..errors import UsageError

Kind = Literal["efficacy", "paraphrase", "neighbourhood", "portability", "opening"]

KINDS: tuple[Kind, ...] = ("efficacy", "paraphrase", "neighbourhood", "portability", "opening")


@dataclass(frozen=True)
class Probe:
    """A question to the model, before and after the edit.

    Raises:
        UsageError: the prompt or the answer is empty, or there is no such kind.
    """

    kind: Kind
    """`efficacy` asks the edit's own prompt, `paraphrase` the same in other words, `neighbourhood` something that the
    edit should leave alone, `portability` what follows from it; from an `opening` the model writes on at length."""
    prompt: str
    answer: str
    """What is right once the edit is made; for a neighbourhood, what was right all along."""
    other: str | None = None
    """What is wrong then: the old answer, or for a neighbourhood the edit's target. `compare` needs it."""
    aliases: tuple[str, ...] = ()
    """Other ways to write the answer; any of them is right where the model answers in its own words."""
    aspect: str = ""
    """The data set's own name for what is asked, within the kind: `Reasoning`, `Subject_Aliasing`."""
    chat: bool = False
    """Whether the prompt is asked as a user's turn, by the tokenizer's chat template."""
    gap: str | None = None
    """What stands between prompt and answer, as in an edit."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"there is no kind of probe {self.kind!r}; known: {', '.join(KINDS)}")
        for part in ("prompt", "answer"):
            object.__setattr__(self, part, said(getattr(self, part), part, f"a probe ({self.kind})").strip(" "))
        if self.other is not None:
            object.__setattr__(self, "other", self.other.strip() or None)
        object.__setattr__(self, "aliases", tuple(a.strip() for a in self.aliases if a.strip()))

    @classmethod
    def of(cls, edit: Edit) -> Self:
        """The question that an edit answers."""
        return cls("efficacy", edit.text, edit.target, edit.truth, chat=edit.chat, gap=edit.gap)


@dataclass(frozen=True)
class Case:
    """An edit and what judges it. The efficacy probe is derived from the edit and comes first (one for each edit).

    Where the edit is made in a chat, all probes are asked in one.
    """

    id: int | str
    """The data set's own number where it has one, otherwise that of the row."""
    edit: Edit
    probes: tuple[Probe, ...] = ()
    relation: str | None = None
    """The kind of fact, as a Wikidata property: `P103`."""
    also: tuple[Edit, ...] = ()
    """Edits that are made with it, because its probes ask what follows from all of them (MQuAKE)."""
    openings: tuple[str, ...] = ()
    """Prompts that the model writes on from, at length: how fluent is it, and does it keep to the new fact?"""
    references: tuple[str, ...] = ()
    """Texts about things of which the new fact is true, to compare what it writes with."""

    def __post_init__(self) -> None:
        chat = self.edit.chat
        asked = tuple(replace(p, chat=p.chat or chat) for p in self.probes if p.kind != "efficacy")
        efficacy = tuple(map(Probe.of, self.edits))
        object.__setattr__(self, "probes", (*efficacy, *asked))

    @property
    def edits(self) -> tuple[Edit, ...]:
        """All that is edited for this case."""
        return (self.edit, *self.also)
