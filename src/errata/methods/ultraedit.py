"""UltraEdit: one forward and one backward pass; no training, no subject, and statistics of the edits so far alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..edit import Edit
from ..lm import LM, Site
from ..method import Method
from ..parts.hyper import Normaliser
from ..parts.solve import ridge
from ..parts.taps import Which, among, change, places, tap
from ..patch import Patch


@dataclass(frozen=True, kw_only=True)
class UltraEdit(Method, name="ultraedit"):
    """dW = V^T K (K^T K + I)^-1 with v = -rate |k'|^2 g'; k' and g' are normalised by all edits so far (eq. 3 to 6)."""

    paper = "Gu et al. 2025, UltraEdit: Training-, Subject-, and Memory-Free Lifelong Editing in Language Models"
    source = "https://arxiv.org/abs/2505.14679"

    at: tuple[int | str, ...]
    """The matrices to change, by name; a layer's number stands for all matrices of its MLP."""
    rate: float = 1e-6
    """How far the update goes (the paper's eta)."""
    tokens: Which = "all"
    """What of a text is written to: every token (EasyEdit), where the target is read off, or the subject's end. The
    statistics are always of every token."""

    def patch(self, lm: LM, edits: Sequence[Edit], prior: Patch) -> Patch:
        sites = places(lm, self.at)
        seen, chosen = tap(lm, sites, edits), among(lm, edits, self.tokens)
        normal = {_shape(s): _kept(prior, s, lm) for s in sites}
        both = {s.name: torch.cat([seen.K[s.name], seen.G[s.name]], 1) for s in sites}
        for site in sites:  # all before the first is used: matrices of a shape share one
            normal[_shape(site)].update(both[site.name])
        changes = {}
        for site in sites:
            K = seen.K[site.name][chosen]
            k, g = normal[_shape(site)](both[site.name][chosen]).split([site.shape[1], site.shape[0]], 1)
            V = -self.rate * k.pow(2).sum(1, keepdim=True) * g
            solved = ridge(K, V, torch.eye(K.shape[1], dtype=torch.float64), weight=1.0)
            changes[site.name] = (change(seen.owner[chosen], solved.left.T, solved.right),)
        carry = {f"{shape}/{name}": t.cpu() for shape, one in normal.items() for name, t in one.state_dict().items()}
        return Patch(changes, carry={f"normaliser/{name}": t for name, t in carry.items()})


def _shape(site: Site) -> str:
    return "x".join(map(str, site.shape))


def _kept(prior: Patch, site: Site, lm: LM) -> Normaliser:
    """The normaliser as the earlier edits left it."""
    one = Normaliser(sum(site.shape))
    start = f"normaliser/{_shape(site)}/"
    kept: dict[str, Tensor] = {k.removeprefix(start): t.clone() for k, t in prior.carry.items() if k.startswith(start)}
    if kept:
        one.load_state_dict(kept)
    return one.to(lm.device)
