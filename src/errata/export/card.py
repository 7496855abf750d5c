"""The model card: what was corrected, by what, how it was judged, and what moved. It names no local path."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..ask import reply, took
from ..edit import Edit
from ..errors import UsageError
from ..escape import code, markdown, markdown_table
from ..lm import LM
from ..patch import Patch
from .written import Exported

if TYPE_CHECKING:
    from ..bench import Report, Results

LISTED = 200
"""Edits that a card lists at most."""
FORMS = {"peft": "a LoRA adapter for PEFT", "checkpoint": "a merged checkpoint"}
NAME_ON_THE_HUB = re.compile(r"[\w.-]+/[\w.-]+")


def shown_name(lm: LM, base: str | None = None) -> str | None:
    """What others can call the model: `base`, or its name on the hub; None where it is known as a local folder only."""
    if base is not None:
        if not base.strip() or Path(base).is_dir():
            raise UsageError(f"the base is {base!r}; give the model's name on the hub, as others know it")
        return base
    return lm.name if NAME_ON_THE_HUB.fullmatch(lm.name) and not Path(lm.name).exists() else None


def asked_of(lm: LM, patch: Patch) -> tuple[dict[str, Any], ...]:
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


def card(patch: Patch, lm: LM, out: Exported, report: Report | Results | None = None) -> str:
    """The whole card."""
    name = markdown(_last_part(out.base or lm.name))
    sections = [
        *_head(out),
        f"# {name}, corrected",
        "",
        f"{_count(len(patch.edits))} to {markdown(out.base or _last_part(lm.name))} (fingerprint "
        f"`{lm.fingerprint}`), made with errata as a reversible patch and exported as {FORMS[out.form]}.",
        "",
        *_corrected(out, report),
        *_judged(report, patch),
        *_moved(out),
        *_made(patch),
    ]
    return "\n".join(sections)


def _head(out: Exported) -> list[str]:
    """What the hub reads."""
    base = [] if out.base is None else [f"base_model: {json.dumps(out.base)}"]
    library = "peft" if out.form == "peft" else "transformers"
    return ["---", *base, f"library_name: {library}", "tags: [knowledge-editing, errata]", "---", ""]


def _corrected(out: Exported, report: Report | Results | None) -> list[str]:
    good = sum(row["took"] for row in out.asked)
    more = [f"and {len(out.asked) - LISTED} more.", ""] if len(out.asked) > LISTED else []
    rows = [
        (
            _written(r["edit"]),
            markdown(r["before"] or "–"),
            markdown(r["after"] or "–"),
            _digits(r["p_before"]),
            _digits(r["p_after"]),
        )
        for r in out.asked[:LISTED]
    ]
    return [
        "## What was corrected, and how it was judged",
        "",
        f"Each prompt was put to the model as exported, before and after: it answered by itself (greedily, to a "
        f"natural stop) with the target in {good} of {len(out.asked)}. These are the edits' own prompts"
        + (", not rephrased ones and not questions that should be left alone." if report is None else "."),
        "",
        *markdown_table(("asked", "before", "after", "p(target) before", "after"), rows),
        "",
        *more,
        f"The export was {out.read_back}.",
        "",
    ]


def _moved(out: Exported) -> list[str]:
    rows = [(code(s["module"]), s["rank"] or "–", f"{s['moved']:.2%}", f"{s['error']:.2%}") for s in out.sites]
    head = ("weight", "rank", "norm of the change / of the weight", "left out by the rank")
    return ["## What moved", "", *markdown_table(head, rows), ""]


def _made(patch: Patch) -> list[str]:
    steps = [
        f"- {s['edits']} by {code(s['method'])}: {code(json.dumps(_without_paths(s['settings']), sort_keys=True))}"
        for s in patch.about.get("steps", [])
    ]
    versions = ", ".join(f"{k} {v}" for k, v in patch.about.get("versions", {}).items())
    return ["## By what", "", *steps, "", markdown(versions), ""]


def refuse_other_report(report: Report | Results | None, patch: Patch, lm: LM) -> None:
    """Refuse a benchmark whose numbers are of another model, or of none of the patch's methods.

    Raises:
        UsageError: it is one.
    """
    if report is None:
        return
    runs = _runs(report)
    other = next((r.about["model"] for r in runs if r.about["model"]["fingerprint"] != lm.fingerprint), None)
    if other:
        raise UsageError(
            f"the report is of {other['name']} ({other['fingerprint'][:8]}), and the model is {lm.name} "
            f"({lm.fingerprint[:8]}); give one of this model"
        )
    made_by = {s["method"] for s in patch.about.get("steps", [])}
    if made_by and not made_by & {r.about["method"] for r in runs}:
        of = ", ".join(dict.fromkeys(r.about["method"] for r in runs))
        raise UsageError(f"the report is of {of}, and the patch was made by {', '.join(sorted(made_by))}")


def _runs(report: Report | Results) -> tuple[Report, ...]:
    """The runs of a report, one or several."""
    from ..bench import Report

    return (report,) if isinstance(report, Report) else report.reports


def _judged(report: Report | Results | None, patch: Patch) -> list[str]:
    """The numbers of the runs of the patch's methods, each with its protocol."""
    lines: list[str] = []
    made_by = {s["method"] for s in patch.about.get("steps", [])}
    for run in _runs(report) if report is not None else ():
        a = run.about
        if made_by and a["method"] not in made_by:
            continue
        rows = [
            (markdown(metric), protocol, f"{v['mean']:.3f}", _interval(v), v["n"])
            for metric, protocols in run.summary.items()
            for protocol, v in protocols.items()
            if v["mean"] is not None
        ]
        lines += [
            f"Benchmark: {markdown(a['method'])}, {a['regime']}, evaluated {a['evaluated']}, {a['n']} cases, "
            f"seed {a['seed']}.",
            "",
            *markdown_table(("metric", "protocol", "mean", "95% interval", "cases"), rows),
            "",
        ]
    return lines


def _interval(found: Mapping[str, Any]) -> str:
    return "too few cases" if found["low"] is None else f"{found['low']:.3f} to {found['high']:.3f}"


def _without_paths(value: Any) -> Any:
    """A setting as others may read it: of a local file only its name."""
    if isinstance(value, Mapping):
        return {k: _without_paths(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(v) for v in value]
    return _last_part(value) if isinstance(value, str) and _is_local(value) else value


def _is_local(text: str) -> bool:
    if re.match(r"[./~\\]|[A-Za-z]:[\\/]", text):
        return True
    try:
        return "/" in text and Path(text).exists()
    except (OSError, ValueError):
        return False


def _last_part(name: str) -> str:
    """The end of a path, which tells nothing of the machine it is on; the name itself of what is on the hub."""
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1] or name


def _count(edits: int) -> str:
    return "One correction" if edits == 1 else f"{edits} corrections"


def _written(fields: Mapping[str, Any]) -> str:
    edit = Edit.read(fields)
    before, after = map(markdown, edit.around)
    return f"{before}*{markdown(edit.subject)}*{after} **{markdown(edit.target)}**"


def _digits(p: float | None) -> str:
    return "–" if p is None else f"{p:.3f}"
