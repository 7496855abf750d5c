"""A patched model as a checkpoint of its own, which anything that loads its like can load."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.pytorch_utils import Conv1D

from .. import store
from ..errors import ErrataError, UsageError
from ..lm import LM, Site
from ..patch import Patch
from .card import asked_of, card, refuse_other_report, shown_name
from .check import transformers_reads
from .weights import delta, moved, weight_changes
from .written import Exported, ReadBack

if TYPE_CHECKING:
    from ..bench import Report, Results


def merge(
    patch: Patch,
    lm: LM,
    folder: str | Path,
    shard: str | int = "5GB",
    report: Report | Results | None = None,
    base: str | None = None,
    check: bool = True,
) -> Exported:
    """Write the patched model with its tokenizer, as `save_pretrained` does: in the model's dtype, in shards.

    Args:
        patch: of weight changes.
        lm: the model it was made for.
        folder: a new or an empty one.
        shard: how large a file gets at most.
        report: of a benchmark, whose numbers go into the card.
        base: what others call the model, a name on the hub; by default the model's own, unless that is a local folder.
        check: load it back by transformers, which takes the memory of a second model while it lasts.

    Raises:
        UsageError: the folder is not empty, `shard` is no size, or the report is of another model.
        ErrataError: the patch is for another model, or has a change that is no sum with a weight; the model's weights
            are quantised, or it has an adapter of its own; or what is loaded back is not the patched model.
    """
    changes = weight_changes(patch, lm)
    refuse_other_report(report, patch, lm)
    _refuse_no_size(shard)
    sites = [lm.site(name) for name in changes]
    for site in sites:
        if not site.writable:
            raise ErrataError(
                f"{site.name} is quantised and can't take a change in itself; load {lm.name} unquantised, or export to "
                "peft"
            )
    told = tuple({"module": s.name, "rank": None, "error": 0.0, "moved": moved(changes[s.name], s)} for s in sites)
    shared = [name for site in sites for name in _sharing(lm, site)]
    asked = asked_of(lm, patch)
    with store.whole_folder(folder) as place:
        if shared:
            _save_apart(patch, lm, sites, shared, place, shard)
        else:
            with patch.applied(lm):
                lm.model.save_pretrained(place, max_shard_size=shard)
        lm.tokenizer.save_pretrained(place)
        read = transformers_reads(lm, patch, place) if check else ReadBack(None, "the check was left out")
        out = Exported(Path(folder), "checkpoint", shown_name(lm, base), told, asked, read)
        store.write(place / "README.md", card(patch, lm, out, report))
    return out


def _refuse_no_size(shard: str | int) -> None:
    if isinstance(shard, str) and not re.fullmatch(r"\d*[1-9]\d*[KMGT]B", shard, re.IGNORECASE):
        raise UsageError(f"{shard!r} is no size of a file; give one such as 5GB or 500MB")


def _sharing(lm: LM, site: Site) -> list[str]:
    """Names of the other parameters that are the same tensor as a site's weight."""
    weight = site.module.get_parameter("weight")
    named = lm.model.named_parameters(remove_duplicate=False)
    return [n for n, p in named if p is weight and n != f"{site.name}.weight"]


def _save_apart(patch: Patch, lm: LM, sites: Sequence[Site], shared: list[str], place: Path, shard: str | int) -> None:
    """Save the model with an edited weight apart from the one it was tied to, which stays as it is."""
    names = ", ".join(s.name for s in sites if _sharing(lm, s))
    warnings.warn(
        f"{names} is one tensor with {', '.join(shared)}; only the former is corrected, and the checkpoint has them "
        "apart (tie_word_embeddings is off in its config)",
        stacklevel=3,
    )
    state: dict[str, Any] = dict(lm.model.state_dict())
    for site in sites:
        added = site.weight.float() + delta(patch.changes[site.name]).to(site.weight.device, torch.float32)
        key = f"{site.name}.weight"
        state[key] = (added.T if isinstance(site.module, Conv1D) else added).to(site.weight.dtype)
    config = type(lm.model.config).from_dict(lm.model.config.to_dict())
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    with torch.device("meta"):
        apart = type(lm.model)(config).to(lm.dtype)
    apart.load_state_dict(state, assign=True)
    apart.generation_config = lm.model.generation_config
    apart.save_pretrained(place, max_shard_size=shard)
