"""Where a fact is looked up: the input of a matrix at the last token of the subject."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..edit import Edit
from ..lm import LM, Site
from ..tokens import passage
from ..trace import read

ROWS = 256
"""Passages in one pass."""


def at_subject(lm: LM, site: Site, edits: Sequence[Edit], contexts: Sequence[str] = ("{}",)) -> tuple[Tensor, Tensor]:
    """What goes into and comes out of a matrix at every edit's subject, averaged over contexts, in float32.

    Returns:
        Keys k (edits, d_in) and values W k (edits, d_out).
    """
    passages = [passage(e, c) for e in edits for c in contexts]
    found = []
    for start in range(0, len(passages), ROWS):
        batch = lm.encode(passages[start : start + ROWS])
        rows = torch.arange(len(batch), device=lm.device)
        found.append(read(lm, [site.name], batch, rows, batch.subject)[site.name])
    into, out = (torch.cat(parts).float() for parts in zip(*found, strict=True))
    return tuple(t.unflatten(0, (len(edits), len(contexts))).mean(1) for t in (into, out))  # type: ignore[return-value]
