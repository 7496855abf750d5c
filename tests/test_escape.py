"""A text of unknown content is shown as what it is, wherever it is shown: no character of it is obeyed."""

from __future__ import annotations

import html
import io
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console

from errata.escape import code, in_json, markdown, markdown_table, markup, visible

MEAN = st.text(
    st.one_of(
        st.sampled_from("\\`*_[]()<>|#~$&!+-=:. 12\n\r\t\x1b\x07\x9b\u2028\u202e"),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=30,
)


def told(text: str) -> str:
    """What a reader sees of a page of Markdown; anything but paragraphs is kept as a tag."""
    page = MarkdownIt().render(text)
    return html.unescape(re.sub(r"</?p>|\n$", "", page.strip("\n")))


@given(MEAN)
def test_nothing_of_a_text_is_markup_in_markdown_within_a_line_or_at_its_beginning(text: str):
    shown = re.sub("^ +", " ", visible(text))
    assert told(f"x{markdown(text)}x") == f"x{shown}x"
    assert told(f"{markdown(text)}x").strip() == f"{shown}x".strip()


@pytest.mark.parametrize(
    "text", ["# heading", "- item", " - item", "+ item", "1. item", " 12) item", "---", "> quote", "    code"]
)
def test_a_line_that_begins_with_a_text_is_a_paragraph(text: str):
    assert told(markdown(text)).split() == text.split()
    assert "\\" not in markdown("1.000")  # a number is no list


@given(MEAN)
def test_code_ends_where_the_text_does(text: str):
    page = MarkdownIt().render(f"a {code(text)} b")
    found = re.fullmatch(r"<p>a <code>(.*)</code> b</p>\n", page)
    assert found, page
    shown = visible(text)
    assert html.unescape(found[1]).strip() == shown.strip()


@given(st.lists(MEAN, min_size=2, max_size=2))
def test_a_table_has_the_cells_it_was_given(texts: list[str]):
    page = MarkdownIt().enable("table").render("\n".join(markdown_table(("a", "b"), [[markdown(t) for t in texts]])))
    cells = re.findall(r"<td>(.*?)</td>", page, re.DOTALL)
    assert page.count("<tr>") == 2
    assert [" ".join(html.unescape(c).split()) for c in cells] == [" ".join(visible(t).split()) for t in texts]


@given(MEAN)
def test_richs_markup_sends_no_control_character_and_no_style(text: str):
    out = io.StringIO()
    terminal = Console(file=out, force_terminal=True, width=500, highlight=False, emoji=False)
    terminal.print(f"[none]{markup(text)}[/]", soft_wrap=True)
    assert out.getvalue() == f"{visible(text)}\n"


def test_control_characters_halves_and_changes_of_direction_are_written_out():
    assert visible("a\x1b[2J\x07\u202e\ud800b\n") == r"a\x1b[2J\x07\u202e\ud800b\n"
    assert visible("a\nb\t", keep="\n") == "a\nb\\t"


@given(st.recursive(MEAN | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(MEAN, inner), max_leaves=6))
def test_json_without_control_characters_says_the_same(value: object):
    shown = in_json(json.dumps(value, indent=1, ensure_ascii=False))
    assert json.loads(shown) == value
    assert visible(shown, keep="\n") == shown
