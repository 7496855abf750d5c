from __future__ import annotations

import pytest

from errata.words import Words


def test_a_text_is_as_like_itself_as_can_be_and_unlike_one_it_shares_no_word_with():
    index = Words(["The mother tongue of Max", "a red house", "the red tongue"])
    assert index.cosine("a RED house")[1] == pytest.approx(1.0)
    assert 0 not in index.cosine("a red house")
    assert index.cosine("red")[1] > index.cosine("red door of wood")[1]


def test_the_rarer_a_word_the_more_it_counts():
    index = Words(["red house", "red car", "red tree"])
    assert index.cosine("house")[0] > index.cosine("red")[0]
    assert index.share("house")[0] > 0.5 > index.share("red")[0]
    assert index.share("a red house!")[0] == pytest.approx(1.0)


def test_a_text_without_spaces_or_words_is_found_as_it_stands():
    index = Words(["東京", "$$", "Zoë"])
    assert index.share("それは東京です") == {0: 1.0}
    assert index.share("it costs $$ now") == {1: 1.0}
    assert index.share("nothing") == {}
