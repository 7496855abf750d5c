"""MELO: low-rank blocks beside a few matrices, each opened only near the keys of the edits it was trained for.

Where this differs from the authors' code, and why:

- The router looks at every token, at what each edited matrix is given there. Theirs looks at one token of a prompt, in
  a layer below the edited ones, and opens the block for the whole row; with a key-value cache it looks at another token
  in every step, so the answer depends on how the model is run. For longer targets, the tokens that predict the target's
  are keys too (`keys = "answer"`); theirs are the prompts' last tokens only (`keys = "prompt"`).
- `scale` stands for the product of theirs, which comes to the number of blocks that are reserved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from ..changes import Blocks
from ..edit import Edit
from ..lm import LM, Site
from ..method import Method
from ..parts.descend import pull
from ..patch import Patch
from ..replay import in_pass, passes
from ..tokens import Tokens, passage
from ..trace import beside, read


@dataclass(frozen=True, kw_only=True)
class MELO(Method, name="melo"):
    """Neuron-indexed dynamic LoRA: a vector database of keys decides which low-rank block a token gets."""

    paper = "Yu et al. 2023, MELO: Enhancing Model Editing with Neuron-Indexed Dynamic LoRA"
    source = "https://arxiv.org/abs/2312.11795"

    at: tuple[int | str, ...]
    """The layers whose MLP write matrices get blocks, or linear modules by their full names; lowest first."""
    rank: int = 2
    """Of a block."""
    per_block: int = 1
    """So many edits of a batch share a block (the authors' 4)."""
    scale: float = 1.0
    """What a block puts out is multiplied by this."""
    radius: float = 0.5
    """Euclidean distance from its key within which a new cluster answers."""
    keys: Literal["answer", "prompt"] = "answer"
    """Where a block works, and what is remembered: the tokens that predict the target's, or the prompt's last alone."""
    steps: int = 50
    """Adam steps to a block."""
    rate: float = 1e-3
    """Adam's learning rate; it is halved every 20 steps."""

    def patch(self, lm: LM, edits: Sequence[Edit], prior: Patch) -> Patch:
        return self._made(lm, edits, torch.arange(len(edits)) // self.per_block)

    def patches(self, lm: LM, edits: Sequence[Edit]) -> list[Patch]:
        together = self._made(lm, edits, torch.arange(len(edits)))
        return [Patch({n: (c[0].alone(i),) for n, c in together.changes.items()}) for i in range(len(edits))]  # pyright: ignore[reportAttributeAccessIssue]

    def _made(self, lm: LM, edits: Sequence[Edit], block: Tensor) -> Patch:
        """Blocks for edits, of which edit i gets the `block[i]`-th."""
        sites = [lm.site(place) for place in self.at]
        tokens = lm.encode([passage(e, answer=e.target) for e in edits])
        factors = [self._start(site, int(block[-1]) + 1, lm.device) for site in sites]
        self._train(lm, sites, factors, tokens, block.to(lm.device))
        rows, cols = self._places(tokens)
        with self._beside(sites, factors, tokens, block.to(lm.device), torch.zeros_like(tokens.last)):
            seen = read(lm, [site.name for site in sites], tokens, rows, cols)
        owners, labels = rows.cpu(), tokens.to_say(rows, cols).cpu()
        changes = {}
        for site, (left, right) in zip(sites, factors, strict=True):
            keys, (left, right) = seen[site.name][0].float().cpu(), (t.detach().cpu() for t in (left, right))
            radius = torch.full((len(rows),), self.radius)
            made = Blocks.of(owners.clone(), keys, radius, labels.clone(), block[owners], self.scale * left, right)
            changes[site.name] = (made,)
        return Patch(changes)

    def _start(self, site: Site, blocks: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Factors of blocks that do nothing yet, all alike, so that none hangs on the others."""
        d_out, d_in = site.shape
        draw = torch.rand(self.rank, d_in, generator=torch.Generator().manual_seed(self.seed))
        right = (2 * draw - 1) / math.sqrt(d_in)
        left = torch.zeros(blocks, d_out, self.rank, device=device)
        return left.requires_grad_(), right.repeat(blocks, 1, 1).to(device).requires_grad_()

    def _train(
        self, lm: LM, sites: Sequence[Site], factors: Sequence[tuple[Tensor, Tensor]], tokens: Tokens, block: Tensor
    ) -> None:
        """Descent of all blocks at once; edits of different blocks don't meet in it."""
        optimiser = torch.optim.Adam([t for pair in factors for t in pair], lr=self.rate)
        halving = torch.optim.lr_scheduler.StepLR(optimiser, step_size=20, gamma=0.5)
        first = tokens.asked
        again = passes(lm, tokens, [s.name for s in sites], first)
        sizes = tokens.target.sum(1)[tokens.reads[0]]
        for _ in range(self.steps):
            with self._beside(sites, factors, tokens, block, first - again.start):
                said = log_softmax(again.logits(*tokens.reads), -1)
            loss = -(said.gather(1, tokens.wanted[:, None])[:, 0] / sizes).sum()
            optimiser.zero_grad()
            pull(lm, loss, [t for pair in factors for t in pair])
            optimiser.step()
            halving.step()

    def _beside(
        self,
        sites: Sequence[Site],
        factors: Sequence[tuple[Tensor, Tensor]],
        tokens: Tokens,
        block: Tensor,
        shift: Tensor,
    ) -> ExitStack:
        """While inside, each row's block works at its places; row i of a pass begins at column `shift[i]`."""
        here = torch.zeros_like(tokens.target)
        here[self._places(tokens)] = True

        def adding(left: Tensor, right: Tensor) -> Callable[[Tensor], Tensor]:
            def added(inputs: Tensor) -> Tensor:
                inputs = inputs.view(len(tokens), -1, inputs.shape[-1])
                works = in_pass(here, shift, inputs.shape[1])
                return self.scale * works[..., None] * (inputs @ right[block].mT @ left[block].mT)

            return added

        with ExitStack() as stack:
            for site, (left, right) in zip(sites, factors, strict=True):
                stack.enter_context(beside(site.module, adding(left, right)))
            return stack.pop_all()

    def _places(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Rows and columns of the tokens that a block is for."""
        if self.keys == "answer":
            return tokens.reads
        return torch.arange(len(tokens), device=tokens.ids.device), tokens.asked
