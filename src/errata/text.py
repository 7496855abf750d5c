"""Text as people write it: words in scripts with and without spaces, Unicode forms, and where a space belongs.

A word boundary lies between a letter and what is no letter; in scripts that put no space between words (Chinese,
Japanese, Thai ...) it may lie between any two characters. Words are found in any Unicode form (`é` as one character
or as two).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\ua980-\ua9df"  # Thai to Javanese
    "\u2e80-\u312f\u31a0-\u9fff\ua000-\ua4cf\uf900-\ufaff\ufe30-\ufe4f\uff00-\uff9f"  # Chinese, Japanese, Yi
    "\U00020000-\U0003ffff]"
)
"""A character of a script that puts no space between words. (Korean puts one.)"""

HALF = re.compile("[\ud800-\udfff]")
"""Half a character: a surrogate without the other one, which no file in UTF-8 can hold."""

MARKER = re.compile(r"<[^<>\s]{1,60}>$")
"""A tag at the end of a text, as chat templates write them: `<|assistant|>`."""

QUOTES = "\"'`“”„‟‘’‚‛«»‹›"
JOINED = "-‐‑–—/=&+"
"""Signs that are joined to what follows where they are joined to what stands before (`3-`, `https://`, `x=`)."""

TIMES = 3
"""So often a text says the same in a row before it counts as a stutter."""
REPEAT = re.compile(rf"(.{{2,}}?)\1{{{TIMES - 1},}}", re.DOTALL)


def plain(text: str) -> str:
    """The text without what carries no meaning: case, spacing, Unicode form."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


BETWEEN = {"Zs", "Zl", "Zp", "Cc", "Pc", "Pd", "Ps", "Pe", "Pi", "Pf"}
"""Categories of what stands between words: spaces, hyphens, brackets, quotes."""
MARKS = set(".,:;!?'\"…。、，：；？！")
"""What else does."""


def words(text: str) -> str:
    """The text without what makes no other question of it: case, Unicode form, and what stands between words.

    Signs stay, so C is not C++.
    """
    return plain("".join(" " if c in MARKS or unicodedata.category(c) in BETWEEN else c for c in plain(text)))


def find(text: str, phrase: str) -> tuple[int, int] | None:
    """Start and end of the last occurrence of a phrase in whole words; None where there is none.

    Where the text has it in another Unicode form only (NFC, NFD, NFKC ...), that is found.
    """
    exact = [(m.start(), m.end()) for m in _all(text, phrase)]
    spans = exact if exact else list(_in_any_form(text, phrase))
    return next(((a, b) for a, b in reversed(spans) if whole(text, a, b)), None)


def whole(text: str, start: int, end: int) -> bool:
    """Whether a part of a text is bounded by word boundaries."""
    return not (_within_word(text, start) or _within_word(text, end))


def has(text: str, phrase: str) -> bool:
    """Whether a text contains a phrase in whole words; case, spacing and Unicode form don't matter."""
    where, what = plain(text), plain(phrase)
    return any(whole(where, m.start(), m.end()) for m in _all(where, what))


def begins(text: str, phrase: str) -> bool:
    """Whether a text begins with a phrase in whole words, perhaps behind quotes; as `has`."""
    where, what = plain(text).lstrip(QUOTES + " "), plain(phrase).lstrip(QUOTES + " ")
    return bool(what) and where.startswith(what) and whole(where, 0, len(what))


def ends(text: str, phrase: str) -> bool:
    """Whether a text ends with a phrase in whole words, but for closing marks; as `has`."""
    where, what = (plain(t).rstrip(QUOTES + " .!?…。！？)*") for t in (text, phrase))
    return bool(what) and where.endswith(what) and whole(where, len(where) - len(what), len(where))


def gap(prompt: str, answer: str) -> str:
    """What belongs between a prompt and what follows it: a space, or nothing.

    Nothing after a space or line break, an opening quote or bracket, a currency or other sign that is written in front,
    a chat marker, and in scripts without spaces.
    """
    last = prompt[-1:]
    if not last or last.isspace() or MARKER.search(prompt) or _opens(prompt) or _unspaced(prompt, answer):
        return ""
    return " "


def stutters(text: str) -> bool:
    """Whether a text says the same three times in a row or more: `Italy, Italy, Italy`, `Lyon is Lyon is Lyon is`."""
    letters = re.sub(r"[\W_]+", "", plain(text))
    return any(re.search(r"[^\W\d_]", m[1]) for m in REPEAT.finditer(letters))


def _all(text: str, phrase: str) -> Iterator[re.Match[str]]:
    """All occurrences, also overlapping ones."""
    start = 0
    pattern = re.compile(re.escape(phrase))
    while phrase and (found := pattern.search(text, start)):
        yield found
        start = found.start() + 1


def _in_any_form(text: str, phrase: str) -> Iterator[tuple[int, int]]:
    """Occurrences in another Unicode form: first of the same characters, then of those that are as good (NFKC)."""
    for form in ("NFD", "NFKD"):
        where: list[int] = []  # the place of every character of the decomposed text
        parts: list[str] = []
        for i, char in enumerate(text):
            part = unicodedata.normalize(form, char)
            parts.append(part)
            where += [i] * len(part)
        decomposed = unicodedata.normalize(form, "".join(parts))  # marks in order, within their letters
        found = [
            (where[m.start()], where[m.end() - 1] + 1)
            for m in _all(decomposed, unicodedata.normalize(form, phrase))
            if whole(decomposed, m.start(), m.end())
        ]
        if found:
            yield from found
            return


def _within_word(text: str, at: int) -> bool:
    """Whether the characters on both sides of a place belong to one word."""
    if not 0 < at < len(text):
        return False
    before, after = text[at - 1], text[at]
    if unicodedata.category(after).startswith("M") or "\u200d" in (before, after):
        return True  # a mark belongs to the letter before it
    if UNSPACED.match(before) or UNSPACED.match(after):
        return False
    return _of_word(before) and _of_word(after)


def _of_word(char: str) -> bool:
    return char.isalnum() or char == "_" or unicodedata.category(char).startswith("M")


def _opens(prompt: str) -> bool:
    """Whether a prompt ends in a sign that is written in front of something, without a space."""
    last, before = prompt[-1], prompt[:-1]
    ahead = before[-1:]
    alone = not ahead or ahead.isspace()
    if last in QUOTES:
        return _opening(last, before, alone)
    if last in "*~":  # emphasis in Markdown opens behind a space
        bare = prompt.rstrip(last)
        return not bare or bare[-1].isspace()
    kind = unicodedata.category(last)
    if kind == "Sc":
        return not before.rstrip()[-1:].isdigit()  # $5, but 5 €
    if last in JOINED:
        return not alone
    return kind == "Ps" or last in "@\\−" or (last == "#" and not ahead.isalnum())


def _opening(quote: str, before: str, alone: bool) -> bool:
    """Whether a quotation mark behind a text opens."""
    ahead = before[-1:]
    if alone or unicodedata.category(ahead) == "Ps" or ahead in ":=>/\\":
        return True
    if _of_word(ahead):
        return False
    if quote in "\"'`":  # behind other punctuation: the one that has no partner yet
        return len(re.findall(rf"(?<!\w){quote}|{quote}(?!\w)", before)) % 2 == 0
    return unicodedata.category(quote) in ("Pi", "Ps")


def _unspaced(prompt: str, answer: str) -> bool:
    """Whether prompt and answer meet in a script without spaces."""
    last, first = UNSPACED.match(prompt[-1:]), UNSPACED.match(answer[:1])
    if last and (first or unicodedata.category(prompt[-1]).startswith("P")):
        return True
    letters = [bool(UNSPACED.match(c)) for c in prompt if c.isalpha()]
    return bool(last or first) and 2 * sum(letters) >= len(letters)
