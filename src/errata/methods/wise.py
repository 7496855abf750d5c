"""WISE: edits are written into side memories of one matrix, which a token reads only where it would be moved far.

Where this differs from the authors' code, and why:

- Every token is routed by itself. Theirs takes the mean of a row, padding included, or of what one step of generation
  sees, so the answer depends on how the model is run. The gap is the norm of what the side memory adds (the paper);
  theirs passes both outputs through the activation function first.
- In scope are the tokens that predict the target's, out of scope the tokens of the same texts and of a corpus that are
  nearest to them. Theirs takes a locality prompt of the benchmark, which errata never shows to a method.
- With `replay`, a step sees every earlier edit of the shard, and up to `others` of those in other memories; theirs sees
  one of each. And where another memory answers a token in scope, the new one has to move it further by `apart`, or the
  router would go on asking the other one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from ..changes import SideMemories, ties
from ..edit import Edit
from ..lm import LM, Site
from ..method import Method
from ..parts import contexts, moments
from ..parts.descend import pull
from ..patch import Patch
from ..replay import in_pass, passes
from ..tokens import Passage, Tokens, passage
from ..trace import read

BEGINNING = 200
"""Characters of a text of the corpus that are read."""


@dataclass(frozen=True, kw_only=True)
class WISE(Method, name="wise"):
    """Side memories with masked gradients, sharded, merged by TIES, and routed by how far they would move a token."""

    paper = (
        "Wang et al. 2024, WISE: Rethinking the Knowledge Memory for Lifelong Model Editing of Large Language Models"
    )
    source = "https://arxiv.org/abs/2405.14768"

    at: int | str
    """The layer whose MLP write matrix has the side memories, or a linear module by its full name."""
    mask: float = 0.2
    """Share of a side memory's entries that a shard may write (rho)."""
    steps: int = 70
    """Steps of descent on an edit at most."""
    rate: float = 1.0
    """Of the descent."""
    descent: Literal["sgd", "adam"] = "sgd"
    """Which descent; the authors' is plain."""
    bound: float | None = 1.0
    """No entry of a side memory is further than this from the weight."""
    near: float = 5.0
    """Out of scope, a token should be moved by less (alpha)."""
    far: float = 20.0
    """In scope, a token should be moved by more (beta),"""
    apart: float = 10.0
    """and by so much more than any out of scope (gamma)."""
    ratio: float = 0.88
    """A side memory answers from this share of the least gap of its own edits on."""
    shard: int = 500
    """Edits that are written under one mask."""
    merge: int = 2
    """Full shards that are merged into one memory; 1 keeps them apart."""
    density: float = 0.53
    """Share of a shard's entries that TIES keeps."""
    retrieve: bool = True
    """Keep every merged memory and let the gap choose; otherwise merge into the one that is there, which counts 0.6."""
    replay: bool = False
    """Keep earlier edits in view (appendix B.3): those of the shard are written again with each later one, those of the
    other memories are out of scope."""
    lengths: tuple[tuple[int, int], ...] = ((5, 5), (10, 5))
    """Texts before the prompt: (new tokens, count)."""
    others: int = 64
    """Tokens of the corpus, nearest to an edit's own, that count as out of scope."""
    corpus: str = moments.BUILT_IN
    """Where they are taken from: `almanac`, a text file, .jsonl, a folder, or the name of a data set."""
    lines: int = 400
    """So many texts of it are read."""
    stop: float = 0.02
    """The loss at which an edit is done."""

    def prepare(self, lm: LM) -> None:
        contexts.sample(lm, self.lengths, self.seed)
        self._elsewhere(lm, lm.site(self.at))

    def beneath(self, lm: LM, prior: Patch) -> Patch:
        """Without the side memories: a new one is written as if it were the only one that answers."""
        name = lm.site(self.at).name
        others = tuple(c for c in prior.changes.get(name, ()) if not isinstance(c, SideMemories))
        return replace(prior, changes={**prior.changes, name: others})

    def patch(self, lm: LM, edits: Sequence[Edit], prior: Patch) -> Patch:
        site = lm.site(self.at)
        before = _memories(prior, site)
        after, todo = list(before), list(range(len(prior.edits), len(prior.edits) + len(edits)))
        known = [*prior.edits, *edits]
        while todo:
            if not after or after[-1].shards:
                after.append(_Memory(torch.zeros(site.shape), float("inf"), 0, ()))
            shard = after.pop()
            some, todo = todo[: self.shard - len(shard.edits)], todo[self.shard - len(shard.edits) :]
            after.append(self._written(lm, site, shard, some, known, after))
            if len(after[-1].edits) == self.shard:
                after = self._merged(after)
        return Patch({site.name: (_change(before, after, len(prior.edits)),)})

    def patches(self, lm: LM, edits: Sequence[Edit]) -> list[Patch]:
        site = lm.site(self.at)
        work = self._writing(lm, site, edits, torch.arange(len(edits)))
        deltas, gaps = self._descend(work, torch.zeros(len(edits), *site.shape), shard=0)
        found = [
            _Memory(d, self.ratio * float(g), int(self.shard == 1), (0,)) for d, g in zip(deltas, gaps, strict=True)
        ]
        return [Patch({site.name: (_change([], [memory], 0),)}) for memory in found]

    def _written(
        self,
        lm: LM,
        site: Site,
        memory: _Memory,
        new: Sequence[int],
        edits: Sequence[Edit],
        others: Sequence[_Memory],
    ) -> _Memory:
        """A shard's memory with more edits in it, beside the others."""
        numbers = (*memory.edits, *new)
        chosen = numbers if self.replay else new
        work = self._writing(lm, site, [edits[i] for i in chosen], torch.zeros(len(chosen), dtype=torch.long))
        if self.replay and others:
            past = [i for m in others for i in m.edits]
            drawn = random.Random(self.seed).sample(past, min(self.others, len(past)))
            away = self._inputs(lm, site, self._encoded(lm, [edits[i] for i in drawn]))
            work.apart = torch.cat([work.apart, away[None]], 1)
            work.beside(self._inputs(lm, site, work.tokens), others)
        shard = sum(len(m.edits) for m in others) // self.shard
        (delta,), (gap,) = self._descend(work, memory.delta[None], shard)
        least = self.ratio * float(gap)
        return _Memory(delta, least if self.replay else min(least, memory.threshold), 0, numbers)

    def _merged(self, memories: list[_Memory]) -> list[_Memory]:
        """Memories of which the last has just become full; as many full shards as go together are one."""
        memories = [*memories[:-1], replace(memories[-1], shards=1)]
        full = next((i for i, m in enumerate(reversed(memories)) if m.shards != 1), len(memories))
        if self.merge == 1 or full < self.merge:
            return memories
        rest, parts = memories[: -self.merge], memories[-self.merge :]
        weights = torch.full((self.merge,), 1 / self.merge)
        if not self.retrieve and rest:
            rest, parts = rest[:-1], [*parts, rest[-1]]
            weights = torch.cat([0.4 * weights, torch.tensor([0.6])])
        one = _Memory(
            ties(torch.stack([m.delta for m in parts]), weights, self.density),
            min(m.threshold for m in parts),
            sum(m.shards for m in parts),
            tuple(sorted(i for m in parts for i in m.edits)),
        )
        return [*rest, one]

    # Descent

    def _descend(self, work: _Writing, start: Tensor, shard: int) -> tuple[Tensor, Tensor]:
        """Deltas (groups, d_out, d_in) on from `start`, and the least gap (groups,) of a token in scope.

        Groups of edits share passes, but nothing else; one that is done stays as it is.
        """
        device = work.group.device
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + shard)
        mask = (torch.rand(start.shape[1:], generator=draw) < self.mask).to(device)
        deltas = start.to(device, copy=True).requires_grad_()
        kind = torch.optim.SGD if self.descent == "sgd" else torch.optim.Adam
        optimiser = kind([deltas], lr=self.rate)
        active = torch.ones(len(start), dtype=torch.bool, device=device)
        for _ in range(self.steps):
            loss = work.loss(deltas)
            active &= loss.detach() > self.stop
            if not active.any():
                break
            optimiser.zero_grad()
            pull(work.lm, torch.where(active, loss, 0.0), [deltas])
            assert deltas.grad is not None
            deltas.grad *= mask
            kept = deltas.detach().clone()
            optimiser.step()
            with torch.no_grad():
                moved = deltas if self.bound is None else deltas.clamp(-self.bound, self.bound)
                deltas.copy_(torch.where(active[:, None, None], moved, kept))
        with torch.no_grad():
            work.loss(deltas)
        return deltas.detach().cpu(), work.least().cpu()

    def _writing(self, lm: LM, site: Site, edits: Sequence[Edit], group: Tensor) -> _Writing:
        tokens = self._encoded(lm, edits)
        group = group.repeat_interleave(len(tokens) // len(edits)).to(lm.device)
        return _Writing(self, lm, site, tokens, group, self._apart(lm, site, edits, tokens, group))

    def _encoded(self, lm: LM, edits: Sequence[Edit]) -> Tokens:
        """Each edit after each of the sampled texts."""
        texts = contexts.sample(lm, self.lengths, self.seed)
        return lm.encode([passage(e, text, e.target) for e in edits for text in texts])

    def _inputs(self, lm: LM, site: Site, tokens: Tokens) -> Tensor:
        """What the matrix is given at tokens in scope, (reads, d_in)."""
        return read(lm, [site.name], tokens, *tokens.reads)[site.name][0].float()

    def _apart(self, lm: LM, site: Site, edits: Sequence[Edit], tokens: Tokens, group: Tensor) -> Tensor:
        """What the matrix is given at tokens that are out of scope, (groups, others, d_in).

        They are the nearest to those in scope, of the same texts and of texts of the corpus that name no subject of the
        group.
        """
        rows, cols = tokens.mask.bool().nonzero(as_tuple=True)
        inside, keys = _scope(tokens)[rows, cols], read(lm, [site.name], tokens, rows, cols)[site.name][0].float()
        texts, line, far = self._elsewhere(lm, site)
        per, found = len(tokens) // len(edits), []
        for number in range(int(group[-1]) + 1):
            subjects = {edits[i // per].subject for i in (group == number).nonzero()[:, 0].tolist()}
            named = torch.tensor([any(s in text for s in subjects) for text in texts], device=line.device)
            mine = group[rows] == number
            own, scope = keys[mine & ~inside], keys[mine & inside]
            away = torch.cat([_away(own, scope), _away(far, scope).masked_fill(named[line], torch.inf)])
            chosen = away.topk(min(self.others, int(away.isfinite().sum())), largest=False).indices
            here = chosen < len(own)
            found.append(torch.cat([own[chosen[here]], far[chosen[~here] - len(own)]]))
        least = min(map(len, found))
        return torch.stack([k[:least] for k in found])

    def _elsewhere(self, lm: LM, site: Site) -> tuple[list[str], Tensor, Tensor]:
        """Beginnings of texts of the corpus, and for each of their tokens (m,) its text and (m, d_in) what the matrix
        is given there."""
        key = "elsewhere", site.name, self.corpus, self.lines
        if key not in lm.memo:
            texts = [text[:BEGINNING] for text in islice(moments.texts(self.corpus), self.lines)]
            tokens = lm.encode([Passage(text) for text in texts])
            rows, cols = tokens.mask.bool().nonzero(as_tuple=True)
            lm.memo[key] = texts, rows, read(lm, [site.name], tokens, rows, cols)[site.name][0].float()
        return lm.memo[key]


@dataclass(frozen=True)
class _Memory:
    """A side memory on its way."""

    delta: Tensor
    threshold: float
    shards: int
    """How many full shards are in it; 0 while it is written to."""
    edits: tuple[int, ...]


class _Writing:
    """Groups of edits that are written into a delta each."""

    def __init__(self, how: WISE, lm: LM, site: Site, tokens: Tokens, group: Tensor, apart: Tensor) -> None:
        self.how, self.lm, self.site, self.tokens, self.group = how, lm, site, tokens, group
        self.apart = apart
        """What is out of scope, (groups, others, d_in)."""
        rows = tokens.reads[0]
        self.member = group[rows]
        self.weight = 1 / (rows.bincount()[rows] * group.bincount()[self.member])
        """(reads,) of a mean over rows of means over tokens, in each group."""
        self.rival = torch.zeros_like(self.weight)
        """(reads,) how far another memory that answers there would move it."""
        first = tokens.asked
        self.again = passes(lm, tokens, [site.name], first)
        self.shift = first - self.again.start
        self.scope = _scope(tokens)
        self.gaps = torch.empty(0)

    def beside(self, inputs: Tensor, others: Sequence[_Memory]) -> None:
        """Other memories, of which the router would ask the one that moves a token most: inputs (reads, d_in)."""
        for memory in others:
            gap = (inputs @ memory.delta.to(inputs.device).T).norm(dim=-1)
            self.rival = self.rival.maximum(gap.where(gap > memory.threshold, 0.0))

    def loss(self, deltas: Tensor) -> Tensor:
        """(groups,) of what is said, and of the margins that keep what is in scope and what is not apart (eq. 5)."""
        handle = self.site.module.register_forward_hook(partial(self._write, deltas))
        try:
            said = log_softmax(self.again.logits(*self.tokens.reads), -1).gather(1, self.tokens.wanted[:, None])[:, 0]
        finally:
            handle.remove()
        away = (self.apart @ deltas.mT).norm(dim=-1)  # (groups, others)
        near = (away - self.how.near).relu()
        beyond = away.amax(1)[self.member].maximum(self.rival) + self.how.apart
        return (
            self._sum(-said * self.weight)
            + near.sum(1) / (near > 0).sum(1).clamp(min=1)
            + self._violated(self.how.far - self.gaps)
            + self._violated(beyond - self.gaps)
        )

    def least(self) -> Tensor:
        """(groups,) the least gap of a token in scope, as the last pass had it."""
        none = torch.full((int(self.member[-1]) + 1,), torch.inf, device=self.member.device)
        return none.scatter_reduce(0, self.member, self.gaps.detach(), "amin")

    def _write(self, deltas: Tensor, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The weight's own output, and in scope what the group's delta adds."""
        inputs = args[0].float().view(len(self.tokens), -1, args[0].shape[-1])
        added = inputs @ (deltas if len(deltas) == 1 else deltas[self.group]).mT
        here = in_pass(self.scope, self.shift, inputs.shape[1])
        self.gaps = added[here].norm(dim=-1)
        return output + (added * here[..., None]).view(output.shape).to(output.dtype)

    def _sum(self, values: Tensor) -> Tensor:
        """(groups,) of values (reads,)."""
        return values.new_zeros(len(self.apart)).index_add(0, self.member, values)

    def _violated(self, excess: Tensor) -> Tensor:
        """(groups,) the mean of what is above zero."""
        return self._sum(excess.relu()) / self._sum((excess > 0).float()).clamp(min=1)


def _scope(tokens: Tokens) -> Tensor:
    """(batch, seq) bool: tokens that predict the target's."""
    scope = torch.zeros_like(tokens.target)
    scope[tokens.reads] = True
    return scope


def _away(keys: Tensor, scope: Tensor) -> Tensor:
    """(m,) squares of the distances from keys (m, d) to the nearest in scope."""
    return (keys.square().sum(1)[:, None] + scope.square().sum(1) - 2 * keys @ scope.T).amin(1)


def _memories(patch: Patch, site: Site) -> list[_Memory]:
    """The side memories that a patch has at a site."""
    found = [c for c in patch.changes.get(site.name, ()) if isinstance(c, SideMemories)]
    return [
        _Memory(
            change.deltas[i],
            float(change.thresholds[i]),
            int(change.sharded[i]),
            tuple(change.owners[change.memory == i].tolist()),
        )
        for change in found[-1:]
        for i in range(len(change.deltas))
    ]


def _change(before: Sequence[_Memory], after: Sequence[_Memory], known: int) -> SideMemories:
    """What was written on the memories that were there, for edits from the `known`-th on."""
    same = next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a is not b), min(len(before), len(after))
    )
    new = after[same:]
    pairs = [(edit - known, i) for i, m in enumerate(new) for edit in m.edits if edit >= known]
    owners, memory = (torch.tensor(numbers) for numbers in zip(*pairs, strict=True))
    replaces = torch.zeros(len(new), dtype=torch.long)
    replaces[0] = sum(len(m.edits) for m in before[same:])
    return SideMemories(
        owners,
        memory,
        torch.stack([m.delta for m in new]),
        torch.tensor([m.threshold for m in new]),
        torch.tensor([m.shards for m in new]),
        replaces,
    )
