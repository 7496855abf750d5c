"""Words, and the spaces between them, in many scripts."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errata import text as texts


@pytest.mark.parametrize(
    "prompt",
    [
        '{"name": "Paris", "country": "',
        '["a","',
        "print('",
        "He said “",
        "Er sagte »",
        "Il dit «",
        "list [",
        "f(",
        "The price is $",
        "about €",
        "Hashtag #",
        "user@",
        "The score is 3-",
        "https://",
        'lang="',
        "It is **",
        "See `",
        "<|user|>Where?<|assistant|>",
        "<start_of_turn>model\n",
        "法国的首都是",
        "首都：",
        "他说：“",
        "日本の首都は",
        "ประเทศไทยมีเมืองหลวงชื่อ",
        "",
    ],
)
def test_no_space_belongs_behind(prompt: str):
    assert texts.gap(prompt, "Paris") == ""


@pytest.mark.parametrize(
    "prompt",
    [
        "The capital is",
        'He said "yes"',
        "Er sagte „ja“",
        "the dogs'",
        "It’s",
        "In `x`",
        "**Answer:**",
        "Q:",
        "It costs 5 €",
        "in C#",
        "Paris -",
        "a ->",
        "x =",
        '5" and 6"',
        "(in brackets)",
        "[INST] Where? [/INST]",
        "프랑스의 수도는",
        "The Chinese name is 中国",
    ],
)
def test_a_space_belongs_behind(prompt: str):
    assert texts.gap(prompt, "Paris") == " "


def test_a_foreign_word_stands_as_the_text_around_it_does():
    assert texts.gap("The capital of China is", "北京") == " "
    assert texts.gap("这个公司叫Apple", "中国") == ""


@pytest.mark.parametrize(
    ("text", "phrase", "span"),
    [
        ("The capital of Alabama is seen by Al in", "Al", (34, 36)),
        ("Ann, says Ann, speaks", "Ann", (10, 13)),
        ("iPhone 12", "iPhone 1", None),
        ("Alabama", "Al", None),
        ("under_score", "score", None),
        ("法国的首都", "首都", (3, 5)),
        ("한국은 나라", "한국", None),  # Korean has spaces, and particles are parts of words
        ("Ｔｏｋｙｏ is", "Tokyo", (0, 5)),
        ("x", "", None),
    ],
)
def test_phrases_are_found_in_whole_words(text: str, phrase: str, span: tuple[int, int] | None):
    assert texts.find(text, phrase) == span


words = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=6)


@given(words, words, words, *[st.sampled_from(["NFC", "NFD", "NFKC", "NFKD"])] * 2)
def test_a_word_is_found_whatever_the_forms(before: str, word: str, after: str, one: str, two: str):
    text, phrase = unicodedata.normalize(one, f"{before} {word} {after}"), unicodedata.normalize(two, word)
    found = texts.find(text, phrase)
    assert found is not None
    assert unicodedata.normalize("NFKD", text[slice(*found)]) == unicodedata.normalize("NFKD", word)


@pytest.mark.parametrize(
    ("text", "does"),
    [
        ("Italy, Italy, Italy, It", True),
        ("Lyon passed LyonJ Lyon Lyon Lyon L", True),
        ("Lyon is Lyon is Lyon is", True),
        ("ParisParisParis", True),
        ("東京東京東京", True),
        ("New York, New York", False),
        ("Bora Bora.", False),
        ("1,000,000,000", False),
        ("Mississippi.", False),
        ("the city of Paris, the capital of France.", False),
        ("", False),
    ],
)
def test_a_text_that_says_the_same_three_times_in_a_row_stutters(text: str, does: bool):
    assert texts.stutters(text) == does


def test_a_text_begins_with_and_has_whole_words():
    assert texts.begins('"Sony" makes it', "sony")
    assert not texts.begins("Sonya", "Sony")
    assert not texts.begins("the Sony", "Sony")
    assert not texts.begins("anything", '"')
    assert texts.has("東京です", "東京")
    assert not texts.has("Londonderry", "London")
