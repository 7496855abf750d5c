from __future__ import annotations

import itertools
import json
import unicodedata
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from errata import Edit, UsageError
from errata.edit import agree

words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda t: t.strip() and "{}" not in t)


def test_a_prompt_with_the_subject_equals_a_template():
    assert Edit("The mother tongue of {} is", "Ann", "French") == Edit("The mother tongue of Ann is", "Ann", "French")


def test_the_last_occurrence_of_the_subject_is_the_place():
    assert Edit("Ann, says Ann, speaks", "Ann", "French").prompt == "Ann, says {}, speaks"


@given(prompt=words, subject=words, target=words)
def test_spaces_around_the_parts_carry_no_meaning(prompt: str, subject: str, target: str):
    prompt = prompt.strip() + " {}"
    assume(subject.strip() not in prompt)  # what is named twice has a test of its own
    assert Edit(prompt, subject, target) == Edit(f" {prompt}  ", f" {subject} ", f"  {target} ")


@given(prompt=words, subject=words, target=words)
def test_an_edit_survives_being_plain_values(prompt: str, subject: str, target: str):
    assume(subject.strip() not in prompt)
    edit = Edit(prompt + "{}", subject, target, truth="x")
    assert Edit(**edit.to_dict()) == edit
    assert edit.text == (prompt + subject.strip()).strip(" ")


def test_the_subject_is_a_word_not_a_part_of_one():
    assert Edit("The capital of Alabama was seen by Al in", "Al", "May").prompt == (
        "The capital of Alabama was seen by {} in"
    )
    assert Edit("法国的首都是", "法国", "巴黎").prompt == "{}的首都是"  # no spaces, and words all the same
    assert Edit("O'Neill's son is", "O'Neill", "Bob").prompt == "{}'s son is"


@pytest.mark.parametrize(("prompt", "subject"), itertools.product(("NFC", "NFD", "NFKC"), repeat=2))
def test_the_subject_is_found_in_any_unicode_form_and_written_as_in_the_prompt(prompt: str, subject: str):
    text, name = unicodedata.normalize(prompt, "Beyoncé is"), unicodedata.normalize(subject, "Beyoncé")
    edit = Edit(text, name, "Bob")
    assert (edit.prompt, edit.text) == ("{} is", text)
    with pytest.raises(UsageError, match="part of a word|not in the prompt"):
        Edit(text, "Beyonce", "Bob")  # another name


def test_braces_that_are_text_stay_text():
    for prompt in ("In {{}} there is {}", "{{}}{} {{}}"):
        edit = Edit(prompt, "Rust", "x")
        assert edit.text == prompt.replace("{{}}", "\0").replace("{}", "Rust").replace("\0", "{}")
        assert Edit(**edit.to_dict()) == edit
    several = Edit('In Rust, print!("{} {}") works; Rust was made by', "Rust", "Hoare")
    assert several.text == 'In Rust, print!("{} {}") works; Rust was made by'
    assert Edit(**several.to_dict()) == several


@pytest.mark.parametrize("prompt", ["In Rust, {} is a place for", "{} is written in Rust by", "Say Rust: {}"])
def test_braces_next_to_the_subjects_name_are_not_taken_for_its_place(prompt: str):
    with pytest.raises(UsageError, match=r"has a place \{\} and names the subject 'Rust' as well; write \{\{\}\}"):
        Edit(prompt, "Rust", "x")


def test_a_subject_that_is_named_twice_survives_being_plain_values_and_being_replaced():
    edit = Edit("Ann, says Ann, speaks", "Ann", "French")
    assert Edit(**json.loads(json.dumps(edit.to_dict()))) == edit == Edit.read(edit.to_dict())
    assert replace(edit, target="Dutch").prompt == edit.prompt
    earlier = {"prompt": "Ann, says {}, speaks", "subject": "Ann", "target": "French", "truth": None}
    assert Edit.read(earlier) == edit


def test_chat_and_gap_are_among_the_plain_values_only_where_they_are_set():
    assert set(Edit("{} is", "Ann", "here").to_dict()) == {"prompt", "subject", "target", "truth"}
    edit = Edit("{} is", "Ann", "here", chat=True, gap="")
    assert Edit(**edit.to_dict()) == edit


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"target": ["Berlin", "Bonn"]}, "the target of an edit is a list, .*Berlin.*; give one text"),
        ({"target": 1999}, "the target of an edit is the number 1999; write it as a text: '1999'"),
        ({"target": None}, r"the target of an edit is missing \(null\)"),
        ({"target": True}, "the target of an edit is True, no text"),
        ({"subject": 5}, "the subject of an edit is the number 5"),
        ({"prompt": None}, r"the prompt of an edit is missing \(null\)"),
        ({"truth": ["a"]}, "the truth of an edit is a list"),
        ({"target": "a\ud800"}, "half a character"),
        ({"gap": "-"}, "the gap of an edit is '-'"),
    ],
)
def test_a_value_of_another_kind_is_told(values: dict[str, Any], reason: str):
    with pytest.raises(UsageError, match=reason):
        Edit(**{"prompt": "The capital of {} is", "subject": "Peru", "target": "Lima", **values})


def test_edits_that_contradict_each_other_are_refused_with_their_numbers():
    one, other = Edit("The seat of {} is in", "Acme Ltd", "Rome"), Edit("{} is", "Ann", "here")
    again = Edit("the  seat of {} is in?", "ACME ltd", "Oslo")  # the same question
    agree([one, other, replace(one, target="rome"), Edit("{} is", "Bob", "there")])
    with pytest.raises(UsageError, match=r"1 and 3 \(.*'Rome' and 'Oslo'\); leave one of each out, or .*anyway"):
        agree([one, other, again])
    with pytest.raises(UsageError, match="contradict each other: 12 and 40 "):
        agree([one, again], [12, 40])


@pytest.mark.parametrize(
    ("prompt", "subject", "target", "reason"),
    [
        ("The capital of Alabama is", "Al", "May", "'Al' is only as a part of a word in the prompt"),
        ("The capital of {} is", "France", "  ", "the target of an edit is empty"),
        ("The capital of {} is", "", "Lima", "the subject of an edit is empty"),
        ("The capital of Peru is", "France", "Lima", "'France' is not in the prompt 'The capital of Peru is'"),
        ("{} and {} are", "France", "Lima", "has 2 places"),
    ],
)
def test_what_cannot_be_an_edit_is_refused_with_the_reason(prompt: str, subject: str, target: str, reason: str):
    with pytest.raises(UsageError, match=reason):
        Edit(prompt, subject, target)
