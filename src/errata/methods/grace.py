"""GRACE: a codebook beside one layer. Where an input is near a key it knows, the layer answers with the key's value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, pad

from ..changes import Codebook
from ..edit import Edit
from ..lm import LM, Site
from ..method import Method
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

    def patch(self, lm: LM, edits: Sequence[Edit], prior: Patch) -> Patch:
        site = lm.site(self.at)
        tokens = lm.encode([passage(e, answer=e.target) for e in edits])
        rows, cols = torch.arange(len(edits), device=lm.device), tokens.target.long().argmax(1) - 1
        keys, _ = read(lm, [site.name], tokens, rows, cols)[site.name]
        values = self._values(lm, site, tokens, rows, cols)
        patch = Patch()
        for i, edit in enumerate(edits):
            label = tokens.ids[i][tokens.target[i]]
            entry = Codebook(
                torch.zeros(1, dtype=torch.long),
                keys[i : i + 1].float().cpu(),
                values[i : i + 1].cpu(),
                torch.tensor([self.radius]),
                pad(label, (0, 1), value=-1)[None].cpu(),
                torch.zeros(1, dtype=torch.long),
            )
            patch = patch + Patch({site.name: (entry,)}, (edit,))
        return patch

    def _values(self, lm: LM, site: Site, tokens: Tokens, rows: Tensor, cols: Tensor) -> Tensor:
        """What the layer should put out at the last token of each prompt, (edits, d_out); they start at random."""
        start = torch.rand(len(tokens), site.shape[0], generator=torch.Generator().manual_seed(self.seed))
        values = start.to(lm.device).requires_grad_()
        optimiser = torch.optim.Adam([values], lr=self.rate)

        again = passes(lm, tokens, site.name, cols)

        def write(output: Tensor) -> Tensor:
            output = output.clone()
            output[rows, again.start] = values.to(output.dtype)
            return output

        for _ in range(self.steps):
            with rewrite(lm, site.name, len(tokens), write):
                said = log_softmax(again.logits(*tokens.reads), -1)
            nll = -said.gather(1, tokens.wanted[:, None])[:, 0]
            loss = (nll / tokens.target.sum(1)[tokens.reads[0]]).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return values.detach()
