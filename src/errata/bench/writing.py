"""What a model writes at length from a case's openings: is it varied (fluency), does it fit the new fact (consistency)?

The protocol is `written`: greedy, up to `errata.ask.AT_LENGTH` tokens. (ROME samples from the five likeliest tokens;
the scores are the same functions, but of other texts, so a number from there is not one from here.)
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from ..data import Case, Probe

PROTOCOL = "written"
WEIGHTS = {2: 2 / 3, 3: 4 / 3}
"""Of the entropies of pairs and triples of words (Zhang et al. 2018, https://arxiv.org/abs/1809.05972; as in ROME)."""


def with_openings(case: Case) -> Case:
    """The case, its openings among what is asked."""
    openings = tuple(Probe("opening", text, case.edit.target) for text in case.openings)
    return replace(case, probes=(*case.probes, *openings))


def scores(case: Case, texts: Sequence[str], rarity: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Fluency, and consistency where the case has references: {metric: {protocol: value}}."""
    out = {"fluency": {PROTOCOL: fmean(fluency(text) for text in texts)}} if texts else {}
    if texts and case.references:
        together = [" ".join(texts), " ".join(case.references)]
        out["consistency"] = {PROTOCOL: cosine(*(weighted(text, rarity) for text in together))}
    return out


def words(text: str) -> list[str]:
    """Words and punctuation marks, each a token."""
    return re.findall(r"\w+(?:'\w+)?|[^\w\s]", text)


def fluency(text: str) -> float:
    """The weighted mean of the entropies of word pairs and triples, in bits; low where a model repeats itself."""
    return fmean(weight * entropy(words(text), n) for n, weight in WEIGHTS.items())


def entropy(tokens: Sequence[str], n: int) -> float:
    """Of the n-grams of a text, in bits; 0 where it has none."""
    counts = Counter(zip(*(tokens[i:] for i in range(n)), strict=False))
    total = sum(counts.values())
    return -sum(c / total * math.log2(c / total) for c in counts.values())


def rarities(texts: Sequence[str]) -> dict[str, float]:
    """How rare each word is among texts: log((1 + texts) / (1 + texts with it)) + 1."""
    found = Counter(word for text in texts for word in set(words(text.lower())))
    return {word: math.log((1 + len(texts)) / (1 + n)) + 1 for word, n in found.items()}


def weighted(text: str, rarity: Mapping[str, float]) -> dict[str, float]:
    """A text as counts of its words times their rarity (tf-idf); words that no reference has are left out."""
    return {word: n * rarity[word] for word, n in Counter(words(text.lower())).items() if word in rarity}


def cosine(one: Mapping[str, float], two: Mapping[str, float]) -> float:
    """1 for texts of the same words in the same shares, 0 for texts without a common one."""
    dot = sum(value * two.get(word, 0.0) for word, value in one.items())
    return dot / (math.hypot(*one.values()) * math.hypot(*two.values())) if dot else 0.0
