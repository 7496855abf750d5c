from __future__ import annotations

import pytest

from errata import Case, Edit, Probe, UsageError

EDIT = Edit("The mother tongue of {} is", "Danielle Darrieux", "English", "French")


def test_the_edit_itself_is_asked_first():
    case = Case(7, EDIT, (Probe("paraphrase", "Danielle Darrieux, a native", "English"),))
    assert case.probes[0] == Probe("efficacy", "The mother tongue of Danielle Darrieux is", "English", "French")
    assert [p.kind for p in case.probes] == ["efficacy", "paraphrase"]


def test_the_efficacy_probe_can_not_be_another_than_the_edits():
    case = Case(7, EDIT, (Probe("efficacy", "An easier question:", "yes"),))
    assert [p.prompt for p in case.probes] == [EDIT.text]


def test_a_case_made_of_a_cases_probes_is_the_same():
    case = Case(7, EDIT, (Probe("neighbourhood", "Michel Rocard speaks", "French", "English"),))
    assert Case(case.id, case.edit, case.probes) == case


def test_spaces_around_an_answer_carry_no_meaning():
    spaced = Probe("neighbourhood", "Michel Rocard speaks ", " French", " English", (" français ", " "))
    assert spaced == Probe("neighbourhood", "Michel Rocard speaks", "French", "English", ("français",))
    assert Probe("paraphrase", "p", "a", "  ").other is None


@pytest.mark.parametrize(("prompt", "answer"), [("", "French"), ("  ", "French"), ("He speaks", " ")])
def test_an_empty_question_or_answer_is_refused(prompt: str, answer: str):
    with pytest.raises(UsageError, match=r"of a probe \(paraphrase\) is empty; give the words it stands for"):
        Probe("paraphrase", prompt, answer)


def test_an_unknown_kind_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match=r"'rephrase'; known: efficacy, paraphrase, neighbourhood, portability"):
        Probe("rephrase", "p", "a")  # pyright: ignore[reportArgumentType]
