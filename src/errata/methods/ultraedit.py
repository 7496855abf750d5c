"""UltraEdit: one forward and one backward pass; no training, no subject, and statistics of the edits so far alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..changes import Dense, LowRank
from ..edit import Edit
from ..lm import LM, Site
from ..method import Method
from ..parts import descend
from ..parts.hyper import Normaliser
from ..parts.scaled import Scaled
from ..parts.solve import ridge
from ..parts.taps import Which, among, change, places, tap
from ..patch import Patch
from ..replay import block_of, passes
from ..tokens import passage

TRIES = 24
"""Rates that are tried at most."""
STEP = 1.25
"""From one rate to the next."""


@dataclass(frozen=True, kw_only=True)
class UltraEdit(Scaled, Method, name="ultraedit"):
    """dW = V^T K (K^T K + I)^-1 with v = -rate |k'|^2 g'; k' and g' are normalised by all edits so far (eq. 3 to 6)."""

    paper = "Gu et al. 2025, UltraEdit: Training-, Subject-, and Memory-Free Lifelong Editing in Language Models"
    source = "https://arxiv.org/abs/2505.14679"
    scalable = ("rate", "ridge")

    at: tuple[int | str, ...]
    """The matrices to change, by name; a layer's number stands for all matrices of its MLP."""
    rate: float = 1e-6
    """How far the update goes (the paper's eta); if `scaled`, a share of what a matrix puts out where it is written to,
    and every matrix has its own statistics, where matrices of a shape share them in the paper's code."""
    margin: float | None = None
    """Each edit's update goes on from `rate`, in steps of a quarter, until every token of its target is by so many nats
    the likeliest; None: at `rate`, as in the paper."""
    ending: str = ""
    """What follows the target, so that the answer ends there: nothing, or a full stop."""
    ridge: float = 1.0
    """How much the size of the update counts; if `scaled`, in the mean square of the inputs' norms."""
    tokens: Which = "all"
    """What of a text is written to: every token (EasyEdit), where the target is read off, or the subject's end. The
    statistics are always of every token."""

    def patch(self, lm: LM, edits: Sequence[Edit], prior: Patch) -> Patch:
        sites, asked = places(lm, self.at), [replace(e, target=e.target + self.ending) for e in edits]
        seen, chosen = tap(lm, sites, asked), among(lm, asked, self.tokens)
        group = {s.name: s.name if "rate" in self.scaled else "x".join(map(str, s.shape)) for s in sites}
        normal = {group[s.name]: _kept(prior, group[s.name], s, lm) for s in sites}
        both = {s.name: torch.cat([seen.K[s.name], seen.G[s.name]], 1) for s in sites}
        for site in sites:  # all before the first is used: matrices of a group share one
            normal[group[site.name]].update(both[site.name])
        owner, values, solved = seen.owner[chosen], {}, {}
        for site in sites:
            K = seen.K[site.name][chosen]
            k, g = normal[group[site.name]](both[site.name][chosen]).split([site.shape[1], site.shape[0]], 1)
            V = -k.pow(2).sum(1, keepdim=True) * g
            values[site.name] = self._sized(site, K, V, owner) if "rate" in self.scaled else V
            weight = self.ridge * (float(K.square().sum(1).mean()) if "ridge" in self.scaled else 1.0)
            right = ridge(K, values[site.name], torch.eye(K.shape[1], dtype=torch.float64), weight=weight).right
            solved[site.name] = right.to(lm.device)

        def changes(rates: Tensor) -> dict[str, LowRank | Dense]:
            """The update with a rate (edits,) for each edit."""
            return {n: change(owner, rates[owner, None] * V, solved[n]) for n, V in values.items()}

        rates = torch.full((len(edits),), self.rate, device=lm.device)
        if self.margin is not None:
            rates = self._enough(lm, sites, asked, rates, changes, self.margin)
        found = changes(rates)
        carry = {f"{name}/{part}": t.cpu() for name, one in normal.items() for part, t in one.state_dict().items()}
        return Patch({n: (c,) for n, c in found.items()}, carry={f"normaliser/{n}": t for n, t in carry.items()})

    def _sized(self, site: Site, K: Tensor, V: Tensor, owner: Tensor) -> Tensor:
        """Values (m, d_out) of which each edit's mean is as long as what the matrix puts out at its tokens."""
        with torch.no_grad():
            out = site.module(K.to(site.module.get_parameter("weight").dtype)).float().norm(dim=1)
        sums = [torch.zeros(int(owner.max()) + 1, device=V.device).index_add(0, owner, t) for t in (out, V.norm(dim=1))]
        return V * (sums[0] / sums[1].clamp(min=torch.finfo(V.dtype).tiny))[owner, None]

    @torch.no_grad()
    def _enough(
        self,
        lm: LM,
        sites: Sequence[Site],
        edits: Sequence[Edit],
        rates: Tensor,
        changes: Callable[[Tensor], dict[str, LowRank | Dense]],
        margin: float,
    ) -> Tensor:
        """For each edit the least rate tried at which its target leads, or else that at which it leads most."""
        tokens = lm.encode([passage(e, answer=e.target) for e in edits])
        blocks = {s.name: block_of(lm, s.name) or 0 for s in sites}
        again = passes(lm, tokens, sorted(blocks, key=blocks.__getitem__), torch.zeros_like(tokens.last))
        best, most = rates, torch.full_like(rates, -torch.inf)
        for _ in range(TRIES):
            with lm.hold(*(made.effect_in(lm, name) for name, made in changes(rates).items())):
                leads = descend.leads(again.logits(*tokens.reads), tokens.wanted)
            lead = most.new_full((len(tokens),), torch.inf).scatter_reduce(0, tokens.reads[0], leads, "amin")
            better = lead > most
            best, most = torch.where(better, rates, best), torch.where(better, lead, most)
            todo = most < margin
            if not todo.any():
                break
            rates = torch.where(todo, rates * STEP, best)
        return best


def _kept(prior: Patch, group: str, site: Site, lm: LM) -> Normaliser:
    """A group's normaliser as the earlier edits left it."""
    one = Normaliser(sum(site.shape))
    start = f"normaliser/{group}/"
    kept: dict[str, Tensor] = {k.removeprefix(start): t.clone() for k, t in prior.carry.items() if k.startswith(start)}
    if kept:
        one.load_state_dict(kept)
    return one.to(lm.device)
