"""C = E[k k^T]: how the model uses its matrices on ordinary text (ROME, section 3.1).

One pass for all matrices asked for, which stops after the last of them; streamed, so that a corpus of any size takes
the memory of one batch; resumed after a kill; and ended when more text no longer changes what is solved with C. What
is kept says how many tokens it saw, its standard error and how much it still moved, under the model's fingerprint and
the corpus' digest.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ErrataError, UsageError
from ..lm import ALMANAC, LM, Site
from ..store import Store
from ..tokens import Passage, batches
from ..trace import hidden, watch
from . import solve

log = logging.getLogger(__name__)

BUILT_IN = "almanac"
"""The corpus that ships with the built-in model."""
WINDOW = 1024
"""Texts that are sorted by length together, and between which the pass can be resumed."""
TOKENS = 8192
"""Tokens in one pass, padding included."""
LONGEST = 1024
"""A longer text is cut into pieces of so many tokens."""
PROBES = 64
"""Keys on which convergence is measured."""
TOLERANCE = 0.01
"""Relative change of C^-1 k, over a doubling of the tokens, at which the pass ends."""

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
    """How much C^-1 k moved when the tokens last doubled, relative; nan if they never did."""
    error: float = float("nan")
    """The standard error of C, relative to its norm, if texts are independent of each other; nan if unknown."""


def give(lm: LM, site: Site, moment: Moment, corpus: str = BUILT_IN) -> None:
    """Have methods with this `corpus` solve with a second moment that was taken elsewhere."""
    if tuple(moment.C.shape) != (site.shape[1],) * 2:
        raise UsageError(
            f"{site.name} has {site.shape[1]} inputs; the moment is {tuple(moment.C.shape)}, which is not C"
        )
    for key in [k for k in lm.memo if isinstance(k, tuple) and k[1:3] == (site.name, corpus)]:
        del lm.memo[key]  # with what was derived from an earlier one
    lm.memo["moment", site.name, corpus] = moment


def prepare(lm: LM, sites: Sequence[Site], corpus: str, progress: Progress | None = None) -> dict[str, Moment]:
    """Have the second moments of sites at hand: from memory, from the store, or by one pass over the corpus.

    Args:
        lm: the unedited model.
        sites: the matrices, any number of layers.
        corpus: `almanac`, a text file (one text a line) or .jsonl with a field `text`, a folder of them, or the name of
            a data set on the hub.
        progress: told how far the pass is.

    Returns:
        {name of the matrix: its moment}.
    """
    missing = [s.name for s in sites if ("moment", s.name, corpus) not in lm.memo]
    if missing:
        if corpus == BUILT_IN and lm.name != BUILT_IN:
            warnings.warn(
                f"second moments of {lm.name} are taken on the small corpus of almanac; give `corpus` a larger text",
                stacklevel=2,
            )
        store, source = Store(), _digest(corpus)
        keys = {n: {"moment": n, "model": lm.fingerprint, "dtype": str(lm.dtype), "corpus": source} for n in missing}
        kept = {n: found for n in missing if (found := store.load(keys[n])) is not None}
        wanted = [n for n in missing if n not in kept]
        if wanted:
            resume = {
                "moments so far": wanted,
                "form": 2,
                **{k: v for k, v in keys[wanted[0]].items() if k != "moment"},
            }
            with lm.unedited():
                measured = second_moments(lm, wanted, texts(corpus), progress, (store, resume), TOLERANCE)
            for name, moment in measured.items():
                seen = torch.tensor([moment.tokens, moment.change, moment.error], dtype=torch.float64)
                kept[name] = {"C": moment.C, "seen": seen}
                store.keep(keys[name], kept[name])
            store.drop(resume)
        for name, found in kept.items():
            lm.memo["moment", name, corpus] = Moment(found["C"], int(found["seen"][0]), *found["seen"][1:].tolist())
    return {s.name: lm.memo["moment", s.name, corpus] for s in sites}


def cholesky(lm: LM, site: Site, corpus: str) -> Tensor:
    """The factor of a site's (regularised) second moment, (d_in, d_in) float64; `prepare` came before."""
    return _derived(lm, ("factor", site.name, corpus), lambda C: solve.factor(C))


def projector(lm: LM, site: Site, corpus: str, below: float, share: bool = False) -> Tensor:
    """The projector onto the directions that the corpus hardly uses, (d_in, d_in) float64; `prepare` came before.

    `below` bounds the eigenvalues; or if `share`, it says how many of them, the smallest, count.
    """
    return _derived(lm, ("projector", site.name, corpus, below, share), lambda C: solve.projector(C, below, share))


def _derived(lm: LM, key: tuple[Any, ...], compute: Callable[[Tensor], Tensor]) -> Tensor:
    if key not in lm.memo:
        lm.memo[key] = compute(lm.memo["moment", key[1], key[2]].C)
    return lm.memo[key]


@dataclass
class _Sums:
    """What has been summed so far."""

    outer: dict[str, Tensor] = field(default_factory=dict)
    """By matrix, (d_in, d_in) float64."""
    probes: dict[str, Tensor] = field(default_factory=dict)
    """By matrix, the first keys seen: (PROBES, d_in) float32."""
    spread: dict[str, float] = field(default_factory=dict)
    """By matrix, the sum over texts of |K^T K|^2, whence the standard error."""
    squares: float = 0.0
    """The sum over texts of their tokens squared."""
    tokens: int = 0
    texts: int = 0
    last: tuple[int, dict[str, Tensor]] = (0, {})
    """Tokens and C^-1 k when convergence was last measured."""
    change: dict[str, float] = field(default_factory=dict)
    """By matrix, how much that moved then."""

    def moment(self, name: str) -> Moment:
        """What is known of a matrix by now."""
        C = self.outer[name] / self.tokens
        # texts vary about their mean n C: the sum of |K^T K - n C|^2, less what their lengths alone account for
        varied = self.spread[name] - self.squares * float(C.norm()) ** 2
        error = max(varied, 0.0) ** 0.5 / self.tokens / float(C.norm()) if C.any() else float("nan")
        return Moment(C.float(), self.tokens, self.change.get(name, float("nan")), error)


@torch.no_grad()
def second_moments(
    lm: LM,
    names: Sequence[str],
    source: Iterable[str],
    progress: Progress | None = None,
    resume: tuple[Store, dict[str, Any]] | None = None,
    tolerance: float = 0.0,
) -> dict[str, Moment]:
    """The mean of k k^T over the tokens of a source of texts, by the name of the matrix whose input is k.

    Every token counts, BOS too. The pass ends with the source, or when doubling the tokens moved C^-1 k by less than
    `tolerance` for every matrix.

    Args:
        lm: the model.
        names: of the matrices.
        source: the texts.
        progress: told how far it is, after every window.
        resume: where to keep what was summed so far, and under which key.
        tolerance: 0 reads the whole source; `prepare` takes TOLERANCE.
    """
    sums = _resumed(resume) if resume else _Sums()
    source = itertools.islice(source, sums.texts, None)
    while window := list(itertools.islice(source, WINDOW)):
        for batch in _batches(lm, window):
            _add(lm, names, batch, sums)
        sums.texts += len(window)
        converged = _measure(sums, tolerance)
        if resume:
            resume[0].keep(resume[1], _to_tensors(sums))
        if progress:
            progress(sums.tokens, max(sums.change.values(), default=float("nan")))
        if converged:
            break
    if not sums.tokens:
        raise UsageError("the corpus holds no text; give a file with one text a line")
    return {n: sums.moment(n) for n in names}


def _batches(lm: LM, window: Sequence[str]) -> Iterator[Tensor]:
    """Ids of texts of like length, (batch, seq), padded with -1; long texts in pieces."""
    longest = min(lm.context or LONGEST, LONGEST)
    bos = lm.encode([Passage("a")]).ids[0, :-1].tolist()
    plain = lm.tokenizer(list(window), add_special_tokens=False, verbose=False)["input_ids"]
    step = longest - len(bos)
    rows = [torch.tensor(bos + ids[i : i + step]) for ids in plain for i in range(0, len(ids), step)]
    for batch in batches([len(row) for row in rows], TOKENS):
        yield torch.nn.utils.rnn.pad_sequence([rows[i] for i in batch], batch_first=True, padding_value=-1)


def _add(lm: LM, names: Sequence[str], ids: Tensor, sums: _Sums) -> None:
    ids = ids.to(lm.device)
    mask = ids >= 0

    def see(name: str, given: Any, _output: Any) -> None:
        every = hidden(given, len(ids), ids.shape[1], name).float() * mask[:, :, None]
        k = every[mask]
        outer = (k.T @ k).double().cpu()
        sums.spread[name] = sums.spread.get(name, 0.0) + float((every @ every.mT).double().square().sum())
        sums.outer[name] = sums.outer[name] + outer if name in sums.outer else outer
        seen = sums.probes.get(name, k[:0].cpu())
        if len(seen) < PROBES:
            sums.probes[name] = torch.cat([seen, k[:: max(1, len(k) // PROBES)][: PROBES - len(seen)].cpu()])

    watch(lm, names, {"input_ids": ids.clamp(min=0), "attention_mask": mask.long()}, see)
    sums.squares += float(mask.sum(1).double().square().sum())
    sums.tokens += int(mask.sum())


def _measure(sums: _Sums, tolerance: float) -> bool:
    """At each doubling of the tokens: how much C^-1 k moved since the last one, and whether that is little enough."""
    before, solved = sums.last
    if sums.tokens < 2 * before:
        return False
    now = {n: solve.whiten(solve.factor(outer / sums.tokens), sums.probes[n]) for n, outer in sums.outer.items()}
    if solved:
        sums.change = {n: float((now[n] - solved[n]).norm() / now[n].norm()) for n in now}
        log.info("%d tokens: C^-1 k moved by %.2g at most", sums.tokens, max(sums.change.values()))
    sums.last = sums.tokens, now
    return bool(solved) and max(sums.change.values()) < tolerance


def _to_tensors(sums: _Sums) -> dict[str, Tensor]:
    numbers = _number(sums.tokens, sums.texts, sums.last[0], sums.squares)
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


# Sources of text


def texts(corpus: str) -> Iterator[str]:
    """The texts of a corpus, one after another."""
    for path in _files(corpus):
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _text(line, path, number) if path.suffix == ".jsonl" else line.strip()
    if not _files(corpus):
        for row in _hub(corpus):
            if not isinstance(row.get("text"), str):
                raise UsageError(f"the data set {corpus!r} has fields {', '.join(row)}; a corpus needs a field 'text'")
            if row["text"].strip():
                yield row["text"]


def _text(line: str, path: Path, number: int) -> str:
    try:
        return json.loads(line)["text"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise UsageError(
            f"{path}, line {number}: a corpus in .jsonl has an object with a field 'text' in every line"
        ) from None


def _files(corpus: str) -> list[Path]:
    """The files of a corpus; none if it is a name on the hub."""
    path = ALMANAC / "corpus.txt" if corpus == BUILT_IN else Path(corpus).expanduser()
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.suffix in {".txt", ".jsonl"})
    if path.is_file() or corpus == BUILT_IN:
        return [path]
    if path.suffix in {".txt", ".jsonl"} or corpus.startswith((".", "/", "~")):
        raise UsageError(
            f"there is no corpus {corpus!r}; give a text file (one text a line), a folder, or a data set's name"
        )
    return []


def _hub(corpus: str) -> Iterator[dict[str, Any]]:
    """A data set on the hub, `name` or `name:configuration`, streamed."""
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UsageError(
            f"{corpus!r} is no file here, and reading data sets from the hub needs: pip install 'errata[data]'"
        ) from None
    name, _, configuration = corpus.partition(":")
    try:
        yield from load_dataset(name, configuration or None, split="train", streaming=True)
    except Exception as error:  # whatever the hub, the network or a data set's own reader raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ErrataError(
            f"the corpus {corpus!r} is no file here and can't be read from the hub ({reason}); give a text file"
        ) from error


def _digest(corpus: str) -> str:
    """Of the content of files; of a data set on the hub, its name."""
    digest = hashlib.sha256()
    for path in _files(corpus):
        digest.update(path.read_bytes())
    return digest.hexdigest() if _files(corpus) else f"hub:{corpus}"
