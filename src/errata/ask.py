"""Asking a model: the one room below all who ask, the shell and the export as well as the benchmark.

`ask` gives raw answers to probes, without a score; `reply` what a model says to the prompts of edits, and whether that
is the target. Everything is asked in batches as large as their tokens allow. A question that can't be asked (its answer
can't be written in the model's vocabulary, it is longer than the context) gets an answer that says why; the others are
asked.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import memory
from . import text as texts
from .data import Case, Probe
from .edit import Edit
from .errors import ErrataError
from .lm import ANSWER, LM
from .patch import Patch, applied_by_row
from .reading import read
from .tokens import Passage, Template, batches, follow

TOKENS = 4096
"""Tokens in one pass, padding included. Changes the memory, not the answers."""
NEW_TOKENS = 24
"""At most so many tokens are generated before an answer is cut off."""
TOGETHER = 64
"""Facts that a model is asked in one go whether it knows them."""
AT_LENGTH = 100
"""Tokens that a model writes from an opening."""

T = TypeVar("T")


@dataclass(frozen=True)
class Asking:
    """How questions are put."""

    new_tokens: int = field(default_factory=lambda: NEW_TOKENS)
    """At most so many tokens are generated before an answer is cut off."""
    at_length: int = field(default_factory=lambda: AT_LENGTH)
    """Tokens that the model writes from an opening."""
    chat: bool = False
    """Whether every question is a user's turn, by the tokenizer's chat template; otherwise those that say so."""


@dataclass(frozen=True)
class Spoken:
    """What a model thinks of an answer that is put in its mouth."""

    ids: tuple[int, ...]
    """The tokens of the answer, in its place behind the prompt."""
    argmax: tuple[int, ...]
    """The tokens the model would rather have said at each place, all before it being the answer's own."""
    logprob: float
    """The mean log-probability of the answer's tokens."""

    @property
    def p(self) -> float:
        """The probability of the whole answer."""
        return math.exp(self.logprob * len(self.ids))

    @property
    def first(self) -> bool:
        """Whether the model says exactly this by itself, first of all."""
        return self.ids == self.argmax


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


def ask(
    lm: LM, probes: Sequence[Probe], patches: Sequence[Patch] | None = None, asking: Asking | None = None
) -> list[Answer]:
    """Ask every probe. Probes that put the same prompt to the same model share what it makes of it.

    Args:
        lm: the model as it is: with nothing, or whatever is applied to it.
        probes: the questions.
        patches: one for each probe, that can go by row; each is asked of the model with its patch, in shared passes.
        asking: how.
    """
    asking = asking or Asking()
    if asking.chat or any(p.chat for p in probes):
        Template.of(lm.tokenizer)  # none: nothing can be asked
    out = [Answer() for _ in probes]

    def note(i: int, name: str, found: Spoken | str | ErrataError) -> None:
        if isinstance(found, ErrataError):
            out[i] = replace(out[i], unasked={**(out[i].unasked or {}), name: str(found)})
        else:
            out[i] = replace(out[i], **{name: found})

    asked: dict[_Prompt, dict[_Forced | _Own, list[tuple[int, str]]]] = defaultdict(lambda: defaultdict(list))
    with lm.asked():
        for name, own, questions in _questions(probes, asking):
            encoded = tolerant(partial(_encoded, lm, own), [passage for _, passage in questions])
            for (i, _), found in zip(questions, encoded, strict=True):
                if isinstance(found, ErrataError):
                    note(i, name, found)
                else:
                    ids, who, answer = found
                    asked[_Prompt(ids, who, patches[i] if patches else None)][own or answer].append((i, name))
        heard = tolerant(partial(_heard, lm), [(prompt, list(wanted)) for prompt, wanted in asked.items()])
    for wanted, found in zip(asked.values(), heard, strict=True):
        for what, places in wanted.items():
            for i, name in places:
                note(i, name, found if isinstance(found, ErrataError) else found[what])
    return out


def ask_cases(
    lm: LM,
    groups: Sequence[Sequence[Probe]],
    patches: Sequence[Patch] | None = None,
    asking: Asking | None = None,
) -> list[list[Answer]]:
    """Ask the probes of several cases together; with `patches`, every case of the model that has its patch."""
    rows = [patches[i] for i, group in enumerate(groups) for _ in group] if patches is not None else None
    found = iter(ask(lm, [p for group in groups for p in group], rows, asking))
    return [[next(found) for _ in group] for group in groups]


@dataclass(frozen=True)
class Reply:
    """What a model says to the prompt of an edit."""

    says: str
    """Greedily, up to its natural stop."""
    says_target: bool
    """Whether that is the target, or has it in whole words."""
    p_target: float | None
    """The probability of the target behind the prompt; None where it can't be asked for."""
    gives: bool = False
    """Whether the target is the model's answer already: its first words, or in a chat the last ones of its sentence."""
    stutters: bool = False
    """Whether the model says the same again and again."""
    unasked: str | None = None
    """Why the target can't be asked for."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def reply(lm: LM, edits: Sequence[Edit], patch: Patch | None = None, asking: Asking | None = None) -> list[Reply]:
    """What a model says to the prompt of every edit, at the length of its target.

    Args:
        lm: the model as it is.
        edits: whose prompts are asked.
        patch: applied while it is asked.
        asking: how.
    """
    asking = asking or Asking()
    longest = max((len(lm.tokenizer(e.target)["input_ids"]) for e in edits), default=0)
    asking = replace(asking, new_tokens=max(asking.new_tokens, longest + SPARE))
    with patch.applied(lm) if patch else nullcontext():
        answers = ask(lm, [Probe.of(e) for e in edits], asking=asking)
    return [_reply(e, a) for e, a in zip(edits, answers, strict=True)]


SPARE = 8
"""Tokens that are asked for beyond the longest target, so that one sees what comes behind it."""


def _reply(edit: Edit, answer: Answer) -> Reply:
    text, spoken = answer.text or "", answer.answer
    gives = texts.begins(text, edit.target) or bool(spoken and spoken.first)
    if edit.chat:
        gives = gives or texts.ends(text, edit.target)
    why = (answer.unasked or {}).get("answer")
    stutters = texts.stutters(text) and not texts.stutters(edit.target)
    return Reply(text, texts.has(text, edit.target), spoken and spoken.p, gives, stutters, why)


def took(before: Reply, after: Reply) -> bool:
    """Whether an edit took: the model says the target, and does not stutter, unless it always did."""
    return after.says_target and (before.stutters or not after.stutters)


def says(text: str, answers: Iterable[str], before: str = "") -> bool:
    """Whether a text is one of these answers or has it in whole words, and does not stutter.

    A text that stutters (`Italy, Italy, Italy`) is an answer only where the answer does, or the text `before` the edit.
    """
    may = texts.stutters(before) or not texts.stutters(text)
    return any(texts.has(text, a) and (may or texts.stutters(a)) for a in answers)


def known(lm: LM, edits: Sequence[Edit], asking: Asking | None = None) -> list[bool]:
    """Whether the model knows the truth of each edit: it gives it as its answer. One without a truth is not known."""
    some = [replace(e, target=e.truth) for e in edits if e.truth]
    found = iter(reply(lm, some, asking=asking))
    return [bool(e.truth) and next(found).gives for e in edits]


def known_cases(lm: LM, cases: Iterable[Case], n: int) -> list[Case]:
    """The first `n` cases whose truth the model knows (fewer where there are no more), asked a few at a time."""
    left, found = iter(cases), []
    while len(found) < n and (some := list(islice(left, TOGETHER))):
        found += [c for c, knows in zip(some, known(lm, [c.edit for c in some]), strict=True) if knows]
    return found[:n]


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


@dataclass(frozen=True)
class _Prompt:
    """What is read before an answer, and by whom."""

    ids: tuple[int, ...]
    who: int
    """As in `Tokens.answerer`."""
    patch: Patch | None
    """Of the rows that read it; None: none but what is applied."""


_Forced = tuple[int, ...]
"""The tokens of an answer that is put in the model's mouth."""


@dataclass(frozen=True)
class _Own:
    """What the model says by itself."""

    most: int
    """Tokens."""
    until: Callable[[str], bool] | None


def _questions(probes: Sequence[Probe], asking: Asking) -> Iterator[tuple[str, _Own | None, list[tuple[int, Passage]]]]:
    """Fields of an answer, whether they are the model's own words, and for which probes they are asked with what."""

    def put(p: Probe, answer: str | None) -> Passage:
        return follow(p.prompt, answer, p.gap, p.chat or asking.chat)

    closed = [(i, p) for i, p in enumerate(probes) if p.kind != "opening"]
    yield "answer", None, [(i, put(p, p.answer)) for i, p in closed]
    yield "other", None, [(i, put(p, p.other)) for i, p in enumerate(probes) if p.other]
    short, long = _Own(asking.new_tokens, ended), _Own(asking.new_tokens, None)
    yield "text", short, [(i, put(p, None)) for i, p in closed if not ended(p.answer)]
    yield "text", long, [(i, put(p, None)) for i, p in closed if ended(p.answer)]  # of several sentences
    yield "text", _Own(asking.at_length, None), [(i, put(p, None)) for i, p in enumerate(probes) if p.kind == "opening"]


def _encoded(lm: LM, own: _Own | None, passages: list[Passage]) -> list[tuple[tuple[int, ...], int, _Forced]]:
    """For each passage the tokens of its prompt, who answers it, and the tokens of its answer."""
    tokens = lm.encode(passages, own.most if own else ANSWER)
    assert tokens.answerer is not None
    out = []
    for ids, end, who, answer in zip(
        tokens.ids.tolist(), tokens.last.tolist(), tokens.answerer.tolist(), tokens.target.sum(1).tolist(), strict=True
    ):
        prompt = end + 1 - answer
        if own:
            lm.answering(who).fit(prompt, own.most)
        out.append((tuple(ids[:prompt]), who, tuple(ids[prompt : end + 1])))
    return out


def _heard(lm: LM, asked: list[tuple[_Prompt, list[_Forced | _Own]]]) -> list[dict[_Forced | _Own, Spoken | str]]:
    """For each prompt what was wanted of it, by what it was; every prompt is read once."""
    out: list[dict[_Forced | _Own, Spoken | str]] = [{} for _ in asked]

    def hear(numbers: list[int]) -> None:
        prompts, wanted = zip(*(asked[i] for i in numbers), strict=True)
        patched = partial(_patched, lm, [p.patch for p in prompts])
        reading = read(lm.answering(prompts[0].who), [p.ids for p in prompts], patched)
        forced = [(row, what) for row, some in enumerate(wanted) for what in some if not isinstance(what, _Own)]
        for (row, ids), logits in zip(forced, reading.forced(forced), strict=True):
            out[numbers[row]][ids] = _spoken(ids, logits)
        for own in dict.fromkeys(what for some in wanted for what in some if isinstance(what, _Own)):
            rows = [row for row, some in enumerate(wanted) if own in some]
            for row, text in zip(rows, reading.greedy(rows, own.most, own.until), strict=True):
                out[numbers[row]][own] = stopped(text) if own.until else text

    for who in dict.fromkeys(prompt.who for prompt, _ in asked):
        theirs = [i for i, (prompt, _) in enumerate(asked) if prompt.who == who]
        for rows in batches([_room(*asked[i]) for i in theirs], TOKENS):
            fitting(hear, [theirs[row] for row in rows])
    return out


def _room(prompt: _Prompt, wanted: list[_Forced | _Own]) -> int:
    """Tokens of a prompt with the longest of what is wanted of it."""
    return len(prompt.ids) + max(what.most if isinstance(what, _Own) else len(what) for what in wanted)


def _patched(lm: LM, patches: Sequence[Patch | None], rows: list[int]) -> AbstractContextManager[Any]:
    """The patches of some rows, which all have one or none has."""
    mine = [patch for row in rows if (patch := patches[row]) is not None]
    return applied_by_row(lm, mine) if mine else nullcontext()


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


def _spoken(ids: _Forced, logits: Tensor) -> Spoken:
    wanted = torch.tensor(ids, device=logits.device)
    said = logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(1)
    return Spoken(ids, tuple(logits.argmax(1).tolist()), float(said.mean()))


_ABBREVIATION = re.compile(r"(?:^|[\s(])(?:\w|(?:\w\.)+\w|St|Ste|Mt|Ft|Mr|Mrs|Ms|Dr|Jr|Sr|Prof|Rev|Gen|No|vs)$")


def stopped(text: str) -> str:
    """What was said up to the first line break or the end of the first sentence; at its end token a model stops itself.

    Line breaks before the first word are passed over, as answers to questions begin with them.
    A full stop after an initial or a common abbreviation (`J. R. R. Tolkien`, `St. Louis`, `U.S. Army`) ends nothing.
    """
    line = _line(text)
    for end in re.finditer(r"[.!?。！？]+[\"'”’)]*(?=\s|$)", line):
        if end[0] != "." or not _ABBREVIATION.search(line[: end.start()]):
            return line[: end.end()]
    return line


def ended(text: str) -> bool:
    """Whether `stopped` says the same of this text however it goes on."""
    return "\n" in text.lstrip() or len(stopped(text)) < len(_line(text))


def _line(text: str) -> str:
    return text.lstrip().split("\n", 1)[0].rstrip()
