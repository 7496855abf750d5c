"""MALMEN: MEND for thousands of edits, whose updates are joined by least squares instead of being summed.

Editing holds one pass of edits at a time, as the normal equation is two sums over tokens. Training holds the taps of a
batch, and no graph of it: the gradient of the loss reaches the network through the gradient of the update alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..changes import Dense
from ..data import Case
from ..edit import Edit
from ..errors import UsageError
from ..lm import LM, Site
from ..method import Method
from ..parts.basis import Basis
from ..parts.hyper import First, RidgeNet, TapNet
from ..parts.near import Likes, Near, namesakes
from ..parts.outer import apart, losses, questions, weights
from ..parts.taps import Again, Taps, answers, places, spoken
from ..patch import Patch
from ..train import Losses
from .mend import MEND, numbered

TOGETHER = 32
"""Cases whose questions are asked in one pass of training. Changes the memory, not the result."""


Sums = dict[str, tuple[Tensor, Tensor]]
"""By matrix: K^T K + ridge I, (d_in, d_in), and V^T K, (d_out, d_in); float64."""


@dataclass(frozen=True, kw_only=True)
class MALMEN(MEND, name="malmen"):
    """dW = V^T K (K^T K + ridge I)^-1, with v = -rate (k . k~) g~ for every token of every edit (eq. 2 and 3)."""

    paper = "Tan et al. 2024, Massive Editing for Large Language Models via Meta Learning"
    source = "https://arxiv.org/abs/2311.04661"

    step: float = 1e-6
    """The rate that training begins with."""
    weight: float = 1.0
    """How much the edit counts against what shall stay."""

    first: First = "relu"
    """How the network's layers are built: with "scale", they can begin as those of a MEND editor (`Course.start`)."""

    ridge: float = 1.0
    """The weight of the ridge that training begins with."""

    rounds: int = 1
    """How often a batch is edited, each time on the model as the time before left it: what one step along a gradient
    leaves over is seen by the next. (The authors: once.)"""

    likes: float = 0.0
    """How much it counts that nothing changes in what edits of one answer have in common (`parts.near`)."""
    namesakes: int = 0
    """Made-up subjects of each edit, of the same answer, that every round draws back to it."""

    net: ClassVar[type[TapNet]] = RidgeNet

    def __post_init__(self) -> None:
        if self.likes and self.tokens == "all":
            raise UsageError("likes compares edits by one token of each; give tokens='target' or tokens='subject'")

    def nets(self, lm: LM) -> dict[str, nn.Module]:
        found = super().nets(lm)
        for net in found.values():
            nn.init.constant_(net.get_parameter("log_ridge"), math.log(self.ridge))
        return found

    patches = Method.patches  # each edit by itself: there is nothing to join

    def patch(self, lm: LM, edits: Sequence[Edit], prior: Patch) -> Patch:
        how, network = self.ready(lm)
        owners, found = torch.arange(len(edits)), how.moved(lm, network, edits)
        return Patch({name: (Dense(owners, update.cpu()),) for name, update in found.items()})

    @torch.no_grad()
    def moved(
        self, lm: LM, network: Any, edits: Sequence[Edit], rounds: list[tuple[list[Taps], Sums]] | None = None
    ) -> dict[str, Tensor]:
        """By matrix, what all rounds make of the edits, (d_out, d_in).

        What each was shown, and what was solved, is added to `rounds` where that is given.
        """
        sites, basis = places(lm, self.at), network["basis"]
        near, found = self.near(lm, sites, edits), {}
        for _ in range(self.rounds):
            with weights(sites, found):
                sums, seen = self.round(network, sites, near, keep=rounds is not None)
            if rounds is not None:
                rounds.append((seen, sums))
            made = {name: basis.out(name, update.float()) for name, (_, update) in sums.items()}
            found = {name: found.get(name, 0) + update for name, update in made.items()}
        return found

    def near(self, lm: LM, sites: Sequence[Site], edits: Sequence[Edit]) -> Near:
        """The edits, and what is kept near them, as the model is now."""
        before = answers(lm, edits) if self.likes or self.namesakes else []
        kept = namesakes(lm, edits, before, random.Random(self.seed), self.namesakes) if self.namesakes else []
        others = (Again(lm, sites, kept, begun=True), spoken(lm, kept)) if kept else None
        return Near(Again(lm, sites, edits), before, others)

    def round(self, network: Any, sites: Sequence[Site], near: Near, keep: bool) -> tuple[Sums, list[Taps]]:
        """What is solved for the edits on the model as it is now, and, where they are to be kept, the taps of that."""
        basis, likes = network["basis"], Likes(near.before)
        passes: Iterable[Taps] = map(basis.seen, near.edits.taps(self.tokens))
        if self.likes:
            passes = likes.watched(passes)
        if near.namesakes:
            kept, said = near.namesakes
            passes = chain(passes, map(basis.seen, kept.drift(self.tokens, said)))
        seen = list(passes) if keep else []
        sums = self.normal(network, sites, seen or passes)
        if self.likes:
            sums = {name: (A + self.likes * likes.moment(name), B) for name, (A, B) in sums.items()}
        return solved(sums), seen

    def learn(self, lm: LM, network: Any, cases: Sequence[Case], draw: random.Random) -> Losses:
        return self._through(lm, network, cases, draw, learning=True)

    def judge(self, lm: LM, network: Any, cases: Sequence[Case], draw: random.Random) -> Losses:
        return self._through(lm, network, cases, draw, learning=False)

    def _through(self, lm: LM, network: Any, cases: Sequence[Case], draw: random.Random, learning: bool) -> Losses:
        """The losses after all rounds. Every round learns from them, as if what it changes the next did not see."""
        sites, basis, cases = places(lm, self.at), network["basis"], apart(cases)
        rounds = [] if learning else None
        moved = self.moved(lm, network, [c.edit for c in cases], rounds)
        pulled = {name: torch.zeros_like(update, requires_grad=True) for name, update in moved.items()}
        parts = self._asked(lm, basis, sites, pulled, cases, draw, before=moved)
        for seen, found in rounds or ():
            self.teach(network, sites, seen, found, pulled)
        return parts

    def normal(self, network: Any, sites: Sequence[Site], passes: Iterable[Taps]) -> Sums:
        """The two sides of the normal equation, summed pass by pass."""
        found: Sums = {}
        rows = numbered(network, sites)
        for site, net, number in rows:
            d_out, d_in = site.shape
            like = {"dtype": torch.float64, "device": net.log_ridge.device}
            found[site.name] = (
                net.log_ridge[number].double().exp() * torch.eye(d_in, **like),
                torch.zeros(d_out, d_in, **like),
            )
        for taps in passes:
            stride = self.stride(network, sites, taps)
            for site, net, number in rows:
                V, K = (_values(net, taps, site, number) * stride).double(), taps.K[site.name].double()
                A, B = found[site.name]
                found[site.name] = torch.addmm(A, K.T, K), torch.addmm(B, V.T, K)
        return found

    def _asked(
        self,
        lm: LM,
        basis: Basis,
        sites: Sequence[Site],
        deltas: Mapping[str, Tensor],
        cases: Sequence[Case],
        draw: random.Random,
        times: float = 1.0,
        before: Mapping[str, Tensor] = {},
    ) -> Losses:
        """The losses of one update shared by all cases, on top of what was there before. Where it takes gradients, they
        are left in it.

        All are multiplied by `times`.
        """
        found = {"total": 0.0, "edit": 0.0, "stay": 0.0}
        for start in range(0, len(cases), TOGETHER):
            some = cases[start : start + TOGETHER]
            asked = questions(lm, some, draw, shared=True)
            with weights(sites, {name: basis.out(name, delta) + before.get(name, 0) for name, delta in deltas.items()}):
                edit, stay = losses(lm, asked)
            total, share = self.weight * edit + stay, times * len(some) / len(cases)
            if total.requires_grad:
                (share * total).backward()
            for name, value in (("total", total), ("edit", edit), ("stay", stay)):
                found[name] += share * value.item()
        return found

    def teach(
        self, network: Any, sites: Sequence[Site], seen: Sequence[Taps], found: Sums, deltas: Mapping[str, Tensor]
    ) -> None:
        """Carry the gradients in the updates on into the network's parameters.

        Args:
            network: whose answers were joined.
            sites: the matrices.
            seen: the taps it answered to, pass by pass.
            found: what was solved with its answers.
            deltas: what has the gradients in the updates.
        """
        for site, net, number in numbered(network, sites):
            A, update = found[site.name]
            grad = deltas[site.name].grad
            assert grad is not None
            M = _by(A, grad.to(A))  # the gradient of V^T K
            ridge = net.log_ridge[number]
            (-(M * update).sum().to(ridge) * ridge.detach().exp() * ridge).backward()
            for taps in seen:
                K = taps.K[site.name]
                V = _values(net, taps, site, number) * self.stride(network, sites, taps)
                (V * (K @ M.T.to(K))).sum().backward()


def _values(net: RidgeNet, taps: Taps, site: Site, number: int) -> Tensor:
    """How the output at each token shall move, (m, d_out)."""
    return (net.back if taps.kept else net.values)(taps.K[site.name], taps.G[site.name], number)


def solved(sums: Sums) -> Sums:
    """By matrix: the left side, and the update (d_out, d_in)."""
    return {name: (A, _by(A, B)) for name, (A, B) in sums.items()}


def _by(A: Tensor, B: Tensor) -> Tensor:
    """B A^-1. Of a model that says no finite numbers any more it has none either, which whoever asked finds out."""
    L, failed = torch.linalg.cholesky_ex(A)
    return torch.cholesky_solve(B.T, L).T.masked_fill(failed != 0, torch.nan)
