"""`errata tune`: settings of methods for a model that nobody tuned, found on facts that it knows and kept for it."""

from __future__ import annotations

import time
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType

from ..errors import UsageError
from ..escape import markup
from . import options, shell
from .measure import progress

if TYPE_CHECKING:
    from ..data import Case
    from ..lm import LM

FACTS = (("counterfact-mini", "train"), ("almanac-facts", "edit"))
"""Built-in data and parts whose facts a model is asked, until it knows enough of them."""


def tune(
    model: Annotated[str, typer.Argument(help=options.MODEL)],
    method: Annotated[str, typer.Option("--method", help="One method, or several separated by commas.")] = "memit",
    data: Annotated[
        str | None,
        typer.Option(
            "--data", "-d", help="A file of facts to tune on; by default built-in facts that the model knows."
        ),
    ] = None,
    n: Annotated[int, typer.Option("--n", "-n", min=8, help="Known facts to use; half of them are held out.")] = 24,
    budget: Annotated[float, typer.Option("--budget", min=0, help="Minutes for all methods together, about.")] = 20.0,
    dtype: options.Dtype = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Find layers and strength for a model, on facts that it knows, and keep them: presets use them from then on.

    The objective is the mean of reliability, generalization and locality by what the model says. What was found is
    kept only if it beats the default on facts that the search did not see. A search that is stopped goes on.
    """
    from ..method import method as method_of
    from ..tune import tune as search

    chosen = [method_of(name.strip()) for name in method.split(",") if name.strip()]
    if not chosen:
        raise UsageError("--method names no method; give one, or several separated by commas")
    end = time.monotonic() + 60 * budget
    lm = shell.load(model, dtype, device)
    facts = _known(lm, data, n)
    shell.written.append("the same command goes on from what was measured")
    found = []
    for left, one in zip(range(len(chosen), 0, -1), chosen, strict=True):
        with progress(f"tuning {one.name}", n) as told:
            found.append(search(one, lm, facts, max(0.0, end - time.monotonic()) / left, told))
    result = {
        "model": {"name": lm.name, "fingerprint": lm.fingerprint},
        "facts": len(facts),
        "methods": [{"method": t.method, "settings": t.settings, "evidence": t.evidence} for t in found],
    }
    shell.give(result, lambda: _shown(result), as_json)


def _known(lm: LM, data: str | None, n: int) -> list[Case]:
    """The first n cases whose fact the model says."""
    from ..ask import known_cases
    from ..data import load

    sets = [load(data)] if data else (load(name, part=part) for name, part in FACTS)
    with shell.working(f"asking {lm.name} what it knows"):
        return known_cases(lm, chain.from_iterable(sets), n)


def _shown(result: dict[str, Any]) -> list[RenderableType]:
    table = shell.table("method", "settings", "default", "tuned", right={"default", "tuned"})
    for one in result["methods"]:
        scores = one["evidence"]["score on the held-out facts"]
        changed = ", ".join(f"{k} = {v}" for k, v in one["settings"].items()) or "the default is best"
        table.add_row(one["method"], markup(changed), f"{scores['default']:.3f}", f"{scores['tuned']:.3f}")
    objective = result["methods"][0]["evidence"]["objective"]
    note = f"{result['facts']} facts, half of them held out; the scores are of those, {objective}."
    return [table, f"[dim]{note}[/]", "Presets for this model use these settings from now on."]
