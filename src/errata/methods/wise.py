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
- With `token = "subject"` the subject's last token is in scope, in the prompt and elsewhere, so that another wording of
  the question is routed too; and the same question about names that end as the subject does is out of scope.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..changes import SideMemories, ties
from ..edit import Edit
from ..effects import Hook, hooked
from ..lm import LM, Site
from ..method import Method
from ..parts import contexts, scope
from ..parts import corpus as sources
from ..parts.descend import pull, unfinished
from ..parts.scaled import Scaled
from ..patch import Patch
from ..replay import in_pass, passes
from ..tokens import Tokens
from ..trace import read


@dataclass(frozen=True, kw_only=True)
class WISE(Scaled, Method, name="wise"):
    """Side memories with masked gradients, sharded, merged by TIES, and routed by how far they would move a token."""

    paper = (
        "Wang et al. 2024, WISE: Rethinking the Knowledge Memory for Lifelong Model Editing of Large Language Models"
    )
    source = "https://arxiv.org/abs/2405.14768"
    scalable = ("near", "far", "apart")

    at: int | str
    """The layer whose MLP write matrix has the side memories, or a linear module by its full name."""
    token: Literal["answer", "subject"] = "answer"
    """What is in scope: the tokens that predict the target's, or the subject's last token."""
    mask: float = 0.2
    """Share of a side memory's entries that a shard may write (rho)."""
    steps: int = 70
    """Steps of descent on an edit at most."""
    rate: float = 1.0
    """Of the descent; with `value`, a share of the root mean square of what the matrix puts out in scope."""
    descent: Literal["sgd", "adam", "value"] = "sgd"
    """What descends: every entry, plainly (the authors') or by Adam; or by Adam a value of each edit's, which is read
    where the input is like one in its scope, unlike those outside and those of the shard's earlier edits."""
    ridge: float = 1.0
    """With `value`, how much may be left of such likeness: a share of the mean square of the inputs in scope."""
    bound: float | None = 1.0
    """No entry of a side memory is further than this from the weight; with `value`, no value is longer
    than so many times what the matrix puts out in scope."""
    near: float = 5.0
    """Out of scope, a token should be moved by less (alpha). If `scaled`, this margin, like the next two, is a share of
    the size of what the matrix puts out in scope."""
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
    corpus: str = sources.BUILT_IN
    """Where they are taken from: `almanac`, a text file, .jsonl, a folder, or the name of a data set."""
    lines: int = 400
    """Texts of it that are read."""
    stop: float = 0.02
    """The loss at which an edit is done."""
    ending: str = ""
    """What is trained to follow the target, so that the answer ends there: nothing, or a full stop."""

    def prepare(self, lm: LM) -> None:
        contexts.sample(lm, self.lengths, self.seed)
        scope.ordinary(lm, lm.site(self.at), self.corpus, self.lines)

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
        work = self._writing(lm, site, edits, torch.arange(len(edits)), ())
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
        group = torch.zeros(len(chosen), dtype=torch.long)
        work = self._writing(lm, site, [edits[i] for i in chosen], group, edits)
        if self.replay and others:
            past = [i for m in others for i in m.edits]
            drawn = random.Random(self.seed).sample(past, min(self.others, len(past)))
            away = self._scope(lm, site, [edits[i] for i in drawn])[0]
            work.apart = torch.cat([work.apart, away[None]], 1)
        if self.replay or self.token == "subject":  # a later edit of a subject is about the same inputs
            work.beside(others)
        subjects = {edits[i].subject for i in chosen}
        earlier = [edits[i] for i in memory.edits if i not in chosen and edits[i].subject not in subjects]
        if self.descent == "value" and earlier:
            work.earlier = self._scope(lm, site, earlier)[0]
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
        device, start = work.group.device, start.to(work.group.device)
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + shard)
        mask = (torch.rand(start.shape[1:], generator=draw) < self.mask).to(device)
        by_value = self.descent == "value"
        param, written = (work.by_value if by_value else work.by_entry)(start, mask)
        kind = torch.optim.SGD if self.descent == "sgd" else torch.optim.Adam
        optimiser = kind([param], lr=self.rate)
        active = torch.ones(len(start), dtype=torch.bool, device=device)
        for _ in range(self.steps):
            loss = work.loss(written(param))
            active &= unfinished(loss, self.stop)
            if not active.any():
                break
            optimiser.zero_grad()
            losses = torch.where(active, loss, 0.0)
            pull(work.lm, losses.sum() if by_value else losses, [param])
            kept = param.detach().clone()
            if not by_value:
                assert param.grad is not None
                param.grad *= mask
            optimiser.step()
            with torch.no_grad():
                moved = param if self.bound is None else self._bounded(param, self.bound)
                stays = ~active[work.groups] if by_value else ~active
                param.copy_(torch.where(stays.view(-1, *[1] * (param.ndim - 1)), kept, moved))
        found = written(param).detach()
        return found.cpu(), work.least(found).cpu()

    def _bounded(self, param: Tensor, bound: float) -> Tensor:
        if self.descent != "value":
            return param.clamp(-bound, bound)
        return param * (bound * param.shape[1] ** 0.5 / param.norm(dim=1, keepdim=True)).clamp(max=1.0)

    def _writing(self, lm: LM, site: Site, edits: Sequence[Edit], group: Tensor, known: Sequence[Edit]) -> _Writing:
        """What is written: edits, each of a group, and what else of the known ones is of their subjects."""
        texts = contexts.sample(lm, self.lengths, self.seed)
        passages, edit = scope.lessons(edits, texts, self.ending, known if self.token == "subject" else ())
        tokens, mine = lm.encode(passages), group[edit].to(lm.device)
        inputs, outputs, owner = self._scope(lm, site, edits)
        member = group[owner].to(lm.device)
        apart = self._apart(lm, site, edits, group, inputs, member)
        work = _Writing(self, lm, site, tokens, mine, inputs, member, apart)
        work.owner, work.groups = owner.to(lm.device), group.to(lm.device)
        sums = torch.zeros(len(apart), device=lm.device).index_add(0, member, outputs.norm(dim=1))
        work.size = (sums / member.bincount()).clamp(min=torch.finfo(sums.dtype).tiny)
        return work

    def _scope(self, lm: LM, site: Site, edits: Sequence[Edit]) -> tuple[Tensor, Tensor, Tensor]:
        """What the matrix is given and puts out at tokens in scope, (m, d_in) and (m, d_out) float32, and (m,) of which
        edit."""
        texts = contexts.sample(lm, self.lengths, self.seed)
        if self.token == "subject":
            passages, edit = scope.inside(edits, texts)
            tokens = lm.encode(passages)
            rows, cols = torch.arange(len(tokens), device=lm.device), tokens.subject
        else:
            passages, edit = scope.lessons(edits, texts, self.ending)
            tokens = lm.encode(passages)
            rows, cols = tokens.reads
        inputs, outputs = read(lm, [site.name], tokens, rows, cols)[site.name]
        return inputs.float(), outputs.float(), edit[rows.cpu()]

    def _apart(
        self, lm: LM, site: Site, edits: Sequence[Edit], group: Tensor, inputs: Tensor, member: Tensor
    ) -> Tensor:
        """What the matrix is given at tokens that are out of scope, (groups, others, d_in).

        They are those most like one in scope, of texts of the corpus that name no subject of the group and of the
        edits' own texts, also with other names that end as the subject does.
        """
        texts = contexts.sample(lm, self.lengths, self.seed)
        far, found = scope.ordinary(lm, site, self.corpus, self.lines), []
        for number in range(int(group[-1]) + 1):
            mine = [edits[i] for i in (group == number).nonzero()[:, 0].tolist()]
            own = self._out_of_scope(lm, site, mine, texts)
            away = torch.cat([own, far.inputs[~far.naming([e.subject for e in mine])]])
            like = _like(away, inputs[member == number], self.descent == "value")
            found.append(away[like.topk(min(self.others, len(away))).indices])
        least = min(map(len, found))
        return torch.stack([k[:least] for k in found])

    def _out_of_scope(self, lm: LM, site: Site, edits: Sequence[Edit], texts: Sequence[str]) -> Tensor:
        """What the matrix is given at the other tokens of the edits' texts, (m, d_in)."""
        tokens = lm.encode(scope.lessons(edits, texts, self.ending)[0])
        outside = tokens.mask.bool() & ~self._marked(tokens)
        found = [read(lm, [site.name], tokens, *outside.nonzero(as_tuple=True))[site.name][0].float()]
        if self.token == "subject":
            found += [scope.namesakes(lm, site, edit) for edit in edits]
        return torch.cat(found)

    def _marked(self, tokens: Tokens) -> Tensor:
        """(batch, seq) bool: the tokens in scope."""
        marked = torch.zeros_like(tokens.target)
        rows = torch.arange(len(tokens), device=tokens.ids.device)
        marked[(rows, tokens.subject) if self.token == "subject" else tokens.reads] = True
        return marked


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

    def __init__(
        self,
        how: WISE,
        lm: LM,
        site: Site,
        tokens: Tokens,
        group: Tensor,
        inputs: Tensor,
        member: Tensor,
        apart: Tensor,
    ) -> None:
        self.how, self.lm, self.site, self.tokens, self.group = how, lm, site, tokens, group
        self.inputs, self.member = inputs, member
        """What is in scope, (m, d_in), and of which group, (m,)."""
        self.apart = apart
        """What is out of scope, (groups, others, d_in)."""
        self.owner, self.groups = member, torch.arange(len(apart), device=inputs.device)
        """(m,) the edit that each of those is of, and (edits,) the group of each edit."""
        self.earlier = inputs[:0]
        """What was in scope of the edits that a group's delta has already, (n, d_in)."""
        self.size = torch.ones(len(apart), device=inputs.device)
        """(groups,) the mean norm of what the matrix puts out in scope."""
        rows = tokens.reads[0]
        self.weight = 1 / (rows.bincount()[rows] * group.bincount()[group[rows]])
        """(reads,) of a mean over rows of means over tokens, in each group."""
        self.rival = torch.zeros(len(inputs), device=inputs.device)
        """(m,) how far another memory that answers there would move it."""
        self.scope = how._marked(tokens)
        first = tokens.subject if how.token == "subject" else tokens.asked
        self.again = passes(lm, tokens, [site.name], first)
        self.shift = first - self.again.start

    def beside(self, others: Sequence[_Memory]) -> None:
        """Other memories, of which the router would ask the one that moves a token most."""
        for memory in others:
            gap = (self.inputs @ memory.delta.to(self.inputs.device).T).norm(dim=-1)
            self.rival = self.rival.maximum(gap.where(gap > memory.threshold, 0.0))

    def by_entry(self, start: Tensor, mask: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """What is trained, and the deltas that it comes to: every entry."""
        return start.clone().requires_grad_(), lambda entries: entries

    def by_value(self, start: Tensor, mask: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The same: of each edit a value, which is read where the input is like one in its scope."""
        reading = self._reading()
        unit = (self.size / start.shape[1] ** 0.5)[self.groups, None]
        numbers = [(self.groups == group).nonzero()[:, 0] for group in range(len(start))]

        def written(values: Tensor) -> Tensor:
            added = torch.stack([(unit * values)[some].T @ reading[some] for some in numbers])
            return start + added * mask / self.how.mask

        return start.new_zeros(len(self.groups), start.shape[1]).requires_grad_(), written

    def _reading(self) -> Tensor:
        """(edits, d_in): what gives 1 in the mean with inputs in scope of an edit, and about 0 with others of its group
        and with what is out of scope, by least squares."""
        rows = []
        for edit, group in enumerate(self.groups.tolist()):
            here = self.member == group
            others = torch.cat([self.inputs[here], self.apart[group], self.earlier]).double()
            wanted = torch.zeros(len(others), dtype=torch.float64, device=others.device)
            wanted[: int(here.sum())] = (self.owner[here] == edit).double()
            gram = others @ others.T
            gram.diagonal().add_(self.how.ridge * self.inputs[here].square().sum(1).mean())
            row = torch.linalg.solve(gram, wanted) @ others
            rows.append((row / (others @ row)[wanted > 0].mean()).float())
        return torch.stack(rows)

    def loss(self, deltas: Tensor) -> Tensor:
        """(groups,) of what is said, and of the margins that keep what is in scope and what is not apart (eq. 5)."""
        with hooked(Hook(self.site.module, partial(self._write, deltas))):
            nll = cross_entropy(self.again.logits(*self.tokens.reads), self.tokens.wanted, reduction="none")
        said = nll.new_zeros(len(self.apart)).index_add(0, self.group[self.tokens.reads[0]], nll * self.weight)
        unit = self.size if self.how.scaled else torch.ones_like(self.size)
        near, far, apart = (self._margin(name) / unit for name in self.how.scalable)
        away = (self.apart @ deltas.mT).norm(dim=-1) / unit[:, None]  # (groups, others)
        gaps, rival = self.gaps(deltas) / unit[self.member], self.rival / unit[self.member]
        beyond = away.amax(1)[self.member].maximum(rival) + apart[self.member]
        close = (away - near[:, None]).relu()
        return (
            said
            + close.sum(1) / (close > 0).sum(1).clamp(min=1)
            + self._violated(far[self.member] - gaps)
            + self._violated(beyond - gaps)
        )

    def _margin(self, name: str) -> Tensor:
        """(groups,) near, far or apart, in the units of what the matrix puts out."""
        return getattr(self.how, name) * (self.size if name in self.how.scaled else torch.ones_like(self.size))

    def gaps(self, deltas: Tensor) -> Tensor:
        """(m,) how far each token in scope is moved."""
        return _through(deltas, self.inputs, self.member).norm(dim=-1)

    def least(self, deltas: Tensor) -> Tensor:
        """(groups,) the least gap of a token in scope."""
        none = torch.full((len(self.apart),), torch.inf, device=self.member.device)
        return none.scatter_reduce(0, self.member, self.gaps(deltas), "amin")

    def _write(self, deltas: Tensor, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The weight's own output, and in scope what the group's delta adds."""
        inputs = args[0].float().view(len(self.tokens), -1, args[0].shape[-1])
        here = in_pass(self.scope, self.shift, inputs.shape[1])
        added = output.new_zeros(*inputs.shape[:2], deltas.shape[1], dtype=torch.float32)
        added[here] = _through(deltas, inputs[here], self.group[here.nonzero()[:, 0]])
        return output + added.view(output.shape).to(output.dtype)

    def _violated(self, excess: Tensor) -> Tensor:
        """(groups,) the mean of what is above zero."""
        none = excess.new_zeros(len(self.apart))
        violated = none.index_add(0, self.member, excess.relu())
        return violated / none.index_add(0, self.member, (excess > 0).float()).clamp(min=1)


def _through(deltas: Tensor, inputs: Tensor, group: Tensor) -> Tensor:
    """(m, d_out) of inputs (m, d_in), each through the delta of its group; groups stand in order."""
    parts = inputs.split(group.bincount(minlength=len(deltas)).tolist())
    return torch.cat([part @ delta.T for part, delta in zip(parts, deltas, strict=True)])


def _like(keys: Tensor, inside: Tensor, along: bool) -> Tensor:
    """(m,) how like one in scope each key (m, d) is: by its product, which is how far what moves that one moves it, or
    by the square of its distance."""
    product = keys @ inside.T
    if along:
        return (product.abs() / inside.square().sum(1)).amax(1)
    return -(keys.square().sum(1)[:, None] + inside.square().sum(1) - 2 * product).amin(1)


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
