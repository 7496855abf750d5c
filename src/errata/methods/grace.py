"""GRACE: a codebook beside one layer. Where an input is near a key it knows, the layer answers with the key's value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from ..changes import Codebook
from ..edit import Edit
from ..errors import over
from ..lm import LM, Site
from ..method import Method
from ..parts.descend import pull
from ..patch import Patch
from ..replay import passes
from ..tokens import Tokens, passage
from ..trace import read, rewrite


@dataclass(frozen=True, kw_only=True)
class GRACE(Method, name="grace"):
    """General Retrieval Adaptors for Continual Editing: keys are the layer's inputs at the prompt's last token."""

    paper = "Hartvigsen et al. 2023, Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors"
    source = "https://arxiv.org/abs/2211.11031"

    at: int | str
    """The layer whose MLP write matrix has the codebook, or a linear module by its full name."""
    radius: float = 1.0
    """Euclidean distance from its key within which a new entry answers."""
    steps: int = 50
    """Adam steps to a value."""
    rate: float = 1.0
    """Adam's learning rate."""

    placement: Literal["last", "prompt"] = "last"
    """Where the value goes: to the prompt's last token, or to all of the prompt up to it (EasyEdit's `replace_last` and
    `replace_prompt`, less that the latter leaves out the last token itself). The second rewrites what stands before the
    token that is recognised, so a prompt must be read in one pass.
    """

    def patch(self, lm: LM, edits: Sequence[Edit], prior: Patch) -> Patch:
        over(0, steps=self.steps, rate=self.rate, radius=self.radius)
        site = lm.site(self.at)
        tokens = lm.encode([passage(e, answer=e.target) for e in edits])
        rows, cols = torch.arange(len(edits), device=lm.device), tokens.asked
        keys, _ = read(lm, [site.name], tokens, rows, cols)[site.name]
        book = Codebook.of(
            torch.arange(len(edits)),
            keys.float().cpu(),
            self._values(lm, site, tokens, cols).cpu(),
            torch.full((len(edits),), self.radius),
            tokens.to_say(rows, cols).cpu(),
            torch.full((len(edits),), int(self.placement == "prompt")),
        )
        return Patch({site.name: (book,)})

    def patches(self, lm: LM, edits: Sequence[Edit]) -> list[Patch]:
        together = self.patch(lm, edits, Patch())
        ((name, (book,)),) = together.changes.items()
        assert isinstance(book, Codebook)
        return [Patch({name: (book.alone(i),)}) for i in range(len(edits))]

    def _values(self, lm: LM, site: Site, tokens: Tokens, last: Tensor) -> Tensor:
        """What the layer should put out at (or up to) the last token of each prompt, (edits, d_out).

        They start at random, alike for every edit, so that a value does not hang on the edits made with it.
        """
        start = torch.rand(site.shape[0], generator=torch.Generator().manual_seed(self.seed))
        values = start.repeat(len(tokens), 1).to(lm.device).requires_grad_()
        optimiser = torch.optim.Adam([values], lr=self.rate)
        first = last if self.placement == "last" else torch.zeros_like(last)
        again = passes(lm, tokens, [site.name], first)

        def write(output: Tensor) -> Tensor:
            cols = torch.arange(output.shape[1], device=output.device) + (first - again.start)[:, None]
            here = (cols >= first[:, None]) & (cols <= last[:, None])
            return torch.where(here[..., None], values[:, None].to(output.dtype), output)

        for _ in range(self.steps):
            with rewrite(lm, site.name, len(tokens), write):
                said = log_softmax(again.logits(*tokens.reads), -1)
            nll = -said.gather(1, tokens.wanted[:, None])[:, 0]
            loss = (nll / tokens.target.sum(1)[tokens.reads[0]]).sum()
            optimiser.zero_grad()
            pull(lm, loss, [values])
            optimiser.step()
        return values.detach()
