"""MEMIT: many facts at once, over several layers, by ridge regression against what the layers already know."""

from __future__ import annotations

from abc import abstractmethod
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
from ..parts.tail import writes_plainly
from ..parts.target import TargetSearch
from ..patch import Patch
from ..tokens import passage


@dataclass(frozen=True, kw_only=True)
class Spread(TargetSearch, Method):
    """What MEMIT and its kin share: edits find their targets, and each layer in turn solves for its part of the way."""

    layers: tuple[int, ...]
    """The blocks whose MLP write matrices are changed, lowest first; the last one's output is brought to the target."""
    clamp: float = 0.75
    """|delta| is at most this many times |h|."""
    lengths: tuple[tuple[int, int], ...] = ((10, 5),)
    """(new tokens, how many) of the sampled contexts that keys and targets are averaged over, with the bare prompt."""
    merge: bool = True
    """Whether edits of one subject get one target together (MEMIT-Merge, Dong et al. 2025, https://arxiv.org/abs/2502.07322);
    the published MEMIT gives each its own, and they overwrite each other."""
    corpus: str = moments.OWN
    """What C is taken on: samples of the model itself (`own`), or a text file, one text a line."""

    def prepare(self, lm: LM) -> None:
        contexts.sample(lm, self.lengths, self.seed)
        moments.prepare(lm, [lm.mlp_out(layer) for layer in self.layers], self.corpus)

    def patch(self, lm: LM, edits: Sequence[Edit], prior: Patch) -> Patch:
        templates = contexts.sample(lm, self.lengths, self.seed)
        wanted = self.wanted(lm, edits, templates)

        def solve(site: Site, K: Tensor, R: Tensor) -> LowRank:
            return self.solve(lm, site, K, R, prior)

        return spread(lm, edits, self.layers, templates, wanted, solve, self.portion)

    def wanted(self, lm: LM, edits: Sequence[Edit], templates: Sequence[str]) -> dict[str, Tensor]:
        """The modules that are brought to a target, and what each should put out, (edits, d).

        The last block's output, to which the MLPs of all layers add. Where they write through a norm, what one lacks
        another can't make up for: each layer's write matrix has its own target, and all are found together.
        """
        places = [lm.blocks[self.layers[-1]]]
        if not self.plain(lm, edits):
            places = [lm.site(layer).name for layer in self.layers]
        return dict(zip(places, self.find(lm, places, edits, templates, self.merge), strict=True))

    def plain(self, lm: LM, edits: Sequence[Edit]) -> bool:
        """Whether all layers add what their MLPs write to the residual stream as it is."""
        return all(writes_plainly(lm, layer, lambda: lm.encode([passage(e) for e in edits])) for layer in self.layers)

    def portion(self, left: int) -> float:
        """How much of what is missing a layer takes when so many are left, itself among them."""
        return 1 / left

    @abstractmethod
    def solve(self, lm: LM, site: Site, K: Tensor, R: Tensor, prior: Patch) -> LowRank:
        """One layer's change, for keys K (n, d_in) and what their values lack, R (n, d_out)."""

    def ridge(self, lm: LM, site: Site, K: Tensor, R: Tensor, setting: str) -> LowRank:
        """R K^T (w C + K K^T)^-1, where w is a setting; if `scaled`, in the mean of k^T C^-1 k over ordinary text,
        which is d_in."""
        weight = getattr(self, setting) * (site.shape[1] if setting in self.scaled else 1)
        return ridge(K, R, moments.cholesky(lm, site, self.corpus), weight)


@dataclass(frozen=True, kw_only=True)
class MEMIT(Spread, name="memit"):
    """Mass-Editing Memory in a Transformer: dW = R K^T (weight C + K K^T)^-1 in each layer, eq. 14."""

    paper = "Meng et al. 2023, Mass-Editing Memory in a Transformer"
    source = "https://arxiv.org/abs/2210.07229"
    scalable = ("rate", "weight")

    weight: float = 15000.0
    """How much what the layers know counts against a new fact (lambda); if `scaled`, in the mean of k^T C^-1 k over
    ordinary text, which is d_in."""

    def solve(self, lm: LM, site: Site, K: Tensor, R: Tensor, prior: Patch) -> LowRank:
        return self.ridge(lm, site, K, R, "weight")
