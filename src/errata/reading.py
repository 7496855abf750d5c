"""Prompts that a model reads once, and what may come after them: answers put in its mouth, or what it says by itself.

One pass over the prompts fills a cache and tells what comes first; every answer then goes on from there, on its own
tokens alone. Rows whose text is over leave the batch. Where a model's cache can't be gone on from, or not in that way,
whole texts are read instead (`errata.past.proven`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from .lm import LM
from .past import Past, Use, empty, hooked, proven, takes
from .rounding import alike

T = TypeVar("T")

JUDGED = 4
"""Rows of different paddings, at most, that are held against plain passes."""

Ids = Sequence[int]
Edited = Callable[[list[int]], AbstractContextManager[Any]]
"""What is in place while a pass runs over these of the prompts, in this order: a patch for each row, or nothing."""
Until = Callable[[str], bool]
"""Told a text so far, says whether it has gone far enough."""


class Reading(Protocol):
    """Prompts, and what one model makes of them."""

    def forced(self, answers: Sequence[tuple[int, Ids]]) -> list[Tensor]:
        """Logits (tokens, vocabulary) at every token of answers, each put behind the prompt of a number."""
        ...

    def greedy(self, rows: list[int], most: int, until: Until | None) -> list[str]:
        """What the model says by itself behind these prompts: up to its end, `until`, or so many tokens."""
        ...


def read(lm: LM, prompts: Sequence[Ids], edited: Edited) -> Reading:
    """The cheapest exact way to hear what may come after prompts, as token ids; at least one."""
    return _Proven(lm, prompts, edited)


@dataclass(frozen=True)
class _Said:
    """What a model said by itself, row by row."""

    ids: list[list[int]]
    logprobs: list[list[float]]
    """Of every token."""


class _Proven:
    """Prompts that are gone on from where that is proven, else read again with every answer."""

    def __init__(self, lm: LM, prompts: Sequence[Ids], edited: Edited) -> None:
        self.lm, self.prompts, self.again = lm, prompts, Again(lm, prompts, edited)
        self.gone_on = False
        """Whether anything was asked before."""

    @cached_property
    def once(self) -> Once:
        return Once(self.lm, self.prompts, self.again.edited)

    @cached_property
    def hooked(self) -> Any:
        with self.again.edited([0]):
            return hooked(self.lm)

    def forced(self, answers: Sequence[tuple[int, Ids]]) -> list[Tensor]:
        if not answers:
            return []
        asked = [(row, len(answer)) for row, answer in answers]

        def agrees(found: list[Tensor]) -> bool:
            some = _telling([(len(self.prompts[row]), length) for row, length in asked])
            plain = self.again.forced([answers[i] for i in some])
            return all(alike(self.lm.dtype, found[i], want) for i, want in zip(some, plain, strict=True))

        found = self._proven("forced", lambda: self.once.forced(answers), lambda _: asked, agrees)
        return self.again.forced(answers) if found is None else found

    def greedy(self, rows: list[int], most: int, until: Until | None) -> list[str]:
        def asked(said: _Said) -> list[tuple[int, int]]:
            return [(row, len(ids)) for row, ids in zip(rows, said.ids, strict=True)]

        def agrees(said: _Said) -> bool:
            some = _telling([(len(self.prompts[row]), length) for row, length in asked(said)])
            plain = self.again.forced([(rows[i], said.ids[i]) for i in some])
            return all(_said(self.lm, said, i, want) for i, want in zip(some, plain, strict=True))

        said = self._proven("greedy", lambda: self.once.greedy(rows, most, until), asked, agrees)
        return self.lm.texts((said or self.again.greedy(rows, most, until)).ids)

    def _proven(
        self, what: str, make: Callable[[], T], asked: Callable[[T], list[tuple[int, int]]], agrees: Callable[[T], bool]
    ) -> T | None:
        """What is heard by going on from the cache.

        Args:
            what: way of asking.
            make: asks.
            asked: prompts and how many tokens came after each.
            agrees: holds what was heard against whole texts.
        """

        gone_on, self.gone_on = self.gone_on, True

        def use(made: T) -> Use:
            rows = asked(made)
            longest = max(map(len, self.prompts))
            before, after = [len(self.prompts[row]) for row, _ in rows], [length for _, length in rows]
            uneven = min(map(len, self.prompts)) < longest, min(after) < max(after)
            whole = [row for row, _ in rows] == list(range(len(self.prompts)))
            # a state may take padding in steps: which rows have how much of it is then a use of its own
            padding = None if self.once.past.grows else frozenset(longest - length for length in before)
            kind = *uneven, len(rows) > 1, whole, gone_on, padding, self.hooked
            return kind, (max(before), max(after), max(map(sum, zip(before, after, strict=True))))

        return proven(self.lm, ("goes on", what), "gone on from its cache", make, use, agrees)


def _telling(rows: Sequence[tuple[int, int]]) -> list[int]:
    """Rows by which all are judged: the one with the longest answer, and some from the shortest to the longest prompt.

    Args:
        rows: tokens of each prompt and of what came after.
    """
    best: dict[int, int] = {}
    for i in sorted(range(len(rows)), key=lambda i: rows[i][1]):
        best[rows[i][0]] = i  # of a prompt's length, the row with the longest answer
    lengths, longest = sorted(best), max(range(len(rows)), key=lambda i: rows[i][1])
    chosen = {lengths[k * (len(lengths) - 1) // (JUDGED - 1)] for k in range(JUDGED)}
    return sorted({longest, *(best[length] for length in chosen)})


def _said(lm: LM, said: _Said, row: int, logits: Tensor) -> bool:
    """Whether a row's log-probabilities are those of its tokens by the logits of a plain pass."""
    want = logits.gather(1, torch.tensor(said.ids[row], device=logits.device)[:, None])[:, 0] - logits.logsumexp(1)
    return alike(lm.dtype, want.new_tensor(said.logprobs[row]), want, logits)


class Again:
    """Every answer is read with its prompt, and every token that is said with all before it."""

    def __init__(self, lm: LM, prompts: Sequence[Ids], edited: Edited) -> None:
        self.lm, self.prompts, self.edited = lm, prompts, edited

    def forced(self, answers: Sequence[tuple[int, Ids]]) -> list[Tensor]:
        rows, texts = [row for row, _ in answers], [[*self.prompts[row], *answer[:-1]] for row, answer in answers]
        ids, mask = self.lm.stacked(texts)
        asked = mask.clone()
        for i, row in enumerate(rows):
            asked[i, : len(self.prompts[row]) - 1] = 0
        with self.edited(rows):
            said = self.lm.logits(*asked.nonzero(as_tuple=True), input_ids=ids, attention_mask=mask)
        return list(said.split([len(answer) for _, answer in answers]))

    def greedy(self, rows: list[int], most: int, until: Until | None) -> _Said:
        def on(going: list[int], said: list[list[int]]) -> Tensor:
            texts = [[*self.prompts[rows[i]], *said[i]] for i in going]
            ids, mask = self.lm.stacked(texts)
            with self.edited([rows[i] for i in going]):
                here = torch.arange(len(going), device=self.lm.device)
                return self.lm.logits(here, mask.sum(1) - 1, input_ids=ids, attention_mask=mask)

        return _spoken(self.lm, len(rows), most, until, on)


def _spoken(
    lm: LM, rows: int, most: int, until: Until | None, on: Callable[[list[int], list[list[int]]], Tensor]
) -> _Said:
    """What is likeliest, token by token.

    Args:
        lm: the model.
        rows: how many.
        most: tokens.
        until: told a text so far, says whether it has gone far enough.
        on: gives the logits of what comes next in those rows that go on, after what each said so far.
    """
    said, logprobs = [[] for _ in range(rows)], [[] for _ in range(rows)]
    going = list(range(rows))
    while going:
        logits = on(going, said)
        likeliest = logits.max(1)
        likely = (likeliest.values - logits.logsumexp(1)).tolist()
        for i, token, logprob in zip(going, likeliest.indices.tolist(), likely, strict=True):
            said[i].append(token)
            logprobs[i].append(logprob)
        over = {i for i in going if said[i][-1] in lm.end_tokens or len(said[i]) == most}
        if until is not None:
            over |= {i for i, text in zip(going, lm.texts([said[i] for i in going]), strict=True) if until(text)}
        going = [i for i in going if i not in over]
    return _Said(said, logprobs)


class Once:
    """Every prompt is read once, and gone on from."""

    def __init__(self, lm: LM, prompts: Sequence[Ids], edited: Edited) -> None:
        self.lm = lm
        self.whole = _Rows(lm, edited, empty(lm), list(range(len(prompts))))
        self.first = self.whole.read(*lm.stacked(prompts, left=True), last=True)
        """Logits (prompts, vocabulary) of the token after each."""
        self.past = Past(self.whole.cache)

    def forced(self, answers: Sequence[tuple[int, Ids]]) -> list[Tensor]:
        out = [self.first[row, None] for row, _ in answers]
        longer = [i for i, (_, answer) in enumerate(answers) if len(answer) > 1]
        if longer:
            ids, mask = self.lm.stacked([answers[i][1][:-1] for i in longer])
            with self._from([answers[i][0] for i in longer]) as batch:
                later = batch.read(ids, mask).split(mask.sum(1).tolist())
            for i, more in zip(longer, later, strict=True):
                out[i] = torch.cat([out[i], more])
        return out

    def greedy(self, rows: list[int], most: int, until: Until | None) -> _Said:
        with self._from(rows) as batch:
            there = list(range(len(rows)))

            def on(going: list[int], said: list[list[int]]) -> Tensor:
                nonlocal there
                if not said[going[0]]:
                    return self.first[rows]
                batch.keep([there.index(i) for i in going])
                there = going
                ids = torch.tensor([said[i][-1:] for i in going], device=self.lm.device)
                return batch.read(ids, torch.ones_like(ids))

            return _spoken(self.lm, len(rows), most, until, on)

    @contextmanager
    def _from(self, rows: list[int]) -> Iterator[_Rows]:
        """These of the prompts, as they were read."""
        with self.past.as_it_was() as cache:
            batch = _Rows(self.lm, self.whole.edited, cache, self.whole.rows, self.whole.mask)
            batch.keep(rows)
            yield batch


class _Rows:
    """Rows of a batch on their way: what they have read so far, and the numbers of their prompts."""

    def __init__(self, lm: LM, edited: Edited, cache: Any, rows: list[int], mask: Tensor | None = None) -> None:
        self.lm, self.edited, self.cache, self.rows = lm, edited, cache, rows
        self.mask = torch.zeros(len(rows), 0, dtype=torch.long, device=lm.device) if mask is None else mask

    def keep(self, rows: list[int]) -> None:
        """From now on the batch is these rows of it."""
        if rows != list(range(len(self.rows))):
            self.cache.reorder_cache(torch.tensor(rows, device=self.lm.device))
            self.rows, self.mask = [self.rows[row] for row in rows], self.mask[rows]

    def read(self, ids: Tensor, mask: Tensor, last: bool = False) -> Tensor:
        """Read on; logits (m, vocabulary) at every token, or only in the last column."""
        places = (self.mask.sum(1, keepdim=True) + mask.cumsum(1) - 1).clamp(min=0)
        self.mask = torch.cat([self.mask, mask], 1)
        inputs = {"input_ids": ids, "attention_mask": self.mask, "past_key_values": self.cache, "use_cache": True}
        if takes(self.lm, "position_ids"):
            inputs["position_ids"] = places
        asked = mask.clone()
        asked[:, : -1 if last else 0] = 0
        with self.edited(self.rows):
            return self.lm.logits(*asked.nonzero(as_tuple=True), **inputs)
