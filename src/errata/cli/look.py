"""`errata methods` and `anatomy`: what there is to edit with, and where in a model."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType

from ..errors import ErrataError
from ..escape import markup
from . import options, shell

if TYPE_CHECKING:
    from ..lm import LM, Site
    from ..method import Method


def methods(
    name: Annotated[str | None, typer.Argument(help="Only this method, with its settings.")] = None,
    as_json: options.Json = False,
) -> None:
    """List the ways of editing; with a name, the settings of one."""
    from ..method import method, methods

    if name is None:
        listed = [_method(m) for m in methods().values()]
        shell.give(listed, lambda: [_listed(listed)], as_json)
        return
    from . import settings

    one = _method(method(name)) | {"settings": settings.describe(method(name))}
    shell.give(one, lambda: _one(one), as_json)


def anatomy(
    model: Annotated[str, typer.Argument(help=options.MODEL)],
    dtype: options.Dtype = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Show the parts of a model that are edited, and how errata reads its tokens."""
    lm = shell.load(model, dtype, device)
    found = _anatomy(lm)
    shell.give(found, lambda: _parts(found), as_json)


# Methods


def _method(kind: type[Method]) -> dict[str, Any]:
    about = {"name": kind.name, "about": (inspect.getdoc(kind) or "").partition("\n")[0]}
    return about | {"paper": kind.paper, "source": kind.source, "batched": kind.batched, "trained": kind.trained}


def _listed(listed: Sequence[dict[str, Any]]) -> RenderableType:
    table = shell.table("method", "what it is", "batched", "trained")
    for m in listed:
        about = f"{markup(m['about'])}\n[dim]{markup(m['paper'])}[/]"
        table.add_row(f"[bold]{m['name']}[/]", about, _yes(m["batched"]), _yes(m["trained"]))
    return table


def _one(one: dict[str, Any]) -> list[RenderableType]:
    about = shell.grid(
        ("method", one["name"]),
        ("what it is", one["about"]),
        ("paper", f"{one['paper']}, {one['source']}"),
        ("batched", "many edits in one step" if one["batched"] else "one edit at a time"),
        ("trained", "needs a trained editor" if one["trained"] else "no training before the first edit"),
    )
    table = shell.table("--set", "type", "default", "what it does")
    for s in one["settings"]:
        default = "the preset's" if s["default"] is None else json.dumps(s["default"])
        table.add_row(f"[bold]{s['name']}[/]", markup(s["type"]), markup(default), markup(s["about"]))
    return [about, table]


def _yes(value: bool) -> str:
    return "yes" if value else "no"


# Anatomy


def _anatomy(lm: LM) -> dict[str, Any]:
    from ..tokens import prefix

    head, read_in = lm.model.get_output_embeddings(), lm.model.get_input_embeddings()
    start = lm.tokenizer.convert_ids_to_tokens(prefix(lm.tokenizer))
    return {
        "name": lm.name,
        "class": type(lm.model).__name__,
        "fingerprint": lm.fingerprint,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in lm.model.parameters()),
        "blocks": len(lm.blocks),
        "block_names": list(lm.blocks),
        "d_model": lm.d_model,
        "context": lm.context,
        "vocabulary": len(lm.tokenizer),
        "head_tied": head.weight is read_in.weight,
        "starts_with": start,
        "preset": _preset(lm),
        "layers": [_layer(lm, i) for i in range(len(lm.blocks))],
        **_open_questions(lm),
    }


def _preset(lm: LM) -> str | None:
    from .. import presets

    return presets.recognised(lm.config)


def _layer(lm: LM, i: int) -> dict[str, Any]:
    try:
        mlp = _site(lm.mlp_out(i))
    except ErrataError:
        mlp = None
    return {"layer": i, "mlp": mlp, "attention": _site(lm.attention_out(i))}


def _site(site: Site | None) -> dict[str, Any] | None:
    return {"name": site.name, "shape": list(site.shape), "writable": site.writable} if site else None


def _open_questions(lm: LM) -> dict[str, Any]:
    """Where the rule by which an MLP's write matrix is found fails: why, and what there is to choose from."""
    from ..anatomy import linears

    try:
        for i in range(len(lm.blocks)):
            lm.mlp_out(i)
    except ErrataError as error:
        found = linears(lm.module(lm.blocks[0]))
        return {"problem": str(error), "linear": [f"{n} ({type(m).__name__})" for n, m in found.items()]}
    return {}


def _parts(found: dict[str, Any]) -> list[RenderableType]:
    head = "tied to" if found["head_tied"] else "apart from"
    preset = f"published for {found['preset']}" if found["preset"] else "none: settings for any model, with a warning"
    about = shell.grid(
        ("model", f"{found['name']}, {found['class']}, {found['parameters']:,} parameters in {found['dtype']}"),
        ("fingerprint", found["fingerprint"]),
        ("blocks", f"{found['block_names'][0]} to {found['block_names'][-1]}, {found['d_model']} wide"),
        ("context", f"{found['context']} tokens" if found["context"] else "not bounded by its config"),
        ("vocabulary", f"{found['vocabulary']} tokens, head {head} the embeddings"),
        ("a text starts", f"with {' '.join(found['starts_with'])}" if found["starts_with"] else "with its first token"),
        ("settings", preset),
    )
    table = shell.table("layers", "MLP writes by", "d_out x d_in", "attention writes by", "d_out x d_in")
    for layers, mlp, attention in _runs(found["layers"]):
        table.add_row(layers, *_cells(mlp), *_cells(attention))
    if "problem" not in found:
        return [about, table]
    return [about, table, shell.tick(False, found["problem"]), f"  linear maps: {markup(', '.join(found['linear']))}"]


def _runs(layers: Sequence[dict[str, Any]]) -> list[tuple[str, Any, Any]]:
    """Neighbouring layers that look the same as one row."""

    def look(layer: dict[str, Any]) -> tuple[Any, Any]:
        return _inside(layer["mlp"], layer["layer"]), _inside(layer["attention"], layer["layer"])

    out = []
    for (mlp, attention), group in groupby(layers, look):
        numbers = [layer["layer"] for layer in group]
        named = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
        out.append((named, mlp, attention))
    return out


def _inside(site: dict[str, Any] | None, layer: int) -> tuple[str, tuple[int, ...]] | None:
    return (site["name"].partition(f".{layer}.")[2], tuple(site["shape"])) if site else None


def _cells(site: tuple[str, tuple[int, ...]] | None) -> tuple[str, str]:
    return (markup(site[0]), " x ".join(map(str, site[1]))) if site else ("–", "–")
