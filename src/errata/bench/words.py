"""What a report says in words, the same in Markdown and on the page: how its numbers were obtained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from .results import Results

T = TypeVar("T")

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
FAULTS = {
    "failed": "edits could not be made: they count as 0, and have no locality",
    "unasked": "probes could not be asked in full: they are left out of the means",
}
COSTS = {
    "processor_per_edit": "processor seconds an edit",
    "editing_per_edit": "seconds an edit",
    "bytes_per_edit": "bytes an edit",
    "flops_per_edit": "operations an edit",
    "peak_memory": "peak memory",
}
"""What a run costs, by its name in a report's `efficiency`."""


def spread(found: Mapping[str, Any]) -> str:
    """An interval in words."""
    return "too few cases" if found["low"] is None else f"{found['low']:.3f} to {found['high']:.3f}"


def half(found: Mapping[str, Any]) -> str:
    """Half the width of an interval, or nothing where there is none."""
    return "" if found["low"] is None else "±" + f"{(found['high'] - found['low']) / 2:.2f}".removeprefix("0")


def title(results: Results) -> str:
    """What was run."""
    methods = dict.fromkeys(r.about["method"] for r in results.reports)
    return f"{', '.join(methods)} on {results.reports[0].about['model']['name']}"


def heading(results: Results) -> str:
    """What stands over a table: how many methods on which model, by which cases, and how they were asked."""
    data, count = results.about["data"], len({r.about["method"] for r in results.reports})
    looked_at = results.about.get("known")
    cases = f"{data['n']} cases" if looked_at is None else f"the {data['n']} of {looked_at} cases it knew"
    model = results.reports[0].about["model"]["name"]
    chat = ", edited and asked in chat" if results.about.get("chat") else ""
    return f"{count} method{'s' * (count != 1)} on {model}, {cases} of {data['name']}{chat}"


def provenance(results: Results) -> list[str]:
    """Where the numbers come from, a sentence each."""
    data, first = results.about["data"], results.reports[0].about
    model = first["model"]
    seen = dict.fromkeys((r.about["regime"], r.about["evaluated"], r.about["batch"]) for r in results.reports)
    regimes = "; ".join(f"{r}{_of(r, b)}: evaluated {e}" for r, e, b in seen)
    return [
        f"model {model['name']}, fingerprint {model['fingerprint']}, {model['dtype']}",
        f"data {data['name'] or 'of the caller'}, {data['n']} cases, digest {data['digest'] or '–'}{_knew(results)}"
        + (f", {data['read']}" if data.get("read") else ""),
        f"regimes {regimes}",
        f"generated answers: greedy, to a natural stop, at most {first['new_tokens']} tokens"
        + ("; edits and questions are users' turns by the model's chat template" if results.about.get("chat") else ""),
        f"intervals: 95%, bootstrap over cases, seed {first['seed']}; exact where all cases agree, none below 10 cases",
        f"metrics: version {first['metrics']}",
    ]


def _knew(results: Results) -> str:
    looked_at = results.about.get("known")
    return "" if looked_at is None else f"; they are those of the first {looked_at} that the model knew before"


def _of(regime: str, batch: int) -> str:
    return f" ({batch} at once)" if regime == "sequential" and batch > 1 else ""


def notes(results: Results) -> list[str]:
    """What a reader has to know of single cells, a sentence each."""
    lines = []
    for (method, error), regimes in _grouped(
        ((one["method"], one["error"]), one["regime"]) for one in results.about["left_out"]
    ):
        lines.append(f"no numbers for {method} ({', '.join(regimes)}): {error}")
    for what, text in FAULTS.items():
        lines += [
            f"{r.about['method']}, {r.about['regime']}: {r.about[what]} {text}"
            for r in results.reports
            if r.about[what]
        ]
    name = results.about["data"]["name"]
    found = [(r.about.get("source") or "", r.about["method"]) for r in results.reports]
    for source, methods in _grouped(one for one in found if name and name in one[0]):
        lines.append(f"settings of {', '.join(methods)}: {source}")
    return lines


def abilities(results: Results) -> list[str]:
    """What an edited model can still do on held-out text, a sentence for each run that was asked."""
    return [
        f"{r.about['method']}, {r.about['regime']}: {ability(r.about['ability'])}"
        for r in results.reports
        if r.about.get("ability")
    ]


def ability(found: Mapping[str, Any]) -> str:
    """Perplexity and KL on held-out text, and the scores of tasks, as far as they were asked for."""
    parts = []
    if "perplexity_after" in found:
        before, after = found["perplexity_before"], found["perplexity_after"]
        parts.append(
            f"perplexity {before:.4g} → {after:.4g} ({after / before - 1:+.1%}), KL {found['kl']:.3g} nats a token, "
            f"on {found['tokens']} tokens of held-out text"
            if after is not None and before is not None
            else "perplexity on held-out text is no finite number any more"
        )
    own = ("perplexity_before", "perplexity_after", "kl", "tokens")
    parts += [f"{name} {value:.4g}" for name, value in found.items() if name not in own and value is not None]
    return "; ".join(parts)


def _grouped(pairs: Iterable[tuple[T, str]]) -> list[tuple[T, list[str]]]:
    out: dict[T, dict[str, None]] = {}
    for key, value in pairs:
        out.setdefault(key, {})[value] = None
    return [(key, list(values)) for key, values in out.items()]


def costs(about: Mapping[str, Any]) -> list[tuple[float | None, str]]:
    """What a run costs, and the same for people, in the order of `COSTS`."""
    values = [about["efficiency"].get(name) for name in COSTS]
    units = ("s", "s", "B", "FLOP", "B")
    return [(v, seconds(v) if u == "s" else amount(v, u)) for v, u in zip(values, units, strict=True)]


def seconds(value: float | None) -> str:
    """Seconds for people."""
    if value is None:
        return "–"
    return "< 0.001 s" if value < 0.001 else f"{value:.2g} s" if value < 1 else f"{value:.1f} s"


def amount(value: float | None, unit: str) -> str:
    """A large number for people."""
    if value is None:
        return "–"
    for prefix in ("", "k", "M", "G", "T"):
        if value < 1000:
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    return f"{value:.3g} P{unit}"
