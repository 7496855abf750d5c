"""AlphaEdit: MEMIT whose updates stay in the null space of what the layers already know, and remember earlier edits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..changes import LowRank
from ..edit import Edit
from ..lm import LM, Site
from ..parts import contexts, moments
from ..parts.solve import null_space
from ..parts.spread import mean_key
from ..patch import Patch
from .memit import Spread


@dataclass(frozen=True, kw_only=True)
class AlphaEdit(Spread, name="alphaedit"):
    """dW = R K^T P (K_p K_p^T P + K K^T P + weight I)^-1, eq. 14: P projects, K_p are the keys of earlier edits."""

    paper = "Fang et al. 2025, AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models"
    source = "https://arxiv.org/abs/2410.02355"
    scalable = ("rate", "weight", "below")

    weight: float = 10.0
    """How much the size of the update counts (the authors' L2); if `scaled`, in the mean of k^T P k over ordinary
    text."""
    below: float = 0.02
    """Eigenvalues of C under this count as its null space; if `scaled`, this share of them, the smallest."""

    def prepare(self, lm: LM) -> None:
        super().prepare(lm)
        for layer in self.layers:
            self.projector(lm, lm.site(layer))

    def patch(self, lm: LM, edits: Sequence[Edit], prior: Patch) -> Patch:
        new = super().patch(lm, edits, prior)
        templates = contexts.sample(lm, self.lengths, self.seed)
        with new.applied(lm):
            now = {s.name: mean_key(lm, s, edits, templates).cpu() for s in map(lm.site, self.layers)}
        return Patch(new.changes, carry={_carried(n): torch.cat([_past(prior, n, k), k]) for n, k in now.items()})

    def solve(self, lm: LM, site: Site, K: Tensor, R: Tensor, prior: Patch) -> LowRank:
        P, weight = self.projector(lm, site), self.weight
        if "weight" in self.scaled:
            C = moments.prepare(lm, [site], self.corpus)[site.name].C
            weight *= float((P * C.to(P)).sum())
        return null_space(K, R, P, _past(prior, site.name, K), weight)

    def projector(self, lm: LM, site: Site) -> Tensor:
        """P, (d_in, d_in)."""
        return moments.projector(lm, site, self.corpus, self.below, "below" in self.scaled)


def _carried(name: str) -> str:
    return f"past keys/{name}"


def _past(prior: Patch, name: str, like: Tensor) -> Tensor:
    """Keys of all earlier edits at a matrix, (m, d_in)."""
    return prior.carry.get(_carried(name), torch.zeros(0, like.shape[1]))
