"""Prompts that a model reads once, and what may come after them: answers put in its mouth, or what it says by itself.

One pass over the prompts fills a cache and tells what comes first; every answer then goes on from there, on its own
tokens alone. Rows whose text is over leave the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from .lm import LM
from .past import Past, empty, proven, takes_positions
from .tokens import stacked

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
    again = Again(lm, prompts, edited)

    def both(once: Once) -> tuple[Tensor, Tensor]:
        rows = list(range(min(2, len(prompts))))
        answers = [(row, [token] * 3) for row, token in zip(rows, once.first[rows].argmax(1).tolist(), strict=True)]
        got, want = (torch.cat(way.forced(answers)) for way in (once, again))
        return got, want

    return proven(lm, "goes on", "gone on from its cache", lambda: Once(lm, prompts, edited), both) or again


class Again:
    """Every answer is read with its prompt."""

    def __init__(self, lm: LM, prompts: Sequence[Ids], edited: Edited) -> None:
        self.lm, self.prompts, self.edited = lm, prompts, edited

    def forced(self, answers: Sequence[tuple[int, Ids]]) -> list[Tensor]:
        rows, texts = [row for row, _ in answers], [[*self.prompts[row], *answer[:-1]] for row, answer in answers]
        ids, mask = stacked(self.lm.tokenizer, texts, self.lm.device)
        asked = mask.clone()
        for i, row in enumerate(rows):
            asked[i, : len(self.prompts[row]) - 1] = 0
        with self.edited(rows):
            said = self.lm.logits(*asked.nonzero(as_tuple=True), input_ids=ids, attention_mask=mask)
        return list(said.split([len(answer) for _, answer in answers]))

    def greedy(self, rows: list[int], most: int, until: Until | None) -> list[str]:
        ids, mask = stacked(self.lm.tokenizer, [self.prompts[row] for row in rows], self.lm.device, left=True)
        inputs, length = {"input_ids": ids, "attention_mask": mask}, ids.shape[1]
        with self.edited(rows):
            out = self.lm.continued(inputs, self.lm.stop(length, until), do_sample=False, max_new_tokens=most)
        return self.lm.texts(out[:, length:])


class Once:
    """Every prompt is read once, and gone on from."""

    def __init__(self, lm: LM, prompts: Sequence[Ids], edited: Edited) -> None:
        self.lm = lm
        self.whole = _Rows(lm, edited, empty(lm), list(range(len(prompts))))
        self.first = self.whole.read(*stacked(lm.tokenizer, prompts, lm.device, left=True), last=True)
        """Logits (prompts, vocabulary) of the token after each."""
        self.past = Past(self.whole.cache)

    def forced(self, answers: Sequence[tuple[int, Ids]]) -> list[Tensor]:
        out = [self.first[row, None] for row, _ in answers]
        longer = [i for i, (_, answer) in enumerate(answers) if len(answer) > 1]
        if longer:
            ids, mask = stacked(self.lm.tokenizer, [answers[i][1][:-1] for i in longer], self.lm.device)
            with self._from([answers[i][0] for i in longer]) as batch:
                later = batch.read(ids, mask).split(mask.sum(1).tolist())
            for i, more in zip(longer, later, strict=True):
                out[i] = torch.cat([out[i], more])
        return out

    def greedy(self, rows: list[int], most: int, until: Until | None) -> list[str]:
        said: list[list[int]] = [[] for _ in rows]
        going, logits = list(range(len(rows))), self.first[rows]
        with self._from(rows) as batch:
            while True:
                for i, token in zip(going, logits.argmax(1).tolist(), strict=True):
                    said[i].append(token)
                over = self._over([said[i] for i in going], until)
                stay = [k for k, i in enumerate(going) if not over[k] and len(said[i]) < most]
                if not stay:
                    return self.lm.texts(said)
                batch.keep(stay)
                going = [going[k] for k in stay]
                ids = torch.tensor([said[i][-1:] for i in going], device=self.lm.device)
                logits = batch.read(ids, torch.ones_like(ids))

    def _over(self, said: Sequence[Ids], until: Until | None) -> list[bool]:
        ended = [ids[-1] in self.lm.end_tokens for ids in said]
        return ended if until is None else [e or until(t) for e, t in zip(ended, self.lm.texts(said), strict=True)]

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
            self.cache.batch_select_indices(torch.tensor(rows, device=self.lm.device))
            self.rows, self.mask = [self.rows[row] for row in rows], self.mask[rows]

    def read(self, ids: Tensor, mask: Tensor, last: bool = False) -> Tensor:
        """Read on; logits (m, vocabulary) at every token, or only in the last column."""
        places = (self.mask.sum(1, keepdim=True) + mask.cumsum(1) - 1).clamp(min=0)
        self.mask = torch.cat([self.mask, mask], 1)
        inputs = {"input_ids": ids, "attention_mask": self.mask, "past_key_values": self.cache, "use_cache": True}
        if takes_positions(self.lm):
            inputs["position_ids"] = places
        asked = mask.clone()
        asked[:, : -1 if last else 0] = 0
        with self.edited(self.rows):
            return self.lm.logits(*asked.nonzero(as_tuple=True), **inputs)
