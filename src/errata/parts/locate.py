"""Where a fact is looked up: what goes into and comes out of a module at the last token of the subject."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..edit import Edit
from ..lm import LM
from ..tokens import batches, passage
from ..trace import read

TOKENS = 8192
"""Tokens in one pass. Changes the memory, not the result."""


def at_subject(lm: LM, place: str, edits: Sequence[Edit], contexts: Sequence[str] = ("{}",)) -> tuple[Tensor, Tensor]:
    """What goes into and comes out of a module at the subject of every edit in every context.

    Returns:
        Two float32 tensors, (edits, contexts, d_in) and (edits, contexts, d_out): of a matrix W, keys k and values W k.
    """
    tokens = lm.encode([passage(e, c) for e in edits for c in contexts])
    found, order = [], []
    for rows in batches((tokens.subject + 1).tolist(), TOKENS):
        batch = tokens[torch.tensor(rows, device=lm.device)]
        batch = batch.until(batch.subject)
        found.append(read(lm, [place], batch, torch.arange(len(rows), device=lm.device), batch.subject)[place])
        order += rows
    back = torch.tensor(order, device=lm.device).argsort()
    into, out = (torch.cat(parts)[back].float().unflatten(0, (len(edits), -1)) for parts in zip(*found, strict=True))
    return into, out
