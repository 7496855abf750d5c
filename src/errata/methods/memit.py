"""MEMIT: many facts at once, over several layers, by ridge regression against what the layers already know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..changes import LowRank
from ..edit import Edit
from ..lm import LM, Site
from ..method import Method
from ..parts import contexts, moments
from ..parts.solve import ridge
from ..parts.spread import spread
from ..parts.target import TargetSearch
from ..patch import Patch


@dataclass(frozen=True, kw_only=True)
class MEMIT(TargetSearch, Method, name="memit"):
    """Mass-Editing Memory in a Transformer: dW = R K^T (weight C + K K^T)^-1 in each layer, eq. 14."""

    paper = "Meng et al. 2023, Mass-Editing Memory in a Transformer"
    source = "https://arxiv.org/abs/2210.07229"

    layers: tuple[int, ...]
    """The blocks whose MLP write matrices are changed, lowest first; the last one's output is brought to the target."""
    clamp: float = 0.75
    """|delta| is at most this many times |h|."""
    lengths: tuple[tuple[int, int], ...] = ((10, 5),)
    """(new tokens, how many) of the sampled contexts that keys and targets are averaged over, with the bare prompt."""
    weight: float = 15000.0
    """How much what the layers know counts against a new fact (lambda)."""
    merge: bool = True
    """Whether edits of one subject get one target together (MEMIT-Merge, Dong et al. 2025, https://arxiv.org/abs/2502.07322);
    the published MEMIT gives each its own, and they overwrite each other."""
    corpus: str = moments.BUILT_IN
    """The text file that C is taken on, one text a line; by default the small one that ships with almanac."""

    def prepare(self, lm: LM) -> None:
        contexts.sample(lm, self.lengths, self.seed)
        moments.prepare(lm, [lm.mlp_out(layer) for layer in self.layers], self.corpus)

    def patch(self, lm: LM, edits: Sequence[Edit], prior: Patch) -> Patch:
        templates = contexts.sample(lm, self.lengths, self.seed)
        place, wanted = self.wanted(lm, edits, templates)

        def solve(site: Site, K: Tensor, R: Tensor) -> LowRank:
            return self.solve(lm, site, K, R, prior)

        return spread(lm, edits, self.layers, templates, place, wanted, solve, self.portion)

    def wanted(self, lm: LM, edits: Sequence[Edit], templates: Sequence[str]) -> tuple[str, Tensor]:
        """The module that is brought to a target, and what it should put out, (edits, d)."""
        block = lm.blocks[self.layers[-1]]
        (z,) = self.find(lm, [block], edits, templates, self.merge)
        return block, z

    def portion(self, left: int) -> float:
        """How much of what is missing a layer takes when so many are left, itself among them."""
        return 1 / left

    def solve(self, lm: LM, site: Site, K: Tensor, R: Tensor, prior: Patch) -> LowRank:
        """One layer's change."""
        return ridge(K, R, moments.cholesky(lm, site, self.corpus), self.weight)
