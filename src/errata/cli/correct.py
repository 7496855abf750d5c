"""`errata edit`, `show` and `apply`: make a patch, read it, use it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.markup import escape

from ..edit import Edit
from ..errors import ErrataError, UsageError
from . import options, shell

if TYPE_CHECKING:
    from ..changes import Change
    from ..lm import LM
    from ..method import Method
    from ..patch import Patch

THROUGH = "what goes through the LM"
"""Where a change is that is of no module."""
PatchFile = Annotated[Path, typer.Argument(metavar="PATCH", help="A file that `errata edit --save` wrote.")]


def edit(
    prompt: Annotated[
        str | None, typer.Argument(help="What is asked, with {} for the subject or with the subject itself.")
    ] = None,
    subject: Annotated[str | None, typer.Option("--subject", "-s", help="What the fact is about.")] = None,
    to: Annotated[str | None, typer.Option("--to", "-t", help="What the model shall say.")] = None,
    edits: Annotated[
        Path | None, typer.Option("--edits", help="Several edits: JSON or JSON lines with prompt, subject, target.")
    ] = None,
    method: Annotated[str, typer.Option("--method", help="How to edit; `errata methods` lists them.")] = "rome",
    model: options.Model = "almanac",
    assignments: options.Settings = None,
    after: Annotated[Path | None, typer.Option("--after", help="A patch that this edit comes on top of.")] = None,
    save: Annotated[Path | None, typer.Option("--save", "-o", help="Where to keep the patch.")] = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Correct a fact, and keep the correction as a patch. The model itself is left as it was."""
    wanted = _wanted(prompt, subject, to, edits)
    from ..method import method as by_name
    from ..patch import Patch
    from . import settings
    from .proof import imprint

    kind = by_name(method)
    chosen = settings.read(kind, assignments or ())
    shell.check_writable(save)
    prior = Patch.load(after) if after else Patch()

    lm = shell.load(model, dtype, device)
    how = kind.preset(lm, **chosen)
    before_all = imprint(lm)
    before = asked(lm, wanted, prior)
    patch = corrected(how, lm, wanted, prior)
    after_all = asked(lm, wanted, patch)
    if imprint(lm) != before_all:
        raise ErrataError(f"{method} did not leave {lm.name} as it was; the patch is not kept, please report this")
    if save:
        patch.save(save)

    found = {
        "model": {"name": lm.name, "fingerprint": lm.fingerprint},
        "method": method,
        "settings": patch.about["steps"][-1]["settings"],
        "edits": [
            {**e.to_dict(), "before": b, "after": a, "took": a["says_target"]}
            for e, b, a in zip(wanted, before, after_all, strict=True)
        ],
        "came_back": {"parameters": sum(p.startswith("parameter ") for p in before_all), "to_the_bit": True},
        "patch": {"changes": changes(patch), "bytes": patch.bytes, "saved": shell.wrote(save) if save else None},
    }
    shell.give(found, lambda: _edited(found), as_json)


def show(path: PatchFile, as_json: options.Json = False) -> None:
    """Say what a patch corrects, in which model, by what method, and how large it is. No model is loaded."""
    from ..patch import Patch

    patch = Patch.load(path)
    listed = [change for there in patch.changes.values() for change in there]
    found = {
        "file": str(path),
        "bytes": path.stat().st_size,
        "model": patch.about.get("base"),
        "steps": patch.about.get("steps", []),
        "versions": patch.about.get("versions"),
        "edits": [e.to_dict() for e in patch.edits],
        "changes": changes(patch),
        "remembered": [text for change in listed for text in change.told],
        "carry": {name: list(t.shape) for name, t in patch.carry.items()},
    }
    shell.give(found, lambda: _shown(found), as_json)


def apply(
    path: PatchFile,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="What to ask; may be repeated. By default what the patch corrects."),
    ] = None,
    model: options.Model = "almanac",
    scale: Annotated[float, typer.Option("--scale", help="Strength of the patch: 0 is the base, 1 the patch.")] = 1.0,
    tokens: options.Tokens = 24,
    dtype: options.Dtype = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Ask the model with a patch applied, next to what it says without it."""
    from ..patch import Patch

    patch = Patch.load(path)
    prompts = prompt or [e.text for e in patch.edits]
    if not prompts:
        raise UsageError(f"{str(path)!r} has no edits of its own to ask about; give --prompt")
    scaled = patch if scale == 1 else patch.scaled(scale)
    lm = shell.load(model, dtype, device)
    with shell.working(f"asking {lm.name}"):
        before = _says(lm, prompts, tokens)
        with scaled.applied(lm):
            after = _says(lm, prompts, tokens)
    found = {
        "model": {"name": lm.name, "fingerprint": lm.fingerprint},
        "patch": str(path),
        "scale": scale,
        "answers": [{"prompt": p, "base": b, "patched": a} for p, b, a in zip(prompts, before, after, strict=True)],
    }
    shell.give(found, lambda: [_answers(found)], as_json)


# What is asked for


def _wanted(prompt: str | None, subject: str | None, to: str | None, edits: Path | None) -> list[Edit]:
    if edits is not None:
        if prompt or subject or to:
            raise UsageError("give either --edits FILE, or PROMPT with --subject and --to")
        return _listed(edits)
    for value, name in ((prompt, "PROMPT"), (subject, "--subject"), (to, "--to")):
        if value is None:
            raise UsageError(f"{name} is missing; an edit is PROMPT --subject SUBJECT --to TARGET, or --edits FILE")
    return [Edit(prompt or "", subject or "", to or "")]


def _listed(path: Path) -> list[Edit]:
    """The edits of a file: a list of objects with the fields of an Edit, or one such object a line."""
    if not path.is_file():
        raise UsageError(f"there is no file {str(path)!r}; give JSON or JSON lines with prompt, subject and target")
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = json.loads(text) if path.suffix == ".json" else [json.loads(x) for x in text.split("\n") if x.strip()]
    except ValueError as error:
        raise UsageError(f"{str(path)!r} is no JSON ({error}); a list is .json, one edit a line .jsonl") from error
    if not isinstance(rows, list) or not rows:
        raise UsageError(f"{str(path)!r} holds no list of edits; give objects with prompt, subject and target")
    return [_edit(row, f"{path.name}, edit {number}") for number, row in enumerate(rows, 1)]


def _edit(row: Any, place: str) -> Edit:
    fields = {"prompt", "subject", "target"}
    given = {k: v for k, v in row.items() if v is not None} if isinstance(row, dict) else {}
    if not fields <= set(given) <= fields | {"truth"} or not all(isinstance(v, str) for v in given.values()):
        raise UsageError(f"{place}: expected texts prompt, subject, target (and truth), found {json.dumps(row)[:80]}")
    try:
        return Edit(**given)
    except UsageError as error:
        raise UsageError(f"{place}: {error}") from None


# What is done


def asked(lm: LM, edits: Sequence[Edit], patch: Patch | None = None) -> list[dict[str, Any]]:
    """For every edit, what the model says to its prompt, whether that is the target, and the target's probability."""
    from ..bench.answer import ask
    from ..bench.metrics import says
    from ..data import Probe

    with shell.working(f"asking {lm.name}"), patch.applied(lm) if patch else nullcontext():
        answers = ask(lm, [Probe("efficacy", e.text, e.target) for e in edits])
    found = []
    for edit, answer in zip(edits, answers, strict=True):
        if answer.answer is None:
            raise UsageError((answer.unasked or {}).get("answer", "the target can't be asked for"))
        text = answer.text or ""
        p = math.exp(answer.answer.logprob * len(answer.answer.ids))
        found.append({"says": text, "says_target": bool(says(text, [edit.target])), "p_target": p})
    return found


def corrected(method: Method, lm: LM, edits: Sequence[Edit], prior: Patch) -> Patch:
    """All edits after `prior`: at once where the method can, otherwise one after another."""
    groups = [edits] if method.batched else [[e] for e in edits]
    patch = prior
    for number, group in enumerate(groups, 1):
        with shell.working(f"{method.name}: {group[0].subject}" + f" ({number} of {len(groups)})" * (len(groups) > 1)):
            patch = method.edit(lm, group, patch)
    return patch


def _says(lm: LM, prompts: Sequence[str], tokens: int) -> list[str]:
    from ..bench.answer import stopped

    return [stopped(text) for text in lm.generate(prompts, max_new_tokens=tokens)]


# What is shown


def changes(patch: Patch) -> list[dict[str, Any]]:
    """Every change of a patch: its module, kind, extent, size, and how far it moves a weight."""
    return [
        {
            "module": name or THROUGH,
            "kind": change.kind,
            "extent": _extent(change),
            "norm": _norm(change),
            "bytes": sum(t.numel() * t.element_size() for t in change.tensors().values()),
        }
        for name, listed in patch.changes.items()
        for change in listed
    ]


def _extent(change: Change) -> str:
    from ..changes import Blocks, Codebook, Dense, LowRank, Remembered, SideMemories

    if isinstance(change, LowRank):
        return f"{change.left.shape[0]} x {change.right.shape[1]}, rank {change.left.shape[1]}"
    if isinstance(change, Dense):
        return f"{change.delta.shape[0]} x {change.delta.shape[1]}"
    if isinstance(change, Remembered):
        return f"{len(change.texts)} remembered"
    if isinstance(change, SideMemories):
        n, sizes = len(change.deltas), change.memory.bincount(minlength=len(change.deltas)).tolist()
        limits = ", ".join(f"{size} from {limit:.3g} on" for size, limit in zip(sizes, change.thresholds, strict=True))
        shape = " x ".join(map(str, change.deltas.shape[1:]))
        return f"{n} {'memory' if n == 1 else 'memories'} of {shape}; edits: {limits}"
    if isinstance(change, Blocks):
        n, radii = len(change.live), change.radii[change.live]
        keys = f"{len(change.keys)} keys in {n} cluster{'s' * (n != 1)}, radius {radii.min():.3g} to {radii.max():.3g}"
        return f"{len(change.left)} of rank {change.right.shape[1]}; {keys}"
    if isinstance(change, Codebook):
        n, edits = len(change.live), len(change.keys)
        shared = f" for {edits} edits" * (edits > n)
        low, high = change.radii[change.live].min(), change.radii[change.live].max()
        return (
            f"{n} {'entry' if n == 1 else 'entries'} of {change.keys.shape[1]}{shared}, radius {low:.3g} to {high:.3g}"
        )
    return f"{len(change.tensors())} tensors"


def _norm(change: Change) -> float | None:
    """The Frobenius norm of what is added to a weight; None for what answers beside one."""
    from ..changes import Dense, LowRank

    if isinstance(change, LowRank):
        left, right = change.left.double(), change.right.double()
        return float(((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt())
    return float(change.delta.double().norm()) if isinstance(change, Dense) else None


def _edited(found: dict[str, Any]) -> list[RenderableType]:
    rows = found["edits"]
    table = shell.table("asked, and to be answered", "before", "p", "after", "p", right={"p"})
    for row in rows:
        text = row["prompt"].replace("{}", row["subject"])
        style = "green" if row["took"] else "red"
        table.add_row(
            f"{escape(text)} [bold]{escape(row['target'])}[/]",
            shell.styled(shell.short(row["before"]["says"]), "dim"),
            shell.probability(row["before"]["p_target"]),
            shell.styled(shell.short(row["after"]["says"]), style),
            shell.probability(row["after"]["p_target"]),
        )
    return [table, *_facts(found)]


def _facts(found: dict[str, Any]) -> list[str]:
    rows, patch = found["edits"], found["patch"]
    took = sum(row["took"] for row in rows)
    parts = [f"{c['module']}, {c['kind']}, {c['extent']}" for c in patch["changes"]]
    kept = f"saved as {patch['saved']}" if patch["saved"] else "not saved; --save FILE keeps it"
    outcome = "the edit took" if len(rows) == took == 1 else f"{took} of {len(rows)} edits took"
    lines = [
        shell.tick(took == len(rows), outcome),
        shell.tick(True, f"the model came back: {found['came_back']['parameters']} parameters equal to the bit"),
        f"  patch: {shell.size(patch['bytes'])}, {kept}",
    ]
    hint = f"  `errata methods {found['method']}` lists what to --set; another layer may hold the fact"
    outcome_lines = [lines[0], *([f"[dim]{hint}[/]"] if took < len(rows) else [])]
    return [*outcome_lines, lines[1], escape(lines[2]), *(f"    [dim]{escape(p)}[/]" for p in parts)]


def _shown(found: dict[str, Any]) -> list[RenderableType]:
    base, versions = found["model"] or {}, found["versions"] or {}
    about = shell.grid(
        ("patch", f"{found['file']}, {shell.size(found['bytes'])}"),
        ("for", f"{base.get('name', 'any model')} ({base.get('fingerprint', 'no fingerprint')})"),
        *(("by", _step(step)) for step in found["steps"]),
        ("made with", ", ".join(f"{k} {v}" for k, v in versions.items()) or "nothing known"),
    )
    edits = shell.table("what it corrects", "now says", "instead of")
    for row in found["edits"]:
        text = row["prompt"].replace("{}", row["subject"])
        edits.add_row(escape(text), f"[green]{escape(row['target'])}[/]", escape(row["truth"] or "–"))
    where = shell.table("where", "kind", "extent", "norm", "size", right={"norm", "size"})
    for c in found["changes"]:
        norm = "–" if c["norm"] is None else f"{c['norm']:.3g}"
        where.add_row(escape(c["module"]), c["kind"], c["extent"], norm, shell.size(c["bytes"]))
    carry = [f"  carries {escape(n)} {' x '.join(map(str, s))} for the next edit" for n, s in found["carry"].items()]
    texts = [f"  [dim]{escape(text)}[/]" for text in found["remembered"]]
    heard = ["a call of the model itself does not see the edits: only what goes through the LM (generate, bench)"]
    return [
        about,
        edits,
        where,
        *carry,
        *(heard if any(c["module"] == THROUGH for c in found["changes"]) else []),
        *texts,
    ]


def _step(step: dict[str, Any]) -> str:
    said = ", ".join(f"{name}={json.dumps(value)}" for name, value in step["settings"].items())
    return f"{step['method']}, {step['edits']} edit{'s' if step['edits'] != 1 else ''}: {said}"


def _answers(found: dict[str, Any]) -> RenderableType:
    table = shell.table("", found["model"]["name"], "with the patch" + f" x {found['scale']:g}" * (found["scale"] != 1))
    for row in found["answers"]:
        style = "green" if row["patched"] != row["base"] else ""
        table.add_row(escape(row["prompt"]), escape(row["base"]), shell.styled(row["patched"], style))
    return table
