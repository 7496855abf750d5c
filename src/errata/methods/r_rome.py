"""R-ROME: ROME with one key. ROME's code scales the update for the bare prompt's key and points it at the mean one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .rome import ROME


@dataclass(frozen=True, kw_only=True)
class RROME(ROME, name="r-rome"):
    """ROME with the averaged key k* on both sides, so that long sequences of edits don't disable the model."""

    paper = "Gupta et al. 2024, Rebuilding ROME: Resolving Model Collapse during Sequential Model Editing"
    source = "https://arxiv.org/abs/2403.07175"

    def present(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return keys.mean(1), values.mean(1)
