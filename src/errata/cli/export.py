"""`errata export`: a patch as a PEFT adapter or a merged checkpoint, for other programs to serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import RenderableType

from ..escape import markup
from . import options, shell
from .correct import PatchFile


def export(
    path: PatchFile,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    to: Annotated[
        Literal["peft", "checkpoint"],
        typer.Option("--to", help="peft: a LoRA adapter beside the model; checkpoint: a whole corrected model."),
    ] = "peft",
    model: options.Model = "almanac",
    rank: Annotated[
        int | None,
        typer.Option("--rank", min=1, help="The most a module of the adapter gets; what that leaves out is told."),
    ] = None,
    shard: Annotated[str, typer.Option("--shard", help="The largest file of a checkpoint.")] = "5GB",
    report: Annotated[
        Path | None, typer.Option("--report", help="A report of `errata bench --out`, for the model card.")
    ] = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Write a patch in a form that servers read, with a model card that lists what was corrected."""
    from .. import export as forms
    from ..bench import Report
    from ..patch import Patch

    patch = Patch.load(path)
    judged = Report.load(report) if report else None
    lm = shell.load(model, dtype, device)
    with shell.working(f"writing {out}"):
        if to == "peft":
            made = forms.to_peft(patch, lm, out, rank, judged)
        else:
            made = forms.merge(patch, lm, out, shard, judged)
    shell.wrote(out)
    found = made.to_dict()
    shell.give(found, lambda: _exported(found), as_json)


def _exported(found: dict[str, Any]) -> list[RenderableType]:
    table = shell.table("weight", "rank", "moved", "left out", right={"rank", "moved", "left out"})
    for site in found["sites"]:
        table.add_row(markup(site["module"]), str(site["rank"] or "–"), f"{site['moved']:.2%}", f"{site['error']:.2%}")
    how = {
        "peft": "PeftModel.from_pretrained(model, {!r}), or a server's --lora-modules",
        "checkpoint": "transformers serve {!r}, or AutoModelForCausalLM.from_pretrained",
    }[found["form"]].format(found["folder"])
    return [table, shell.tick(True, f"{found['folder']} was written"), f"  [dim]{markup(how)}[/]"]
