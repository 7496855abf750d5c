"""RECT: MEMIT's update, of which only the entries that change their weight most are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..edit import Edit
from ..filters import keep_largest
from ..lm import LM
from ..patch import Patch
from .memit import MEMIT


@dataclass(frozen=True, kw_only=True)
class RECT(MEMIT, name="rect"):
    """Relative Change in weighT: MEMIT, less the entries of dW that are small beside those of W."""

    paper = "Gu et al. 2024, Model Editing Harms General Abilities: Regularization to the Rescue"
    source = "https://arxiv.org/abs/2401.04700"

    share: float = 0.2
    """Share of the entries of each dW that stay; 0.2 is what later comparisons take (arXiv 2502.01636)."""

    def patch(self, lm: LM, edits: Sequence[Edit], prior: Patch) -> Patch:
        return keep_largest(super().patch(lm, edits, prior), lm, self.share)
