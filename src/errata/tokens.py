"""Where text becomes tokens: the one place that joins prompt and target, finds their tokens, pads, and adds BOS.

Prompt and target are joined as text, tokenized once, and told apart by character offsets. (Tokenizing " London" alone
gives SentencePiece's extra `▁`, and a BOS in the middle.) Everything is padded on the right, so that a position means
the same in every row; only generation pads on the left (`pad_left`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from .edit import Edit
from .errors import ErrataError, UsageError

EVEN = 0.8
"""The shortest row of a batch has at least this share of the longest one's tokens, unless the batch is tiny."""


@dataclass(frozen=True)
class Passage:
    """A text and where its parts stand in it, counted in characters."""

    text: str
    subject: tuple[int, int] | None = None
    """Start and end of the subject."""
    target: int | None = None
    """Where the prompt ends and what should follow it begins."""


def passage(edit: Edit, context: str = "{}", answer: str | None = None) -> Passage:
    """The edit's prompt inside a context (a template with `{}`), followed by `answer` if one is given."""
    before = context.index("{}")
    start = before + edit.prompt.index("{}")
    whole = follow(context.replace("{}", edit.text), answer)
    return replace(whole, subject=(start, start + len(edit.subject)))


def within(p: Passage, before: str, after: str) -> Passage:
    """The passage with more text before its prompt and after it; its parts are where they went."""
    subject = p.subject and (p.subject[0] + len(before), p.subject[1] + len(before))
    prompt, follows = p.text[: p.target], "" if p.target is None else p.text[p.target :]
    prompt = before + prompt + after
    return Passage(prompt + follows, subject, None if p.target is None else len(prompt))


def follow(prompt: str, answer: str | None) -> Passage:
    """A prompt and its answer joined by exactly one space (none after a line break)."""
    if answer is None:
        return Passage(prompt)
    prompt = prompt.rstrip(" ")
    gap = "" if not prompt or prompt[-1].isspace() else " "
    return Passage(prompt + gap + answer.strip(), target=len(prompt))


@dataclass(frozen=True)
class Tokens:
    """A batch of tokenized passages, padded on the right."""

    ids: Tensor
    """(batch, seq) int64."""
    mask: Tensor
    """(batch, seq) int64: 1 on tokens, 0 on padding."""
    subject: Tensor
    """(batch,) int64: the index of the subject's last token, -1 where the passage names none."""
    target: Tensor
    """(batch, seq) bool: the tokens of the target."""
    answerer: Tensor | None = None
    """(batch,) int64, who answers each row: 0 the model itself, n the n-th of `LM.readers`. None: the model, all."""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Tensor | slice) -> Tokens:
        answerer = None if self.answerer is None else self.answerer[rows]
        return Tokens(self.ids[rows], self.mask[rows], self.subject[rows], self.target[rows], answerer)

    def until(self, last: Tensor) -> Tokens:
        """The rows up to a column each, (batch,), and no more columns than that takes."""
        width = int(last.max()) + 1
        here = torch.arange(width, device=last.device) <= last[:, None]
        mask = self.mask[:, :width] * here
        return replace(self, ids=self.ids[:, :width], mask=mask, target=self.target[:, :width] & here)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a model is called with."""
        return {"input_ids": self.ids, "attention_mask": self.mask}

    @property
    def last(self) -> Tensor:
        """(batch,) int64: the index of each row's last token."""
        return self.mask.sum(1) - 1

    @property
    def ends(self) -> Tensor:
        """(batch,) int64: the index of the last token that has to be read: a target's own last is only predicted."""
        return self.last - self.target.gather(1, self.last[:, None])[:, 0].long()

    @property
    def asked(self) -> Tensor:
        """(batch,) int64: the index of the prompt's last token, in rows that have a target."""
        return self.target.long().argmax(1) - 1

    @property
    def reads(self) -> tuple[Tensor, Tensor]:
        """Rows and columns at which a model predicts the target's tokens, row by row; both (m,)."""
        rows, cols = self.target.nonzero(as_tuple=True)
        return rows, cols - 1

    @property
    def wanted(self) -> Tensor:
        """(m,) int64: the target's tokens, in the order of `reads`."""
        return self.ids[self.target]

    def to_say(self, rows: Tensor, cols: Tensor) -> Tensor:
        """(m, most + 1) int64: the target's tokens behind positions (rows, cols), both (m,); -1 behind the last."""
        some = zip(self.ids[rows], self.target[rows], cols.tolist(), strict=True)
        parts = [ids[col + 1 :][here[col + 1 :]] for ids, here, col in some]
        return pad(pad_sequence(parts, batch_first=True, padding_value=-1), (0, 1), value=-1)


def encode(
    tokenizer: Any, passages: Sequence[Passage], limit: int | None = None, device: torch.device | str = "cpu"
) -> Tokens:
    """Tokenize passages into one batch.

    Args:
        tokenizer: a fast tokenizer of transformers (it must know character offsets).
        passages: at least one.
        limit: the model's context length in tokens.
        device: where the tensors go.

    Raises:
        UsageError: a passage is longer than `limit`, or its target can't be written in the tokenizer's vocabulary.
        ErrataError: the tokenizer has no offsets, or merges the end of the prompt with the target.
    """
    start = prefix(tokenizer)
    found, spans = _tokenize(tokenizer, [p.text for p in passages])
    batch = [start + row for row in found]
    longest = max(map(len, batch))
    if limit is not None and longest > limit:
        text = next(p.text for p, row in zip(passages, batch, strict=True) if len(row) == longest)
        raise UsageError(f"the text {_short(text)} has {longest} tokens, the model reads {limit}; shorten it")

    ids, mask = stacked(tokenizer, batch, device)
    subject, target = torch.full((len(batch),), -1), torch.zeros(ids.shape, dtype=torch.bool)
    heads = [p.text[: p.target] for p in passages if p.target is not None]
    prompts = iter(_tokenize(tokenizer, heads)[0] if heads else ())
    for i, (p, row) in enumerate(zip(passages, found, strict=True)):
        if p.subject is not None:
            subject[i] = len(start) + _last_token(p, spans[i])
        if p.target is not None:
            first = _first_token(tokenizer, p, row, spans[i], next(prompts))
            target[i, len(start) + first : len(start) + len(row)] = True
    return Tokens(ids, mask, subject.to(device), target.to(device))


def pad_left(tokenizer: Any, prompts: Sequence[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Prompts for generation: (batch, seq) ids and mask, padded on the left."""
    start = prefix(tokenizer)
    rows = [start + row for row in _tokenize(tokenizer, list(prompts))[0]]
    ids, mask = stacked(tokenizer, rows, device, left=True)
    return {"input_ids": ids, "attention_mask": mask}


def stacked(
    tokenizer: Any, rows: Sequence[Sequence[int]], device: torch.device | str = "cpu", left: bool = False
) -> tuple[Tensor, Tensor]:
    """Rows of token ids, at least one, as (batch, seq) ids and mask, padded on the right or on the left."""
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), padding(tokenizer)), torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        here = slice(longest - len(row), longest) if left else slice(len(row))
        ids[i, here], mask[i, here] = torch.tensor(row), 1
    return ids.to(device), mask.to(device)


def batches(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Rows of like length together, so that a padded batch has at most so many tokens (or one row).

    The longest come first: what does not fit, in the context or in memory, is known at once.
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        longest = lengths[batch[0]] if batch else 0
        uneven = lengths[i] < EVEN * longest and len(batch) * longest >= most // 32
        if batch and (uneven or (len(batch) + 1) * longest > most):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def prefix(tokenizer: Any) -> list[int]:
    """The special tokens (BOS, mostly) that the tokenizer puts before a text; what it puts after is left out."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start]
    raise ErrataError(f"{type(tokenizer).__name__} encodes a text differently with and without special tokens")


def padding(tokenizer: Any) -> int:
    """An id to pad with: any will do, as padding is always masked."""
    for name in ("pad_token_id", "eos_token_id"):
        if getattr(tokenizer, name, None) is not None:
            return getattr(tokenizer, name)
    return 0


def _tokenize(tokenizer: Any, texts: list[str]) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
    if not getattr(tokenizer, "is_fast", False):
        raise ErrataError(
            f"{type(tokenizer).__name__} can't tell which characters a token covers; load the model's fast tokenizer"
        )
    found = tokenizer(
        texts, add_special_tokens=False, return_offsets_mapping=True, padding=False, truncation=False, verbose=False
    )
    return found["input_ids"], found["offset_mapping"]


def _last_token(p: Passage, spans: list[tuple[int, int]]) -> int:
    assert p.subject is not None
    start, end = p.subject
    found = [i for i, (a, b) in enumerate(spans) if a < end and b > start]
    if not found:
        raise ErrataError(f"the tokenizer gives the subject {p.text[start:end]!r} no token of its own")
    return found[-1]


def _first_token(tokenizer: Any, p: Passage, ids: list[int], spans: list[tuple[int, int]], prompt: list[int]) -> int:
    """The index of the target's first token, after checking that the split is clean on both sides."""
    assert p.target is not None
    target = p.text[p.target :].strip()
    first = next((i for i, (_, b) in enumerate(spans) if b > p.target), len(ids))
    if ids[:first] != prompt:
        raise ErrataError(
            f"the tokenizer merges the end of the prompt {_short(p.text[: p.target])} with the target {target!r}; "
            "end the prompt at a whole word"
        )
    written = tokenizer.decode(ids[first:], clean_up_tokenization_spaces=False)
    if first == len(ids) or "".join(written.split()) != "".join(target.split()):
        raise UsageError(
            f"the tokenizer writes the target {target!r} as {written.strip()!r}; "
            "choose a target that the model's vocabulary can write"
        )
    return first


def _short(text: str, most: int = 60) -> str:
    return repr(text if len(text) <= most else text[:most] + "…")
