"""R-ROME: ROME with one key. ROME's code scales the update for the bare prompt's key and points it at the mean one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..edit import Edit
from ..lm import LM, Site
from ..parts.locate import at_subject
from .rome import ROME


@dataclass(frozen=True, kw_only=True)
class RROME(ROME, name="r-rome"):
    """ROME with the averaged key k* on both sides, so that long sequences of edits don't disable the model."""

    paper = "Gupta et al. 2024, Rebuilding ROME: Resolving Model Collapse during Sequential Model Editing"
    source = "https://arxiv.org/abs/2403.07175"

    def present(self, lm: LM, site: Site, edits: Sequence[Edit], templates: Sequence[str]) -> tuple[Tensor, Tensor]:
        k, v = at_subject(lm, site.name, edits, templates)
        return k.mean(1), v.mean(1)
