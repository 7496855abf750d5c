"""What errata raises when it can't do what was asked: one sentence on what was found, wanted, and to be done."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from .escape import visible

_LONG = re.compile(r"(\S{299})\S+")
"""A word of 300 characters and more, which nobody reads."""


class ErrataError(Exception):
    """Something could not be done (the shell exits with 1).

    In the sentence, which may quote anything, control characters are written out and very long words are cut.
    """

    def __init__(self, sentence: str = "") -> None:
        super().__init__(_LONG.sub(r"\1…", visible(str(sentence), keep="\n")))


class UsageError(ErrataError, ValueError):
    """What was asked for is wrong and can be asked differently (the shell exits with 2)."""


def over(least: float, **settings: float) -> None:
    """Refuse the first setting that is not greater than `least`.

    Raises:
        UsageError: there is one.
    """
    for name, value in settings.items():
        if not value > least:
            raise UsageError(f"{name}={value:g} can't be used; give more than {least:g}")


def unknown(what: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name that is not among the known ones, with the nearest of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}"
    return UsageError(f"there is no {what} {short(name)!r}; {hint}")


def short(text: str, most: int = 200) -> str:
    """A text for a sentence, in at most so many characters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"
