"""`errata edit`, `show` and `apply`: make a patch, read it, use it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType

from ..edit import Edit, agree, question
from ..errors import ErrataError, UsageError
from ..escape import markup
from . import options, shell
from .patches import Model, Place, carried, model_of

if TYPE_CHECKING:
    from ..ask import Reply
    from ..changes import Change
    from ..check import Check
    from ..data import Correction
    from ..lm import LM
    from ..method import Method
    from ..patch import Patch

TOKENS, CHAT_TOKENS = 24, 100
"""Tokens of an answer that `apply` shows."""
SHOWN = 3
"""Questions that an edit moved and that are shown."""
THROUGH = "what goes through the LM"
"""Where a change is that is of no module."""


def edit(
    prompt: Annotated[
        str | None, typer.Argument(help="What is asked, with {} for the subject or with the subject itself.")
    ] = None,
    subject: Annotated[str | None, typer.Option("--subject", "-s", help="What the fact is about.")] = None,
    to: Annotated[str | None, typer.Option("--to", "-t", help="What the model shall say.")] = None,
    edits: Annotated[
        Path | None,
        typer.Option(
            "--edits",
            help="A list: CSV, TSV, JSON, JSON lines, YAML or .xlsx, with prompt (question), subject, target (answer) "
            "in each row. Further columns are kept in the patch.",
        ),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option("--map", metavar="THEIRS=OURS,...", help="What the list calls its columns, as in Frage=prompt."),
    ] = None,
    method: Annotated[str, typer.Option("--method", help="How to edit; `errata methods` lists them.")] = "rome",
    model: options.Model = "almanac",
    assignments: options.Settings = None,
    after: Annotated[Path | None, typer.Option("--after", help="A patch that this edit comes on top of.")] = None,
    save: Annotated[Path | None, typer.Option("--save", "-o", help="Where to keep the patch.")] = None,
    force: options.Force = False,
    chat: options.Chat = False,
    anyway: Annotated[
        bool,
        typer.Option(
            "--anyway", help="Also keep what did not take, edit what the model says already, and take contradictions."
        ),
    ] = False,
    no_check: Annotated[bool, typer.Option("--no-check", help="Don't ask what else moved; faster.")] = False,
    dtype: options.Dtype = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Correct a fact, and keep the correction as a patch. The model itself is left as it was."""
    listed = _wanted(prompt, subject, to, edits, columns)
    wanted = [replace(one.edit, chat=one.edit.chat or chat) for one in listed]
    if not anyway:
        agree(wanted, [one.row for one in listed])
    from ..method import method as by_name
    from ..patch import Patch
    from . import settings
    from .proof import imprint

    kind = by_name(method)
    chosen = settings.read(kind, assignments or ())
    shell.check_patch_file(save, force)
    prior = carried(after) if after else Patch()

    lm = shell.load(model, dtype, device)
    how = kind.preset(lm, **chosen)
    before_all = imprint(lm)
    done = _done(how, lm, wanted, prior, anyway, check=not no_check)
    if imprint(lm) != before_all:
        raise ErrataError(f"{method} did not leave {lm.name} as it was; the patch is not kept, please report this")
    keeps = save is not None and any(done.new) and (anyway or not done.failed)
    notes = [one.notes for one, new in zip(listed, done.new, strict=True) if new]
    patch = done.patch.noted(notes) if notes else done.patch
    if save and keeps:
        patch.save(save)

    found = {
        "model": {"name": lm.name, "fingerprint": lm.fingerprint},
        "list": None if edits is None else _read_as(edits, listed),
        "method": method,
        "settings": done.patch.about["steps"][-1]["settings"] if any(done.new) else None,
        "edits": done.rows(),
        "failed": done.failed,
        "check": done.check.to_dict() | {"asked": list(done.check.asked)} if done.check else None,
        "came_back": {"parameters": sum(p.startswith("parameter ") for p in before_all), "to_the_bit": True},
        "patch": {
            "changes": changes(done.patch),
            "bytes": done.patch.bytes,
            "saved": shell.wrote(save) if save and keeps else None,
        },
    }
    shell.give(found, lambda: _edited(found, done.check, save), as_json)
    if done.failed and not anyway:
        raise ErrataError(_not_taken(done.failed, sum(done.new)))


def show(path: Place, as_json: options.Json = False) -> None:
    """Say what a patch corrects, in which model, by what method, and how large it is. No model is loaded."""
    patch = carried(path)
    listed = [change for there in patch.changes.values() for change in there]
    found = {
        "file": str(path),
        "bytes": patch.bytes if path.is_dir() else path.stat().st_size,
        "model": patch.about.get("base"),
        "steps": patch.about.get("steps", []),
        "check": patch.about.get("check"),
        "versions": patch.about.get("versions"),
        "edits": [e.to_dict() for e in patch.edits],
        "notes": [dict(notes) for notes in patch.notes],
        "changes": changes(patch),
        "remembered": [text for change in listed for text in change.told],
        "carry": {name: list(t.shape) for name, t in patch.carry.items()},
    }
    shell.give(found, lambda: _shown(found), as_json)


def apply(
    path: Place,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="What to ask; may be repeated. By default what the patch corrects."),
    ] = None,
    model: Model = None,
    scale: Annotated[float, typer.Option("--scale", help="Strength of the patch: 0 is the base, 1 the patch.")] = 1.0,
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=1, help="How many tokens of an answer to show; 24, in a chat 100.")
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Ask by the model's chat template: the prompts are the user's turns of one conversation. Without any, "
            "a terminal asks for them.",
        ),
    ] = False,
    dtype: options.Dtype = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Ask the model with a patch applied, next to what it says without it."""
    if not math.isfinite(scale):
        raise UsageError(f"--scale is {scale}; give a number, such as 0.5")
    if prompt and not all(p.strip() for p in prompt):
        raise UsageError("--prompt is empty; give what to ask")
    patch = carried(path)
    talk = chat and not prompt and not as_json and shell.interactive()
    questions = [(p, chat) for p in prompt] if prompt else [(e.text, chat or e.chat) for e in patch.edits]
    if not questions and not talk:
        raise UsageError(f"{str(path)!r} has no edits of its own to ask about; give --prompt")
    scaled = patch if scale == 1 else patch.scaled(scale)
    lm = shell.load(model_of(patch, model), dtype, device)
    length = tokens or (CHAT_TOKENS if chat else TOKENS)
    if talk:
        _talk(lm, scaled, length)
        return
    with shell.working(f"asking {lm.name}"):
        if chat and prompt:
            before, after = _conversations(lm, scaled, prompt, length)
        else:
            before = _says(lm, questions, length)
            with scaled.applied(lm):
                after = _says(lm, questions, length)
    found = {
        "model": {"name": lm.name, "fingerprint": lm.fingerprint},
        "patch": str(path),
        "scale": scale,
        "chat": chat,
        "answers": [
            {"prompt": p, "base": b, "patched": a} for (p, _), b, a in zip(questions, before, after, strict=True)
        ],
    }
    shell.give(found, lambda: [_answers(found)], as_json)


# What is asked for


def _wanted(
    prompt: str | None, subject: str | None, to: str | None, edits: Path | None, columns: str | None
) -> list[Correction]:
    from ..data import Correction, corrections

    if edits is not None:
        if prompt or subject or to:
            raise UsageError("give either --edits FILE, or PROMPT with --subject and --to")
        return corrections(edits, _columns(columns))
    if columns:
        raise UsageError("--map names the columns of --edits FILE; give both, or neither")
    for value, name in ((prompt, "PROMPT"), (subject, "--subject"), (to, "--to")):
        if value is None:
            raise UsageError(f"{name} is missing; an edit is PROMPT --subject SUBJECT --to TARGET, or --edits FILE")
    return [Correction(Edit(prompt or "", subject or "", to or ""), 1)]


def _read_as(path: Path, listed: Sequence[Correction]) -> str:
    """How a list was read, in words."""
    formats = " and ".join(dict.fromkeys(one.format for one in listed))
    kept = ", ".join(dict.fromkeys(name for one in listed for name in one.notes))
    return f"{path.name}: {len(listed)} edits, read as {formats}" + (f"; kept with them: {kept}" if kept else "")


def _columns(named: str | None) -> dict[str, str]:
    """`"Frage=prompt,Antwort=target"` as `{"Frage": "prompt", "Antwort": "target"}`."""
    found = {}
    for part in (named or "").split(","):
        theirs, equals, ours = (word.strip() for word in part.partition("="))
        if part.strip() and not (theirs and equals and ours):
            raise UsageError(f"--map {part.strip()!r} names nothing; write THEIRS=OURS, as in Frage=prompt")
        found |= {theirs: ours} if theirs else {}
    return found


# What is done


@dataclass(frozen=True)
class _Done:
    """Edits that were made, and what the model says to them before and after."""

    edits: Sequence[Edit]
    new: Sequence[bool]
    """Whether each was made; otherwise the model said it already."""
    before: Sequence[Reply]
    after: Sequence[Reply]
    patch: Patch
    check: Check | None

    @property
    def failed(self) -> list[int]:
        """Numbers of those that were made and did not take, from 1 on."""
        return [n for n, (new, took) in enumerate(zip(self.new, self.took, strict=True), 1) if new and not took]

    @property
    def took(self) -> list[bool]:
        """Whether the model says each as it should."""
        from ..ask import took

        return [took(*pair) for pair in zip(self.before, self.after, strict=True)]

    def rows(self) -> list[dict[str, Any]]:
        """Every edit with what the model says, as plain values."""
        return [
            {
                **edit.to_dict(),
                "before": before.to_dict(),
                "after": after.to_dict(),
                "took": took,
                "said_already": not new,
            }
            for edit, new, before, after, took in zip(
                self.edits, self.new, self.before, self.after, self.took, strict=True
            )
        ]


def _done(how: Method, lm: LM, edits: Sequence[Edit], prior: Patch, anyway: bool, check: bool) -> _Done:
    """Make the edits that the model does not say already (`anyway`: all), and look at them."""
    before = asked(lm, edits, prior)
    new = [anyway or not reply.gives for reply in before]
    made = [e for e, is_new in zip(edits, new, strict=True) if is_new]
    if not made:
        return _Done(edits, new, before, before, prior, None)
    patch = corrected(how, lm, made, prior, anyway)
    after = asked(lm, edits, patch)
    if not check:
        return _Done(edits, new, before, after, patch, None)
    from ..check import checked, selfcheck

    with shell.working(f"looking at what else moved in {lm.name}"):
        replies = [(b, a) for b, a, is_new in zip(before, after, new, strict=True) if is_new]
        found = selfcheck(lm, patch, prior, replies)
    return _Done(edits, new, before, after, checked(patch, found), found)


def asked(lm: LM, edits: Sequence[Edit], patch: Patch | None = None) -> list[Reply]:
    """What the model says to the prompt of every edit.

    Raises:
        UsageError: a target can't be asked for.
    """
    from ..ask import reply

    with shell.working(f"asking {lm.name}"):
        found = reply(lm, edits, patch)
    for number, one in enumerate(found, 1):
        if one.unasked is not None:
            raise UsageError(f"edit {number}: {one.unasked}" if len(edits) > 1 else one.unasked)
    return found


def corrected(method: Method, lm: LM, edits: Sequence[Edit], prior: Patch, anyway: bool = False) -> Patch:
    """All edits after `prior`: at once where the method can, otherwise one after another."""
    groups = [edits] if method.batched else [[e] for e in edits]
    patch = prior
    for number, group in enumerate(groups, 1):
        if group:
            of = f" ({number} of {len(groups)})" * (len(groups) > 1)
            with shell.working(f"{method.name}: {group[0].subject}{of}"):
                patch = method.edit(lm, group, patch, anyway=anyway)
    return patch


def _says(lm: LM, questions: Sequence[tuple[str, bool]], tokens: int) -> list[str]:
    """What the model says to prompts: up to the end of a line or sentence; to those of a chat all of its reply."""
    from ..ask import stopped

    out = [""] * len(questions)
    for chat in (False, True):
        rows = [i for i, (_, inside) in enumerate(questions) if inside == chat]
        texts = lm.generate([questions[i][0] for i in rows], max_new_tokens=tokens, chat=chat)
        for i, text in zip(rows, texts, strict=True):
            out[i] = text.strip() if chat else stopped(text)
    return out


def _conversations(lm: LM, patch: Patch, turns: Sequence[str], tokens: int) -> tuple[list[str], list[str]]:
    """The replies to the turns of a conversation, without the patch and with it; each goes on from its own."""
    from ..patch import Patch

    base, patched = Talk(lm, Patch(), tokens), Talk(lm, patch, tokens)
    return [base.reply(turn) for turn in turns], [patched.reply(turn) for turn in turns]


def _talk(lm: LM, patch: Patch, tokens: int) -> None:
    """A conversation on the terminal, with and without the patch, until there is no more to say."""
    from ..patch import Patch

    base, patched = Talk(lm, Patch(), tokens), Talk(lm, patch, tokens)
    shell.out.print("[dim]Ctrl-D ends the conversation.[/]")
    while (turn := shell.asked("you")) is not None:
        if turn.strip():
            table = shell.grid((lm.name, base.reply(turn)), ("with the patch", patched.reply(turn)))
            shell.out.print(table)


class Talk:
    """A conversation with a model that has a patch."""

    def __init__(self, lm: LM, patch: Patch, tokens: int) -> None:
        self.lm, self.patch, self.tokens = lm, patch, tokens
        self.messages: list[dict[str, str]] = []

    def reply(self, turn: str) -> str:
        """What the model says to a user's turn."""
        self.messages.append({"role": "user", "content": turn})
        with self.patch.applied(self.lm):
            text = self.lm.chat(self.messages, max_new_tokens=self.tokens).strip()
        self.messages.append({"role": "assistant", "content": text})
        return text


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
        n, edits = len(change.live), len(change.owners.unique())
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


def _edited(found: dict[str, Any], check: Check | None, save: Path | None) -> list[RenderableType]:
    rows = found["edits"]
    table = shell.table("asked, and to be answered", "before", "p", "after", "p", right={"p"})
    for row in rows:
        style = "dim" if row["said_already"] else "green" if row["took"] else "red"
        table.add_row(
            f"{markup(question(row))} [bold]{markup(row['target'])}[/]",
            shell.styled(shell.short(row["before"]["says"]), "dim"),
            shell.probability(row["before"]["p_target"]),
            shell.styled(shell.short(row["after"]["says"]), style),
            shell.probability(row["after"]["p_target"]),
        )
    read = [] if found["list"] is None else [f"  [dim]{markup(found['list'])}[/]"]
    return [table, *read, *_facts(found, check, save)]


def _facts(found: dict[str, Any], check: Check | None, save: Path | None) -> list[str]:
    rows, patch = found["edits"], found["patch"]
    new = [row for row in rows if not row["said_already"]]
    already = [n for n, row in enumerate(rows, 1) if row["said_already"]]
    lines = []
    if already:
        which = "this" if len(rows) == 1 else f"{len(already)} of them ({_numbers(already)})"
        lines.append(shell.tick(True, f"the model says {which} already; nothing to correct (--anyway edits it)"))
    if new:
        took = sum(row["took"] for row in new)
        outcome = "the edit took" if len(new) == took == 1 else f"{took} of {len(new)} edits took"
        seen = [] if check is None else check.parts()[1:]
        lines.append(shell.tick(took == len(new), " / ".join([outcome, *seen])))
        lines += [] if check is None else _doubts(check)
        lines += [f"  [dim]{_hint(found['method'])}[/]"] if took < len(new) else []
    lines.append(
        shell.tick(True, f"the model came back: {found['came_back']['parameters']} parameters equal to the bit")
    )
    if new:
        kept = f"saved as {patch['saved']}" if patch["saved"] else "not saved"
        kept += "" if save else "; --save FILE keeps it"
        lines.append(markup(f"  patch: {shell.size(patch['bytes'])}, {kept}"))
        parts = [f"{c['module']}, {c['kind']}, {c['extent']}" for c in patch["changes"]]
        lines += [f"    [dim]{markup(part)}[/]" for part in parts]
    return lines


def _doubts(check: Check) -> list[str]:
    """What a look at an edit found that a user should know of."""
    lost = [q for q in check.asked if q["kind"] == "other" and not q["good"]]
    lines = [f"  moved: {q['prompt']} {shell.short(q['before'])} → {shell.short(q['after'])}" for q in lost[:SHOWN]]
    if check.stutters:
        lines.append("  the model says the same again and again; that is no answer (fewer steps, or another method)")
    return [f"[yellow]{markup(line)}[/]" for line in lines]


def _hint(name: str) -> str:
    """What may help an edit that did not take."""
    from ..method import method

    known = {f.name for f in fields(method(name))}
    layer = "; another layer may hold the fact" if known & {"layer", "layers", "at"} else ""
    return f"`errata methods {name}` lists what to --set{layer}"


def _not_taken(failed: Sequence[int], n: int) -> str:
    which = "the edit did not take" if n == 1 else f"{len(failed)} of {n} edits did not take ({_numbers(failed)})"
    return f"{which}; nothing was saved (--anyway keeps it all the same)"


def _numbers(numbers: Sequence[int], most: int = 12) -> str:
    """Numbers of edits, of many the first."""
    listed = ", ".join(map(str, numbers[:most]))
    return f"number{'s' * (len(numbers) > 1)} {listed}{' …' * (len(numbers) > most)}"


def _shown(found: dict[str, Any]) -> list[RenderableType]:
    from ..check import Check

    base, versions = found["model"] or {}, found["versions"] or {}
    about = shell.grid(
        ("patch", f"{found['file']}, {shell.size(found['bytes'])}"),
        ("for", f"{base.get('name', 'any model')} ({base.get('fingerprint', 'no fingerprint')})"),
        *(("by", _step(step)) for step in found["steps"]),
        *((("checked", str(Check.from_dict(found["check"]))),) if found["check"] else ()),
        ("made with", ", ".join(f"{k} {v}" for k, v in versions.items()) or "nothing known"),
    )
    kept = ["notes"] if any(found["notes"]) else []
    edits = shell.table("", "what it corrects", "asked for", "instead of", *kept, right={""})
    for number, (row, notes) in enumerate(zip(found["edits"], found["notes"], strict=True), 1):
        noted = [markup(", ".join(f"{name}: {value}" for name, value in notes.items()))] if kept else []
        target = f"[green]{markup(row['target'])}[/]"
        edits.add_row(str(number), markup(question(row)), target, markup(row["truth"] or "–"), *noted)
    where = shell.table("where", "kind", "extent", "norm", "size", right={"norm", "size"})
    for c in found["changes"]:
        norm = "–" if c["norm"] is None else f"{c['norm']:.3g}"
        where.add_row(markup(c["module"]), c["kind"], c["extent"], norm, shell.size(c["bytes"]))
    carry = [f"  carries {markup(n)} {' x '.join(map(str, s))} for the next edit" for n, s in found["carry"].items()]
    texts = [f"  [dim]{markup(text)}[/]" for text in found["remembered"]]
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
        table.add_row(markup(row["prompt"]), markup(row["base"]), shell.styled(row["patched"], style))
    return table
