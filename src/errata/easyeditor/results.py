"""EasyEdit's form of results: of one request, what the model answered before and after the edit, as scores or texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..ask import Answer
from ..bench import metrics
from .requests import Part

Answers = Mapping[Part, Sequence[Answer]]
Result = dict[str, Any]
Score = Callable[[Answers, Answers], tuple[Result, Result]]
"""From the answers before and after, `pre` and `post`."""


def gathered(parts: Iterable[Part], answers: Iterable[Answer]) -> Answers:
    """The answers by what was asked, those of one name together."""
    found: dict[Part, list[Answer]] = {}
    for part, answer in zip(parts, answers, strict=True):
        found.setdefault(part, []).append(answer)
    return found


def scores(before: Answers, after: Answers) -> tuple[Result, Result]:
    """`rewrite_acc` and so on: lists of shares of tokens."""
    pre: Result = {"locality": {}, "portability": {}}
    post: Result = {"locality": {}, "portability": {}}
    for (part, name), answers in after.items():
        were = before[part, name]
        if part in ("rewrite", "rephrase"):
            pre[f"{part}_acc"], post[f"{part}_acc"] = _forced(were), _forced(answers)
        elif part == "portability":
            pre[part][f"{name}_acc"], post[part][f"{name}_acc"] = _forced(were), _forced(answers)
        else:
            pre[part][f"{name}_output"], post[part][f"{name}_output"] = _argmax(were), _argmax(answers)
            post[part][f"{name}_acc"] = [
                metrics.kept_tokens(b.answer, a.answer)
                for b, a in zip(were, answers, strict=True)
                if b.answer is not None and a.answer is not None
            ]
    return pre, post


def texts(before: Answers, after: Answers) -> tuple[Result, Result]:
    """`rewrite_ans` and so on: what the model says."""
    pre: Result = {}
    post: Result = {}
    for out, found in ((pre, before), (post, after)):
        for (part, _), answers in found.items():
            said = [a.text for a in answers]
            if part in ("rewrite", "rephrase"):
                out[f"{part}_ans"] = said[0]
            else:
                out[f"{part}_ans"] = [*out.get(f"{part}_ans", []), *said]
    return pre, post


def _forced(answers: Sequence[Answer]) -> list[float]:
    return [metrics.forced_tokens(a.answer) for a in answers if a.answer is not None]


def _argmax(answers: Sequence[Answer]) -> list[list[int]]:
    return [list(a.answer.argmax) for a in answers if a.answer is not None]
