"""FT: gradient descent on a few matrices. What editing methods are measured against.

The delta is trained beside the weight, in float32, so the model's own weights are never touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from ..changes import Dense
from ..edit import Edit
from ..effects import hooked
from ..errors import over
from ..lm import LM
from ..method import Method
from ..parts import descend
from ..parts.scaled import Scaled
from ..patch import Patch
from ..replay import Passes, passes
from ..tokens import Tokens, passage
from ..trace import adding


@dataclass(frozen=True, kw_only=True)
class FT(Scaled, Method, name="ft"):
    """Fine-tuning of MLP write matrices on prompt and target, without a bound."""

    paper = "Zhu et al. 2020, Modifying Memories in Transformer Models"
    source = "https://arxiv.org/abs/2012.00363"
    scalable = ("rate", "bound")

    layers: tuple[int, ...]
    """The blocks whose MLP write matrices are trained."""
    steps: int = 25
    """Passes over the edits at most."""
    rate: float = 5e-4
    """The learning rate; if `scaled`, about the share of what a matrix puts out by which a step moves it."""
    descent: Literal["adam", "gradient"] = "adam"
    """Adam, or the gradient's own direction, which moves a weight along what the edit's tokens give it alone, in steps
    as long as Adam's."""
    bound: float | None = None
    """No entry of a weight moves further than this (L-infinity); if `scaled`, what all of them together may move is
    about this share of what the matrix puts out."""
    loss: Literal["text", "target", "last"] = "text"
    """Trained on: every token of prompt and target; the target's tokens; or the target's tokens all read off at the
    prompt's last token (the code of ROME's authors and EasyEdit's "prompt_last": the same for one-token targets)."""
    stop: float = 0.01
    """The loss at which training ends."""
    margin: float | None = None
    """Training ends, too, when every token of every target is by so many nats the likeliest."""
    ending: str = ""
    """What is trained to follow the target, so that the answer ends there: nothing, or a full stop."""

    def patch(self, lm: LM, edits: Sequence[Edit], prior: Patch) -> Patch:
        over(0, steps=self.steps, rate=self.rate, **({} if self.bound is None else {"bound": self.bound}))
        sites = [lm.site(layer) for layer in sorted(self.layers)]
        deltas = [torch.zeros(*site.shape, device=lm.device, requires_grad=True) for site in sites]
        units = [descend.entry(site) / site.shape[1] ** 0.5 for site in sites] if self.scaled else [1.0] * len(sites)
        rates = [self.rate * (unit if "rate" in self.scaled else 1.0) for unit in units]
        tokens = lm.encode([passage(e, answer=e.target + self.ending) for e in edits])
        kind = torch.optim.Adam if self.descent == "adam" else torch.optim.SGD
        optimiser = kind([{"params": [d], "lr": rate} for d, rate in zip(deltas, rates, strict=True)])
        again = passes(lm, tokens, [site.name for site in sites], torch.zeros_like(tokens.last))
        moved = zip(sites, deltas, strict=True)
        with hooked(*(adding(site.module, lambda x, delta=delta: linear(x, delta)) for site, delta in moved)):
            for _ in range(self.steps):
                loss, lead = self._loss(again, tokens)
                if loss < self.stop or (self.margin is not None and lead >= self.margin):
                    break
                optimiser.zero_grad()
                descend.pull(lm, loss, deltas)
                self._step(optimiser, deltas, units)
        owners = torch.arange(len(edits))
        changes = {s.name: (Dense(owners, d.detach().cpu()),) for s, d in zip(sites, deltas, strict=True)}
        return Patch(changes if any(bool(d.any()) for d in deltas) else {})

    def _step(self, optimiser: torch.optim.Optimizer, deltas: Sequence[Tensor], units: Sequence[float]) -> None:
        if self.descent == "gradient":
            for delta in deltas:  # as long as Adam's, whose every entry moves by the rate
                assert delta.grad is not None
                delta.grad *= delta.numel() ** 0.5 / delta.grad.norm().clamp(min=torch.finfo(delta.dtype).tiny)
        optimiser.step()
        if self.bound is not None:
            for delta, unit in zip(deltas, units, strict=True):
                most = self.bound * (unit if "bound" in self.scaled else 1.0)
                delta.data.clamp_(-most, most)

    def _loss(self, again: Passes, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Mean over edits of the mean negative log-probability of the tokens trained on; and the least lead of a
        target's."""
        rows, cols = tokens.reads
        wanted = tokens.wanted
        if self.loss == "text":
            rows, cols = tokens.mask[:, 1:].nonzero(as_tuple=True)
            wanted = tokens.ids[rows, cols + 1]
        elif self.loss == "last":
            cols = tokens.asked[rows]
        logits = again.logits(rows, cols)
        nll = cross_entropy(logits, wanted, reduction="none")
        loss = (nll / rows.bincount(minlength=len(tokens))[rows]).sum() / len(tokens)
        targets = tokens.target[rows, cols + 1] if self.loss == "text" else slice(None)
        return loss, descend.leads(logits.detach()[targets], wanted[targets]).min()


@dataclass(frozen=True, kw_only=True)
class FTM(FT, name="ft-m"):
    """FT with the loss on the target's tokens only (FT-M of EasyEdit's survey, https://arxiv.org/abs/2401.01286)."""

    loss: Literal["text", "target", "last"] = "target"


@dataclass(frozen=True, kw_only=True)
class FTL(FTM, name="ft-l"):
    """FT under an L-infinity bound on the change of every weight."""

    bound: float | None = 5e-4
