"""C = E[k k^T]: how the model uses its matrices on ordinary text (ROME, section 3.1).

One pass for all matrices asked for, which stops after the last of them; streamed, so that a corpus of any size takes
the memory of one batch; resumed after a kill; and ended when more text no longer changes what is solved with C. What
is kept says how many tokens it saw, its standard error and how much it still moved, under the model's fingerprint and
the corpus' digest. A moment of few tokens is regularised by its own standard error before anything is solved with it.
"""

from __future__ import annotations

import itertools
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..lm import LM, Site
from ..store import Store
from ..tokens import batches
from ..trace import hidden, watch
from . import corpus as sources
from . import solve
from .corpus import BUILT_IN, OWN

log = logging.getLogger(__name__)

MOST = 65_536
"""Tokens at most between two places at which the pass can be resumed. Convergence is looked at when there are twice
as many tokens as k has entries, and whenever they have doubled (or at the end, if they are half as many again)."""
TOKENS = 8192
"""Tokens in one pass, padding included."""
BLOCK = 256
"""Columns of k k^T that are summed together: of two blocks that mirror each other one is."""
PROBES = 64
"""Keys on which convergence is measured."""
TOLERANCE = 0.1
"""Relative error of C^-1 k at which the pass ends. What an update by it does to other keys is then within 1% of the
least."""
ROUGH = 0.5
"""Relative standard error of C from which on it is warned of."""

Progress = Callable[[int, float | None], None]
"""Called with the tokens seen and the last change."""


@dataclass(frozen=True)
class Moment:
    """A second moment and how well it is known."""

    C: Tensor
    """(d_in, d_in) float32."""
    tokens: int
    """Over how many the mean was taken."""
    change: float
    """How much C^-1 k moved when the tokens last doubled, relative: its standard error; nan if unknown."""
    error: float = float("nan")
    """The standard error of C, relative to its norm, if texts are independent of each other; nan if unknown, inf of
    a single text."""

    @property
    def converged(self) -> bool:
        """Whether C^-1 k is within `TOLERANCE` of where more of the same text would bring it."""
        return self.change <= TOLERANCE

    @property
    def more(self) -> int | None:
        """About how many tokens more that takes; None if unknown.

        In d dimensions C^-1 k of n tokens has a squared relative error of d / (n - d), as an inverse Wishart matrix
        has; how many dimensions the keys fill is told by the error that was seen.
        """
        if math.isnan(self.change):
            return None
        filled = self.tokens * self.change**2 / (1 + self.change**2)
        return max(0, round(filled * (1 + 1 / TOLERANCE**2)) - self.tokens)

    @property
    def shrinkage(self) -> float:
        """The share of the mean eigenvalue in what stands for C, by which that comes nearest to the true C (Ledoit and
        Wolf 2004, https://doi.org/10.1016/S0047-259X(03)00096-4, lemma 2.1); it falls as 1 / tokens."""
        apart = self.C - self.C.diagonal().mean() * torch.eye(len(self.C)).to(self.C)
        found = (self.error * float(self.C.norm()) / float(apart.norm())) ** 2 if apart.any() else 0.0
        return 0.0 if math.isnan(found) else min(1.0, found)

    def shrunk(self) -> Tensor:
        """C, drawn towards a multiple of the identity by `shrinkage`; (d_in, d_in) float32."""
        share, mean = self.shrinkage, self.C.diagonal().mean()
        C = self.C * (1 - share)
        C.diagonal().add_(share * mean)
        return C


def give(lm: LM, site: Site, moment: Moment, corpus: str = OWN) -> None:
    """Have methods with this `corpus` solve with a second moment that was taken elsewhere."""
    if tuple(moment.C.shape) != (site.shape[1],) * 2:
        raise UsageError(
            f"{site.name} has {site.shape[1]} inputs; the moment is {tuple(moment.C.shape)}, which is not C"
        )
    for key in [k for k in lm.memo if isinstance(k, tuple) and k[1:3] == (site.name, corpus)]:
        del lm.memo[key]  # with what was derived from an earlier one
    lm.memo["moment", site.name, corpus] = moment


def prepare(lm: LM, sites: Sequence[Site], corpus: str = OWN, progress: Progress | None = None) -> dict[str, Moment]:
    """Have the second moments of sites at hand: from memory, from the store, or by one pass over the corpus.

    Args:
        lm: the unedited model.
        sites: the matrices, any number of layers.
        corpus: `own`, samples of the model; `almanac`, the small corpus that ships with it; a text file (one text a
            line) or .jsonl with a field `text`, a folder of them, or the name of a data set on the hub.
        progress: told how far the pass is.

    Returns:
        {name of the matrix: its moment}.
    """
    missing = [s.name for s in sites if ("moment", s.name, corpus) not in lm.memo]
    if missing:
        store, digest = Store(), sources.digest(corpus)
        common = {"model": lm.fingerprint, "dtype": str(lm.dtype), "corpus": digest}
        keys = {n: {"moment": n, **common} for n in missing}
        kept = {n: found for n in missing if (found := store.load(keys[n])) is not None}
        wanted = [n for n in missing if n not in kept]
        if wanted:
            resume = {"moments so far": wanted, "form": 3, **common}
            tolerance = 0.0 if corpus == BUILT_IN else TOLERANCE  # it is short, and its presets know all of it
            with lm.unedited():
                rows = sources.rows(lm, corpus)
                measured = second_moments(lm, wanted, rows, progress, (store, resume), tolerance)
            for name, moment in measured.items():
                seen = torch.tensor([moment.tokens, moment.change, moment.error], dtype=torch.float64)
                kept[name] = {"C": moment.C, "seen": seen}
                store.keep(keys[name], kept[name])
            store.drop(resume)
        for name, found in kept.items():
            tokens, change, error = found["seen"].tolist()
            lm.memo["moment", name, corpus] = Moment(found["C"], int(tokens), change, error)
    found = {s.name: lm.memo["moment", s.name, corpus] for s in sites}
    if corpus != OWN:  # how many samples are drawn is no user's doing, and was measured
        _warn_if_rough(lm, max(found.values(), key=lambda moment: moment.error))
    return found


def _warn_if_rough(lm: LM, worst: Moment) -> None:
    """Once for a model."""
    if worst.error > ROUGH and ("told of", "moments") not in lm.memo:
        lm.memo["told of", "moments"] = True
        warnings.warn(
            f"second moments of {lm.name} are rough: of {worst.tokens:,} tokens, standard error {worst.error:.0%}; "
            f"`errata stats --model {lm.name} --text FILE` takes them on a longer text",
            stacklevel=4,
        )


def cholesky(lm: LM, site: Site, corpus: str) -> Tensor:
    """The factor of a site's (regularised) second moment, (d_in, d_in) float64; `prepare` came before.

    Almanac's corpus is solved with as it is: its presets were tuned so.
    """
    key = "factor", site.name, corpus
    return _derived(lm, key, lambda m: solve.factor(m.C if corpus == BUILT_IN else m.shrunk()))


def projector(lm: LM, site: Site, corpus: str, below: float, share: bool = False) -> Tensor:
    """The projector onto the directions that the corpus hardly uses, (d_in, d_in) float64; `prepare` came before.

    `below` bounds the eigenvalues; or if `share`, it says how many of them, the smallest, count.
    """
    key = "projector", site.name, corpus, below, share
    return _derived(lm, key, lambda m: solve.projector(m.C, below, share))


def _derived(lm: LM, key: tuple[Any, ...], compute: Callable[[Moment], Tensor]) -> Tensor:
    if key not in lm.memo:
        lm.memo[key] = compute(lm.memo["moment", key[1], key[2]])
    return lm.memo[key]


# The pass


@dataclass
class _Sums:
    """What has been summed so far."""

    outer: dict[str, Tensor] = field(default_factory=dict)
    """By matrix, (d_in, d_in) float64, of which the blocks on and above the diagonal count."""
    probes: dict[str, Tensor] = field(default_factory=dict)
    """By matrix, the first keys seen: (PROBES, d_in) float32."""
    spread: dict[str, float] = field(default_factory=dict)
    """By matrix, the sum over rows of |K^T K|^2, whence the standard error."""
    squares: float = 0.0
    """The sum over rows of their tokens squared."""
    tokens: int = 0
    rows: int = 0
    last: tuple[int, dict[str, Tensor]] = (0, {})
    """Tokens and C^-1 k when convergence was last looked at."""
    change: dict[str, float] = field(default_factory=dict)
    """By matrix, how much that moved then."""

    def C(self, name: str) -> Tensor:
        """(d_in, d_in) float32."""
        upper = (self.outer[name] / self.tokens).float().triu()
        return upper + upper.triu(1).T

    def moment(self, name: str) -> Moment:
        """What is known of a matrix by now."""
        C, total = self.C(name), self.tokens**2
        # rows vary about their mean n C: the sum of |K^T K - n C|^2, less what their lengths alone account for
        varied = max(0.0, self.spread[name] - self.squares * float(C.norm()) ** 2)
        free = total - self.squares  # the mean is of the same rows
        error = (varied / free) ** 0.5 / float(C.norm()) if free and C.any() else math.inf
        return Moment(C, self.tokens, self.change.get(name, math.nan), error)


@torch.no_grad()
def second_moments(
    lm: LM,
    names: Sequence[str],
    rows: Iterable[Sequence[int]],
    progress: Progress | None = None,
    resume: tuple[Store, dict[str, Any]] | None = None,
    tolerance: float = 0.0,
) -> dict[str, Moment]:
    """The mean of k k^T over all tokens of a corpus, BOS too, by the name of the matrix whose input is k.

    The pass ends with the corpus, or when C^-1 k is known to `tolerance` for every matrix.

    Args:
        lm: the model.
        names: of the matrices.
        rows: token ids, text after text (`corpus.rows`, `corpus.tokenized`).
        progress: told how far it is, whenever convergence was looked at.
        resume: where to keep what was summed so far, and under which key.
        tolerance: 0 reads the whole corpus; `prepare` takes TOLERANCE.
    """
    sums = _resumed(resume) if resume else _Sums()
    rows = itertools.islice(rows, sums.rows, None)
    first = 2 * max(lm.site(name).shape[1] for name in names)
    with lm.frozen():
        while window := _until(rows, min(max(sums.tokens, first), MOST)):
            for batch in batches([len(row) for row in window], TOKENS):
                _add(lm, names, [torch.tensor(window[i]) for i in batch], sums)
            sums.rows += len(window)
            _look(sums)
            if resume:
                resume[0].keep(resume[1], _to_tensors(sums))
            worst = max(sums.change.values(), default=math.nan)
            if progress:
                progress(sums.tokens, worst)
            if worst < tolerance:
                break
    if not sums.tokens:
        raise UsageError("the corpus holds no text; give a file with one text a line")
    return {n: sums.moment(n) for n in names}


def _until(rows: Iterator[Sequence[int]], tokens: int) -> list[Sequence[int]]:
    """The next rows, of at least so many tokens together if there are as many."""
    found, count = [], 0
    while count < tokens and (row := next(rows, None)) is not None:
        found.append(row)
        count += len(row)
    return found


def _add(lm: LM, names: Sequence[str], rows: Sequence[Tensor], sums: _Sums) -> None:
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=-1).to(lm.device)
    mask = ids >= 0

    def see(name: str, given: Any, _output: Any) -> None:
        every = hidden(given, len(ids)).float()
        k = every[mask]
        grams = (every @ every.mT) * (mask[:, :, None] & mask[:, None])  # |K K^T| = |K^T K|
        sums.spread[name] = sums.spread.get(name, 0.0) + float(grams.double().square().sum())
        if name not in sums.outer:
            sums.outer[name] = torch.zeros(k.shape[1], k.shape[1], dtype=torch.float64)
        for i in range(0, k.shape[1], BLOCK):
            sums.outer[name][i : i + BLOCK, i:] += (k[:, i : i + BLOCK].T @ k[:, i:]).cpu()
        seen = sums.probes.get(name, k[:0].cpu())
        if len(seen) < PROBES:
            some = k[:: max(1, len(k) // PROBES)][: PROBES - len(seen)].cpu()
            sums.probes[name] = torch.cat([seen, some])

    watch(lm, names, {"input_ids": ids.clamp(min=0), "attention_mask": mask.long()}, see)
    sums.squares += float(mask.sum(1).double().square().sum())
    sums.tokens += int(mask.sum())


def _look(sums: _Sums) -> None:
    """How much C^-1 k moved since the last look, if there are half as many tokens again.

    A mean of n tokens and one of m among them are apart by 1 / m - 1 / n of a token's variance, and the first is off by
    1 / n of it: what is kept is the movement times the root of their ratio, which is 1 where the tokens doubled.
    """
    before, solved = sums.last
    if sums.tokens < 1.5 * before:
        return
    now = {n: solve.whiten(solve.factor(sums.outer[n] / sums.tokens), sums.probes[n]) for n in sums.outer}
    if solved:
        scale = (before / (sums.tokens - before)) ** 0.5
        sums.change = {n: scale * float((now[n] - solved[n]).norm() / now[n].norm()) for n in now}
        log.info("%d tokens: C^-1 k moved by %.2g at most", sums.tokens, max(sums.change.values()))
    sums.last = sums.tokens, now


def _to_tensors(sums: _Sums) -> dict[str, Tensor]:
    numbers = _number(sums.tokens, sums.rows, sums.last[0], sums.squares)
    groups = {"outer": sums.outer, "probes": sums.probes, "last": sums.last[1]}
    for name, plain in (("spread", sums.spread), ("change", sums.change)):
        groups[name] = {n: _number(v) for n, v in plain.items()}
    return {"numbers": numbers, **{f"{g}/{n}": t for g, ts in groups.items() for n, t in ts.items()}}


def _number(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _resumed(resume: tuple[Store, dict[str, Any]]) -> _Sums:
    found = resume[0].load(resume[1])
    if found is None:
        return _Sums()
    tokens, count, last, squares = found["numbers"].tolist()
    group = {
        g: {k.partition("/")[2]: t for k, t in found.items() if k.startswith(f"{g}/")}
        for g in ("outer", "probes", "last", "spread", "change")
    }
    spread, change = ({n: float(t) for n, t in group[g].items()} for g in ("spread", "change"))
    log.info("second moments go on after %d tokens", tokens)
    last = int(last), group["last"]
    return _Sums(group["outer"], group["probes"], spread, squares, int(tokens), int(count), last, change)
