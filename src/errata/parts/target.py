"""v*: what a module should put out at the subject's last token for the model to say the target.

Meng et al. 2022 (ROME), https://arxiv.org/abs/2202.05262, eq. 4. Edits are independent of each other, so all of them
share every pass, one delta per edit, and edits that are done leave the batch. Passes are replayed from the edited
layer and the subject on (`errata.replay`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from ..edit import Edit
from ..effects import hooked
from ..errors import over
from ..lm import LM
from ..replay import Passes, passes
from ..tokens import Passage, Tokens, passage
from ..trace import rewriting
from .descend import pull
from .scaled import Scaled
from .tail import tail

log = logging.getLogger(__name__)

TOKENS = 16_384
"""Tokens in one pass: how many edits go together. Changes the memory, not the result."""
UNEVEN = 1.3
"""Edits go together while the longest, from its subject on, has at most this many times the tokens of the shortest."""


@dataclass(frozen=True, kw_only=True)
class TargetSearch(Scaled):
    """How v* is found: Adam on an additive delta, from zero."""

    scalable = ("rate",)

    steps: int = 25
    """Passes at most; the last one only measures."""
    rate: float = 0.5
    """Adam's learning rate; if `scaled`, in |v| / sqrt(d)."""
    kl: float = 0.0625
    """Weight of keeping what the model says after "{subject} is a"."""
    kl_at: Literal["end", "subject"] = "end"
    """Where that is read: after the whole phrase (the paper), or at the subject's last token (the authors' code)."""
    decay: float = 0.5
    """Weight of |delta| / |v|^2."""
    clamp: float = 4.0
    """|delta| is at most this many times |v|; where a norm comes after the place, both as it leaves them."""
    stop: float = 0.05
    """The loss at which an edit is done."""
    margin: float | None = None
    """An edit is also done when every token of its target is likelier, in every context, than any other by this
    difference of log-probabilities (MPES, https://arxiv.org/abs/2502.01636, has 0); none: by the loss alone."""

    def find(
        self, lm: LM, places: Sequence[str], edits: Sequence[Edit], contexts: Sequence[str], merge: bool = False
    ) -> list[Tensor]:
        """v* of every edit at every place: for each place (edits, d) in float32.

        Args:
            lm: the model.
            places: modules, the first one in the lowest block; they get a delta each, found together.
            edits: what should be said.
            contexts: templates with `{}` for the prompt, the bare one first.
            merge: one v* for all edits of a subject, so that they don't fight over it (MEMIT-Merge).
        """
        over(0, rate=self.rate, clamp=self.clamp)
        over(1, steps=self.steps)  # the last one only measures
        number: dict[str | int, int] = {}
        member = torch.tensor([number.setdefault(e.subject if merge else i, len(number)) for i, e in enumerate(edits)])
        rows = [p for e in edits for p in _rows(e, contexts)]
        tokens = lm.encode(rows)
        per = len(rows) // len(edits)
        together = max(1, TOKENS // (per * tokens.ids.shape[1]))
        suffix = (tokens.last - tokens.subject).view(-1, per).max(1).values.cpu() + 1
        groups = list(_groups(member, suffix, together))
        found: list[list[Tensor]] = []
        for group in groups:
            chosen = (group[:, None] * per + torch.arange(per)).flatten().to(lm.device)
            _, owner = member[group].unique(return_inverse=True)
            found.append(_Descent(self, lm, places, tokens[chosen], owner.to(lm.device), per).run())
        order = torch.cat(groups).argsort().to(lm.device)
        return [torch.cat(parts)[order] for parts in zip(*found, strict=True)]

    def judge(self, total: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
        """Which deltas are done, and how much the target counts in the next step; both (deltas,)."""
        done = total < self.stop
        if self.margin is not None:
            done = done | (loss.margin >= self.margin)
        return done, torch.ones_like(total)


@dataclass
class Loss:
    """What a pass says of every delta, each (deltas,)."""

    nll: Tensor
    """Mean negative log-probability of the target's tokens."""
    kl: Tensor
    """Weighted divergence from what followed "{subject} is a"."""
    decay: Tensor
    """Weighted size."""
    margin: Tensor
    """Log-probability of a target's token less that of the likeliest other, the least of all tokens and contexts."""


def _rows(edit: Edit, contexts: Sequence[str]) -> list[Passage]:
    """The prompt and target in every context, then "{subject} is a"."""
    is_a = Edit("{} is a", edit.subject, edit.target)
    return [*(passage(edit, c, edit.target) for c in contexts), passage(is_a)]


def _groups(member: Tensor, suffix: Tensor, most: int) -> Iterator[Tensor]:
    """Indices of edits, in batches of about `most`; those with a delta in common stay together.

    A pass is as long as its longest suffix, so that edits of like suffixes go together.

    Args:
        member: (edits,) the delta of each.
        suffix: (edits,) tokens from the subject on.
        most: edits in a batch.
    """
    longest = torch.zeros(int(member.max()) + 1, dtype=suffix.dtype).scatter_reduce(0, member, suffix, "amax")
    order = longest[member].mul(len(longest)).add(member).argsort(stable=True)
    batch: list[int] = []
    for i in order.tolist():
        new = bool(batch) and int(member[i]) != int(member[batch[-1]])
        if new and (len(batch) >= most or longest[member[i]] > UNEVEN * longest[member[batch[0]]]):
            yield torch.tensor(batch)
            batch = []
        batch.append(i)
    yield torch.tensor(batch)


class _Descent:
    """One batch of edits on their way to v*."""

    def __init__(
        self, how: TargetSearch, lm: LM, places: Sequence[str], tokens: Tokens, owner: Tensor, per: int
    ) -> None:
        self.how, self.lm, self.places, self.owner, self.per = how, lm, places, owner, per
        self.n = int(owner.max()) + 1
        self.edits = torch.arange(len(owner), device=owner.device)  # those in the batch
        self.batch = tokens
        self.first = torch.stack([(owner == i).nonzero()[0, 0] * per for i in range(self.n)])
        """(deltas,) rows of bare prompts."""
        self.tails = [tail(lm, p, lambda: tokens[self.first]) for p in places]
        self.passes: Passes = passes(lm, tokens, places, tokens.subject)
        self.before: list[Tensor] = []
        """v of every delta and place, seen in the first pass; (deltas, d)."""
        self.is_a = torch.empty(0)
        """What followed "{subject} is a" then, for every edit."""
        self.bounds: list[Tensor] = []
        """What |delta| is at most, as the block's output feels it; (deltas,)."""
        self.units: list[Tensor] = []
        """By how much a rate of 1 moves a delta; (deltas, 1)."""
        self.moves: list[Tensor] = []
        """What Adam moves: each delta in its unit; (deltas, d)."""

    def run(self) -> list[Tensor]:
        """v* for each place, (edits, d)."""
        active = torch.arange(self.n, device=self.lm.device)
        self._look()
        optimiser = torch.optim.Adam(self.moves, lr=self.how.rate)
        lead = torch.ones(self.n, device=self.lm.device)
        for step in range(self.how.steps):
            loss = self._loss()
            total = lead * loss.nll + loss.kl + loss.decay
            done, lead = self.how.judge(total.detach(), loss)
            log.debug("step %d: loss %s", step, total[active].tolist())
            active = active[~done[active]]
            if step == self.how.steps - 1 or not len(active):
                break
            optimiser.zero_grad()
            pull(self.lm, torch.zeros_like(total).index_copy(0, active, total[active]), self.moves)
            kept = [move.detach().clone() for move in self.moves]
            optimiser.step()
            self._clamp(kept, active)
            self._leave(active)
        return [(v + d).detach()[self.owner] for v, d in zip(self.before, self.deltas, strict=True)]

    @property
    def deltas(self) -> list[Tensor]:
        """By place, (deltas, d)."""
        return [move * unit for move, unit in zip(self.moves, self.units, strict=True)]

    @torch.no_grad()
    def _clamp(self, kept: Sequence[Tensor], active: Tensor) -> None:
        """The deltas brought within bounds; those that are done are as they were kept."""
        for i, (move, delta, old) in enumerate(zip(self.moves, self.deltas, kept, strict=True)):
            after, most = self.tails[i], self.bounds[i]
            inside = after.within(delta, most) if after else delta * (most / _size(delta)).clamp(max=1)[:, None]
            old[active] = (inside / self.units[i])[active]
            move.copy_(old)

    def _leave(self, active: Tensor) -> None:
        """Edits that are done leave the batch."""
        staying = torch.isin(self.owner[self.edits], active)
        if not staying.all():
            rows = staying.repeat_interleave(self.per).nonzero()[:, 0]
            self.edits, self.batch = self.edits[staying], self.batch[rows]
            self.passes.keep(rows)

    def _said(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities at the reads of the target, (reads, vocabulary), and after "{subject} is a", (edits, .)."""
        rows, cols = self.batch.reads
        essence = torch.arange(self.per - 1, len(self.batch), self.per, device=rows.device)
        ends = self.batch.last if self.how.kl_at == "end" else self.batch.subject
        logits = self.passes.logits(torch.cat([rows, essence]), torch.cat([cols, ends[essence]]))
        said = log_softmax(logits, -1)
        return said[: len(rows)], said[len(rows) :]

    @torch.no_grad()
    def _look(self) -> None:
        """One pass that changes nothing: v at the bare prompt, its size, and what follows "{subject} is a"."""
        seen: dict[str, Tensor] = {}

        def looker(place: str) -> Callable[[Tensor], Tensor]:
            def look(output: Tensor) -> Tensor:
                seen[place] = output[self.first, self.passes.start[self.first]].float()
                return output

            return look

        with hooked(*(rewriting(self.lm, place, len(self.batch), looker(place)) for place in self.places)):
            self.is_a = self._said()[1]
        for place, after in zip(self.places, self.tails, strict=True):
            v = seen[place]
            self.before.append(v)
            self.bounds.append(self.how.clamp * (after(-v) if after else v).norm(dim=1))
            own = "rate" in self.how.scaled
            self.units.append(_size(v)[:, None] / v.shape[1] ** 0.5 if own else torch.ones_like(v[:, :1]))
            self.moves.append(torch.zeros_like(v).requires_grad_())

    def _written(self) -> AbstractContextManager[None]:
        """The deltas added where they belong."""
        rows = torch.arange(len(self.batch), device=self.lm.device)
        owner = self.owner[self.edits].repeat_interleave(self.per)

        def writer(delta: Tensor) -> Callable[[Tensor], Tensor]:
            def write(output: Tensor) -> Tensor:
                output = output.clone()
                at = rows, self.passes.start
                output[at] = (output[at] + delta[owner]).to(output.dtype)
                return output

            return write

        written = zip(self.places, self.deltas, strict=True)
        return hooked(*(rewriting(self.lm, place, len(self.batch), writer(delta)) for place, delta in written))

    def _loss(self) -> Loss:
        """The loss of every delta, the mean over its edits; 0 for those that left the batch."""
        rows, _ = self.batch.reads
        with self._written():
            target, is_a = self._said()
        edit, owner = rows // self.per, self.owner[self.edits]
        share = 1 / (self.batch.target.sum(1)[rows] * (self.per - 1) * owner.bincount()[owner][edit])
        nll = -target.gather(1, self.batch.wanted[:, None])[:, 0] * share
        kl = kl_div(self.is_a[self.edits], is_a, log_target=True, reduction="none").sum(1) / owner.bincount()[owner]
        zero = torch.zeros(self.n, device=nll.device)
        decay = torch.stack([d.norm(dim=1) / _size(v) ** 2 for d, v in zip(self.deltas, self.before, strict=True)])
        margin = torch.full_like(zero, torch.inf).scatter_reduce(
            0, owner[edit], _margins(target.detach(), self.batch.wanted), "amin"
        )
        return Loss(
            zero.index_add(0, owner[edit], nll),
            self.how.kl * zero.index_add(0, owner, kl),
            self.how.decay * decay.sum(0),
            margin,
        )


def _margins(said: Tensor, wanted: Tensor) -> Tensor:
    """By how much the log-probability of each wanted token is above that of the likeliest other, (m,)."""
    top, ids = said.topk(2, dim=1)
    first = ids[:, 0] == wanted
    return torch.where(first, top[:, 0] - top[:, 1], said.gather(1, wanted[:, None])[:, 0] - top[:, 0])


def _size(t: Tensor) -> Tensor:
    """The norm of every row; not 0, where a module puts out nothing."""
    return t.norm(dim=1).clamp(min=1e-6)
