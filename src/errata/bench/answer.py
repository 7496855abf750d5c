"""Asking a model: what it answers to probes, as raw answers without a score.

Everything is asked in batches as large as their tokens allow. A question that can't be asked (its answer can't be
written in the model's vocabulary, it is longer than the context) gets an answer that says why; the others are asked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch

from ..data import Probe
from ..errors import ErrataError, UsageError
from ..lm import LM
from ..patch import Patch, applied_by_row
from ..tokens import Passage, Tokens, follow, prefix
from . import memory, writing

TOKENS = 4096
"""Tokens in one pass, padding included. Changes the memory, not the answers."""
NEW_TOKENS = 24
"""At most so many tokens are generated before an answer is cut off."""

CHAT = False
"""Whether what the model answers by itself is asked as a user's turn, by its tokenizer's chat template."""

T = TypeVar("T")


@dataclass(frozen=True)
class Spoken:
    """What a model thinks of an answer that is put in its mouth."""

    ids: tuple[int, ...]
    """The tokens of the answer, in its place behind the prompt."""
    argmax: tuple[int, ...]
    """The tokens the model would rather have said at each place, all before it being the answer's own."""
    logprob: float
    """The mean log-probability of the answer's tokens."""


@dataclass(frozen=True)
class Answer:
    """All that was asked of a model about one probe."""

    answer: Spoken | None = None
    other: Spoken | None = None
    text: str | None = None
    """What the model says by itself, greedily, up to its natural stop."""
    unasked: Mapping[str, str] | None = None
    """Why something of this is missing, by its name."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Answer:
        """The answer that `to_dict` gave, to the bit."""
        return cls(_spoken_again(found["answer"]), _spoken_again(found["other"]), found["text"], found["unasked"])


def _spoken_again(found: Mapping[str, Any] | None) -> Spoken | None:
    if found is None:
        return None
    return Spoken(tuple(found["ids"]), tuple(found["argmax"]), found["logprob"])


def ask(lm: LM, probes: Sequence[Probe], patches: Sequence[Patch] | None = None) -> list[Answer]:
    """Ask every probe.

    Args:
        lm: the model as it is: with nothing, or whatever is applied to it.
        probes: the questions.
        patches: one for each probe, that can go by row; each is asked of the model with its patch, in shared passes.
    """
    asked = _Asking(lm, patches)
    out = [Answer() for _ in probes]
    wanted: list[tuple[str, Callable[[list[Any]], list[Any]], list[Any]]] = [
        ("answer", asked.put, [(i, follow(p.prompt, p.answer)) for i, p in enumerate(probes) if p.kind != "opening"]),
        ("other", asked.put, [(i, follow(p.prompt, p.other)) for i, p in enumerate(probes) if p.other]),
        ("text", asked.listen, [(i, _put(lm, p.prompt)) for i, p in enumerate(probes) if p.kind != "opening"]),
        ("text", asked.write, [(i, p.prompt) for i, p in enumerate(probes) if p.kind == "opening"]),
    ]
    with lm.frozen(), torch.no_grad():
        for name, how, questions in wanted:
            for (i, _), found in zip(questions, tolerant(how, questions), strict=True):
                if isinstance(found, ErrataError):
                    out[i] = replace(out[i], unasked={**(out[i].unasked or {}), name: str(found)})
                else:
                    out[i] = replace(out[i], **{name: found})
    return out


def ask_cases(lm: LM, groups: Sequence[Sequence[Probe]], patches: Sequence[Patch] | None = None) -> list[list[Answer]]:
    """Ask the probes of several cases together; with `patches`, every case of the model that has its patch."""
    rows = [patches[i] for i, group in enumerate(groups) for _ in group] if patches is not None else None
    found = iter(ask(lm, [p for group in groups for p in group], rows))
    return [[next(found) for _ in group] for group in groups]


def tolerant(do: Callable[[list[T]], list[Any]], items: list[T]) -> list[Any]:
    """`do(items)`, or where that fails the same in halves; an item that fails alone gives its error."""
    if not items:
        return []
    try:
        return do(items)
    except ErrataError as error:
        if len(items) == 1:
            return [error]
    half = len(items) // 2
    return tolerant(do, items[:half]) + tolerant(do, items[half:])


class _Asking:
    """Ways of asking one model (or, with patches, one model a row) many questions; a question carries its row."""

    def __init__(self, lm: LM, patches: Sequence[Patch] | None) -> None:
        self.lm, self.patches = lm, patches

    def put(self, questions: list[tuple[int, Passage]]) -> list[Spoken]:
        """Read answers with teacher forcing."""
        tokens = self.lm.encode([passage for _, passage in questions])
        out: list[Spoken | None] = [None] * len(questions)

        def read(rows: list[int]) -> None:
            with self._patched([questions[i][0] for i in rows]):
                for i, spoken in zip(rows, _spoken(self.lm, _only(tokens, rows)), strict=True):
                    out[i] = spoken

        for rows in batches(tokens.mask.sum(1).tolist()):
            fitting(read, rows)
        return [spoken for spoken in out if spoken is not None]

    def listen(self, questions: list[tuple[int, str]]) -> list[str]:
        """Let the model answer by itself."""
        return [stopped(text) for text in self._heard(questions, NEW_TOKENS, ended)]

    def write(self, openings: list[tuple[int, str]]) -> list[str]:
        """Let the model write on at length."""
        return self._heard(openings, writing.NEW_TOKENS, None)

    def _heard(self, prompts: list[tuple[int, str]], most: int, until: Callable[[str], bool] | None) -> list[str]:
        lengths = self.lm.encode([Passage(prompt) for _, prompt in prompts]).mask.sum(1)
        out = [""] * len(prompts)

        def hear(rows: list[int]) -> None:
            with self._patched([prompts[i][0] for i in rows]):
                texts = self.lm.generate([prompts[i][1] for i in rows], max_new_tokens=most, until=until)
            for i, text in zip(rows, texts, strict=True):
                out[i] = text

        for rows in batches((lengths + most).tolist()):
            fitting(hear, rows)
        return out

    def _patched(self, rows: Sequence[int]) -> AbstractContextManager[Any]:
        return nullcontext() if self.patches is None else applied_by_row(self.lm, [self.patches[i] for i in rows])


def _put(lm: LM, prompt: str) -> str:
    """A question as it is put to the model: as it stands, or as a user's turn of a chat."""
    if not CHAT:
        return prompt
    if not getattr(lm.tokenizer, "chat_template", None):
        raise UsageError(f"{lm.name} has no chat template in its tokenizer; leave chat out")
    turn = [{"role": "user", "content": prompt}]
    text = lm.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    start = lm.tokenizer.decode(prefix(lm.tokenizer))  # what is put before a text anyway
    return text.removeprefix(start) if start else text


def fitting(do: Callable[[list[int]], None], rows: list[int]) -> None:
    """`do(rows)`, or where memory runs out the same in halves."""
    try:
        return do(rows)
    except (RuntimeError, MemoryError) as error:
        if len(rows) == 1 or not memory.exhausted(error):
            raise
    half = len(rows) // 2  # outside the handler, which would keep the failed pass alive
    fitting(do, rows[:half])
    fitting(do, rows[half:])


def batches(lengths: Sequence[int], most: int = TOKENS) -> Iterator[list[int]]:
    """Rows of like length together, so that a padded batch has at most so many tokens (or one row).

    The longest come first: what does not fit, in the context or in memory, is known at once.
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if batch and (len(batch) + 1) * lengths[batch[0]] > most:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _only(tokens: Tokens, rows: Sequence[int]) -> Tokens:
    """Some rows of a batch, without the padding that none of them needs."""
    some = tokens[torch.tensor(rows, device=tokens.ids.device)]
    longest = int(some.mask.sum(1).max())
    ids, mask, target = (t[:, :longest] for t in (some.ids, some.mask, some.target))
    return replace(some, ids=ids, mask=mask, target=target)


def _spoken(lm: LM, tokens: Tokens) -> list[Spoken]:
    logits = lm.said(tokens)
    wanted = tokens.wanted
    said = logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(1)
    sizes = tokens.target.sum(1).tolist()
    answers = zip(wanted.split(sizes), logits.argmax(1).split(sizes), said.split(sizes), strict=True)
    return [Spoken(tuple(ids.tolist()), tuple(best.tolist()), float(p.mean())) for ids, best, p in answers]


_ABBREVIATION = re.compile(r"(?:^|[\s(])(?:\w|(?:\w\.)+\w|St|Ste|Mt|Ft|Mr|Mrs|Ms|Dr|Jr|Sr|Prof|Rev|Gen|No|vs)$")


def stopped(text: str) -> str:
    """What was said up to the first line break or the end of the first sentence; at its end token a model stops itself.

    A full stop after an initial or a common abbreviation (`J. R. R. Tolkien`, `St. Louis`, `U.S. Army`) ends nothing.
    """
    line = _line(text)
    for end in re.finditer(r"[.!?。！？]+[\"'”’)]*(?=\s|$)", line):
        if end[0] != "." or not _ABBREVIATION.search(line[: end.start()]):
            return line[: end.end()]
    return line


def ended(text: str) -> bool:
    """Whether `stopped` says the same of this text however it goes on."""
    return "\n" in text or len(stopped(text)) < len(_line(text))


def _line(text: str) -> str:
    return text.lstrip(" ").split("\n", 1)[0].rstrip()
