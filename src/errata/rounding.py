"""What counts as the same when a model is run in two ways: all but rounding, by the model's dtype."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = 1e-3
"""Largest difference at which two ways of running a model in float32 count as one, relative to the spread of what is
compared: a hundred times their rounding, a hundredth of what a wrong position or a stale state makes."""
ROUGH = 0.1
"""The same for 16-bit models, whose rounding is a hundred times coarser."""


def alike(dtype: torch.dtype, got: Tensor, want: Tensor, logits: Tensor | None = None) -> bool:
    """Whether logits (m, vocabulary), or numbers (m,) made of `logits`, are the same but for rounding.

    In no row is the root mean square of what they differ by more than a share of the logits' spread between quartiles:
    one logit's rounding says little, and there may be far outliers, such as tokens that are ruled out.
    """
    of = want if logits is None else logits
    low, high = of.flatten()[:: max(1, of.numel() // 100_000)].quantile(of.new_tensor([0.25, 0.75])).tolist()
    off = got - want if logits is not None else (got - want).square().mean(1).sqrt()
    return bool(off.abs().max() <= tolerance(dtype) * (high - low))


def tolerance(dtype: torch.dtype) -> float:
    """Of a difference, relative to what is compared."""
    return TOLERANCE if dtype == torch.float32 else ROUGH
