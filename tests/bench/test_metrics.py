"""Scores of planted answers, each against a second way to get the number."""

from __future__ import annotations

import bisect
import itertools
import random
from collections import Counter
from dataclasses import replace

import pytest

from errata import Probe
from errata.ask import Answer, Spoken, stopped
from errata.bench import metrics, words

ASKED = Probe("paraphrase", "The capital of France is", "New Delhi", "Paris")
NEAR = Probe("neighbourhood", "The capital of Italy is", "Rome", "New Delhi")


def spoken(ids: tuple[int, ...], argmax: tuple[int, ...], logprob: float) -> Spoken:
    return Spoken(ids, argmax, logprob)


RIGHT = Answer(spoken((3, 4), (3, 4), -0.1), spoken((5,), (3,), -4.0), "New Delhi, since 1911.")
WRONG = Answer(spoken((3, 4), (5, 9), -4.0), spoken((5,), (5,), -0.1), "Paris.")


def test_a_perfect_edit_scores_1_and_a_missing_one_0_under_every_protocol():
    assert metrics.score(ASKED, WRONG, RIGHT) == {"forced": 1.0, "compare": 1.0, "generated": 1.0}
    assert metrics.score(ASKED, WRONG, WRONG) == {"forced": 0.0, "compare": 0.0, "generated": 0.0}


def test_only_what_is_said_after_the_edit_counts_for_it():
    assert metrics.score(ASKED, RIGHT, WRONG) == metrics.score(ASKED, WRONG, WRONG)


def test_the_protocols_differ_where_they_should():
    # Half of the tokens follow once the first is given; the old answer is still likelier; it says the old one.
    flattered = Answer(spoken((3, 4), (5, 4), -2.0), spoken((5,), (5,), -0.1), "Paris.")
    assert metrics.score(ASKED, WRONG, flattered) == {"forced": 0.5, "compare": 0.0, "generated": 0.0}
    # Likelier than the old answer, and still not said.
    liked = replace(flattered, answer=spoken((3, 4), (7, 8), -2.0), other=spoken((5,), (5,), -3.0), text="Berlin.")
    assert metrics.score(ASKED, WRONG, liked) == {"forced": 0.0, "compare": 1.0, "generated": 0.0}
    # Said in its own words, though not at once.
    wordy = replace(flattered, answer=spoken((3, 4), (8, 9), -2.0), text="a city named New Delhi.")
    assert metrics.score(ASKED, WRONG, wordy) == {"forced": 0.0, "compare": 0.0, "generated": 1.0}


def test_locality_is_what_it_was_before_right_or_wrong():
    before = Answer(spoken((1, 2), (8, 9), -3.0), spoken((3,), (3,), -5.0), "Milan.")  # not right, and kept
    same = metrics.score(NEAR, before, before)
    assert same == {"forced": 1.0, "compare": 1.0, "generated": 1.0}
    healed = Answer(spoken((1, 2), (1, 9), -0.1), spoken((3,), (3,), -5.0), "Rome.")  # right, and changed
    assert metrics.score(NEAR, before, healed) == {"forced": 0.5, "compare": 1.0, "generated": 0.0}
    drowned = Answer(spoken((1, 2), (8, 9), -3.0), spoken((3,), (3,), -2.0), "Milan.")  # the new target leaks in
    assert metrics.score(NEAR, before, drowned) == {"forced": 1.0, "compare": 0.0, "generated": 1.0}


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        ("French.", "French", 1.0),
        ("French.", "french !", 1.0),
        ("the U.S.", "the U.S", 1.0),
        ("French.", "English.", 0.0),
        ("French.", "French, they say.", 0.0),
        ("a.b", "ab", 0.0),
    ],
)
def test_version_2_wants_a_neighbours_whole_text_but_for_its_full_stop(before: str, after: str, kept: float):
    assert metrics.kept_text(before, after) == kept
    assert metrics.score(NEAR, Answer(text=before), Answer(text=after), version=2)["generated"] == kept


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        ("Rome, a city of Italy and", "Rome and it lies on the Tiber", 1.0),  # its own truth is said still
        ("the city of Rome.", "the town of Rome.", 1.0),
        ("Rome.", "Milan.", 0.0),
        ("Milan.", "Rome.", 0.0),  # right now, and changed
        ("Milan, in the north", "Milan, of course", 1.0),  # up to the first mark
        ("a city that is full of art", "a city that is full of history", 1.0),  # up to the fifth word
        ("a city that is full of art", "a town that is full of art", 0.0),
        ("J. R. R. Tolkien.", "J. K. Rowling.", 0.0),
        ("Rome.", "Rome, or New Delhi.", 0.0),  # the edit's target has leaked
        ("New Delhi.", "New Delhi!", 1.0),  # it was said before
        ("Rome.", "Rome Rome Rome Rome", 0.0),
        ("", "", 1.0),
        ("3.5 million people", "3.7 million people", 0.0),
        ("罗马，意大利的城市", "罗马，在台伯河上", 1.0),
    ],
)
def test_a_neighbours_answer_is_kept_where_its_truth_or_its_beginning_is(before: str, after: str, kept: float):
    assert metrics.score(NEAR, Answer(text=before), Answer(text=after))["generated"] == kept


def test_a_stutter_is_no_answer_but_was_one_in_version_2():
    stutter = replace(RIGHT, text="New Delhi, New Delhi, New Delhi, New")
    assert metrics.score(ASKED, WRONG, stutter)["generated"] == 0.0
    assert metrics.score(ASKED, WRONG, stutter, version=2)["generated"] == 1.0
    twice = replace(RIGHT, text="New Delhi, New Delhi.")
    assert metrics.score(ASKED, WRONG, twice)["generated"] == 1.0


def test_equal_likelihood_prefers_nothing():
    even = replace(RIGHT, other=spoken((5,), (5,), -0.1))
    assert metrics.score(ASKED, WRONG, even)["compare"] == 0.0


def test_what_was_not_asked_has_no_score():
    assert metrics.score(ASKED, WRONG, Answer()) == dict.fromkeys(metrics.PROTOCOLS)
    assert metrics.score(NEAR, Answer(), RIGHT) == {"forced": None, "compare": 1.0, "generated": None}
    assert metrics.score(ASKED, WRONG, replace(RIGHT, other=None))["compare"] is None


def test_a_broken_model_prefers_nothing():
    broken = Answer(spoken((3,), (0,), float("nan")), spoken((5,), (0,), float("nan")), "")
    assert metrics.score(ASKED, WRONG, broken) == {"forced": 0.0, "compare": 0.0, "generated": 0.0}


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("London", "London", True),
        (" London.", "London", True),
        ("the city of London, in England.", "London", True),
        ("LONDON", "London", True),
        ("New  York", "New York", True),
        ("l'Angleterre", "Angleterre", True),
        ("Londonderry", "London", False),
        ("Greater-London", "London", True),
        ("Iranian", "Iran", False),
        ("Lon don", "London", False),
        ("", "London", False),
        ("C++ and C#", "C++", True),
        ("C", "C++", False),
        ("a.b", "a+b", False),
        ("Apple Inc. makes it", "Apple Inc.", True),
        ("ｆｕｌｌ", "full", True),
        ("首都是巴黎市。", "巴黎", True),
    ],
)
def test_a_text_answers_if_it_is_or_contains_the_answer_in_whole_words(text: str, answer: str, right: bool):
    assert metrics.says(text, [answer]) == float(right)


def test_text_is_compared_to_text_so_that_tokens_do_not_matter():
    # Pitfall 5: "Ġ London" was compared to "L ondon" and a perfect edit got 0.28.
    otherwise = replace(RIGHT, answer=spoken((11, 12, 13), (3, 4, 5), -9.0))
    assert metrics.score(ASKED, WRONG, otherwise)["generated"] == 1.0


def test_any_alias_is_right_where_the_model_answers_in_its_own_words():
    probe = replace(ASKED, aliases=("Naī Dillī",))
    assert metrics.score(probe, WRONG, replace(WRONG, text="naī dillī"))["generated"] == 1.0
    assert metrics.score(ASKED, WRONG, replace(WRONG, text="naī dillī"))["generated"] == 0.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (" London. It is large.", "London."),
        (" London\nParis", "London"),
        ("\n\nLondon\nParis", "London"),  # as many answers to a question begin
        ("\n", ""),
        (" J. R. R. Tolkien. He wrote", "J. R. R. Tolkien."),
        (" St. Louis. It", "St. Louis."),
        (" the U.S. Army! Yes", "the U.S. Army!"),
        (" 3.5 million people. More", "3.5 million people."),
        (' "London." So he said', '"London."'),
        (" Really? Yes", "Really?"),
        (" London", "London"),
        ("", ""),
        (" wait... there", "wait..."),
    ],
)
def test_an_answer_ends_with_its_line_or_first_sentence(text: str, said: str):
    assert stopped(text) == said


def test_a_case_is_the_mean_over_its_probes_and_a_report_the_mean_over_its_cases():
    draw = random.Random(0)
    rows, by_hand = [], []
    for _ in range(20):
        scores = [dict.fromkeys(metrics.PROTOCOLS, draw.random()) for _ in range(draw.randint(1, 5))]
        rows.append(metrics.score_case([ASKED] * len(scores), scores))
        by_hand.append(sum(s["forced"] for s in scores) / len(scores))
    found = metrics.summarise(rows, seed=0)["generalization"]["forced"]
    assert found["mean"] == pytest.approx(sum(by_hand) / 20)
    assert found["n"] == 20


def test_probes_of_a_kind_are_kept_apart():
    scores = [dict.fromkeys(metrics.PROTOCOLS, v) for v in (1.0, 0.0)]
    assert metrics.score_case([ASKED, NEAR], scores) == {
        "generalization": dict.fromkeys(metrics.PROTOCOLS, 1.0),
        "locality": dict.fromkeys(metrics.PROTOCOLS, 0.0),
    }


def test_a_score_that_is_missing_is_neither_0_nor_counted():
    case = metrics.score_case([ASKED, ASKED], [dict.fromkeys(metrics.PROTOCOLS, 1.0), dict.fromkeys(metrics.PROTOCOLS)])
    assert case["generalization"]["compare"] == 1.0
    found = metrics.summarise([case, {"generalization": dict.fromkeys(metrics.PROTOCOLS)}], seed=0)
    assert (found["generalization"]["compare"]["mean"], found["generalization"]["compare"]["n"]) == (1.0, 1)
    assert metrics.interval([None], seed=0) == {"mean": None, "low": None, "high": None, "n": 0}


def test_a_failed_edit_scores_0_and_is_not_local():
    efficacy = Probe("efficacy", "The capital of France is", "Rome")
    assert metrics.score_failed([efficacy, NEAR]) == {
        "reliability": dict.fromkeys(metrics.PROTOCOLS, 0.0),
        "locality": dict.fromkeys(metrics.PROTOCOLS),
    }


def test_the_interval_is_that_of_the_normal_approximation_where_it_holds():
    values = [1.0] * 120 + [0.0] * 280
    found = metrics.interval(values, seed=0)
    half = 1.96 * (0.3 * 0.7 / 400) ** 0.5
    assert found["mean"] == pytest.approx(0.3)
    assert found["low"] == pytest.approx(0.3 - half, abs=0.01)
    assert found["high"] == pytest.approx(0.3 + half, abs=0.01)


def test_the_interval_is_that_of_all_resamples():
    values = [0.0, 0.25, 0.25, 1.0, 0.5] * 2
    likely = {0: 1.0}  # of the sum of ten draws, in quarters
    for _ in range(10):
        more: Counter[int] = Counter()
        for total, p in likely.items():
            for value in values[:5]:
                more[total + int(4 * value)] += p / 5
        likely = dict(sorted(more.items()))
    reached = list(itertools.accumulate(likely.values()))
    wanted = [list(likely)[bisect.bisect(reached, q)] / 40 for q in (0.025, 0.975)]
    found = metrics.interval(values, seed=0, draws=4_000)
    assert [found["low"], found["high"]] == pytest.approx(wanted, abs=0.026)  # a step of a mean of ten quarters


@pytest.mark.parametrize("n", [10, 40, 400])
def test_the_interval_is_exact_where_all_cases_agree(n: int):
    """Clopper and Pearson: the share at which n hits of n (or none) happen in 2.5% of all draws."""
    hits, misses = (metrics.interval([v] * n, seed=0) for v in (1.0, 0.0))
    assert hits["low"] ** n == pytest.approx(0.025)
    assert (hits["high"], misses["low"]) == (1.0, 0.0)
    assert misses["high"] == pytest.approx(1 - hits["low"])
    halves = metrics.interval([0.5] * n, seed=0)
    assert (halves["low"] + halves["high"]) / 2 == pytest.approx(0.5)
    assert halves["high"] - halves["low"] == pytest.approx(1 - hits["low"])
    same = metrics.interval([0.0] * n, seed=0, bounds=(-1.0, 1.0))  # of differences
    assert [same["low"], same["high"]] == pytest.approx([hits["low"] - 1, 1 - hits["low"]])


def test_below_ten_cases_there_is_no_interval():
    assert metrics.interval([1.0] * 9, seed=0) == {"mean": 1.0, "low": None, "high": None, "n": 9}
    few = metrics.interval([1.0, 0.0], seed=0)
    assert few == {"mean": 0.5, "low": None, "high": None, "n": 2}
    assert (words.spread(few), words.half(few)) == ("too few cases", "")


def test_the_interval_is_seeded_and_narrows_with_more_cases():
    few, many = [0.0, 1.0] * 5, [0.0, 1.0] * 200
    assert metrics.interval(few, seed=1) == metrics.interval(few, seed=1)
    widths = [f["high"] - f["low"] for f in (metrics.interval(v, seed=1) for v in (few, many))]
    assert widths[0] > 3 * widths[1]
