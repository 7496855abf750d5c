"""Two patches beside each other: what they have in common, and what going from one to the other does to a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ask import reply
from ..changes import total
from ..edit import asks
from ..patch import Patch
from .conflicts import same

if TYPE_CHECKING:
    from ..lm import LM


def diff(a: Patch, b: Patch) -> dict[str, Any]:
    """What two patches have and have not in common.

    Returns:
        `only_a`, `only_b`, `both` (edits), `otherwise` (pairs of the same question with two answers), and `weights`:
        for each module the norms of both changes, that of their difference, and their cosine (None for memories).
    """
    of_a, of_b = ({asks(e): e for e in p.edits} for p in (a, b))
    shared = [q for q in of_a if q in of_b]
    return {
        "only_a": [e.to_dict() for q, e in of_a.items() if q not in of_b],
        "only_b": [e.to_dict() for q, e in of_b.items() if q not in of_a],
        "both": [of_a[q].to_dict() for q in shared if same(of_a[q].target, of_b[q].target)],
        "otherwise": [
            [of_a[q].to_dict(), of_b[q].to_dict()] for q in shared if not same(of_a[q].target, of_b[q].target)
        ],
        "weights": [_apart(name, a, b) for name in dict.fromkeys([*a.changes, *b.changes])],
    }


def _apart(module: str, a: Patch, b: Patch) -> dict[str, Any]:
    x, y = _delta(module, a), _delta(module, b)
    if x is None or y is None:
        return {"module": module, "norm_a": None, "norm_b": None, "norm_apart": None, "cosine": None}
    zero = torch.zeros_like(y if x.ndim == 0 else x)
    x, y = x + zero, y + zero
    both = float(x.norm() * y.norm())
    return {
        "module": module,
        "norm_a": float(x.norm()),
        "norm_b": float(y.norm()),
        "norm_apart": float((x - y).norm()),
        "cosine": float((x * y).sum()) / both if both else None,
    }


def _delta(module: str, patch: Patch) -> Tensor | None:
    """What a patch adds to a weight (0 if nothing); None where it answers beside it."""
    if module not in patch.changes:
        return torch.zeros((), dtype=torch.float64)
    return total(patch.changes[module])


def effect(lm: LM, before: Patch, after: Patch) -> list[dict[str, Any]]:
    """What going from one patch to another does to the corrections of either: each asked of the model under both.

    Returns:
        For each edit: its fields, whether it is in `after` (`stays`), and `before` and `after`: what the model `says`,
        whether that is the target (`says_target`), and the target's probability (`p_target`).
    """
    edits = list(dict.fromkeys([*before.edits, *after.edits]))
    states = [reply(lm, edits, patch) for patch in (before, after)]
    return [
        {**e.to_dict(), "stays": e in after.edits, "before": then.to_dict(), "after": now.to_dict()}
        for e, then, now in zip(edits, *states, strict=True)
    ]
