"""ROME: one fact, one layer, rank one. A fact is a key k*, read at the subject, and the value v* it should have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..changes import LowRank
from ..edit import Edit
from ..lm import LM
from ..method import Method
from ..parts import contexts, moments
from ..parts.locate import at_subject
from ..parts.solve import whiten
from ..parts.target import TargetSearch
from ..patch import Patch


@dataclass(frozen=True, kw_only=True)
class ROME(TargetSearch, Method, name="rome"):
    """Rank-One Model Editing: W <- W + (v* - W k)(C^-1 k*)^T / (k^T C^-1 k*), eq. 2."""

    paper = "Meng et al. 2022, Locating and Editing Factual Associations in GPT"
    source = "https://arxiv.org/abs/2202.05262"
    batched = False

    layer: int
    """The block whose MLP write matrix W is changed."""
    lengths: tuple[tuple[int, int], ...] = ((5, 10), (10, 10))
    """(new tokens, how many) of the sampled contexts that k* and v* are averaged over, besides the bare prompt."""
    whiten: bool = True
    """Whether C is the second moment of the keys (the paper) or the identity (EasyEdit's settings for 7B models)."""
    corpus: str = moments.OWN
    """What C is taken on: samples of the model itself (`own`), or a text file, one text a line."""

    def prepare(self, lm: LM) -> None:
        contexts.sample(lm, self.lengths, self.seed)
        if self.whiten:
            moments.prepare(lm, [lm.site(self.layer)], self.corpus)

    def patch(self, lm: LM, edits: Sequence[Edit], prior: Patch) -> Patch:
        (patch,) = self.patches(lm, edits)
        return patch

    def patches(self, lm: LM, edits: Sequence[Edit]) -> list[Patch]:
        site, templates = lm.site(self.layer), contexts.sample(lm, self.lengths, self.seed)
        keys, values = at_subject(lm, site.name, edits, templates)
        k_star, (k, v) = keys.mean(1), self.present(keys, values)
        (v_star,) = self.find(lm, [site.name], edits, templates)
        u = whiten(moments.cholesky(lm, site, self.corpus), k_star) if self.whiten else k_star.double()
        u = u / u.norm(dim=1, keepdim=True)
        left = (v_star - v).double() / (k.double() * u).sum(1, keepdim=True)
        return [Patch({site.name: (_rank_one(left[i], u[i]),)}) for i in range(len(edits))]

    def present(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The key that the update is scaled for, and the value it has now: those of the bare prompt, the first context.

        Args:
            keys: (edits, contexts, d_in).
            values: (edits, contexts, d_out).
        """
        return keys[:, 0], values[:, 0]


def _rank_one(left: Tensor, right: Tensor) -> LowRank:
    return LowRank(torch.zeros(1, dtype=torch.long), left.float()[:, None].cpu(), right.float()[None].cpu())
