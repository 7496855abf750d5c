"""What of a patch can be exported: changes that add to weights of a plain transformers model, as one sum each."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..changes import Change, Dense, LowRank, share, total
from ..errors import ErrataError, UsageError
from ..lm import LM, Site
from ..patch import Patch


def weight_changes(patch: Patch, lm: LM) -> Mapping[str, Sequence[Change]]:
    """The changes, if all of them can be added to a weight of this model as it is.

    Raises:
        UsageError: the model has a patch applied, or this one changes nothing.
        ErrataError: the model is wrapped, the patch is for another one, or has a change that is no sum with a weight.
    """
    if lm.patched:
        raise UsageError("the model has a patch applied; leave it first, it would be exported twice")
    if not patch:
        raise UsageError("the patch changes nothing, so there is nothing to export")
    _refuse_wrapped(lm)
    for name, changes in patch._fitting(lm, check=True):
        for change in changes:
            if not isinstance(change, LowRank | Dense):
                raise ErrataError(
                    f"the patch has a {change.kind} change{f' at {name}' if name else ''}, which looks at each input "
                    "before it answers; no weight or LoRA does that, so it can't be exported: apply the patch with "
                    "errata, or edit with a method that changes weights (rome, memit, ft-l ...)"
                )
    return patch.changes


def _refuse_wrapped(lm: LM) -> None:
    """Refuse a model whose module names, or numbers, others would not find in the model that it is made of."""
    if _has_adapters(lm.model):
        raise ErrataError(
            f"{lm.name} has a PEFT adapter of its own, and what is exported would be without it; fold it into the "
            "weights (merge_and_unload), and edit and export that"
        )
    if not isinstance(lm.model, PreTrainedModel):
        raise ErrataError(
            f"{lm.name} is wrapped in a {type(lm.model).__name__}, under which others don't know its parts; "
            "edit and export the model of transformers that is inside"
        )


def _has_adapters(model: Any) -> bool:
    """Whether PEFT has put something into a model: `get_peft_model`, or transformers' own `add_adapter`."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:  # nobody imported PEFT
        return False
    return hasattr(model, "peft_config") or any(isinstance(m, tuners.BaseTunerLayer) for m in model.modules())


def delta(changes: Sequence[Change]) -> Tensor:
    """What all changes of one weight add to it, (d_out, d_in) float64."""
    found = total(changes)
    assert found is not None  # `weight_changes` has seen to it
    return found


def moved(changes: Sequence[Change], site: Site) -> float:
    """The norm of a change over that of the weight; not a number where the weight is quantised."""
    found = share(delta(changes), site)
    return float("nan") if found is None else found
