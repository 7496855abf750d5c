"""A patch as a LoRA adapter for PEFT, and for the servers that read its files."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor
from torch.nn.functional import pad
from transformers.pytorch_utils import Conv1D

from .. import store
from ..changes import Change, LowRank
from ..errors import UsageError
from ..lm import LM
from ..patch import Patch
from .card import asked_of, card, refuse_other_report, shown_name
from .check import peft_reads
from .weights import delta, moved, weight_changes
from .written import Exported, ReadBack

if TYPE_CHECKING:
    from ..bench import Report, Results

log = logging.getLogger(__name__)

SERVED = (16, 64)
"""Ranks up to which servers take an adapter: unless told otherwise (vLLM's `--max-lora-rank`), and commonly at most."""


def to_peft(
    patch: Patch,
    lm: LM,
    folder: str | Path,
    rank: int | None = None,
    report: Report | Results | None = None,
    base: str | None = None,
    check: bool = True,
) -> Exported:
    """Write a patch as a PEFT LoRA: `PeftModel.from_pretrained(model, folder)` answers as the patched model does.

    All modules have one rank, and scale is 1, so a server that knows no patterns reads it rightly too.

    Args:
        patch: of weight changes.
        lm: the model it was made for.
        folder: a new or an empty one.
        rank: the most a module gets. Needed for dense changes; by default low-rank ones are kept exactly.
        report: of a benchmark, whose numbers go into the card.
        base: what others call the model, a name on the hub; by default the model's own, unless that is a local folder.
        check: read it back by PEFT, where that is installed.

    Raises:
        UsageError: the folder is not empty, a dense change is given no rank, or the report is of another model.
        ErrataError: the patch is for another model, or has a change that is no sum with a weight; the model has an
            adapter of its own; or PEFT reads something else than the patch.
    """
    changes = weight_changes(patch, lm)
    refuse_other_report(report, patch, lm)
    factored = {name: _factored(name, cs, rank) for name, cs in changes.items()}
    _tell_rank(factored)
    sites = [lm.site(name) for name in changes]
    tensors, most = _tensors(factored)
    base = shown_name(lm, base)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "target_modules": list(changes),
        "r": most,
        "lora_alpha": most,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(isinstance(site.module, Conv1D) for site in sites),
        "inference_mode": True,
    }
    told = tuple(
        {"module": s.name, "rank": left.shape[1], "error": error, "moved": moved(changes[s.name], s)}
        for s, (left, _, error) in zip(sites, factored.values(), strict=True)
    )
    whole = Patch({n: (_low_rank(f),) for n, f in factored.items()}, patch.edits, about=patch.about)
    asked = asked_of(lm, whole)
    with store.whole_folder(folder) as place:
        store.write(place / "adapter_model.safetensors", to_bytes(tensors, metadata={"format": "pt"}))
        store.write(place / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        read = peft_reads(lm, whole, place) if check else ReadBack(None, "the check was left out")
        out = Exported(Path(folder), "peft", base, told, asked, read)
        store.write(place / "README.md", card(patch, lm, out, report))
    return out


Factors = tuple[Tensor, Tensor, float]
"""(d_out, rank), (rank, d_in), and the share of the change's norm that they leave out."""


def _factored(name: str, changes: Sequence[Change], rank: int | None) -> Factors:
    """The changes of a weight as two factors."""
    if rank is not None and rank < 1:
        raise UsageError(f"a rank of {rank} is none; give 1 or more")
    (first, *more) = changes
    if not more and isinstance(first, LowRank):
        rank = min(rank or first.left.shape[1], first.left.shape[0], first.right.shape[1])
        if first.left.shape[1] <= rank:
            return first.left, first.right, 0.0
    if rank is None and not all(isinstance(c, LowRank) for c in changes):
        raise UsageError(
            f"{name} has a dense change, which is no LoRA of its own; give a rank (--rank), it will be the nearest of "
            f"that rank: {_losses(delta(changes))}"
        )
    U, S, V = torch.linalg.svd(delta(changes), full_matrices=False)
    most = rank or max(1, int(S.gt(S[0] * 1e-9).sum()))
    root, error = S[:most].sqrt(), float(S[most:].norm() / S.norm()) if rank else 0.0
    return (U[:, :most] * root).float(), (root[:, None] * V[:most]).float(), error


def _tensors(factored: Mapping[str, Factors]) -> tuple[dict[str, Tensor], int]:
    """The tensors of an adapter by PEFT's names, all filled up with zeros to the one rank that comes with them."""
    most = max(left.shape[1] for left, _, _ in factored.values())
    tensors = {}
    for name, (left, right, _) in factored.items():
        more = most - left.shape[1]
        tensors[f"base_model.model.{name}.lora_A.weight"] = pad(right, (0, 0, 0, more)).contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = pad(left, (0, more)).contiguous()
    return tensors, most


def _low_rank(factors: Factors) -> LowRank:
    left, right, _ = factors
    return LowRank(torch.zeros(left.shape[1], dtype=torch.long), left, right)


def _losses(change: Tensor) -> str:
    """What is left out at the ranks that servers take, in words."""
    S = torch.linalg.svdvals(change)
    return ", ".join(f"rank {r} leaves out {float(S[r:].norm() / S.norm()):.1%}" for r in SERVED if r < len(S)) or (
        f"rank {len(S)} leaves out nothing"
    )


def _tell_rank(factored: Mapping[str, Factors]) -> None:
    usual, most = SERVED
    for name, (left, right, error) in factored.items():
        if error > 0:
            log.warning("%s: rank %d leaves out %.2f%% of the change", name, left.shape[1], 100 * error)
        if left.shape[1] > usual:
            log.warning(
                "%s needs rank %d; servers take %d unless told (vLLM: --max-lora-rank) and often at most %d. "
                "Truncated (--rank): %s",
                name,
                left.shape[1],
                usual,
                most,
                _losses(left.double() @ right.double()),
            )
