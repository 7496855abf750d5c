"""Reading an export back: it is right if it answers the edits' own prompts as the patched model does."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from ..errors import ErrataError
from ..lm import LM
from ..loading import load
from ..patch import Patch
from ..tokens import passage
from .weights import delta
from .written import ReadBack

TOGETHER = 16
"""Edits asked together."""
SHARE = 0.05
"""Of what the patch moves, how much an export may be off. Where an adapter or a tensor is lost, it is 1."""
ROUNDING = 8
"""Of the largest logit, so many units of the dtype may it be off besides: a change beside a half-precision weight is
rounded otherwise than one in it. At most 3.8 were seen on almanac, SmolLM2 and Gemma 3 in three dtypes."""
LEAST = 1e-4
"""The least of that, where a GPU multiplies more coarsely than its dtype says."""
ALIKE = 1e-2
"""Of the norm of a change, how much PEFT's may be off, whose factors it may keep in half precision."""


def peft_reads(lm: LM, patch: Patch, folder: Path) -> ReadBack:
    """Put an adapter on the model by PEFT itself, and compare.

    Raises:
        ErrataError: PEFT can't read it, or it is not the patch.
    """
    try:
        from peft import PeftModel
    except ImportError:
        return ReadBack(None, "PEFT is not installed (pip install peft), so nobody has tried the adapter")
    by = f"peft {metadata.version('peft')}"

    def read() -> LM:
        model = PeftModel.from_pretrained(_shell_of(lm.model), str(folder)).eval()
        _refuse_other_changes(model.get_base_model(), patch)
        return LM(model.get_base_model(), lm.tokenizer, name="the adapter")

    return _compared(lm, patch, by, read, "write a merged checkpoint instead (--to checkpoint)")


def transformers_reads(lm: LM, patch: Patch, folder: Path) -> ReadBack:
    """Load a checkpoint by transformers, with its tokenizer, and compare.

    Raises:
        ErrataError: transformers can't load it, or it is not the patched model.
    """
    by = f"transformers {transformers.__version__}"
    instead = "apply the patch with errata, or write an adapter (--to peft)"
    try:
        return _compared(lm, patch, by, lambda: load(folder, dtype=lm.dtype, device=lm.device), instead)
    except (MemoryError, torch.OutOfMemoryError):
        return ReadBack(None, "there was no room for a second copy of the model")


def _shell_of(model: Any) -> Any:
    """A model of the same numbers, none of them copied, whose modules can be replaced without touching the others."""
    known = {id(b): b for b in model.buffers()}
    for p in model.parameters():  # a quantised one is a class of its own, with more to it than its numbers
        known[id(p)] = nn.Parameter(p.detach(), requires_grad=False) if type(p) is nn.Parameter else p
    return copy.deepcopy(model, known)


def _refuse_other_changes(model: Any, patch: Patch) -> None:
    """Refuse an adapter that PEFT has put elsewhere, or that adds something else."""
    from peft.tuners.lora import LoraLayer

    found: dict[str, Any] = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    if found.keys() != patch.changes.keys():
        raise ValueError(f"it puts the change of {min(patch.changes)} at {min(found, default='no module')}")
    for name, module in found.items():
        wanted = delta(patch.changes[name])
        left, right = (m["default"].weight.double().cpu() for m in (module.lora_B, module.lora_A))
        off = module.scaling["default"] * (left @ right) - wanted
        if not float(off.norm()) <= ALIKE * float(wanted.norm()):
            raise ValueError(f"what it adds to {name} is not the change")


def _compared(lm: LM, patch: Patch, by: str, read: Callable[[], LM], instead: str) -> ReadBack:
    if not patch.edits:
        return ReadBack(None, "the patch names no edit to ask about")
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            other = read()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # PEFT and transformers have many ways to say no
        why = " ".join(str(error).split()) or type(error).__name__
        raise ErrataError(f"{by} can't read the export back ({why[:300].rstrip('.')}); {instead}") from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    off = moved = size = 0.0
    for start in range(0, len(patch.edits), TOGETHER):
        some = patch.edits[start : start + TOGETHER]
        base, want, have = _logits(lm, some), _patched_logits(lm, patch, some), _logits(other, some)
        if have.shape != want.shape:
            raise ErrataError(f"read back by {by}, the export reads its prompts as other tokens; {instead}")
        off = max(off, float((have - want).abs().max()))
        moved = max(moved, float((want - base).abs().max()))
        size = max(size, float(want.abs().max()))
    rounding = size * max(LEAST, ROUNDING * torch.finfo(lm.dtype).eps)
    if not off <= SHARE * moved + rounding:
        raise ErrataError(
            f"read back by {by}, the export is not the patch: its logits are off by {off:.3g} where the patch moves "
            f"them by {moved:.3g}; {instead}"
        )
    return ReadBack(by, off=off, moved=moved, telling=moved > rounding)


def _logits(lm: LM, edits: Any) -> Tensor:
    with lm.frozen(), torch.no_grad():
        return lm.said(lm.encode([passage(e, answer=e.target) for e in edits])).cpu()


def _patched_logits(lm: LM, patch: Patch, edits: Any) -> Tensor:
    with patch.applied(lm):
        return _logits(lm, edits)
