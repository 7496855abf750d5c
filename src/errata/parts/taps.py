"""Taps: what goes into chosen matrices, token by token, and how the loss of an edit pulls at what comes out of them.

The gradient of a matrix is the sum over tokens of g k^T, k its input and g the gradient at its output. Editor networks
(MEND, MALMEN, KE) and UltraEdit work on these pairs, which are small, and never on the gradient, which is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from ..changes import Dense, LowRank
from ..edit import Edit
from ..effects import Hook, hooked
from ..lm import LM, Site
from ..replay import FullPasses, Passes, block_of, passes
from ..tokens import Tokens, passage
from ..trace import hidden, read
from .descend import slopes

TOKENS = 16_384
"""Tokens in one pass, padding included. Changes the memory, not the result."""

ROUNDING = 1e-6
"""A divergence below this is none."""

Which = Literal["all", "target", "subject"]
"""Tokens that are tapped: all that are read before the target ends, those that the target's tokens are read off, or the
subject's last one."""


@dataclass(frozen=True, eq=False)
class Taps:
    """What a batch of edits showed at the matrices, a row for every tapped token."""

    owner: Tensor
    """(m,) int64: the edit that the token belongs to."""
    place: Tensor
    """(m,) int64: where it stands in its edit's text."""
    K: dict[str, Tensor]
    """Inputs by matrix, (m, d_in) float32."""
    G: dict[str, Tensor]
    """Gradients at the outputs by matrix, (m, d_out) float32, of each edit's own loss: no edit weakens another."""
    loss: Tensor
    """(m,) float32: that of the edit that the token belongs to."""
    kept: bool = False
    """Whether the loss is the drift of what shall stay (`Again.drift`), and no edit's."""


def places(lm: LM, at: Sequence[int | str]) -> list[Site]:
    """The matrices that settings name: a module by its full name; a layer's number stands for all of its MLP's."""
    return [site for one in at for site in (lm.mlp(one) if isinstance(one, int) else [lm.site(lm.inside(one))])]


def tap(lm: LM, sites: Sequence[Site], edits: Sequence[Edit], which: Which = "all") -> Taps:
    """Tap a batch of edits, in as many passes as its tokens need; `owner` counts the edits of all."""
    found = [
        _tapped(sites, which, nll, start, tokens, FullPasses(lm, tokens, _beginning(tokens)))
        for start, tokens in _batches(lm, edits)
    ]
    owner, place, loss = (torch.cat([getattr(t, part) for t in found]) for part in ("owner", "place", "loss"))
    K, G = ({n: torch.cat([getattr(t, side)[n] for t in found]) for n in found[0].K} for side in ("K", "G"))
    return Taps(owner, place, K, G, loss)


class Again:
    """Texts of edits that are tapped again and again while only the matrices change.

    If they fit in one pass, what does not hang on the matrices is not run again.
    """

    def __init__(self, lm: LM, sites: Sequence[Site], edits: Sequence[Edit], begun: bool = False) -> None:
        """With `begun`, of the targets only the first token is read."""
        self.sites = sites
        parts = [(start, _begun(tokens) if begun else tokens) for start, tokens in _batches(lm, edits)]
        self.parts = [(start, tokens, self._run(lm, tokens, len(parts) == 1)) for start, tokens in parts]

    def _run(self, lm: LM, tokens: Tokens, alone: bool) -> Passes:
        if not alone:
            return FullPasses(lm, tokens, _beginning(tokens))
        blocks = {s.name: -1 if (block := block_of(lm, s.name)) is None else block for s in self.sites}
        return passes(lm, tokens, sorted(blocks, key=blocks.__getitem__), _beginning(tokens))

    def taps(self, which: Which) -> Iterator[Taps]:
        """As `tap`, pass by pass, so that the memory of one does for any number of edits."""
        for part in self.parts:
            yield _tapped(self.sites, which, nll, *part)

    def drift(self, which: Which, before: Tensor) -> Iterator[Taps]:
        """Taps of answers that shall stay, pass by pass: the loss is how far they have gone from what they were.

        Args:
            which: the tokens that are tapped.
            before: how the answers to the prompts began (`spoken`); nothing is made of the targets.
        """
        for start, tokens, run in self.parts:
            then = before[start : start + len(tokens)]
            taps = _tapped(
                self.sites, which, lambda logits, t, then=then: divergence(logits, t, then), start, tokens, run
            )
            yield replace(taps, loss=taps.loss * (taps.loss > ROUNDING), kept=True)


def _beginning(tokens: Tokens) -> Tensor:
    return torch.zeros(len(tokens), dtype=torch.long, device=tokens.ids.device)


@torch.no_grad()
def spoken(lm: LM, edits: Sequence[Edit]) -> Tensor:
    """Log-probabilities of how the model would begin its answer to each edit's prompt, (edits, vocabulary)."""
    found = [lm.logits(*_begun(tokens).reads, **tokens.inputs) for _, tokens in _batches(lm, edits)]
    return log_softmax(torch.cat(found), -1)


@torch.no_grad()
def answers(lm: LM, edits: Sequence[Edit]) -> list[int]:
    """The token that the model would begin its answer to each edit's prompt with."""
    found = [lm.logits(*_begun(tokens).reads, **tokens.inputs).argmax(-1) for _, tokens in _batches(lm, edits)]
    return torch.cat(found).tolist()


def _begun(tokens: Tokens) -> Tokens:
    """With a target of one token: the first."""
    return replace(tokens, target=tokens.target & (tokens.target.cumsum(1) == 1))


def inputs(lm: LM, sites: Sequence[Site], edits: Sequence[Edit], which: Which = "all") -> dict[str, Tensor]:
    """The `K` of taps alone: passes that end after the last of the matrices, and none back."""
    names, found = [site.name for site in sites], []
    for _, tokens in _batches(lm, edits):
        needed = tokens.until(tokens.subject) if which == "subject" else tokens
        found.append(read(lm, names, needed, *_chosen(needed, which).nonzero(as_tuple=True)))
    return {name: torch.cat([seen[name][0] for seen in found]).float() for name in names}


def among(lm: LM, edits: Sequence[Edit], which: Which) -> Tensor:
    """(m,) bool: those of all tokens of the edits' taps that are of interest."""
    return torch.cat([_chosen(tokens, which)[_chosen(tokens, "all")] for _, tokens in _batches(lm, edits)])


def _batches(lm: LM, edits: Sequence[Edit]) -> Iterator[tuple[int, Tokens]]:
    """The texts of edits, pass by pass, with the number of the first."""
    tokens = lm.encode([passage(e, answer=e.target) for e in edits])
    rows = max(1, TOKENS // tokens.ids.shape[1])
    for start in range(0, len(tokens), rows):
        yield start, tokens[slice(start, start + rows)]


def _tapped(
    sites: Sequence[Site],
    which: Which,
    lost: Callable[[Tensor, Tokens], Tensor],
    start: int,
    tokens: Tokens,
    run: Passes,
) -> Taps:
    given: dict[str, Tensor] = {}
    nudges: dict[str, Tensor] = {}

    def nudged(name: str) -> Any:
        def hook(_module: nn.Module, args: Any, output: Tensor) -> Tensor:
            given[name] = hidden(args[0], len(tokens), run.length, name).detach()
            nudges[name] = torch.zeros_like(output, requires_grad=True)  # its gradient is the output's
            return output + nudges[name]

        return hook

    with hooked(*(Hook(site.module, nudged(site.name)) for site in sites)), torch.enable_grad():
        loss = lost(run.logits(*tokens.reads), tokens)
        found = slopes(run.lm, loss, [nudges[s.name] for s in sites])
    owner, place = _chosen(tokens, which).nonzero(as_tuple=True)
    G = {s.name: hidden(g, len(tokens))[owner, place].float() for s, g in zip(sites, found, strict=True)}
    K = {s.name: given[s.name][owner, place].float() for s in sites}
    return Taps(owner + start, place, K, G, loss.detach()[owner].float())


def nll(logits: Tensor, tokens: Tokens) -> Tensor:
    """The mean negative log-probability of each row's target, (rows,), from the logits where it is read."""
    return _by_row(cross_entropy(logits, tokens.wanted, reduction="none"), tokens)


def divergence(logits: Tensor, tokens: Tokens, before: Tensor) -> Tensor:
    """The mean KL from each row's log-probabilities `before`, where its target is read, (rows,)."""
    return _by_row(kl_div(log_softmax(logits, -1), before, log_target=True, reduction="none").sum(-1), tokens)


def _by_row(lost: Tensor, tokens: Tokens) -> Tensor:
    rows, _ = tokens.reads
    return lost.new_zeros(len(tokens)).index_add(0, rows, lost / tokens.target.sum(1)[rows])


def _chosen(tokens: Tokens, which: Which) -> Tensor:
    chosen = torch.zeros_like(tokens.target)
    if which == "target":
        chosen[tokens.reads] = True
        return chosen
    if which == "subject":
        chosen[torch.arange(len(tokens), device=tokens.ids.device), tokens.subject] = True
        return chosen
    return torch.arange(tokens.ids.shape[1], device=tokens.ids.device) < tokens.last[:, None]


def change(owners: Tensor, left: Tensor, right: Tensor) -> LowRank | Dense:
    """The product left^T right as the smaller of a low-rank and a dense change.

    Args:
        owners: (m,).
        left: (m, d_out): a row for each token.
        right: (m, d_in).
    """
    (m, d_out), d_in = left.shape, right.shape[1]
    if m * (d_out + d_in) <= d_out * d_in:
        return LowRank(owners.cpu(), left.T.float().contiguous().cpu(), right.float().contiguous().cpu())
    return Dense(owners.unique().cpu(), (left.T @ right).float().cpu())
