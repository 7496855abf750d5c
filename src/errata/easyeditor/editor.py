"""EasyEdit's `BaseEditor`: edit and score in one call, with results in its form."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Unpack

from ..ask import ask_cases
from ..edit import Edit
from ..errors import UsageError
from ..methods import IKE
from ..parts.target import TargetSearch
from ..patch import Patch
from .datasets import Dataset
from .hparams import HyperParams
from .requests import Asked, Request, Texts, probes, requests
from .results import Answers, Result, Score, gathered, scores, texts

Edited = tuple[list[Result], Any, Patch]
"""For each edit its results, as `pre` and `post`; the edited model; the patch that it carries."""


class BaseEditor:
    """Edits a model by the method that the settings name.

    `model` and `tok` are transformers' own. After a call `model` is edited: by all edits of the call in sequential
    editing, otherwise by the last edit (or batch) alone. The next call, and `restore()`, put it back to the bit first.
    """

    def __init__(self, hparams: HyperParams) -> None:
        self.hparams = hparams
        self.alg_name = hparams.alg_name
        self.model_name = hparams.model_name
        self.lm = hparams.loaded()
        self.model, self.tok = self.lm.model, self.lm.tokenizer
        self.method = hparams.prepared(self.lm)
        self.patch = Patch()
        """What `model` carries now, also where the editor is let go."""

    @classmethod
    def from_hparams(cls, hparams: HyperParams) -> BaseEditor:
        """An editor with these settings; the model is loaded."""
        return cls(hparams)

    def edit(self, prompts: Texts = (), target_new: Texts = (), **asked: Unpack[Asked]) -> Edited:
        """Make each edit by itself, or (`sequential_edit`) one on top of the other, and score it.

        Args:
            prompts: what is asked.
            target_new: what shall be said.
            asked: `subject`, `rephrase_prompts`, `locality_inputs` and the others of `requests.Asked`.
        """
        return self._run(requests(prompts, target_new, asked), 1, scores, asked)

    def batch_edit(self, prompts: Texts = (), target_new: Texts = (), **asked: Unpack[Asked]) -> Edited:
        """As `edit`, `batch_size` edits at once (all, where the settings don't say)."""
        if not self.method.batched:
            raise UsageError(f"{self.alg_name} makes one edit at a time; call edit")
        rows = requests(prompts, target_new, asked)
        return self._run(rows, self.hparams.batch_size or len(rows), scores, asked)

    def generate_edit(self, prompts: Texts = (), target_new: Texts = (), **asked: Unpack[Asked]) -> Edited:
        """As `edit`, with what the model says by itself in place of scores: `rewrite_ans`, `rephrase_ans` and so on."""
        return self._run(requests(prompts, target_new, asked), 1, texts, asked)

    def rollback(self, edit_key: str) -> None:
        """Take out of `model` the edits of the last call whose target is `edit_key`; the others stay."""
        found = [e for e in self.patch.edits if e.target == edit_key]
        if not found:
            raise UsageError(
                f"the model carries no edit to {edit_key!r}; it carries {[e.target for e in self.patch.edits]}"
            )
        patch = self.patch
        for edit in dict.fromkeys(found):
            patch = patch.without(edit)
        self._hold(patch)

    rolllback = rollback  # as EasyEdit's README spells it

    def restore(self) -> None:
        """Put the model back to what was loaded, to the bit."""
        if self.patch:
            self.patch.undo(self.lm)
        self.patch = Patch()

    def _hold(self, patch: Patch) -> None:
        self.restore()
        if patch:
            patch.apply(self.lm)
        self.patch = patch

    def _run(self, rows: list[Request], batch: int, score: Score, asked: Asked) -> Edited:
        self._demonstrate(asked.get("train_ds"))
        groups = [rows[i : i + batch] for i in range(0, len(rows), batch)]
        sequential = asked.get("sequential_edit", False)
        with self._put_back() as carried:
            start = carried if sequential else Patch()
            before = self._answers([rows], [start])
            patches, seconds = [], []
            for group in groups:
                began = time.perf_counter()
                prior = patches[-1] if sequential and patches else start
                patches.append(self.method.edit(self.lm, [self._edit(r) for r in group], prior))
                seconds += [time.perf_counter() - began] * len(group)
            after = self._answers([rows], patches[-1:]) if sequential else self._answers(groups, patches)
        self._hold(patches[-1])
        how = {
            "name": "forced" if score is scores else "generated",
            "evaluated": "after all edits" if sequential else "after each edit",
        }
        results = [
            {"case_id": i, "requested_rewrite": row, "pre": pre, "post": post, "time": t, "protocol": how}
            for i, (row, t, (pre, post)) in enumerate(zip(rows, seconds, map(score, before, after), strict=True))
        ]
        return results, self.model, self.patch

    @contextmanager
    def _put_back(self) -> Iterator[Patch]:
        """While inside, the model is what was loaded; after an error it carries again what it carried before."""
        carried = self.patch
        self.restore()
        try:
            yield carried
        except BaseException:
            self._hold(carried)
            raise

    def _edit(self, request: Request) -> Edit:
        subject = request.get("subject")
        if subject is None and isinstance(self.method, TargetSearch):
            raise UsageError(f"{self.alg_name} looks for the subject; give subject=[...], one for each prompt")
        prompt = request["prompt"] if subject else "{}"
        return Edit(prompt, subject or request["prompt"], request["target_new"], request["ground_truth"])

    def _answers(self, groups: Sequence[Sequence[Request]], patches: Sequence[Patch]) -> list[Answers]:
        """For each request the answers to all that it asks, each group of the model with its patch."""
        found: list[Answers] = []
        for group, patch in zip(groups, patches, strict=True):
            asked = [list(probes(r)) for r in group]
            with patch.applied(self.lm):
                answers = ask_cases(self.lm, [[probe for _, probe in questions] for questions in asked])
            found += [
                gathered((part for part, _ in questions), some) for questions, some in zip(asked, answers, strict=True)
            ]
        return found

    def _demonstrate(self, examples: Dataset | None) -> None:
        if examples is not None and isinstance(self.method, IKE):
            self.method = replace(self.method, examples=str(examples.path), part="edit")
