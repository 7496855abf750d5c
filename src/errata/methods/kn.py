"""Knowledge neurons: find the few MLP neurons that express a fact, and write the new answer into what they write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ..changes import LowRank
from ..edit import Edit
from ..errors import ErrataError, over
from ..lm import LM, Site
from ..method import Method
from ..parts import contexts
from ..parts.attribute import attribute, refine
from ..patch import Patch
from ..tokens import Tokens, passage
from ..trace import read


@dataclass(frozen=True, kw_only=True)
class KN(Method, name="kn"):
    """Knowledge Neurons: the value slots of a few neurons, v_i <- v_i - lambda_1 t + lambda_2 t' (section 5.1)."""

    paper = "Dai et al. 2022, Knowledge Neurons in Pretrained Transformers"
    source = "https://arxiv.org/abs/2104.08696"
    batched = False

    steps: int = 20
    """Steps of the integrated gradients."""
    lengths: tuple[tuple[int, int], ...] = ((10, 7),)
    """(new tokens, how many) of the contexts sampled to make several prompts of one; the paper has paraphrases."""
    threshold: float = 0.2
    """A neuron counts for a prompt if it scores at least this share of the prompt's highest score."""
    share: float = 0.7
    """Kept are neurons that count for at least this share of the prompts."""
    fewest: int = 2
    """Neurons that are kept at least."""
    most: int | None = 5
    """Neurons that are kept at most."""
    erase: float = 1.0
    """lambda_1: how much of the old answer's embedding is taken away."""
    write: float = 8.0
    """lambda_2: how much of the new answer's embedding is added."""
    unit: Literal["value", "embedding"] = "value"
    """What that is measured in: embeddings as long as the value slot (the authors' code), or as long as they are (the
    paper's formula, and EasyEdit)."""
    signed: bool = True
    """Whether a neuron that the prompts activate negatively is written with the opposite sign. Gated MLPs have such
    neurons, the GELU of the paper's BERT as good as none; its formula would make them say the old answer louder."""

    def prepare(self, lm: LM) -> None:
        contexts.sample(lm, self.lengths, self.seed)

    def patch(self, lm: LM, edits: Sequence[Edit], prior: Patch) -> Patch:
        over(0, steps=self.steps)
        (edit,) = edits
        truth, target = (_first_token(lm, edit, answer) for answer in (edit.truth, edit.target))
        sites = [lm.site(layer) for layer in range(len(lm.blocks))]
        prompts = lm.encode([passage(edit, c) for c in contexts.sample(lm, self.lengths, self.seed)])
        scores = attribute(lm, sites, prompts, truth, self.steps)
        found = refine(scores, self.threshold, self.share, self.fewest, self.most)
        t, t_new = _embedding(lm, truth), _embedding(lm, target)
        changes = {}
        for site, neurons in zip(sites, found, strict=True):
            if neurons:
                pick = one_hot(torch.tensor(neurons), site.shape[1]).float()
                left = self._written(lm, site, pick, prompts, t, t_new)
                changes[site.name] = (LowRank(torch.zeros(len(neurons), dtype=torch.long), left.cpu(), pick),)
        return Patch(changes)

    def _written(self, lm: LM, site: Site, pick: Tensor, prompts: Tokens, t: Tensor, t_new: Tensor) -> Tensor:
        """What is added to the value slots of neurons (picked by one-hot rows), (d_out, neurons)."""
        old, new = t.expand(len(pick), -1), t_new.expand(len(pick), -1)
        if self.unit == "value":
            length = _values(lm, site, pick).norm(dim=1, keepdim=True)
            old, new = old / t.norm() * length, new / t_new.norm() * length
        change = self.write * new - self.erase * old
        return (change * _signs(lm, site, pick, prompts) if self.signed else change).T


@torch.no_grad()
def _first_token(lm: LM, edit: Edit, answer: str | None) -> int:
    """The token by which an answer begins; by default what the model says. (The paper's answers are single tokens.)"""
    batch = lm.encode([passage(edit, answer=answer)])
    if answer is not None:
        return int(batch.wanted[0])
    return int(lm.logits(torch.zeros_like(batch.last), batch.last, **batch.inputs).argmax())


def _embedding(lm: LM, token: int) -> Tensor:
    """The output embedding of a token, (d_model,) in float32."""
    found = lm.model.get_output_embeddings().weight[token].detach().float()
    if len(found) != lm.d_model:
        raise ErrataError(f"{lm.name} has embeddings of another width than its residual stream; KN can't write them")
    return found


@torch.no_grad()
def _values(lm: LM, site: Site, pick: Tensor) -> Tensor:
    """The value slots of neurons, (neurons, d_out) in float32; asked of the module, as weights may be quantised."""
    pick = pick.to(lm.device, lm.dtype)
    return (site.module(pick) - site.module(torch.zeros_like(pick))).float()


def _signs(lm: LM, site: Site, pick: Tensor, prompts: Tokens) -> Tensor:
    """Whether neurons are active above or below 0 at the prompts' ends: 1 or -1, (neurons, 1)."""
    rows = torch.arange(len(prompts), device=lm.device)
    active, _ = read(lm, [site.name], prompts, rows, prompts.last)[site.name]
    mean = active.float().mean(0) @ pick.T.to(lm.device)
    return torch.where(mean < 0, -1.0, 1.0)[:, None]
