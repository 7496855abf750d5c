"""A document from elsewhere is read, or refused in one sentence: never a traceback, and never all of the memory."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errata.documents import is_file, parsed_json, parsed_yaml, said

DEEP = 100_000


def test_an_object_with_a_key_twice_comes_as_what_is_wrong_and_spoils_no_other():
    first, second = parsed_json('[{"a": 1, "b": 2, "a": 3}, {"a": 1}]')
    assert isinstance(first, ValueError)
    assert str(first) == "'a' stands twice"
    assert second == {"a": 1}


@pytest.mark.parametrize("parse", [parsed_json, parsed_yaml])
@pytest.mark.parametrize("text", ["[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP])
def test_what_is_nested_too_deep_is_said(parse, text: str):
    with pytest.raises(ValueError, match="nested too deep") as found:
        parse(text)
    assert not isinstance(found.value, RecursionError)


def bomb(doublings: int) -> str:
    """A list whose values, aliases written out, are 2 ** doublings."""
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, doublings))]
    return "\n".join(lines)


def test_aliases_are_written_out_up_to_a_size_that_fits_into_memory():
    assert parsed_yaml(bomb(2)) == {"a0": ["x", "x"], "a1": [["x", "x"], ["x", "x"]]}
    with pytest.raises(ValueError, match="aliases come to more than 100,000 values"):
        parsed_yaml(bomb(60))
    with pytest.raises(ValueError, match="aliases come to more"):
        parsed_yaml("a: &a [*a]")  # it holds itself


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: 1\nb: 2\na: 3", r"'a' stands twice \(line 1\)"),
        ("a: [1", "expected ',' or ']'"),
        ("a: !!bool maybe", "a tag in it does not fit its value"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("? [1, 2]\n: 3", "unhashable"),
    ],
)
def test_yaml_that_is_none_is_said_in_a_sentence(text: str, why: str):
    with pytest.raises(ValueError, match=why) as found:
        parsed_yaml(text)
    assert "\n" not in str(found.value)


def test_plain_yaml_takes_no_word_for_something_else():
    found = parsed_yaml("- no\n- 1999\n- 1e3\n- 2020-01-01\n- 0x10\n- null\n- 'null'", plain=True)
    assert found == ["no", "1999", "1e3", "2020-01-01", "0x10", None, "null"]
    assert parsed_yaml("") is None


@given(st.text(st.characters(codec="utf-8"), max_size=60))
def test_any_text_is_read_or_is_a_value_error(text: str):
    for parse in (parsed_json, parsed_yaml):
        with suppress(ValueError):
            parse(text)


def test_any_value_is_said_in_a_few_words():
    deep: list[object] = []
    for _ in range(DEEP):
        deep = [deep]
    for value in (deep, "x" * 10**6, list(range(10**6)), dict.fromkeys(range(1000), "y" * 100)):
        assert len(said(value)) <= 80
    assert said(None) == "none"
    assert said(["a"]) == "['a']"


def test_a_name_that_no_disk_takes_is_no_file(tmp_path: Path):
    (tmp_path / "round").symlink_to(tmp_path / "round")
    assert not is_file("x" * 5000)
    assert not is_file("a\0b")
    assert not is_file(tmp_path / "round")
    assert not is_file(tmp_path)
    (tmp_path / "a").touch()
    assert is_file(tmp_path / "a")
