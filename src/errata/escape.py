"""Texts of unknown content, made safe for the place where they are shown: a terminal, Markdown, a table in it.

A subject, an answer, or the name of a model or a file may hold anything: an escape sequence that clears the screen,
a line break that ends a table, a tag. Such characters are shown as what they are, never sent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, separators of lines, changes of the reading direction, and halves of a character."""
_MARKUP = re.compile(r"[\\`*_\[\]$~]|(?:^|(?<=^ ))[-+=#](?!\w)")
"""What Markdown obeys within a line, and at its beginning."""
_NUMBERED = re.compile(r"^( ?\d{1,9})([.)])(?!\S)")
"""What begins a list: a number, but no decimal one."""
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;"}
"""What a backslash does not hold back everywhere."""


def visible(text: str, keep: str = "") -> str:
    r"""The text with every control character written out, as in `\x1b[2J`, but for those to keep."""
    return _CONTROL.sub(lambda found: found[0] if found[0] in keep else _written(found[0]), text)


def _written(character: str) -> str:
    return character.encode("unicode_escape").decode()


def in_json(text: str) -> str:
    """A JSON text in which every control character of its strings is written out; line breaks between them stay."""
    return _CONTROL.sub(lambda found: found[0] if found[0] == "\n" else f"\\u{ord(found[0]):04x}", text)


def markup(text: str) -> str:
    """The text as rich's markup shows it: nothing in it is a style or a control character."""
    from rich.markup import escape

    return escape(visible(text))


def markup_lines(lines: Iterable[str]) -> str:
    """Lines of text as rich's markup shows them."""
    return "\n".join(map(markup, lines))


def markdown(text: str) -> str:
    """The text as Markdown shows it within a line: nothing in it is markup, HTML, or the end of the line."""
    shown = visible(re.sub("^ +", " ", text))
    for character, entity in _ENTITIES.items():
        shown = shown.replace(character, entity)
    return _NUMBERED.sub(r"\1\\\2", _MARKUP.sub(r"\\\g<0>", shown))


def code(text: str) -> str:
    """The text as a span of code in Markdown, whatever backticks it has."""
    shown = visible(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    room = " " if not shown.strip() or shown[0] == "`" or shown[-1] == "`" else ""
    return f"{fence}{room}{shown}{room}{fence}"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """The lines of a table in Markdown, of cells that are Markdown already."""
    cells = [["---"] * len(head), *([" ".join(str(c).split()).replace("|", r"\|") for c in row] for row in rows)]
    return [f"| {' | '.join(row)} |" for row in (head, *cells)]
