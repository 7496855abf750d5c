"""MEND: a network that has learned to turn the rank-one pieces of an edit's gradient into a good update."""

from __future__ import annotations

import math
import random
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..data import Case
from ..edit import Edit
from ..lm import LM, Site
from ..parts.basis import DIRECTIONS, STRANGERS, Basis, strangers
from ..parts.hyper import First, TapNet
from ..parts.outer import losses, own, questions
from ..parts.taps import Taps, Which, change, inputs, places, tap
from ..patch import Patch
from ..train import Losses, Trained

Factors = dict[str, tuple[Tensor, Tensor, Tensor]]
"""By matrix: the edit each row belongs to (m,), left (m, d_out), right (m, d_in); the update is left^T right."""


SHOWN = 256
"""Cases whose taps the inputs of the network are normalised by."""


@dataclass(frozen=True, kw_only=True)
class TapEditor(Trained):
    """A method whose network makes an update of the taps of an edit: the edit itself is one pass there and back."""

    at: tuple[int | str, ...] = ()
    """The matrices to change, by name; a layer's number stands for all matrices of its MLP."""
    step: float = 1e-4
    """The rate that training begins with."""
    weight: float = 0.1
    """How much the edit counts against what shall stay (c_edit)."""
    tokens: Which = "all"
    """What of a text is looked at: every token (the authors), where the target is read off, or the subject's end."""
    whiten: bool = False
    """Whether inputs are whitened (`parts.basis`): an update then acts on what is special about a token, as ROME's
    does. The authors only scale each entry."""

    # Editing

    def patch(self, lm: LM, edits: Sequence[Edit], prior: Patch) -> Patch:
        found = self._edited(lm, edits)
        return Patch({name: (change(*parts),) for name, parts in found.items()})

    def patches(self, lm: LM, edits: Sequence[Edit]) -> list[Patch]:
        found = self._edited(lm, edits)
        return [Patch({name: (change(*_of(i, parts)),) for name, parts in found.items()}) for i in range(len(edits))]

    def _edited(self, lm: LM, edits: Sequence[Edit]) -> Factors:
        how, network = self.ready(lm)
        with torch.no_grad():
            return how.made(lm, network, edits)

    def made(self, lm: LM, network: Any, edits: Sequence[Edit]) -> Factors:
        """The updates of edits, in shared passes."""
        sites, basis = places(lm, self.at), network["basis"]
        found = self.factors(lm, network, sites, basis.seen(tap(lm, sites, edits, self.tokens)), edits)
        return {name: (owner, left, basis.out(name, right)) for name, (owner, left, right) in found.items()}

    @abstractmethod
    def factors(self, lm: LM, network: Any, sites: Sequence[Site], seen: Taps, edits: Sequence[Edit]) -> Factors:
        """What the network makes of taps."""

    # Training

    @abstractmethod
    def nets(self, lm: LM) -> dict[str, nn.Module]:
        """What learns, as training begins with it."""

    def network(self, lm: LM) -> nn.ModuleDict:
        return nn.ModuleDict({**self.nets(lm), "basis": Basis(places(lm, self.at) if self.whiten else ())})

    def fit(self, lm: LM, network: Any, cases: Sequence[Case]) -> None:
        if self.whiten:
            sites = places(lm, self.at)
            many = STRANGERS * math.ceil(max(site.shape[1] for site in sites) / DIRECTIONS)
            edits = list(strangers(cases, random.Random(self.seed), many))
            network["basis"].fit(inputs(lm, sites, edits, self.tokens))

    def learn(self, lm: LM, network: nn.Module, cases: Sequence[Case], draw: random.Random) -> Losses:
        total, parts = self._losses(lm, network, cases, draw)
        total.backward()
        return parts

    def judge(self, lm: LM, network: nn.Module, cases: Sequence[Case], draw: random.Random) -> Losses:
        return self._losses(lm, network, cases, draw)[1]

    def _losses(self, lm: LM, network: nn.Module, cases: Sequence[Case], draw: random.Random) -> tuple[Tensor, Losses]:
        asked = questions(lm, cases, draw)
        with own(places(lm, self.at), self.made(lm, network, [c.edit for c in cases])):
            edit, stay = losses(lm, asked)
        total = self.weight * edit + stay
        return total, {"total": total.item(), "edit": edit.item(), "stay": stay.item()}


@dataclass(frozen=True, kw_only=True)
class MEND(TapEditor, name="mend"):
    """dW = -rate sum over tokens of g~ k~^T, where (k~, g~) is a network's answer to a token's (k, g), section 3.

    The rate is learned for each matrix, one network serves all matrices of a shape, and its inputs are normalised. (The
    authors' code adds and lets the rates find their sign; here they are positive, and it begins as a descent.)
    """

    paper = "Mitchell et al. 2022, Fast Model Editing at Scale"
    source = "https://arxiv.org/abs/2110.11309"

    rank: int = 1920
    """Of the network's layers."""
    depth: int = 2
    """How many they are."""

    first: First = "scale"
    """How the network's layers are built (`hyper.Layer`)."""
    polyak: bool = False
    """Whether an update is as long as its edit needs: the rates are in steps that would take the edit's loss to zero if
    it went on falling as it begins to (Polyak's), so that an edit that needs little does little elsewhere. Without it,
    as the authors have it, rates are all that length hangs on."""

    def factors(self, lm: LM, network: Any, sites: Sequence[Site], seen: Taps, edits: Sequence[Edit]) -> Factors:
        found: Factors = {}
        stride = self.stride(network, sites, seen)
        for site, net, number in numbered(network, sites):
            k, g = net(seen.K[site.name], seen.G[site.name], number)
            found[site.name] = seen.owner, -net.log_rate[number].exp() * stride * g, k
        return found

    def stride(self, network: Any, sites: Sequence[Site], seen: Taps) -> Tensor:
        """What the rates are multiplied by at every token, (m, 1)."""
        if not self.polyak:
            return torch.ones_like(seen.loss)[:, None]
        rows = numbered(network, sites)
        falls = torch.stack([net.fall(seen.K[s.name], seen.G[s.name]) for s, net, _ in rows]).sum(0)
        whole = falls.new_zeros(int(seen.owner.max()) + 1).index_add(0, seen.owner, falls)
        return (seen.loss / whole[seen.owner].clamp(min=torch.finfo(whole.dtype).tiny))[:, None]

    net: ClassVar[type[TapNet]] = TapNet

    def nets(self, lm: LM) -> dict[str, nn.Module]:
        shapes = [site.shape for site in places(lm, self.at)]
        return {
            _key(s): self.net(s[1], s[0], self.rank, self.depth, shapes.count(s), self.step, self.first)
            for s in dict.fromkeys(shapes)
        }

    def fit(self, lm: LM, network: Any, cases: Sequence[Case]) -> None:
        super().fit(lm, network, cases)
        sites = places(lm, self.at)
        seen = network["basis"].seen(tap(lm, sites, [c.edit for c in cases[:SHOWN]], self.tokens))
        for site, net, _ in numbered(network, sites):
            net.normal.update(torch.cat([seen.K[site.name], seen.G[site.name]], 1))


def numbered(network: Mapping[str, Any], sites: Sequence[Site]) -> list[tuple[Site, Any, int]]:
    """Every matrix, the network of its shape, and its number among those of the shape."""
    seen: dict[str, int] = {}
    found = []
    for site in sites:
        key = _key(site.shape)
        found.append((site, network[key], seen.setdefault(key, 0)))
        seen[key] += 1
    return found


def _key(shape: tuple[int, int]) -> str:
    return "x".join(map(str, shape))


def _of(edit: int, parts: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    owner, left, right = parts
    own = owner == edit
    return torch.zeros_like(owner[own]), left[own], right[own]
