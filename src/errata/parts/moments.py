"""C = E[k k^T]: how the model uses its matrices on ordinary text (ROME, section 3.1).

One pass for all matrices asked for, which stops after the last of them; streamed, so that a corpus of any size takes
the memory of one batch; resumed after a kill; and ended when more text no longer changes what is solved with C. What
is kept says how many tokens it saw and how much it still moved, under the model's fingerprint and the corpus' digest.
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

from ..errors import UsageError
from ..lm import ALMANAC, LM, Site
from ..store import Store
from ..tokens import Passage
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
            resume = {"moments so far": wanted, **{k: v for k, v in keys[wanted[0]].items() if k != "moment"}}
            measured = second_moments(lm, wanted, texts(corpus), progress, (store, resume), TOLERANCE)
            for name, moment in measured.items():
                kept[name] = {"C": moment.C, "seen": torch.tensor([moment.tokens, moment.change], dtype=torch.float64)}
                store.keep(keys[name], kept[name])
            store.drop(resume)
        for name, found in kept.items():
            lm.memo["moment", name, corpus] = Moment(found["C"], int(found["seen"][0]), float(found["seen"][1]))
    return {s.name: lm.memo["moment", s.name, corpus] for s in sites}


def cholesky(lm: LM, site: Site, corpus: str) -> Tensor:
    """The factor of a site's (regularised) second moment, (d_in, d_in) float64; `prepare` came before."""
    return _derived(lm, ("factor", site.name, corpus), lambda C: solve.factor(C))


def projector(lm: LM, site: Site, corpus: str, below: float) -> Tensor:
    """The projector onto the directions that the corpus hardly uses, (d_in, d_in) float64; `prepare` came before."""
    return _derived(lm, ("projector", site.name, corpus, below), lambda C: solve.projector(C, below))


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
    tokens: int = 0
    texts: int = 0
    last: tuple[int, dict[str, Tensor]] = (0, {})
    """Tokens and C^-1 k when convergence was last measured."""
    change: float = float("nan")


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
            progress(sums.tokens, sums.change)
        if converged:
            break
    if not sums.tokens:
        raise UsageError("the corpus holds no text; give a file with one text a line")
    return {n: Moment((sums.outer[n] / sums.tokens).float(), sums.tokens, sums.change) for n in names}


def _batches(lm: LM, window: Sequence[str]) -> Iterator[Tensor]:
    """Ids of texts of like length, (batch, seq), padded with -1; long texts in pieces."""
    longest = min(lm.context or LONGEST, LONGEST)
    bos = lm.encode([Passage("a")]).ids[0, :-1].tolist()
    plain = lm.tokenizer(list(window), add_special_tokens=False, verbose=False)["input_ids"]
    step = longest - len(bos)
    rows = [torch.tensor(bos + ids[i : i + step]) for ids in plain for i in range(0, len(ids), step)]
    rows.sort(key=len)
    while rows:
        count = max(1, TOKENS // len(rows[-1]))
        yield torch.nn.utils.rnn.pad_sequence(rows[-count:], batch_first=True, padding_value=-1)
        del rows[-count:]


def _add(lm: LM, names: Sequence[str], ids: Tensor, sums: _Sums) -> None:
    ids = ids.to(lm.device)
    mask = ids >= 0

    def see(name: str, given: Any, _output: Any) -> None:
        k = hidden(given, len(ids))[mask].float()
        outer = (k.T @ k).double().cpu()
        sums.outer[name] = sums.outer[name] + outer if name in sums.outer else outer
        seen = sums.probes.get(name, k[:0].cpu())
        if len(seen) < PROBES:
            sums.probes[name] = torch.cat([seen, k[:: max(1, len(k) // PROBES)][: PROBES - len(seen)].cpu()])

    watch(lm, names, {"input_ids": ids.clamp(min=0), "attention_mask": mask.long()}, see)
    sums.tokens += int(mask.sum())


def _measure(sums: _Sums, tolerance: float) -> bool:
    """At each doubling of the tokens: how much C^-1 k moved since the last one, and whether that is little enough."""
    before, solved = sums.last
    if sums.tokens < 2 * before:
        return False
    now = {n: solve.whiten(solve.factor(outer / sums.tokens), sums.probes[n]) for n, outer in sums.outer.items()}
    if solved:
        sums.change = max(float((now[n] - solved[n]).norm() / now[n].norm()) for n in now)
        log.info("%d tokens: C^-1 k moved by %.2g", sums.tokens, sums.change)
    sums.last = sums.tokens, now
    return sums.change < tolerance


def _to_tensors(sums: _Sums) -> dict[str, Tensor]:
    numbers = torch.tensor([sums.tokens, sums.texts, sums.last[0], sums.change], dtype=torch.float64)
    groups = {"outer": sums.outer, "probes": sums.probes, "last": sums.last[1]}
    return {"numbers": numbers, **{f"{g}/{n}": t for g, ts in groups.items() for n, t in ts.items()}}


def _resumed(resume: tuple[Store, dict[str, Any]]) -> _Sums:
    found = resume[0].load(resume[1])
    if found is None:
        return _Sums()
    tokens, count, last, change = found["numbers"].tolist()
    group = {
        g: {k.partition("/")[2]: t for k, t in found.items() if k.startswith(f"{g}/")}
        for g in ("outer", "probes", "last")
    }
    log.info("second moments go on after %d tokens", tokens)
    return _Sums(group["outer"], group["probes"], int(tokens), int(count), (int(last), group["last"]), change)


# Sources of text


def texts(corpus: str) -> Iterator[str]:
    """The texts of a corpus, one after another."""
    for path in _files(corpus):
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _text(line, path, number) if path.suffix == ".jsonl" else line.strip()
    if not _files(corpus):
        yield from (row["text"] for row in _hub(corpus) if row["text"].strip())


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


def _hub(corpus: str) -> Any:
    """A data set on the hub, `name` or `name:configuration`, streamed."""
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UsageError(
            f"{corpus!r} is no file here, and reading data sets from the hub needs: pip install 'errata[data]'"
        ) from None
    name, _, configuration = corpus.partition(":")
    return load_dataset(name, configuration or None, split="train", streaming=True)


def _digest(corpus: str) -> str:
    """Of the content of files; of a data set on the hub, its name."""
    digest = hashlib.sha256()
    for path in _files(corpus):
        digest.update(path.read_bytes())
    return digest.hexdigest() if _files(corpus) else f"hub:{corpus}"
