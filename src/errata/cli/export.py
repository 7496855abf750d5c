"""`errata export`: a patch as a PEFT adapter or a merged checkpoint, for other programs to serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import RenderableType

from ..escape import markup
from . import options, shell
from .patches import Model, Place, carried, model_of


def export(
    path: Place,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    to: Annotated[
        Literal["peft", "checkpoint"],
        typer.Option("--to", help="peft: a LoRA adapter beside the model; checkpoint: a whole corrected model."),
    ] = "peft",
    model: Model = None,
    rank: Annotated[
        int | None,
        typer.Option("--rank", min=1, help="The most a module of the adapter gets; what that leaves out is told."),
    ] = None,
    shard: Annotated[str, typer.Option("--shard", help="The largest file of a checkpoint.")] = "5GB",
    report: Annotated[
        Path | None, typer.Option("--report", help="What `errata bench --out` wrote, for the model card.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="NAME", help="What others call the model, on the hub; for card and adapter."),
    ] = None,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Don't read it back, which loads a checkpoint as a second model.")
    ] = False,
    dtype: options.Dtype = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Write a patch in a form that servers read, with a model card that lists what was corrected."""
    from .. import export as forms
    from ..bench import Results

    patch = carried(path)
    judged = Results.load(report) if report else None
    lm = shell.load(model_of(patch, model), dtype, device)
    with shell.working(f"writing {out}"):
        if to == "peft":
            made = forms.to_peft(patch, lm, out, rank, judged, base, check=not no_check)
        else:
            made = forms.merge(patch, lm, out, shard, judged, base, check=not no_check)
    shell.wrote(out)
    found = made.to_dict()
    shell.give(found, lambda: _exported(found, str(made.read_back)), as_json)


def _exported(found: dict[str, Any], read_back: str) -> list[RenderableType]:
    table = shell.table("weight", "rank", "moved", "left out", right={"rank", "moved", "left out"})
    for site in found["sites"]:
        table.add_row(markup(site["module"]), str(site["rank"] or "–"), f"{site['moved']:.2%}", f"{site['error']:.2%}")
    how = {
        "peft": "PeftModel.from_pretrained(model, {!r}), or a server's --lora-modules",
        "checkpoint": "transformers serve {!r}, or AutoModelForCausalLM.from_pretrained",
    }[found["form"]].format(found["folder"])
    note = (
        "[dim]moved: norm of the change over that of the weight; left out: share of the change that the rank loses[/]"
    )
    nameless = "  no name of the base is in it; --base NAME says what others call the model"
    return [
        table,
        note,
        shell.tick(True, f"{found['folder']} was written"),
        shell.tick(found["read_back"]["by"] is not None, read_back),
        f"  [dim]{markup(how)}[/]",
        *([] if found["base"] else [f"[dim]{nameless}[/]"]),
    ]
