"""What a report says in words, the same in Markdown and on the page: how its numbers were obtained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .results import Results

PROTOCOLS = {
    "forced": "share of the answer's tokens that are the model's first choice, each with the right tokens before it "
    "(teacher forcing). It sees the right beginning of every answer, so it flatters.",
    "compare": "share of questions where the right answer is likelier than the wrong one.",
    "generated": "share of questions where the model, answering by itself, says the answer. What a user sees.",
}
METRICS = {
    "reliability": "Does the edited prompt give the new answer?",
    "generalization": "Do paraphrases give it?",
    "locality": "Do neighbouring questions keep the answer they had before?",
    "portability": "Does what follows from the new fact follow?",
    "fluency": "Is what it writes at length varied (entropy of word pairs and triples, in bits)?",
    "consistency": "Is what it writes at length like texts about the new fact (tf-idf cosine)?",
}
MORE = {
    "written": "greedy, at length, from the data set's openings; scored as a text.",
    "judged": "share of generated answers that another model takes for right.",
}
"""Protocols that are there only when asked for."""
COSTS = ("seconds an edit", "seconds evaluating", "peak memory", "operations an edit")


def title(results: Results) -> str:
    """What was run."""
    methods = dict.fromkeys(r.about["method"] for r in results.reports)
    return f"{', '.join(methods)} on {results.reports[0].about['model']['name']}"


def provenance(results: Results) -> list[str]:
    """Where the numbers come from, a sentence each."""
    data, first = results.about["data"], results.reports[0].about
    model = first["model"]
    seen = dict.fromkeys((r.about["regime"], r.about["evaluated"], r.about["batch"]) for r in results.reports)
    regimes = "; ".join(f"{r}{_of(r, b)}: evaluated {e}" for r, e, b in seen)
    return [
        f"model {model['name']}, fingerprint {model['fingerprint']}, {model['dtype']}",
        f"data {data['name'] or 'of the caller'}, {data['n']} cases, digest {data['digest'] or '–'}",
        f"regimes {regimes}",
        f"generated answers: greedy, to a natural stop, at most {first['new_tokens']} tokens"
        + (", asked by the model's chat template" if results.about.get("chat") else ""),
        f"intervals: bootstrap over cases, 95%, seed {first['seed']}; metrics version {first['metrics']}",
    ]


def _of(regime: str, batch: int) -> str:
    return f" ({batch} at once)" if regime == "sequential" and batch > 1 else ""


def costs(about: Mapping[str, Any]) -> list[str]:
    """Time, memory and operations of a run, in the order of `COSTS`."""
    found = about["efficiency"]
    return [
        f"{found['editing_per_edit']:.3f}",
        f"{found['evaluating']:.1f}",
        amount(found.get("peak_memory"), "B"),
        amount(found.get("flops_per_edit"), "FLOP"),
    ]


def amount(value: float | None, unit: str) -> str:
    """A large number for people."""
    if value is None:
        return "–"
    for prefix in ("", "k", "M", "G", "T"):
        if value < 1000:
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    return f"{value:.3g} P{unit}"
