"""What an edit is: a prompt about a subject, and what should follow it. Nothing here knows a model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from . import text as texts
from .errors import UsageError, short

PLACE = re.compile(r"\{\{\}\}|\{\}")
"""The place of the subject in a prompt, `{}`, or braces that are text, `{{}}`."""


@dataclass(frozen=True)
class Edit:
    """Make `prompt`, whose `{}` stands for `subject`, continue with `target`.

    A prompt that contains the subject itself, as a word, is turned into a template at the subject's last occurrence, so
    both ways of writing the same edit are equal. Spaces around the parts carry no meaning and are dropped. Where a
    prompt has braces that are text, write `{{}}`.

    Raises:
        UsageError: a part is empty or no text, the subject is not in the prompt, or the prompt has several places.
    """

    prompt: str
    subject: str
    target: str
    truth: str | None = None
    """What the model said before, where it is known; only scored against, never trained on."""
    chat: bool = False
    """Whether the prompt is asked as a user's turn, by the tokenizer's chat template, and the target is the reply."""
    gap: str | None = None
    """What stands between prompt and target: a space, a line break or "" (nothing); None: what the text asks for."""

    def __post_init__(self) -> None:
        for part in ("prompt", "subject", "target"):
            object.__setattr__(self, part, said(getattr(self, part), part, "an edit"))
        for part in ("subject", "target"):
            object.__setattr__(self, part, getattr(self, part).strip())
        if self.truth is not None:
            object.__setattr__(self, "truth", said(self.truth, "truth", "an edit", empty=True).strip() or None)
        if not isinstance(self.chat, bool):
            raise UsageError(f"the chat of an edit is {self.chat!r}; give true or false")
        if self.gap is not None and (not isinstance(self.gap, str) or self.gap.strip()):
            raise UsageError(f"the gap of an edit is {self.gap!r}; give spaces, a line break, or nothing at all")
        object.__setattr__(self, "prompt", self._template())

    def _template(self) -> Template:
        """The prompt with one place for the subject."""
        if isinstance(self.prompt, Template):
            return Template(self.prompt.strip(" "))
        places = _places(self.prompt)
        if len(places) == 1:
            if self._named_beside(*places[0].span()):
                prompt, subject = short(self.prompt), short(self.subject)
                raise UsageError(
                    f"the prompt {prompt!r} has a place {{}} and names the subject {subject!r} as well; "
                    "write {{}} for braces that are text, or the subject's name in place of {}"
                )
            return Template(self.prompt.strip(" "))
        named = texts.find(self.prompt, self.subject)
        if named is None:
            raise UsageError(self._without_place(len(places)))
        # The subject is named, so all braces are text; from here on it is written as in the prompt (NFC, NFD).
        start, end = named
        object.__setattr__(self, "subject", self.prompt[start:end])
        return Template(f"{_escaped(self.prompt[:start])}{{}}{_escaped(self.prompt[end:])}".strip(" "))

    def _named_beside(self, start: int, end: int) -> bool:
        """Whether the prompt names the subject beside this place of it, which then may be braces that are text."""
        if not any(c.isupper() or texts.UNSPACED.match(c) for c in self.subject):
            return False  # a common word may stand anywhere
        before, after = texts.find(self.prompt[:start], self.subject), texts.find(self.prompt[end:], self.subject)
        return bool((before and before[1] < start) or (after and after[0] > 0))

    def _without_place(self, places: int) -> str:
        """Why the prompt has no place for the subject, or too many."""
        prompt, subject = short(self.prompt), short(self.subject)
        if places > 1:
            return f"the prompt {prompt!r} has {places} places {{}}; it takes one (write {{{{}}}} for braces)"
        part = "only as a part of a word" if self.subject in self.prompt else "not"
        return f"the subject {subject!r} is {part} in the prompt {prompt!r}; write {{}} where it stands"

    @property
    def around(self) -> tuple[str, str]:
        """The text of the prompt before the subject, and behind it."""
        start, end = _places(self.prompt)[0].span()
        return self.prompt[:start].replace("{{}}", "{}"), self.prompt[end:].replace("{{}}", "{}")

    @property
    def text(self) -> str:
        """The prompt with the subject in its place."""
        before, after = self.around
        return f"{before}{self.subject}{after}"

    def to_dict(self) -> dict[str, Any]:
        """The edit as plain values, for JSON; `Edit(**values)` reads it back. `chat`, `gap` only where they are set."""
        values = {name: value for name, value in asdict(self).items() if value != UNSET.get(name, ...)}
        start, end = _places(self.prompt)[0].span()
        twice = self._named_beside(start, end)  # then it is the last one that the edit is about
        return {**values, "prompt": self.prompt[:start] + (self.subject if twice else "{}") + self.prompt[end:]}

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """The edit that `to_dict` of this or an earlier version gave."""
        prompt = values["prompt"]
        given = isinstance(prompt, str) and len(_places(prompt)) == 1
        return cls(**{**values, "prompt": Template(prompt)} if given else values)


class Template(str):
    """A prompt in which the place of the subject is known."""

    __slots__ = ()


UNSET: dict[str, Any] = {"chat": False, "gap": None}
"""What of an edit goes without saying."""


def said(value: Any, part: str, whose: str, empty: bool = False) -> str:
    """A value that has to be a text.

    Raises:
        UsageError: it is no text, an empty one, or holds half a character.
    """
    if not isinstance(value, str):
        raise UsageError(f"the {part} of {whose} is {_kind(value)}")
    if not value.strip() and not empty:
        raise UsageError(f"the {part} of {whose} is empty; give the words it stands for")
    if texts.HALF.search(value):
        raise UsageError(f"the {part} of {whose}, {value!a}, holds half a character (a lone surrogate); mend it")
    return value


def question(values: Mapping[str, Any]) -> str:
    """The text that the prompt of an edit asks, from its plain values (there may be more than those)."""
    return Edit.read({name: values[name] for name in ("prompt", "subject", "target")}).text


def asks(edit: Edit) -> str:
    """What an edit answers, the same for all ways of writing it."""
    return texts.words(edit.text)


def agree(edits: Sequence[Edit], numbers: Sequence[int] | None = None) -> None:
    """Refuse edits that answer one question in two ways; case and spacing make no other question.

    Args:
        edits: those of one call.
        numbers: what to call them, by default from 1 on.

    Raises:
        UsageError: two of them contradict each other.
    """
    numbers = numbers or range(1, len(edits) + 1)
    first: dict[str, tuple[int, Edit]] = {}
    found: list[str] = []
    for number, edit in zip(numbers, edits, strict=True):
        before, other = first.setdefault(asks(edit), (number, edit))
        if texts.plain(other.target) != texts.plain(edit.target):
            found.append(f"{before} and {number} ({edit.text!r} is to be {other.target!r} and {edit.target!r})")
    if found:
        more = f", and {len(found) - 3} more" if len(found) > 3 else ""
        raise UsageError(
            f"edits contradict each other: {'; '.join(found[:3])}{more}; leave one of each out, "
            "or take them all with --anyway (anyway=True)"
        )


def _places(prompt: str) -> list[re.Match[str]]:
    """Where a prompt has `{}`."""
    return [found for found in PLACE.finditer(prompt) if found[0] == "{}"]


def _escaped(text: str) -> str:
    return PLACE.sub("{{}}", text)


def _kind(value: Any) -> str:
    """What a value is that is no text, and what to do about it."""
    shown = ascii(value) if len(ascii(value)) <= 60 else f"{ascii(value)[:60]}…"
    if value is None:
        return "missing (null); give the words it stands for"
    if isinstance(value, bool):
        return f"{shown}, no text; give words"
    if isinstance(value, int | float):
        return f"the number {shown}; write it as a text: {str(value)!r}"
    if isinstance(value, list | tuple | set):
        return f"a list, {shown}; give one text (other ways to write it are aliases of a probe)"
    return f"a {type(value).__name__}, {shown}; give a text"
