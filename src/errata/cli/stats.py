"""`errata stats`: second moments of a model's keys, taken once and kept for every later edit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType

from ..errors import UsageError
from ..escape import markup
from . import options, shell

if TYPE_CHECKING:
    from ..parts.moments import Moment


def stats(
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            "-t",
            help="A text file, .jsonl, a folder of them, or a data set's name on the hub; "
            "by default samples of the model itself.",
        ),
    ] = None,
    layers: Annotated[
        str | None, typer.Option("--layers", "-l", help="Which, e.g. 5 or 4-8 or 3,5; default: all.")
    ] = None,
    model: options.Model = "almanac",
    dtype: options.Dtype = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Take the second moments that ROME, MEMIT and their kin solve with, in one pass, and keep them.

    Edits with --set corpus=TEXT then find them at once; those that are taken by default they find as they are. A pass
    that is stopped goes on where it was, and one that has converged ends.
    """
    wanted = _numbers(layers)
    from .. import presets
    from ..parts import moments
    from ..store import Store

    folder = Store().folder
    lm = shell.load(model, dtype, device)
    default = presets.settings(("memit",), lm, {"layers"}, tuned=False).get("corpus", moments.OWN)
    text = _whole(text or default)
    sites = {i: lm.mlp_out(i) for i in (range(len(lm.blocks)) if wanted is None else wanted)}
    shell.written.append(f"what was read so far is kept in {folder}, and the same command goes on from there")
    with _progress() as tell:
        found = moments.prepare(lm, list(sites.values()), text, tell)
    result = {
        "model": {"name": lm.name, "fingerprint": lm.fingerprint},
        "text": text,
        "folder": str(folder),
        "layers": [{"layer": i, "module": site.name, **_known(found[site.name])} for i, site in sites.items()],
    }
    shell.give(result, lambda: _shown(result, text == default), as_json)


def _whole(text: str) -> str:
    """A path that holds from every folder; a name as it is."""
    from ..parts.corpus import BUILT_IN, OWN

    return str(Path(text).resolve()) if text not in (OWN, BUILT_IN) and Path(text).exists() else text


def _numbers(layers: str | None) -> list[int] | None:
    """`"4-6,9"` as `[4, 5, 6, 9]`."""
    if layers is None:
        return None
    found: set[int] = set()
    for part in layers.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise UsageError(f"--layers {layers!r} can't be read; give numbers and ranges, e.g. 5 or 4-8 or 3,5")
        found |= set(range(int(first), int(last or first) + 1))
    return sorted(found)


def _known(moment: Moment) -> dict[str, Any]:
    change, error = (x if math.isfinite(x) else None for x in (moment.change, moment.error))
    known = {"d_in": len(moment.C), "tokens": moment.tokens, "error": error, "change": change}
    return known | {"converged": moment.converged, "more": moment.more}


@contextmanager
def _progress() -> Iterator[Callable[[int, float | None], None] | None]:
    """A terminal shows how far the pass is, and how much more text still changes."""
    if not shell.err.is_terminal:
        yield None
        return
    with shell.err.status("reading") as status:

        def tell(tokens: int, change: float | None) -> None:
            moved = "" if change is None or math.isnan(change) else f", C^-1 k moved by {change:.0%}"
            status.update(f"read {tokens:,} tokens{moved}")

        yield tell


def _shown(result: dict[str, Any], by_default: bool) -> list[RenderableType]:
    right = {"d_in", "tokens", "error", "still moves"}
    table = shell.table("layer", "matrix", "d_in", "tokens", "error", "still moves", "converged", right=right)
    for row in result["layers"]:
        shares = ("–" if row[key] is None else f"{row[key]:.1%}" for key in ("error", "change"))
        known = str(row["layer"]), markup(row["module"]), str(row["d_in"]), f"{row['tokens']:,}"
        table.add_row(*known, *shares, _converged(row))
    note = "[dim]error: of C, relative; still moves: C^-1 k, when there are twice as many tokens.[/]"
    use = "edits use it by default" if by_default else f"use it with --set {markup(quote('corpus=' + result['text']))}"
    return [table, note, f"kept in {markup(result['folder'])}; {use}"]


def _converged(row: dict[str, Any]) -> str:
    if row["converged"]:
        return "converged"
    more = "too few tokens to say" if row["more"] is None else f"about {_round(row['more']):,} tokens more"
    return f"not converged, {more}"


def _round(count: int) -> int:
    """To two digits: an estimate is no better."""
    return round(count, 2 - len(str(count)))
