"""FT: gradient descent on a few matrices. What editing methods are measured against.

The delta is trained beside the weight, in float32, so the model's own weights are never touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear, log_softmax

from ..changes import Dense
from ..edit import Edit
from ..errors import over
from ..lm import LM
from ..method import Method
from ..parts.descend import pull
from ..patch import Patch
from ..tokens import Tokens, passage
from ..trace import beside


@dataclass(frozen=True, kw_only=True)
class FT(Method, name="ft"):
    """Fine-tuning of MLP write matrices on prompt and target, without a bound."""

    paper = "Zhu et al. 2020, Modifying Memories in Transformer Models"
    source = "https://arxiv.org/abs/2012.00363"

    layers: tuple[int, ...]
    """The blocks whose MLP write matrices are trained."""
    steps: int = 25
    """Passes over the edits at most."""
    rate: float = 5e-4
    """Adam's learning rate."""
    bound: float | None = None
    """No entry of a weight moves further than this (L-infinity)."""
    loss: Literal["text", "target", "last"] = "text"
    """Trained on: every token of prompt and target; the target's tokens; or the target's tokens all read off at the
    prompt's last token (the code of ROME's authors and EasyEdit's "prompt_last": the same for one-token targets)."""
    stop: float = 0.01
    """The loss at which training ends."""

    def patch(self, lm: LM, edits: Sequence[Edit], prior: Patch) -> Patch:
        over(0, steps=self.steps, rate=self.rate, **({} if self.bound is None else {"bound": self.bound}))
        sites = [lm.site(layer) for layer in self.layers]
        deltas = [torch.zeros(*site.shape, device=lm.device, requires_grad=True) for site in sites]
        tokens = lm.encode([passage(e, answer=e.target) for e in edits])
        optimiser = torch.optim.Adam(deltas, lr=self.rate)
        with ExitStack() as stack:
            for site, delta in zip(sites, deltas, strict=True):
                stack.enter_context(beside(site.module, lambda x, delta=delta: linear(x, delta)))
            for _ in range(self.steps):
                loss = self._loss(lm, tokens)
                if loss < self.stop:
                    break
                optimiser.zero_grad()
                pull(lm, loss, deltas)
                optimiser.step()
                if self.bound is not None:
                    for delta in deltas:
                        delta.data.clamp_(-self.bound, self.bound)
        owners = torch.arange(len(edits))
        changes = {s.name: (Dense(owners, d.detach().cpu()),) for s, d in zip(sites, deltas, strict=True)}
        return Patch(changes if any(bool(d.any()) for d in deltas) else {})

    def _loss(self, lm: LM, tokens: Tokens) -> Tensor:
        """Mean over edits of the mean negative log-probability of the tokens trained on."""
        rows, cols = tokens.reads
        wanted = tokens.wanted
        if self.loss == "text":
            rows, cols = tokens.mask[:, 1:].nonzero(as_tuple=True)
            wanted = tokens.ids[rows, cols + 1]
        elif self.loss == "last":
            cols = tokens.asked[rows]
        said = log_softmax(lm.logits(rows, cols, **tokens.inputs), -1).gather(1, wanted[:, None])[:, 0]
        return -(said / rows.bincount(minlength=len(tokens))[rows]).sum() / len(tokens)


@dataclass(frozen=True, kw_only=True)
class FTM(FT, name="ft-m"):
    """FT with the loss on the target's tokens only (FT-M of EasyEdit's survey, https://arxiv.org/abs/2401.01286)."""

    loss: Literal["text", "target", "last"] = "target"


@dataclass(frozen=True, kw_only=True)
class FTL(FTM, name="ft-l"):
    """FT under an L-infinity bound on the change of every weight."""

    bound: float | None = 5e-4
