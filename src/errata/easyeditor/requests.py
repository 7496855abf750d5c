"""What EasyEdit's `edit` is asked for: its arguments as one request for each edit, and the questions of a request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

from ..data import Probe
from ..errors import UsageError, unknown
from .datasets import Dataset

Texts = str | Sequence[str]
Request = dict[str, Any]
Part = tuple[str, str]
"""What is asked (`rewrite`, `rephrase`, `locality`, `portability`), and the caller's own name for it."""


class Asked(TypedDict, total=False):
    """Arguments of `edit`, in EasyEdit's names; those in lists have an entry for each prompt."""

    ground_truth: Texts | None
    """What was said, where it is known."""
    sequential_edit: bool
    """Keep each edit while the next are made; all are scored when all are made."""
    rephrase_prompts: Texts | None
    """The prompts in other words."""
    locality_inputs: Mapping[str, Any] | None
    """By a name of your own, `prompt` and `ground_truth`: for each edit a text, several, or None."""
    portability_inputs: Mapping[str, Any] | None
    """Likewise."""
    subject: Texts | None
    """What a prompt is about, for methods that look for it."""
    requests: Sequence[Mapping[str, Any]]
    """Instead of the others: rows that have all of this by name."""
    train_ds: Dataset | None
    """What IKE makes its demonstrations of."""
    test_generation: bool
    """Refused: errata.bench measures what a model says by itself."""
    target_neg: Texts | None
    """This and what follows is taken, and changes nothing: there is nothing to roll back to or to print."""
    keep_original_weight: bool
    loc_prompts: Sequence[str]
    verbose: bool
    summary_metrics: bool
    eval_metric: str


def requests(prompts: Texts, target_new: Texts, asked: Asked) -> list[Request]:
    """One request for each edit, in EasyEdit's form."""
    _check_names(asked)
    if "requests" in asked:
        return [{"ground_truth": None, "locality": {}, "portability": {}} | dict(r) for r in asked["requests"]]
    prompts = _each(prompts)
    if not prompts:
        raise UsageError("prompts is missing or empty; give at least one")
    columns = {
        "target_new": _column("target_new", target_new, prompts),
        "ground_truth": _column("ground_truth", asked.get("ground_truth"), prompts),
        "rephrase_prompt": _column("rephrase_prompts", asked.get("rephrase_prompts"), prompts),
        "subject": _column("subject", asked.get("subject"), prompts),
    }
    out: list[Request] = []
    for i, prompt in enumerate(prompts):
        row = {k: column[i] for k, column in columns.items() if column[i] is not None or k == "ground_truth"}
        out.append({"prompt": prompt, **row, "locality": {}, "portability": {}})
    for kind in ("locality", "portability"):
        for name, inputs in (asked.get(f"{kind}_inputs") or {}).items():
            for row, question, answer in zip(out, *_inputs(f"{kind}_inputs[{name!r}]", inputs, prompts), strict=True):
                if question is not None:
                    row[kind][name] = {"prompt": question, "ground_truth": answer}
    return out


def _check_names(asked: Asked) -> None:
    if asked.get("test_generation"):
        raise UsageError("test_generation is not in this door; errata.bench measures what a model says by itself")
    for name in asked.keys() - Asked.__annotations__.keys():
        raise unknown("argument of edit", name, Asked.__annotations__)


def _each(value: Any) -> list[Any]:
    return [value] if isinstance(value, str) else list(value)


def _column(name: str, value: Any, prompts: Sequence[str]) -> list[Any]:
    if value is None:
        return [None] * len(prompts)
    column = _each(value)
    if len(column) != len(prompts):
        raise UsageError(f"{name} has {len(column)} values for {len(prompts)} prompts; give one for each")
    return column


def _inputs(name: str, asked: Mapping[str, Any], prompts: Sequence[str]) -> list[list[Any]]:
    """The questions and answers of one name, for each edit."""
    if missing := {"prompt", "ground_truth"} - asked.keys():
        raise UsageError(f"{name} lacks {' and '.join(sorted(missing))}; give prompt and ground_truth")
    return [_column(f"{name}[{part!r}]", asked[part], prompts) for part in ("prompt", "ground_truth")]


def probes(request: Request) -> Iterable[tuple[Part, Probe]]:
    """All questions of a request, each with where its answer goes."""
    yield ("rewrite", ""), Probe("efficacy", request["prompt"], request["target_new"])
    if request.get("rephrase_prompt"):
        yield ("rephrase", ""), Probe("paraphrase", request["rephrase_prompt"], request["target_new"])
    for kind, as_kind in (("locality", "neighbourhood"), ("portability", "portability")):
        for name, asked in (request.get(kind) or {}).items():
            for question, answer in zip(_each(asked["prompt"]), _each(asked["ground_truth"]), strict=True):
                while isinstance(answer, list):
                    answer = answer[0]
                yield (kind, name), Probe(as_kind, question, answer)  # pyright: ignore[reportArgumentType]
