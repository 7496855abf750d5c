"""Where text becomes tokens: the one place that joins prompt and target, finds their tokens, pads, and adds BOS.

Prompt and target are joined as text, tokenized once, and told apart by character offsets. (Tokenizing " London" alone
gives SentencePiece's extra `▁`, and a BOS in the middle.) A prompt of a chat is put into the tokenizer's chat template
here, and nowhere else. Everything is padded on the right, so that a position means the same in every row; only
generation pads on the left (`pad_left`).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from . import text as texts
from .edit import Edit
from .errors import ErrataError, UsageError

EVEN = 0.8
"""The shortest row of a batch has at least this share of the longest one's tokens, unless the batch is tiny."""


TEMPLATE = {"tokenize": False, "enable_thinking": False, "date_string": "26 Jul 2024"}
"""How chat templates are asked for: without a model's own thinking, and the same text on every day."""


@dataclass(frozen=True)
class Passage:
    """A text and where its parts stand in it, counted in characters."""

    text: str
    subject: tuple[int, int] | None = None
    """Start and end of the subject."""
    target: int | None = None
    """Where the prompt ends and what should follow it begins."""
    chat: bool = False
    """Whether the prompt is a user's turn of a chat, and what follows the reply; without the template's own text."""
    gap: str | None = None
    """What stands between them in a chat; None: what the template puts there. Elsewhere it is in the text."""


def passage(edit: Edit, context: str = "{}", answer: str | None = None) -> Passage:
    """The edit's prompt inside a context (a template with `{}`), followed by `answer` if one is given."""
    before, _, after = context.partition("{}")
    start = len(before) + len(edit.around[0])
    whole = follow(f"{before}{edit.text}{after}", answer, edit.gap, edit.chat)
    return replace(whole, subject=(start, start + len(edit.subject)))


def within(p: Passage, before: str, after: str) -> Passage:
    """The passage with more text before its prompt and after it; its parts are where they went."""
    subject = p.subject and (p.subject[0] + len(before), p.subject[1] + len(before))
    prompt, follows = p.text[: p.target], "" if p.target is None else p.text[p.target :]
    prompt = before + prompt + after
    return replace(p, text=prompt + follows, subject=subject, target=None if p.target is None else len(prompt))


def follow(prompt: str, answer: str | None, gap: str | None = None, chat: bool = False) -> Passage:
    """A prompt and its answer, joined by what belongs between them (`errata.text.gap`), or by `gap`."""
    if answer is None:
        return Passage(prompt, chat=chat)
    prompt, answer = prompt.rstrip(" "), answer.strip()
    between = texts.gap(prompt, answer) if gap is None else gap
    if chat:
        return Passage(prompt + answer, target=len(prompt), chat=True, gap=gap)
    return Passage(prompt + between + answer, target=len(prompt))


@dataclass(frozen=True)
class Template:
    """What a tokenizer's chat template puts around a user's turn, up to the reply."""

    before: str
    after: str
    gap: str
    """Between that and the reply."""

    @classmethod
    def of(cls, tokenizer: Any) -> Template:
        """The template of a tokenizer.

        Raises:
            UsageError: it has none.
            ErrataError: the template can't take a turn of a user, or does not quote it.
        """
        asked = {"role": "user", "content": "\u241eQUESTION\u241e"}
        reply = {"role": "assistant", "content": "\u241eREPLY\u241e"}
        before, mark, after = conversation(tokenizer, [asked]).partition(asked["content"])
        if not mark or asked["content"] in after:
            raise ErrataError("the tokenizer's chat template does not quote a user's turn once; leave chat out")
        whole = conversation(tokenizer, [asked, reply], going_on=False)
        between = whole.partition(asked["content"])[2].partition(reply["content"])[0]
        more = between.removeprefix(after) if between.startswith(after) else ""
        return cls(before, after, more if not more.strip() else "")

    def put(self, p: Passage) -> Passage:
        """The passage inside the template."""
        around = within(p, self.before, self.after)
        if around.target is None:
            return around
        between = self.gap if p.gap is None else p.gap
        return replace(around, text=around.text[: around.target] + between + around.text[around.target :])


def conversation(tokenizer: Any, messages: Sequence[Mapping[str, str]], going_on: bool = True) -> str:
    """A conversation as the text that a model reads: up to where it replies, or (not `going_on`) to its end.

    Raises:
        UsageError: the tokenizer has no chat template.
        ErrataError: the template refuses these turns.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError("the tokenizer has no chat template; leave chat out, or take a model that was trained for it")
    try:
        return tokenizer.apply_chat_template(list(messages), add_generation_prompt=going_on, **TEMPLATE)
    except (TemplateError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise ErrataError(f"the tokenizer's chat template refuses this conversation ({why})") from error


def in_chat(tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Each prompt as a user's turn, up to where the model replies."""
    template = Template.of(tokenizer)
    return [f"{template.before}{prompt}{template.after}" for prompt in prompts]


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
    tokenizer: Any,
    passages: Sequence[Passage],
    limit: int | None = None,
    device: torch.device | str = "cpu",
    vocabulary: int | None = None,
) -> Tokens:
    """Tokenize passages into one batch.

    Args:
        tokenizer: a fast tokenizer of transformers (it must know character offsets).
        passages: at least one.
        limit: the model's context length in tokens.
        device: where the tensors go.
        vocabulary: how many tokens the model has embeddings for.

    Raises:
        UsageError: a passage is longer than `limit`, or its target can't be written in the tokenizer's vocabulary.
        ErrataError: the tokenizer has no offsets, or merges the end of the prompt with the target.
    """
    passages = _put(tokenizer, passages)
    found = _rows(tokenizer, passages)
    batch = [row.ids for row in found]
    longest = max(map(len, batch))
    if limit is not None and longest > limit:
        text = next(p.text for p, row in zip(passages, batch, strict=True) if len(row) == longest)
        raise UsageError(f"the text {_short(text)} has {longest} tokens, the model reads {limit}; shorten it")

    ids, mask = stacked(tokenizer, batch, device, vocabulary=vocabulary)
    subject = torch.tensor([row.subject[-1] for row in found])
    target = torch.zeros(ids.shape, dtype=torch.bool)
    for i, row in enumerate(found):
        if row.target is not None:
            target[i, row.target : len(row.ids)] = True
    return Tokens(ids, mask, subject.to(device), target.to(device))


def subject_tokens(tokenizer: Any, p: Passage) -> range:
    """Indices of the subject's tokens in the row of a passage that names one."""
    return _rows(tokenizer, _put(tokenizer, [p]))[0].subject


def pad_left(
    tokenizer: Any,
    prompts: Sequence[str],
    device: torch.device | str = "cpu",
    chat: bool = False,
    vocabulary: int | None = None,
) -> dict[str, Tensor]:
    """Prompts for generation: (batch, seq) ids and mask, padded on the left.

    Args:
        tokenizer: a fast one.
        prompts: at least one.
        device: where the tensors go.
        chat: whether they are what a chat template wrote, which has seen to special tokens itself.
        vocabulary: how many tokens the model has embeddings for.
    """
    start = [] if chat else prefix(tokenizer)
    rows = [_begun(start, row) for row in _tokenize(tokenizer, list(prompts))[0]]
    ids, mask = stacked(tokenizer, rows, device, left=True, vocabulary=vocabulary)
    return {"input_ids": ids, "attention_mask": mask}


def stacked(
    tokenizer: Any,
    rows: Sequence[Sequence[int]],
    device: torch.device | str = "cpu",
    left: bool = False,
    vocabulary: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows of token ids, at least one, as (batch, seq) ids and mask, padded on the right or on the left.

    Raises:
        UsageError: the model has no embedding for a token, which was added to the tokenizer alone.
    """
    longest = max(map(len, rows))
    most = max((max(row, default=0) for row in rows), default=0)
    if vocabulary is not None and most >= vocabulary:
        raise UsageError(
            f"the tokenizer has the token {tokenizer.convert_ids_to_tokens(most)!r}, for which the model has no "
            "embedding; give the model one (resize_token_embeddings), or leave the token out"
        )
    ids = torch.full((len(rows), longest), padding(tokenizer, vocabulary))
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
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


def padding(tokenizer: Any, vocabulary: int | None = None) -> int:
    """An id to pad with that the model has an embedding for: any will do, as padding is always masked."""
    for name in ("pad_token_id", "eos_token_id"):
        found = getattr(tokenizer, name, None)
        if found is not None and (vocabulary is None or found < vocabulary):
            return found
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


@dataclass(frozen=True)
class _Row:
    """The tokens of a passage."""

    ids: list[int]
    subject: range = range(-1, 0)
    """The indices of the subject's tokens."""
    target: int | None = None
    """The index of the target's first token."""

    def behind(self, start: list[int]) -> _Row:
        """The row behind special tokens."""
        ids = _begun(start, self.ids)
        more = len(ids) - len(self.ids)
        subject = range(self.subject.start + more, self.subject.stop + more) if self.subject[0] >= 0 else self.subject
        return _Row(ids, subject, None if self.target is None else self.target + more)


def _put(tokenizer: Any, passages: Sequence[Passage]) -> list[Passage]:
    """The passages, those of a chat in its template."""
    if not any(p.chat for p in passages):
        return list(passages)
    template = Template.of(tokenizer)
    return [template.put(p) if p.chat else p for p in passages]


def _rows(tokenizer: Any, passages: Sequence[Passage]) -> list[_Row]:
    start = prefix(tokenizer)
    heads = [p.text[: p.target] for p in passages if p.target is not None]
    found = zip(*_tokenize(tokenizer, [p.text for p in passages]), strict=True)
    prompts = zip(*_tokenize(tokenizer, heads), strict=True) if heads else iter(())
    rows = []
    for p, (ids, spans) in zip(passages, found, strict=True):
        row = _Row(ids)
        if p.target is not None:
            prompt, own = next(prompts)
            row = _split(tokenizer, p, ids, spans, prompt)
            spans = spans if row.ids is ids else own
        if p.subject is not None:
            row = replace(row, subject=_subject(p, spans))
        rows.append(row if p.chat else row.behind(start))  # a chat template sees to special tokens itself
    return rows


def _begun(start: list[int], ids: list[int]) -> list[int]:
    """A row with the special tokens in front, which its text may have already."""
    return ids if ids[: len(start)] == start else start + ids


def _subject(p: Passage, spans: list[tuple[int, int]]) -> range:
    """The indices of the subject's tokens."""
    assert p.subject is not None
    start, end = p.subject
    found = [i for i, (a, b) in enumerate(spans) if a < end and b > start]
    if not found:
        raise ErrataError(f"the tokenizer gives the subject {p.text[start:end]!r} no token of its own")
    return range(found[0], found[-1] + 1)


def _split(tokenizer: Any, p: Passage, ids: list[int], spans: list[tuple[int, int]], prompt: list[int]) -> _Row:
    """The row and where its target begins, after checking that the split is clean on both sides."""
    assert p.target is not None
    follows = p.text[p.target :]
    target = follows.strip()
    first = next((i for i, (_, b) in enumerate(spans) if b > p.target), len(ids))
    if ids[:first] != prompt:
        apart = None if follows[:1].isspace() else _apart(tokenizer, prompt, follows)
        if apart is None:
            raise ErrataError(
                f"the tokenizer merges the end of the prompt {_short(p.text[: p.target])} with the target {target!r}; "
                "end the prompt at a whole word"
            )
        ids, first = prompt + apart, len(prompt)
    written = _decoded(tokenizer, ids[first:])
    if first == len(ids) or _letters(written) != _letters(target):
        raise UsageError(
            f"the tokenizer writes the target {target!r} as {written.strip()!r}; "
            "choose a target that the model's vocabulary can write"
        )
    return _Row(ids, target=first)


def _apart(tokenizer: Any, prompt: list[int], follows: str) -> list[int] | None:
    """The tokens of what follows a prompt without a space, where both together have a token across the boundary.

    A model that has read the prompt has read its own tokens, and goes on from there. The text alone may begin with more
    (SentencePiece's `▁`), so that it is also tried behind signs that nothing is merged with.
    """
    said = _decoded(tokenizer, prompt)
    for sign in ("", "\n", ":"):
        alone, whole = _tokenize(tokenizer, [sign, sign + follows])[0]
        ids = whole[len(alone) :]
        if whole[: len(alone)] == alone and _decoded(tokenizer, prompt + ids) == said + follows:
            return ids
    return None


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def _letters(text: str) -> str:
    """A text without what a tokenizer may write otherwise and still mean the same: spaces, case, accents' form."""
    decomposed = unicodedata.normalize("NFD", "".join(text.split()).lower())
    return "".join(c for c in decomposed if not unicodedata.category(c).startswith("M"))


def _short(text: str, most: int = 60) -> str:
    return repr(text if len(text) <= most else text[:most] + "…")
