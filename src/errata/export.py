"""A patch as what other programs read: a PEFT adapter, or a merged checkpoint, each with a card that lists the edits.

A low-rank change is a LoRA as it stands. A dense one is factored to a rank, and what that loses is said. A change that
decides by its input whether to answer is neither, and is refused. A folder is written whole or not at all.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save as to_bytes
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from . import store
from .ask import reply, took
from .changes import Change, Dense, LowRank
from .errors import ErrataError, UsageError
from .lm import LM, Site
from .patch import Patch

if TYPE_CHECKING:
    from .bench import Report

log = logging.getLogger(__name__)

SERVED = (16, 64)
"""Ranks up to which servers take an adapter: unless told otherwise (vLLM's `--max-lora-rank`), and commonly at most."""
LISTED = 200
"""Edits that a card lists at most."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    form: str
    """`peft` or `checkpoint`."""
    sites: tuple[dict[str, Any], ...]
    """For each weight: its `module`, `rank`, `error` (the share of the change, by Frobenius norm, that the rank leaves
    out) and `moved` (the norm of the change over that of the weight)."""
    asked: tuple[dict[str, Any], ...]
    """For each edit: what the model says `before` and `after`, and the target's probability at both times."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"folder": str(self.folder)}


def to_peft(
    patch: Patch, lm: LM, folder: str | Path, rank: int | None = None, report: Report | None = None
) -> Exported:
    """Write a patch as a PEFT LoRA: `PeftModel.from_pretrained(model, folder)` answers as the patched model does.

    Scale is 1 in every module, whatever its rank, so a server that knows no `alpha_pattern` reads it rightly too.

    Args:
        patch: of weight changes.
        lm: the model it was made for.
        folder: a new or an empty one.
        rank: the most a module gets. Needed for dense changes; by default low-rank ones are kept exactly.
        report: of a benchmark, whose numbers go into the card.

    Raises:
        UsageError: the folder is not empty, or a dense change is given no rank.
        ErrataError: the patch is for another model, or has a change that is no sum with a weight.
    """
    changes = _weights(patch, lm)
    factored = {name: _factored(name, cs, rank) for name, cs in changes.items()}
    _tell_rank(factored)
    sites = [lm.site(name) for name in changes]
    tensors, ranks = {}, {}
    for name, (left, right, _) in factored.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = right.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = left.contiguous()
        ranks[re.escape(name)] = left.shape[1]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(lm.config, "_name_or_path", "") or lm.name,
        "target_modules": list(changes),
        "r": max(ranks.values()),
        "lora_alpha": max(ranks.values()),
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(isinstance(site.module, Conv1D) for site in sites),
        "inference_mode": True,
    }
    moved = [
        {"module": s.name, "rank": f[0].shape[1], "error": f[2], "moved": _moved(changes[s.name], s)}
        for s, f in zip(sites, factored.values(), strict=True)
    ]
    asked = _asked(lm, Patch({n: (_low_rank(f),) for n, f in factored.items()}, patch.edits, about=patch.about))
    out = Exported(Path(folder), "peft", tuple(moved), asked)
    with _whole(folder) as place:
        store.write(place / "adapter_model.safetensors", to_bytes(tensors, metadata={"format": "pt"}))
        store.write(place / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        store.write(place / "README.md", card(patch, lm, out, report))
    return out


def merge(patch: Patch, lm: LM, folder: str | Path, shard: str | int = "5GB", report: Report | None = None) -> Exported:
    """Write the patched model with its tokenizer, as `save_pretrained` does: in the model's dtype, in shards.

    Args:
        patch: of weight changes.
        lm: the model it was made for.
        folder: a new or an empty one.
        shard: how large a file gets at most.
        report: of a benchmark, whose numbers go into the card.

    Raises:
        UsageError: the folder is not empty.
        ErrataError: the patch is for another model, has a change that is no sum with a weight, or the model's weights
            are quantised.
    """
    changes = _weights(patch, lm)
    sites = [lm.site(name) for name in changes]
    for site in sites:
        if not site.writable:
            raise ErrataError(
                f"{site.name} is quantised and can't take a change in itself; load {lm.name} unquantised, or export to "
                "peft"
            )
    moved = [{"module": s.name, "rank": None, "error": 0.0, "moved": _moved(changes[s.name], s)} for s in sites]
    shared = [name for site in sites for name in _sharing(lm, site)]
    out = Exported(Path(folder), "checkpoint", tuple(moved), _asked(lm, patch))
    with _whole(folder) as place:
        if shared:
            _save_apart(patch, lm, sites, shared, place, shard)
        else:
            with patch.applied(lm):
                lm.model.save_pretrained(place, max_shard_size=shard)
        lm.tokenizer.save_pretrained(place)
        store.write(place / "README.md", card(patch, lm, out, report))
    return out


# Weights


def _weights(patch: Patch, lm: LM) -> Mapping[str, Sequence[Change]]:
    """The changes, if all of them can be added to a weight of this model as it is."""
    if lm.patched:
        raise UsageError("the model has a patch applied; leave it first, it would be exported twice")
    if not patch:
        raise UsageError("the patch changes nothing, so there is nothing to export")
    for name, changes in patch._fitting(lm, check=True):
        for change in changes:
            if not isinstance(change, LowRank | Dense):
                raise ErrataError(
                    f"the patch has a {change.kind} change at {name}, which looks at each input before it answers; no "
                    "weight or LoRA does that, so it can't be exported: apply the patch with errata, or edit with a "
                    "method that changes weights (rome, memit, ft-l ...)"
                )
    return patch.changes


def _delta(changes: Sequence[Change]) -> Tensor:
    """What all changes of one weight add to it, (d_out, d_in)."""
    return torch.stack([c.delta.double() for c in changes if isinstance(c, LowRank | Dense)]).sum(0)


def _moved(changes: Sequence[Change], site: Site) -> float:
    weight = site.weight.detach().cpu().double() if site.writable else None
    return float(_delta(changes).norm() / weight.norm()) if weight is not None else float("nan")


def _low_rank(factored: tuple[Tensor, Tensor, float]) -> LowRank:
    left, right, _ = factored
    return LowRank(torch.zeros(left.shape[1], dtype=torch.long), left, right)


def _factored(name: str, changes: Sequence[Change], rank: int | None) -> tuple[Tensor, Tensor, float]:
    """The changes of a weight as (d_out, rank), (rank, d_in), and the share of their norm that is left out."""
    if rank is not None and rank < 1:
        raise UsageError(f"a rank of {rank} is none; give 1 or more")
    (first, *more) = changes
    if not more and isinstance(first, LowRank):
        rank = min(rank or first.left.shape[1], *_delta_shape(first))
        if first.left.shape[1] <= rank:
            return first.left, first.right, 0.0
    if rank is None and not all(isinstance(c, LowRank) for c in changes):
        raise UsageError(
            f"{name} has a dense change, which is no LoRA of its own; give a rank (--rank), it will be the nearest of "
            f"that rank: {_losses(_delta(changes))}"
        )
    delta = _delta(changes)
    U, S, V = torch.linalg.svd(delta, full_matrices=False)
    most = rank or max(1, int(S.gt(S[0] * 1e-9).sum()))
    root, error = S[:most].sqrt(), float(S[most:].norm() / S.norm()) if rank else 0.0
    return (U[:, :most] * root).float(), (root[:, None] * V[:most]).float(), error


def _delta_shape(change: LowRank) -> tuple[int, int]:
    return change.left.shape[0], change.right.shape[1]


def _losses(delta: Tensor) -> str:
    """What is left out at the ranks that servers take, in words."""
    S = torch.linalg.svdvals(delta)
    return ", ".join(f"rank {r} leaves out {float(S[r:].norm() / S.norm()):.1%}" for r in SERVED if r < len(S)) or (
        f"rank {len(S)} leaves out nothing"
    )


def _tell_rank(factored: Mapping[str, tuple[Tensor, Tensor, float]]) -> None:
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
    from transformers import AutoModelForCausalLM

    state = dict(lm.model.state_dict())
    for site in sites:
        added = site.weight.float() + _delta(patch.changes[site.name]).to(site.weight.device, torch.float32)
        key = f"{site.name}.weight"
        state[key] = (added.T if isinstance(site.module, Conv1D) else added).to(site.weight.dtype)
    config = type(lm.model.config).from_dict(lm.model.config.to_dict())
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    with torch.device("meta"):
        apart = AutoModelForCausalLM.from_config(config, dtype=lm.dtype)
    apart.load_state_dict(state, assign=True)
    apart.generation_config = lm.model.generation_config
    apart.save_pretrained(place, max_shard_size=shard)


# Folders


@contextmanager
def _whole(folder: str | Path) -> Iterator[Path]:
    """A temporary folder beside, that gets this name when the block is done; nothing stays of it otherwise."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{str(folder)!r} exists and is not an empty folder; give a new name")
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(dir=folder.absolute().parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise UsageError(f"{str(folder)!r} can't be written: {error.strerror or error}; give another place") from error
    try:
        yield place
        place.chmod(0o777 & ~store._umask())
        for file in place.iterdir():
            file.chmod(0o666 & ~store._umask())
        os.replace(place, folder)
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        why = error.strerror if isinstance(error, OSError) else error
        raise ErrataError(f"{str(folder)!r} can't be written: {why or error}; nothing was left") from error
    finally:
        shutil.rmtree(place, ignore_errors=True)


# The card


def _asked(lm: LM, patch: Patch) -> tuple[dict[str, Any], ...]:
    """Every edit asked by itself of the model without and with the patch."""
    before, after = reply(lm, patch.edits), reply(lm, patch.edits, patch)
    return tuple(
        {
            "edit": e.to_dict(),
            "before": b.says,
            "after": a.says,
            "p_before": b.p_target,
            "p_after": a.p_target,
            "took": took(b, a),
        }
        for e, b, a in zip(patch.edits, before, after, strict=True)
    )


def card(patch: Patch, lm: LM, out: Exported, report: Report | None = None) -> str:
    """The model card: what was corrected, by what, how it was judged, and what moved."""
    base = patch.about.get("base", {"name": lm.name, "fingerprint": lm.fingerprint})
    good = sum(row["took"] for row in out.asked)
    head = {
        "base_model": json.dumps(base["name"]),
        "library_name": "peft" if out.form == "peft" else "transformers",
        "tags": "[knowledge-editing, errata]",
    }
    edits = _table(
        ("asked", "before", "after", "p(target) before", "after"),
        [
            (_written(r["edit"]), r["before"] or "–", r["after"] or "–", _digits(r["p_before"]), _digits(r["p_after"]))
            for r in out.asked[:LISTED]
        ],
    )
    more = f"\nand {len(out.asked) - LISTED} more.\n" if len(out.asked) > LISTED else ""
    moved = _table(
        ("weight", "rank", "norm of the change / of the weight", "left out by the rank"),
        [(f"`{s['module']}`", s["rank"] or "–", f"{s['moved']:.2%}", f"{s['error']:.2%}") for s in out.sites],
    )
    steps = "".join(
        f"- {s['edits']} by `{s['method']}`: `{json.dumps(s['settings'], sort_keys=True)}`\n"
        for s in patch.about.get("steps", [])
    )
    versions = ", ".join(f"{k} {v}" for k, v in patch.about.get("versions", {}).items())
    return "\n".join(
        [
            "---",
            *(f"{k}: {v}" for k, v in head.items()),
            "---",
            "",
            f"# {lm.name}, corrected",
            "",
            f"{_count(len(patch.edits))} to {base['name']} (fingerprint `{base['fingerprint']}`), made with errata "
            f"as a reversible patch and exported as {_FORMS[out.form]}.",
            "",
            "## What was corrected, and how it was judged",
            "",
            f"Each prompt was put to the model as exported, before and after: it answered by itself (greedily, to a "
            f"natural stop) with the target in {good} of {len(out.asked)}. These are the edits' own prompts"
            + (", not rephrased ones and not questions that should be left alone." if report is None else "."),
            "",
            edits + more,
            *_judged(report),
            "## What moved",
            "",
            moved,
            "## By what",
            "",
            steps + f"\n{versions}\n",
        ]
    )


_FORMS = {"peft": "a LoRA adapter for PEFT", "checkpoint": "a merged checkpoint"}


def _judged(report: Report | None) -> list[str]:
    """The numbers of a report, each with its protocol."""
    if report is None:
        return []
    rows = [
        (metric, protocol, f"{v['mean']:.3f}", _spread(v), v["n"])
        for metric, protocols in report.summary.items()
        for protocol, v in protocols.items()
        if v["mean"] is not None
    ]
    a = report.about
    title = f"Benchmark: {a['method']}, {a['regime']}, evaluated {a['evaluated']}, {a['n']} cases, seed {a['seed']}."
    return [title, "", _table(("metric", "protocol", "mean", "95% interval", "cases"), rows)]


def _spread(found: Mapping[str, Any]) -> str:
    return "too few cases" if found["low"] is None else f"{found['low']:.3f} to {found['high']:.3f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown."""
    cells = [[" ".join(str(c).split()).replace("|", "\\|") for c in row] for row in (head, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]]) + "\n"


def _count(edits: int) -> str:
    return "One correction" if edits == 1 else f"{edits} corrections"


def _written(edit: Mapping[str, str]) -> str:
    return edit["prompt"].replace("{}", f"*{edit['subject']}*") + f" **{edit['target']}**"


def _digits(p: float | None) -> str:
    return "–" if p is None else f"{p:.3f}"
