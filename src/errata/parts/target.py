"""v*: the output of a matrix which, put at the subject's last token, makes the model say the target.

Meng et al. 2022 (ROME), https://arxiv.org/abs/2202.05262, eq. 4. Edits are independent of each other, so all of them
share every pass, one delta per edit; an edit that is done leaves the batch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from ..edit import Edit
from ..lm import LM, Site
from ..tokens import Tokens, passage
from ..trace import rewrite

log = logging.getLogger(__name__)

TOKENS = 16_384
"""Tokens in one pass: how many edits go together. Changes the memory, not the result."""


@dataclass(frozen=True, kw_only=True)
class TargetSearch:
    """How v* is found: Adam on an additive delta, from zero."""

    steps: int = 25
    """Passes at most; the last one only measures."""
    rate: float = 0.5
    """Adam's learning rate."""
    kl: float = 0.0625
    """Weight of keeping what the model says after "{subject} is a"."""
    kl_at: Literal["end", "subject"] = "end"
    """Where that is read: after the whole phrase (the paper), or at the subject's last token (the authors' code)."""
    decay: float = 0.5
    """Weight of |delta| / |v|^2."""
    clamp: float = 4.0
    """|delta| is at most this many times |v|."""
    stop: float = 0.05
    """The loss at which an edit is done."""

    def find(self, lm: LM, site: Site, edits: Sequence[Edit], contexts: Sequence[str]) -> Tensor:
        """v* of every edit, (edits, d_out) in float32."""
        rows = [_rows(e, contexts) for e in edits]
        tokens = lm.encode([p for group in rows for p in group])
        together = max(1, TOKENS // (len(rows[0]) * tokens.ids.shape[1]))
        found = []
        for start in range(0, len(edits), together):
            end = min(start + together, len(edits))
            found.append(self._descend(lm, site, tokens[start * len(rows[0]) : end * len(rows[0])], end - start))
        return torch.cat(found)

    def _descend(self, lm: LM, site: Site, tokens: Tokens, n: int) -> Tensor:
        """v* of n edits, each of which has equally many rows of tokens."""
        delta = torch.zeros(n, site.shape[0], device=lm.device, requires_grad=True)
        optimiser = torch.optim.Adam([delta], lr=self.rate)
        active = torch.arange(n, device=lm.device)
        first = _First()
        for step in range(self.steps):
            losses = self._losses(lm, site, tokens, delta, active, first)
            log.debug("step %d: loss %s", step, losses.detach().tolist())
            active = active[losses.detach() >= self.stop]
            if step == self.steps - 1 or not len(active):
                break
            optimiser.zero_grad()
            losses.sum().backward()
            kept = delta.detach().clone()
            optimiser.step()
            with torch.no_grad():
                kept[active] = _clamped(delta, first.v, self.clamp)[active]
                delta.copy_(kept)
        return (first.v + delta).detach()

    def _losses(
        self, lm: LM, site: Site, tokens: Tokens, delta: Tensor, active: Tensor, first: _First
    ) -> Tensor:
        """The loss of every active edit, (active,)."""
        per = len(tokens) // len(delta)
        batch = tokens[(active[:, None] * per + torch.arange(per, device=lm.device)).flatten()]
        rows = torch.arange(len(batch), device=lm.device)
        essence = rows[per - 1 :: per]
        ends = batch.last if self.kl_at == "end" else batch.subject

        def write(output: Tensor) -> Tensor:
            at_subject = output[rows, batch.subject]
            if first.v is None:
                first.v = at_subject[::per].detach().float()
            output = output.clone()
            output[rows, batch.subject] = (at_subject + delta[active].repeat_interleave(per, 0)).to(output.dtype)
            return output

        read_rows, read_cols = batch.reads
        with rewrite(lm, site.name, len(batch), write):
            logits = lm.logits(batch, torch.cat([read_rows, essence]), torch.cat([read_cols, ends[essence]]))
        said = log_softmax(logits, -1)
        nll = -said[: len(read_rows)].gather(1, batch.wanted[:, None])[:, 0]
        share = 1 / batch.target.sum(1)[read_rows] / (per - 1)
        nll = torch.zeros(len(active), device=lm.device).index_add(0, read_rows // per, nll * share)
        is_a = said[len(read_rows) :]
        if first.is_a is None:
            first.is_a = is_a.detach()
        kl = kl_div(first.is_a[active], is_a, log_target=True, reduction="none").sum(1)
        decay = delta[active].norm(dim=1) / first.v[active].norm(dim=1) ** 2
        return nll + self.kl * kl + self.decay * decay


@dataclass
class _First:
    """What the first pass sees of every edit: the value at the bare prompt, and what follows "{subject} is a"."""

    v: Tensor | None = None
    is_a: Tensor | None = None


def _rows(edit: Edit, contexts: Sequence[str]) -> list:
    is_a = Edit("{} is a", edit.subject, edit.target)
    return [*(passage(edit, c, edit.target) for c in contexts), passage(is_a)]


def _clamped(delta: Tensor, v: Tensor, most: float) -> Tensor:
    return delta * (most * v.norm(dim=1) / delta.norm(dim=1)).clamp(max=1)[:, None]
