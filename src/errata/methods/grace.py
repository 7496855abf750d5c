"""GRACE: a codebook beside one layer. Where an input is near a key it knows, the layer answers with the key's value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..changes import Codebook
from ..edit import Edit
from ..errors import over
from ..lm import LM, Site
from ..method import Method
from ..parts import contexts, scope
from ..parts import corpus as sources
from ..parts.descend import pull, unfinished
from ..parts.scaled import Scaled
from ..patch import Patch
from ..replay import passes
from ..tokens import Tokens
from ..trace import read, rewrite


@dataclass(frozen=True, kw_only=True)
class GRACE(Scaled, Method, name="grace"):
    """General Retrieval Adaptors for Continual Editing: keys are a layer's inputs, at one token of each edit."""

    paper = "Hartvigsen et al. 2023, Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors"
    source = "https://arxiv.org/abs/2211.11031"
    scalable = ("radius", "rate")

    at: int | str
    """The layer whose MLP write matrix has the codebook, or a linear module by its full name."""
    radius: float = 1.0
    """Euclidean distance from its key within which a new entry answers; if `scaled`, a share of that to the nearest
    input out of the edit's scope (`parts.scope`), and no other entry changes it."""
    steps: int = 50
    """Adam steps to a value."""
    rate: float = 1.0
    """Adam's learning rate; if `scaled`, a share of the root mean square of what the module puts out."""
    stop: float = 0.0
    """The loss at which a value is done."""
    start: Literal["random", "output"] = "random"
    """What a value begins as: random numbers (EasyEdit's `cold`), or what the module puts out (the paper's)."""
    token: Literal["last", "subject"] = "last"
    """Where a key is read and a value written: the prompt's last token (the paper), or the subject's last one, which
    every wording of the question has. The subject has several keys: in its prompt, and after each of `lengths`."""
    placement: Literal["last", "prompt"] = "last"
    """Where the value goes: to that token, or to all of the prompt up to it (EasyEdit's `replace_last` and
    `replace_prompt`, less that the latter leaves out the last token itself). The second rewrites what stands before the
    token that is recognised, so a prompt must be read in one pass.
    """
    ending: str = ""
    """What is trained to follow the target, so that the answer ends there: nothing, or a full stop."""
    lengths: tuple[tuple[int, int], ...] = ()
    """Texts before the prompt, which a value is trained after too: (new tokens, count)."""
    corpus: str = sources.BUILT_IN
    """Whose tokens are out of scope, for a scaled radius: `almanac`, a text file, .jsonl, a folder, or the name of a
    data set."""
    lines: int = 400
    """Texts of the corpus that are read."""

    def prepare(self, lm: LM) -> None:
        contexts.sample(lm, self.lengths, self.seed)
        if "radius" in self.scaled:
            scope.ordinary(lm, lm.site(self.at), self.corpus, self.lines)

    def patch(self, lm: LM, edits: Sequence[Edit], prior: Patch) -> Patch:
        book = self._book(lm, edits, (*prior.edits, *edits))
        return Patch({lm.site(self.at).name: (book,)})

    def patches(self, lm: LM, edits: Sequence[Edit]) -> list[Patch]:
        name, book = lm.site(self.at).name, self._book(lm, edits, ())
        return [Patch({name: (book.alone(i),)}) for i in range(len(edits))]

    def _book(self, lm: LM, edits: Sequence[Edit], known: Sequence[Edit]) -> Codebook:
        over(0, steps=self.steps, rate=self.rate, radius=self.radius)
        site, texts = lm.site(self.at), contexts.sample(lm, self.lengths, self.seed)
        passages, edit = scope.lessons(edits, texts, self.ending, known if self.token == "subject" else ())
        tokens, edit = lm.encode(passages), edit.to(lm.device)
        bare = scope.firsts(edit)
        owners, keys = torch.arange(len(edits)), read(lm, [site.name], tokens, bare, tokens.asked[bare])[site.name][0]
        if self.token == "subject":
            places, owners = scope.inside(edits, texts)
            keys = scope.at_subjects(lm, [site.name], lm.encode(places))[site.name]
        reach, measured = torch.ones(len(keys)), "radius" in self.scaled
        if measured:
            ordinary = scope.ordinary(lm, site, self.corpus, self.lines)
            reach = scope.reach(lm, site, edits, owners.to(lm.device), keys.float(), ordinary).cpu()
        return Codebook.of(
            owners,
            keys.float().cpu(),
            self._values(lm, site, tokens, edit).cpu()[owners],
            self.radius * reach,
            tokens.to_say(bare, tokens.asked[bare]).cpu()[owners],
            torch.full_like(owners, int(self.placement == "prompt")),
            torch.full_like(owners, int(measured)),
        )

    def _values(self, lm: LM, site: Site, tokens: Tokens, edit: Tensor) -> Tensor:
        """What the layer should put out at (or up to) each edit's token, (edits, d_out).

        Random starts are alike for every edit, so that a value does not hang on the edits made with it.

        Args:
            lm: the model.
            site: the layer.
            tokens: what values are trained on.
            edit: (rows,) whose each row is, its own prompt first.
        """
        last = tokens.subject if self.token == "subject" else tokens.asked
        bare = scope.firsts(edit)
        own = read(lm, [site.name], tokens, bare, last[bare])[site.name][1].float()
        unit = own.square().mean(1, keepdim=True).sqrt() if "rate" in self.scaled else torch.ones_like(own[:, :1])
        draw = torch.rand(site.shape[0], generator=torch.Generator().manual_seed(self.seed)).to(lm.device)
        begin = own if self.start == "output" else unit * draw
        moved = torch.zeros_like(own, requires_grad=True)
        optimiser = torch.optim.Adam([moved], lr=self.rate)
        first = last if self.placement == "last" else torch.zeros_like(last)
        again = passes(lm, tokens, [site.name], first)
        rows = torch.arange(len(tokens), device=lm.device)

        def write(output: Tensor) -> Tensor:
            cols = torch.arange(output.shape[1], device=output.device) + (first[rows] - again.start)[:, None]
            here = (cols >= first[rows, None]) & (cols <= last[rows, None])
            values = (begin + unit * moved)[edit[rows]]
            return torch.where(here[..., None], values[:, None].to(output.dtype), output)

        share = 1 / (tokens.target.sum(1) * edit.bincount()[edit])
        todo = torch.ones(len(own), dtype=torch.bool, device=lm.device)
        for _ in range(self.steps):
            some = tokens[rows]
            with rewrite(lm, site.name, len(rows), write):
                nll = cross_entropy(again.logits(*some.reads), some.wanted, reduction="none")
            of = rows[some.reads[0]]
            loss = nll.new_zeros(len(own)).index_add(0, edit[of], nll * share[of])
            todo &= unfinished(loss, self.stop)
            if not todo.any():
                break
            optimiser.zero_grad()
            pull(lm, torch.where(todo, loss, 0.0), [moved])
            before = moved.detach().clone()
            optimiser.step()
            with torch.no_grad():
                moved.copy_(moved.where(todo[:, None], before))
            left = todo[edit[rows]]
            if not left.all():
                again.keep(left.nonzero()[:, 0])
                rows = rows[left]
        return (begin + unit * moved).detach()
