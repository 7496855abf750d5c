"""EMMET: MEMIT's batches under ROME's constraint: every new key gets its value exactly, and C is disturbed least."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..changes import LowRank
from ..lm import LM, Site
from ..patch import Patch
from .memit import Spread


@dataclass(frozen=True, kw_only=True)
class EMMET(Spread, name="emmet"):
    """Equality-constrained Mass Model Editing: dW = R (K^T C^-1 K + jitter I)^-1 K^T C^-1, eq. 11."""

    paper = "Gupta et al. 2024, A Unified Framework for Model Editing"
    source = "https://arxiv.org/abs/2403.14236"
    scalable = ("rate", "jitter")

    jitter: float = 1000.0
    """Softens the constraints where keys are nearly the same, which makes EMMET a MEMIT of that weight; 0 meets them
    exactly. If `scaled`, in d_in, as MEMIT's. (The authors' 0.1 on keys whitened by 10,000 C is 1,000 here.)"""

    def solve(self, lm: LM, site: Site, K: Tensor, R: Tensor, prior: Patch) -> LowRank:
        return self.ridge(lm, site, K, R, "jitter")
