"""Texts compared by their words: tf-idf, in an index that only looks at what shares a word with the question."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

WORD = re.compile(r"[^\W_]+")


class Words:
    """Texts by their words, which weigh the more the fewer of the texts have them (ln((1 + n) / (1 + df)) + 1)."""

    def __init__(self, texts: Sequence[str]) -> None:
        found = [Counter(words(text)) for text in texts]
        spread = Counter(word for counts in found for word in counts)
        self.known = {w: math.log((1 + len(texts)) / (1 + df)) + 1 for w, df in spread.items()}
        self.unknown = math.log(1 + len(texts)) + 1
        self.total = [sum(self.known[w] for w in counts) for counts in found]
        self.size = [self._size(counts) for counts in found]
        self.literal = [(i, t.casefold()) for i, t in enumerate(texts) if not (t.isascii() and self.total[i])]
        self.having: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        for i, counts in enumerate(found):
            for word, n in counts.items():
                self.having[word].append((i, n))

    def cosine(self, text: str) -> dict[int, float]:
        """How alike each text is to this one, 0 to 1; those that share no word with it are left out."""
        asked = Counter(words(text))
        out: defaultdict[int, float] = defaultdict(float)
        size = self._size(asked)
        for word, n in asked.items():
            for i, m in self.having.get(word, ()):
                out[i] += n * m * self.known[word] ** 2 / (self.size[i] * size)
        return dict(out)

    def share(self, text: str) -> dict[int, float]:
        """Which share of each text's words, by weight, is in this one; those of which there is none are left out.

        A text of other signs than ASCII's words (a script that puts no space between words) is also looked for as it
        stands.
        """
        out: defaultdict[int, float] = defaultdict(float)
        for word in set(words(text)):
            for i, _ in self.having.get(word, ()):
                out[i] += self.known[word] / self.total[i]
        whole = text.casefold()
        out |= {i: 1.0 for i, literal in self.literal if literal in whole}
        return {i: min(1.0, share) for i, share in out.items()}

    def _size(self, counts: Counter[str]) -> float:
        return math.sqrt(sum((n * self.known.get(w, self.unknown)) ** 2 for w, n in counts.items()))


def words(text: str) -> list[str]:
    """The words of a text, without regard to case."""
    return WORD.findall(text.casefold())
