"""C = E[k k^T]: how the model uses a matrix on ordinary text (ROME, section 3.1)."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UsageError
from ..lm import ALMANAC, LM, Site
from ..store import Store
from ..tokens import Passage
from ..trace import read
from .solve import factor

BUILT_IN = "almanac"
"""The corpus that ships with the built-in model."""
ROWS = 128
"""Texts in one pass."""


def prepare(lm: LM, sites: Sequence[Site], corpus: str) -> None:
    """Have the second moments of sites at hand: from memory, from the store, or by one pass over the corpus."""
    missing = [s for s in sites if ("moment", s.name, corpus) not in lm.memo]
    if not missing:
        return
    texts = _texts(lm, corpus)
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    names = [s.name for s in missing]
    found = Store().get(
        {"what": "second moment", "model": lm.fingerprint, "corpus": digest, "sites": names, "dtype": str(lm.dtype)},
        lambda: second_moments(lm, names, texts),
    )
    for name in names:
        lm.memo["moment", name, corpus] = factor(found[name])


def cholesky(lm: LM, site: Site, corpus: str) -> Tensor:
    """The factor of a site's (regularised) second moment, (d_in, d_in) float64; `prepare` came before."""
    return lm.memo["moment", site.name, corpus]


@torch.no_grad()
def second_moments(lm: LM, names: Sequence[str], texts: Sequence[str]) -> dict[str, Tensor]:
    """The mean of k k^T over all tokens of the texts, by the name of the matrix whose input is k.

    One pass for all matrices, which stops after the last of them.

    Returns:
        {name: (d_in, d_in) float32}, accumulated in float64.
    """
    ordered = sorted(texts, key=len)
    sums: dict[str, Tensor] = {}
    count = 0
    for start in range(0, len(ordered), ROWS):
        batch = lm.encode([Passage(t) for t in ordered[start : start + ROWS]])
        rows, cols = batch.mask.nonzero(as_tuple=True)
        count += len(rows)
        for name, (k, _) in read(lm, names, batch, rows, cols).items():
            outer = (k.float().T @ k.float()).double()
            sums[name] = sums[name] + outer if name in sums else outer
    return {name: (total / count).float() for name, total in sums.items()}


def _texts(lm: LM, corpus: str) -> list[str]:
    path = ALMANAC / "corpus.txt" if corpus == BUILT_IN else Path(corpus)
    if corpus == BUILT_IN and lm.name != BUILT_IN:
        warnings.warn(
            f"the second moment of {lm.name} is taken on the small corpus of almanac; give `corpus` a text file of its own",
            stacklevel=2,
        )
    if not path.is_file():
        raise UsageError(f"there is no corpus {str(path)!r}; give `corpus` a text file, one text a line")
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
