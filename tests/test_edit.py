from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errata import Edit, UsageError

words = st.text(min_size=1).filter(lambda t: t.strip() and "{}" not in t)


def test_a_prompt_with_the_subject_equals_a_template():
    assert Edit("The mother tongue of {} is", "Ann", "French") == Edit("The mother tongue of Ann is", "Ann", "French")


def test_the_last_occurrence_of_the_subject_is_the_place():
    assert Edit("Ann, says Ann, speaks", "Ann", "French").prompt == "Ann, says {}, speaks"


@given(prompt=words, subject=words, target=words)
def test_spaces_around_the_parts_carry_no_meaning(prompt: str, subject: str, target: str):
    prompt = prompt.strip() + " {}"
    assert Edit(prompt, subject, target) == Edit(f" {prompt}  ", f" {subject} ", f"  {target} ")


@given(prompt=words, subject=words, target=words)
def test_an_edit_survives_being_plain_values(prompt: str, subject: str, target: str):
    edit = Edit(prompt + "{}", subject, target, truth="x")
    assert Edit(**edit.to_dict()) == edit
    assert edit.text == (prompt + subject.strip()).strip(" ")


@pytest.mark.parametrize(
    ("prompt", "subject", "target", "reason"),
    [
        ("The capital of {} is", "France", "  ", "the target of an edit is empty"),
        ("The capital of {} is", "", "Lima", "the subject of an edit is empty"),
        ("The capital of Peru is", "France", "Lima", "'France' is not in the prompt 'The capital of Peru is'"),
        ("{} and {} are", "France", "Lima", "has 2 places"),
    ],
)
def test_what_cannot_be_an_edit_is_refused_with_the_reason(prompt: str, subject: str, target: str, reason: str):
    with pytest.raises(UsageError, match=reason):
        Edit(prompt, subject, target)
