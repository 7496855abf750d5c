"""EasyEdit's `BaseEditor`: edit and score in one call, with results in its form."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from ..bench import metrics
from ..bench.answer import Answer, ask
from ..data import Probe
from ..edit import Edit
from ..errors import UsageError, unknown
from ..lm import LM, load
from ..parts.target import TargetSearch
from ..patch import Patch
from .hparams import HyperParams

UNUSED = {
    "keep_original_weight": "the base is always kept",
    "loc_prompts": "no method here takes them from the call",
    "train_ds": "IKE's demonstrations are of its setting `examples`",
    "verbose": "nothing is printed",
    "summary_metrics": "nothing is printed",
    "eval_metric": "scores are `forced`; errata.bench has others",
}
"""Arguments that EasyEdit's scripts pass, and why they change nothing."""

Request = dict[str, Any]
Answers = dict[tuple[str, str], list[Answer]]
"""By what is asked (`rewrite`, `rephrase`, `locality`, `portability`) and the caller's own name for it."""
Score = Callable[[Answers, Answers], tuple[dict[str, Any], dict[str, Any]]]


class BaseEditor:
    """Edits a model by the method that the settings name.

    `model` and `tok` are transformers' own. After a call `model` is edited: by all edits of the call in sequential
    editing, otherwise by the last edit (or batch) alone. The next call, and `restore()`, put it back to the bit first.
    """

    def __init__(self, hparams: HyperParams) -> None:
        self.hparams = hparams
        self.alg_name = hparams.alg_name
        self.model_name = hparams.model_name
        self.lm = _loaded(hparams)
        self.model, self.tok = self.lm.model, self.lm.tokenizer
        self.method = hparams.prepared(self.lm)
        self.patch = Patch()
        """What `model` carries now."""
        self._held = ExitStack()

    @classmethod
    def from_hparams(cls, hparams: HyperParams) -> BaseEditor:
        """An editor with these settings; the model is loaded."""
        return cls(hparams)

    def restore(self) -> None:
        """Put the model back to what was loaded, to the bit."""
        self._held.close()
        self.patch = Patch()

    def edit(
        self,
        prompts: str | Sequence[str],
        target_new: str | Sequence[str],
        ground_truth: str | Sequence[str] | None = None,
        target_neg: str | Sequence[str] | None = None,
        rephrase_prompts: str | Sequence[str] | None = None,
        locality_inputs: Mapping[str, Any] | None = None,
        portability_inputs: Mapping[str, Any] | None = None,
        sequential_edit: bool = False,
        **others: Any,
    ) -> tuple[list[dict[str, Any]], Any, Patch]:
        """Make each edit by itself, or one on top of the other, and score it.

        Args:
            prompts: what is asked.
            target_new: what shall be said.
            ground_truth: what was said, where it is known.
            target_neg: taken and not needed.
            rephrase_prompts: the same in other words, one each.
            locality_inputs: by a name of your own, `prompt` and `ground_truth`: for each edit a text, several, or None.
            portability_inputs: likewise.
            sequential_edit: keep each edit while the next are made; all are scored when all are made.
            others: `subject`, for methods that look for it; `requests`, rows that have all of this by name.

        Returns:
            For each edit its scores (`forced`: the share of tokens) as `pre` and `post`; the edited model; the patch
            that it carries.
        """
        requests = _requests(
            prompts, target_new, ground_truth, rephrase_prompts, locality_inputs, portability_inputs, others
        )
        return self._run(requests, [[r] for r in requests], sequential_edit, _scores)

    def batch_edit(
        self,
        prompts: Sequence[str],
        target_new: Sequence[str],
        ground_truth: Sequence[str] | None = None,
        target_neg: Sequence[str] | None = None,
        rephrase_prompts: Sequence[str] | None = None,
        locality_inputs: Mapping[str, Any] | None = None,
        portability_inputs: Mapping[str, Any] | None = None,
        sequential_edit: bool = False,
        **others: Any,
    ) -> tuple[list[dict[str, Any]], Any, Patch]:
        """As `edit`, `batch_size` edits at once (all, where the settings don't say)."""
        if not self.method.batched:
            raise UsageError(f"{self.alg_name} makes one edit at a time; call edit")
        requests = _requests(
            prompts, target_new, ground_truth, rephrase_prompts, locality_inputs, portability_inputs, others
        )
        n = self.hparams.batch_size or len(requests)
        return self._run(requests, [requests[i : i + n] for i in range(0, len(requests), n)], sequential_edit, _scores)

    def generate_edit(
        self,
        prompts: str | Sequence[str],
        target_new: str | Sequence[str],
        ground_truth: str | Sequence[str] | None = None,
        target_neg: str | Sequence[str] | None = None,
        rephrase_prompts: str | Sequence[str] | None = None,
        locality_inputs: Mapping[str, Any] | None = None,
        portability_inputs: Mapping[str, Any] | None = None,
        sequential_edit: bool = False,
        **others: Any,
    ) -> tuple[list[dict[str, Any]], Any, Patch]:
        """As `edit`, with what the model says by itself in place of scores: `rewrite_ans`, `rephrase_ans` and so on."""
        requests = _requests(
            prompts, target_new, ground_truth, rephrase_prompts, locality_inputs, portability_inputs, others
        )
        return self._run(requests, [[r] for r in requests], sequential_edit, _texts)

    def _run(
        self, requests: list[Request], groups: list[list[Request]], sequential: bool, score: Score
    ) -> tuple[list[dict[str, Any]], Any, Patch]:
        edits = [[self._edit(r) for r in group] for group in groups]
        prior = self.patch if sequential else Patch()
        self.restore()
        try:
            with prior.applied(self.lm):
                before = self._ask(requests)
            after, seconds, patch = [], [], prior
            for group, some in zip(groups, edits, strict=True):
                start = time.perf_counter()
                patch = self.method.edit(self.lm, some, patch if sequential else Patch())
                seconds += [time.perf_counter() - start] * len(group)
                if not sequential:
                    with patch.applied(self.lm):
                        after += self._ask(group)
            if sequential:
                with patch.applied(self.lm):
                    after = self._ask(requests)
        except BaseException:
            self._hold(prior)
            raise
        self._hold(patch)
        rows = []
        for i, request in enumerate(requests):
            pre, post = score(before[i], after[i])
            when = "after all edits" if sequential else "after each edit"
            rows.append(
                {"case_id": i, "requested_rewrite": request, "pre": pre, "post": post, "time": seconds[i]}
                | {"protocol": {"name": "forced" if score is _scores else "generated", "evaluated": when}}
            )
        return rows, self.model, patch

    def _hold(self, patch: Patch) -> None:
        self._held.enter_context(patch.applied(self.lm))
        self.patch = patch

    def _edit(self, request: Request) -> Edit:
        subject = request.get("subject")
        if subject is None and isinstance(self.method, TargetSearch):
            raise UsageError(f"{self.alg_name} looks for the subject; give subject=[...], one for each prompt")
        prompt = request["prompt"] if subject else "{}"
        return Edit(prompt, subject or request["prompt"], request["target_new"], request["ground_truth"])

    def _ask(self, requests: Sequence[Request]) -> list[Answers]:
        """Answers to all that a request asks, in its shape."""
        listed = [(key, probe) for r in requests for key, probe in _probes(r)]
        found = iter(ask(self.lm, [probe for _, probe in listed]))
        out: list[Answers] = []
        for r in requests:
            mine: dict[tuple[str, str], list[Answer]] = {}
            for key, _ in _probes(r):
                mine.setdefault(key, []).append(next(found))
            out.append(mine)
        return out


def _loaded(hparams: HyperParams) -> LM:
    if not isinstance(hparams.model_name, str):
        model, tokenizer = hparams.model_name
        return LM(model, tokenizer)
    device = hparams.device
    if isinstance(device, int):
        device = f"cuda:{device}" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if getattr(hparams, "fp16", False) else torch.float32
    return load(hparams.model_name, dtype=dtype, device=device)


# What is asked for


def _requests(
    prompts: Any,
    targets: Any,
    truths: Any,
    rephrased: Any,
    locality: Mapping[str, Any] | None,
    portability: Mapping[str, Any] | None,
    others: dict[str, Any],
) -> list[Request]:
    if "requests" in others:
        return [{"ground_truth": None, "locality": {}, "portability": {}} | dict(r) for r in others["requests"]]
    if others.get("test_generation"):
        raise UsageError("test_generation is not in this door; errata.bench measures what a model says by itself")
    for name in others.keys() - UNUSED.keys() - {"subject", "test_generation"}:
        raise unknown("argument of edit", name, [*UNUSED, "subject", "requests"])
    prompts = _each(prompts)
    columns = {
        "target_new": _column("target_new", targets, prompts),
        "ground_truth": _column("ground_truth", truths, prompts),
        "rephrase_prompt": _column("rephrase_prompts", rephrased, prompts),
        "subject": _column("subject", others.get("subject"), prompts),
    }
    if None in columns["target_new"]:
        raise UsageError("target_new is missing; give one for each prompt")
    out: list[Request] = []
    for i, prompt in enumerate(prompts):
        row = {k: column[i] for k, column in columns.items() if column[i] is not None or k == "ground_truth"}
        out.append({"prompt": prompt, **row, "locality": {}, "portability": {}})
    for kind, inputs in (("locality", locality), ("portability", portability)):
        for name, asked in (inputs or {}).items():
            questions = _column(f"{kind}_inputs[{name!r}]['prompt']", asked["prompt"], prompts)
            answers = _column(f"{kind}_inputs[{name!r}]['ground_truth']", asked["ground_truth"], prompts)
            for row, question, answer in zip(out, questions, answers, strict=True):
                if question is not None:
                    row[kind][name] = {"prompt": question, "ground_truth": answer}
    return out


def _each(value: Any) -> list[Any]:
    return [value] if isinstance(value, str) else list(value)


def _column(name: str, value: Any, prompts: Sequence[str]) -> list[Any]:
    if value is None:
        return [None] * len(prompts)
    column = _each(value)
    if len(column) != len(prompts):
        raise UsageError(f"{name} has {len(column)} values for {len(prompts)} prompts; give one for each")
    return column


def _probes(request: Request) -> Iterable[tuple[tuple[str, str], Probe]]:
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


# What comes of it


def _scores(before: Answers, after: Answers) -> tuple[dict[str, Any], dict[str, Any]]:
    """`rewrite_acc` and so on, before and after: lists of shares of tokens."""
    pre: dict[str, Any] = {"locality": {}, "portability": {}}
    post: dict[str, Any] = {"locality": {}, "portability": {}}
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


def _texts(before: Answers, after: Answers) -> tuple[dict[str, Any], dict[str, Any]]:
    """`rewrite_ans` and so on, before and after: what the model says."""
    pre: dict[str, Any] = {}
    post: dict[str, Any] = {}
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
