"""What stands near the edits of a batch and shall stay: what else the model gives the same answer to.

Of subjects that have one answer ("Antarctica") the inputs of late matrices are alike, as the answer is in them already.
Where a batch gives many of them another, what they have in common explains it best, and takes everything else that has
the answer along. So what they have in common is kept (`Likes`), and so are made-up subjects with that answer
(`namesakes`), which need no data.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

import torch
from torch import Tensor

from ..edit import Edit
from ..lm import LM
from .basis import made_up
from .taps import Again, Taps, answers

TRIES = 12
"""Names made up for each namesake at most."""
OWN = 0.5
"""How often a name is made of the words of those alone that have the answer; else of those of all edits."""


@dataclass(frozen=True, eq=False)
class Near:
    """A batch of edits, and what is kept near it, of the model before them."""

    edits: Again
    before: Sequence[int]
    """The token that the model begins its answer to each edit's prompt with; empty where nobody asks."""
    namesakes: tuple[Again, Tensor] | None
    """Made-up subjects, and how the model begins its answers there (`taps.spoken`)."""


def namesakes(lm: LM, edits: Sequence[Edit], before: Sequence[int], draw: Random, each: int) -> list[Edit]:
    """Made-up subjects that the model says the same of as of an edit's, in the words of the batch.

    Args:
        lm: the model before the edits.
        edits: the batch.
        before: the token that the model begins its answer to each edit's prompt with.
        draw: what names are drawn by.
        each: how many for an edit at most; a name that nothing is like has fewer.
    """
    every, alike = [e.subject for e in edits], defaultdict(list)
    for edit, answer in zip(edits, before, strict=True):
        alike[answer].append(edit.subject)
    found: list[list[Edit]] = [[] for _ in edits]
    taken = set(every)
    for _ in range(TRIES * each):
        tried = {}
        for i, edit in enumerate(edits):
            if len(found[i]) < each:
                name = made_up(edit.subject, alike[before[i]] if draw.random() < OWN else every, draw)
                tried[i] = replace(edit, subject=name, truth=None)
        tried = {i: e for i, e in tried.items() if e.subject not in taken}
        if tried:
            said = answers(lm, list(tried.values()))
            for (i, edit), answer in zip(tried.items(), said, strict=True):
                if answer == before[i] and edit.subject not in taken:
                    found[i].append(edit)
                    taken.add(edit.subject)
    return [edit for some in found for edit in some]


class Likes:
    """What the edits of one answer have in common at every matrix: the mean of their inputs, where there are several.

    Of each edit its first tap counts, which the answer begins after (or the subject's only one).
    """

    def __init__(self, before: Sequence[int]) -> None:
        """`before` is as in `namesakes`."""
        several = {answer for answer, n in Counter(before).items() if n > 1}
        numbers = {answer: i for i, answer in enumerate(sorted(several))}
        self.group = torch.tensor([numbers.get(answer, -1) for answer in before], dtype=torch.long)
        """(edits,): the number of its answer; -1 where it is alone with it."""
        self.size = self.group[self.group >= 0].bincount(minlength=len(several))
        """(answers,)."""
        self.sums: dict[str, Tensor] = {}
        """By matrix, of the inputs of each answer's edits, (answers, d_in)."""

    def watched(self, passes: Iterable[Taps]) -> Iterator[Taps]:
        """The taps of the edits pass by pass, as they are; their inputs are added up on the way."""
        for taps in passes:
            first = torch.cat([taps.owner.new_ones(1), taps.owner.diff()]) != 0
            group = self.group.to(taps.owner.device)[taps.owner]
            here = first & (group >= 0)
            for name, K in taps.K.items():
                sums = self.sums.setdefault(name, K.new_zeros(len(self.size), K.shape[1], dtype=torch.float64))
                sums.index_add_(0, group[here], K[here].double())
            yield taps

    def moment(self, name: str) -> Tensor:
        """The sum over edits of m m^T, (d_in, d_in), with m the mean of those of its answer."""
        sums = self.sums[name]
        return sums.T @ (sums / self.size.to(sums)[:, None])
