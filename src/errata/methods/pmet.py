"""PMET: targets for attention and MLP are found together, so that the MLP, which alone is written, carries its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from ..edit import Edit
from ..errors import ErrataError
from ..lm import LM
from ..parts.target import Loss
from .memit import MEMIT


@dataclass(frozen=True, kw_only=True)
class PMET(MEMIT, name="pmet"):
    """Precise Model Editing: MEMIT on the MLP's output, each layer taking 1/sqrt(layers left) of what is missing."""

    paper = "Li et al. 2024, PMET: Precise Model Editing in a Transformer"
    source = "https://arxiv.org/abs/2308.08742"

    clamp: float = 1.0
    """|delta| is at most this many times |v|, for attention and MLP each."""
    apart: bool = False
    """Whether every layer's MLP gets a target of its own, so that attention's unwritten part is a small one of many;
    where a norm follows the MLP it always does."""

    def judge(self, total: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
        """Once the model says the target everywhere (by the `margin`), it counts a tenth, and a small KL is enough."""
        done, _ = super().judge(total, loss)
        said = loss.margin >= (self.margin or 0.0)
        return done | (said & (loss.kl.detach() <= 0.01)), torch.where(said, 0.1, 1.0).to(total)

    def wanted(self, lm: LM, edits: Sequence[Edit], templates: Sequence[str]) -> dict[str, Tensor]:
        layers = self.layers if self.apart or not self.plain(lm, edits) else self.layers[-1:]
        attention, mlps = lm.attention_out(self.layers[-1]), [lm.site(layer).name for layer in layers]
        if attention is None:
            raise ErrataError(f"{lm.name} has no single matrix by which attention writes; PMET needs one")
        found = self.find(lm, [*mlps, attention.name], edits, templates, self.merge)
        return dict(zip(mlps, found[:-1], strict=True))

    def portion(self, left: int) -> float:
        return 1 / sqrt(left)
