"""What a model can still do beside the edits: perplexity and KL to the unedited model on held-out text, and tasks.

The text is read in pieces of `WORDS` words, each by itself; the first word of a piece is not scored. Tasks are those of
lm-evaluation-harness (by name, or a task's YAML file), where it is installed; they are asked of the edited model as it
stands in memory.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..lm import LM
from ..patch import Patch
from ..tokens import Passage

log = logging.getLogger(__name__)

WORDS = 40
PIECES = 64
"""At most so many pieces are read."""
TOGETHER = 16


@dataclass(frozen=True)
class Ability:
    """What is asked of an edited model."""

    pieces: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()

    @classmethod
    def of(cls, text: str | Path | None, tasks: Sequence[str] = ()) -> Ability | None:
        """From a file of text and names of tasks; None where nothing is asked.

        Raises:
            UsageError: the file can't be read or is empty, or tasks are asked for and lm_eval is not installed.
        """
        if text is None and not tasks:
            return None
        if tasks:
            _harness()
        return cls(() if text is None else _pieces(Path(text)), tuple(tasks))

    def measure(self, lm: LM, patch: Patch) -> dict[str, Any]:
        """Of the model with this patch: `perplexity_before`, `perplexity_after`, `kl` (base to edited, nats a token),
        `tokens`, and each task's metrics by `task, metric`."""
        found = read(lm, patch, self.pieces) if self.pieces else {}
        if self.tasks:
            with patch.applied(lm):
                found |= _evaluated(lm, self.tasks)
        return found


def read(lm: LM, patch: Patch, pieces: Sequence[str]) -> dict[str, Any]:
    """Perplexities and KL over all scored tokens of the pieces."""
    said = torch.zeros(3, dtype=torch.float64)  # log-probability before, after; KL
    count = 0
    with lm.asked():
        for start in range(0, len(pieces), TOGETHER):
            tokens = lm.encode([Passage(p, target=p.index(" ")) for p in pieces[start : start + TOGETHER]])
            before = _logprobs(lm.said(tokens))
            with patch.applied(lm):
                after = _logprobs(lm.said(tokens))
            wanted = tokens.wanted[:, None]
            kl = (before.exp() * (before - after)).sum()
            parts = (before.gather(1, wanted).sum(), after.gather(1, wanted).sum(), kl)
            said += torch.stack(parts).cpu()
            count += len(wanted)
    old, new, kl = (said / count).tolist()
    return {"perplexity_before": math.exp(-old), "perplexity_after": math.exp(-new), "kl": kl, "tokens": count}


def _logprobs(logits: Tensor) -> Tensor:
    return logits.double().log_softmax(1)


def _pieces(path: Path) -> tuple[str, ...]:
    try:
        words = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{str(path)!r} can't be read ({error}); give a file of plain text in UTF-8") from error
    pieces = [" ".join(words[i : i + WORDS]) for i in range(0, len(words), WORDS)]
    pieces = [p for p in pieces[:PIECES] if " " in p]
    if not pieces:
        raise UsageError(f"{str(path)!r} holds no text; give one of some hundred words")
    return tuple(pieces)


def _harness() -> Any:
    try:
        import lm_eval  # pyright: ignore[reportMissingImports] - optional
    except ImportError:
        raise UsageError("tasks need lm-evaluation-harness, which is not installed: pip install lm_eval") from None
    return lm_eval


def _evaluated(lm: LM, tasks: Sequence[str]) -> dict[str, Any]:
    """Each task's metrics: `task, metric`, with the harness's filter where it has one."""
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    if lm.readers:
        log.warning("tasks are not asked: the harness sees the model's weights, and this patch acts beside them")
        return {}
    model = HFLM(pretrained=lm.model, tokenizer=lm.tokenizer)
    found = _harness().simple_evaluate(model=model, tasks=list(tasks))["results"]
    return {
        f"{Path(task).stem}, {name.removesuffix(',none')}": float(value)
        for task, values in found.items()
        for name, value in values.items()
        if "," in name and isinstance(value, int | float)  # what has no filter (sample_len) is no metric
    }
