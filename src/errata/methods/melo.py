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
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..changes import Blocks
from ..edit import Edit
from ..effects import hooked
from ..lm import LM, Site
from ..method import Method
from ..parts import contexts, scope
from ..parts import corpus as sources
from ..parts.descend import pull, unfinished
from ..parts.scaled import Scaled
from ..patch import Patch
from ..replay import in_pass, passes
from ..tokens import Tokens
from ..trace import adding, read


@dataclass(frozen=True, kw_only=True)
class MELO(Scaled, Method, name="melo"):
    """Neuron-indexed dynamic LoRA: a vector database of keys decides which low-rank block a token gets."""

    paper = "Yu et al. 2023, MELO: Enhancing Model Editing with Neuron-Indexed Dynamic LoRA"
    source = "https://arxiv.org/abs/2312.11795"
    scalable = ("radius", "rate")

    at: tuple[int | str, ...]
    """The layers whose MLP write matrices get blocks, or linear modules by their full names; lowest first."""
    rank: int = 2
    """Of a block."""
    per_block: int = 1
    """So many edits of a batch share a block (the authors' 4)."""
    scale: float = 1.0
    """What a block puts out is multiplied by this."""
    radius: float = 0.5
    """Euclidean distance from its key within which a new cluster answers; if `scaled`, a share of that to the nearest
    input out of the edit's scope (`parts.scope`), and no other cluster changes it."""
    keys: Literal["answer", "prompt", "subject"] = "answer"
    """Where a block works, and what is remembered: the tokens that predict the target's, the prompt's last alone, or
    the subject's last, which every wording of the question has. The subject has several keys: in its prompt, and after
    each of `lengths`."""
    steps: int = 50
    """Adam steps to a block."""
    rate: float = 1e-3
    """Adam's learning rate; it is halved every 20 steps. If `scaled`, a share of the size of what the matrix is given
    and puts out, and a block begins along what it is given and not at random."""
    stop: float = 0.0
    """The loss at which a block is done."""
    ending: str = ""
    """What is trained to follow the target, so that the answer ends there: nothing, or a full stop."""
    lengths: tuple[tuple[int, int], ...] = ()
    """Texts before the prompt, which a block is trained after too: (new tokens, count)."""
    corpus: str = sources.BUILT_IN
    """Whose tokens are out of scope, for a scaled radius: `almanac`, a text file, .jsonl, a folder, or the name of a
    data set."""
    lines: int = 400
    """Texts of the corpus that are read."""

    def prepare(self, lm: LM) -> None:
        contexts.sample(lm, self.lengths, self.seed)
        for place in self.at if "radius" in self.scaled else ():
            scope.ordinary(lm, lm.site(place), self.corpus, self.lines)

    def beneath(self, lm: LM, prior: Patch) -> Patch:
        """Without the blocks: a new one is trained as it will answer, alone."""
        names = {lm.site(place).name for place in self.at}
        kept = {
            name: tuple(c for c in changes if not (name in names and isinstance(c, Blocks)))
            for name, changes in prior.changes.items()
        }
        return replace(prior, changes=kept)

    def patch(self, lm: LM, edits: Sequence[Edit], prior: Patch) -> Patch:
        return self._made(lm, edits, torch.arange(len(edits)) // self.per_block, prior.edits)

    def patches(self, lm: LM, edits: Sequence[Edit]) -> list[Patch]:
        together = self._made(lm, edits, torch.arange(len(edits)), ())
        return [Patch({n: (c[0].alone(i),) for n, c in together.changes.items()}) for i in range(len(edits))]  # pyright: ignore[reportAttributeAccessIssue]

    def _made(self, lm: LM, edits: Sequence[Edit], block: Tensor, known: Sequence[Edit]) -> Patch:
        """Blocks for edits, of which edit i gets the `block[i]`-th."""
        sites, texts = [lm.site(place) for place in self.at], contexts.sample(lm, self.lengths, self.seed)
        names, by_subject = [site.name for site in sites], self.keys == "subject"
        passages, edit = scope.lessons(edits, texts, self.ending, known if by_subject else ())
        tokens, edit, block = lm.encode(passages), edit.to(lm.device), block.to(lm.device)
        bare = scope.firsts(edit)
        begun = read(lm, names, tokens, bare, self._first(tokens)[bare])
        factors = [self._start(site, block, *begun[site.name]) for site in sites]
        self._train(lm, sites, factors, tokens, block[edit])
        labels = tokens.to_say(bare, tokens.asked[bare])[edit]
        if by_subject:
            passages, edit = scope.inside(edits, texts)
            tokens, labels, edit = lm.encode(passages), labels[bare][edit], edit.to(lm.device)
        rows, cols = self._places(tokens)
        with self._beside(sites, factors, tokens, block[edit], torch.zeros_like(tokens.last)):
            seen = read(lm, names, tokens, rows, cols)
        labels = (labels[rows] if by_subject else tokens.to_say(rows, cols)).cpu()
        owners = edit[rows]
        changes = {}
        for site, both in zip(sites, factors, strict=True):
            keys = seen[site.name][0].float()
            reach = torch.ones(len(keys))
            if "radius" in self.scaled:
                ordinary = scope.ordinary(lm, site, self.corpus, self.lines)
                reach = scope.reach(lm, site, edits, owners, keys, ordinary).cpu()
            made = Blocks.of(
                owners.cpu(),
                keys.cpu(),
                self.radius * reach,
                labels.clone(),
                block[owners].cpu(),
                self.scale * both.left.detach().cpu(),
                both.right.detach().cpu(),
                torch.full_like(owners, int("radius" in self.scaled)).cpu(),
            )
            changes[site.name] = (made,)
        return Patch(changes)

    def _start(self, site: Site, block: Tensor, given: Tensor, out: Tensor) -> _Factors:
        """Factors of blocks that do nothing yet; they hang on nothing but their own edits.

        Args:
            site: the matrix.
            block: (edits,) the block of each.
            given: (edits, d_in) what the matrix is given where a block works first.
            out: (edits, d_out) what it puts out there.
        """
        (d_out, d_in), blocks = site.shape, int(block[-1]) + 1
        draw = torch.rand(self.rank, d_in, generator=torch.Generator().manual_seed(self.seed)).to(given.device)
        right = ((2 * draw - 1) / math.sqrt(d_in)).repeat(blocks, 1, 1)
        units = (torch.ones(1, 1, 1, device=given.device),) * 2
        if "rate" in self.scaled:
            n = block.bincount()[:, None]
            along = torch.zeros(blocks, d_in, device=given.device).index_add(0, block, given.float()) / n
            size = torch.zeros(blocks, 1, device=given.device).index_add(
                0, block, out.float().square().mean(1, keepdim=True)
            )
            length = along.norm(dim=1, keepdim=True)
            right[:, 0] = along / length
            units = (size / n).sqrt()[:, None], 1 / length[:, None]
        left = torch.zeros(blocks, d_out, self.rank, device=given.device)
        return _Factors(left.requires_grad_(), right.requires_grad_(), *units)

    def _train(self, lm: LM, sites: Sequence[Site], factors: Sequence[_Factors], tokens: Tokens, block: Tensor) -> None:
        """Descent of all blocks at once, `block` being each row's; edits of different blocks don't meet in it."""
        slower = [1 / math.sqrt(site.shape[1]) if "rate" in self.scaled else 1.0 for site in sites]
        groups = [{"params": [f.L], "lr": self.rate} for f in factors]
        groups += [{"params": [f.R], "lr": self.rate * by} for f, by in zip(factors, slower, strict=True)]
        optimiser = torch.optim.Adam(groups)
        halving = torch.optim.lr_scheduler.StepLR(optimiser, step_size=20, gamma=0.5)
        first = self._first(tokens)
        again = passes(lm, tokens, [s.name for s in sites], first)
        share = 1 / (tokens.target.sum(1))[tokens.reads[0]]
        todo = torch.ones(len(factors[0].L), dtype=torch.bool, device=block.device)
        for _ in range(self.steps):
            with self._beside(sites, factors, tokens, block, first - again.start):
                nll = cross_entropy(again.logits(*tokens.reads), tokens.wanted, reduction="none")
            loss = nll.new_zeros(len(todo)).index_add(0, block[tokens.reads[0]], nll * share)
            todo &= unfinished(loss / block.bincount(), self.stop)
            if not todo.any():
                break
            optimiser.zero_grad()
            trained = [p for f in factors for p in (f.L, f.R)]
            pull(lm, torch.where(todo, loss, 0.0), trained)
            before = [p.detach().clone() for p in trained]
            optimiser.step()
            halving.step()
            with torch.no_grad():
                for p, old in zip([p for f in factors for p in (f.L, f.R)], before, strict=True):
                    p.copy_(p.where(todo[:, None, None], old))

    def _beside(
        self, sites: Sequence[Site], factors: Sequence[_Factors], tokens: Tokens, block: Tensor, shift: Tensor
    ) -> AbstractContextManager[None]:
        """While inside, each row's block works at its places; row i of a pass begins at column `shift[i]`."""
        here = torch.zeros_like(tokens.target)
        here[self._places(tokens)] = True

        def block_of(both: _Factors) -> Callable[[Tensor], Tensor]:
            def added(inputs: Tensor) -> Tensor:
                inputs = inputs.view(len(tokens), -1, inputs.shape[-1])
                works = in_pass(here, shift, inputs.shape[1])
                return self.scale * works[..., None] * (inputs @ both.right[block].mT @ both.left[block].mT)

            return added

        parts = zip(sites, factors, strict=True)
        return hooked(*(adding(site.module, block_of(both)) for site, both in parts))

    def _first(self, tokens: Tokens) -> Tensor:
        """(rows,) the first column at which a block works."""
        return tokens.subject if self.keys == "subject" else tokens.asked

    def _places(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Rows and columns of the tokens that a block is for."""
        if self.keys == "answer":
            return tokens.reads
        return torch.arange(len(tokens), device=tokens.ids.device), self._first(tokens)


@dataclass(frozen=True, eq=False)
class _Factors:
    """Low-rank blocks of a matrix while they are trained, in units of what it puts out and is given."""

    L: Tensor
    """(blocks, d_out, rank)."""
    R: Tensor
    """(blocks, rank, d_in)."""
    out: Tensor
    given: Tensor

    @property
    def left(self) -> Tensor:
        return self.out * self.L

    @property
    def right(self) -> Tensor:
        return self.given * self.R
