"""PRUNE: MEMIT in sequence, with the singular values of all its updates together restrained to those of the weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..edit import Edit
from ..filters import restrain
from ..lm import LM
from ..patch import Patch
from .memit import MEMIT


@dataclass(frozen=True, kw_only=True)
class PRUNE(MEMIT, name="prune"):
    """Perturbation Restraint on Upper bouNd for Editing: a singular value over W's largest becomes its logarithm."""

    paper = "Ma et al. 2024, Perturbation-Restrained Sequential Model Editing"
    source = "https://arxiv.org/abs/2405.16821"

    base: float = 1.2
    """Base of that logarithm (the paper's alpha; the value is ours)."""

    def patch(self, lm: LM, edits: Sequence[Edit], prior: Patch) -> Patch:
        return restrain(super().patch(lm, edits, prior), lm, prior, self.base)
