"""Where a fact is looked up: what goes into and comes out of a module at the last token of the subject."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..edit import Edit
from ..lm import LM
from ..tokens import passage
from ..trace import read

ROWS = 256
"""Passages in one pass."""


def at_subject(lm: LM, place: str, edits: Sequence[Edit], contexts: Sequence[str] = ("{}",)) -> tuple[Tensor, Tensor]:
    """What goes into and comes out of a module at the subject of every edit in every context.

    Returns:
        Two float32 tensors, (edits, contexts, d_in) and (edits, contexts, d_out): of a matrix W, keys k and values W k.
    """
    passages = [passage(e, c) for e in edits for c in contexts]
    found = []
    for start in range(0, len(passages), ROWS):
        batch = lm.encode(passages[start : start + ROWS])
        rows = torch.arange(len(batch), device=lm.device)
        found.append(read(lm, [place], batch, rows, batch.subject)[place])
    into, out = (torch.cat(parts).float().unflatten(0, (len(edits), -1)) for parts in zip(*found, strict=True))
    return into, out
