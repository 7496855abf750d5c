"""`python docs/models.py`: edit and ask a tiny random model of every causal type of transformers, and write what came
of it into `models.json` and the table of `models.md`.

Everything is held against plain passes of one row each, without a cache. A model or a method that is refused is right
too; then the sentence is kept. With types as arguments, only their rows are made anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from errata import GRACE, LM, MEMIT, ROME, Edit, ErrataError, Method, Probe, methods
from errata.ask import ask, stopped
from errata.replay import Replay, passes
from errata.tokens import passage
from tests import tiny
from tests.architectures import KINDS, build

HERE = Path(__file__).parent
FACT = tiny.EDITS[0]
EDITS = (
    Edit("Today we learn. People in {} govern from", "Kenya", "Paris"),
    FACT,
    Edit("It is known. {} has its capital at", "New Zealand", "Oslo Rome"),
    Edit("{} is", "Cuba", "a country"),
)
PROBES = [Probe("efficacy", edit.text, edit.target) for edit in EDITS]
NEAR = 2e-3
"""Largest difference of a log-probability that is rounding: sums of thousands of float32 products, in another order."""

Row = dict[str, str]
"""What came of each thing that was tried: `yes`, how it was done, `refused: why`, or `wrong: how`."""


def settings(layers: Sequence[int]) -> dict[str, Callable[[], Method]]:
    """The methods, with settings by which a random model of four blocks can be edited; `layers` have an MLP."""
    known, at = methods(), layers[(len(layers) - 1) // 3]
    search = dict(steps=20, lengths=(), corpus=str(_corpus()), kl=0.0, decay=0.0, clamp=1.0)
    return {
        "ROME": partial(ROME, layer=at, **search),
        "MEMIT": partial(MEMIT, layers=tuple(layers[:2]), weight=1.0, rate=0.1, **search),
        "GRACE": partial(GRACE, at=at, steps=20),
        "FT-M": partial(known["ft-m"], layers=(at,), steps=10, rate=5e-3),
        "UltraEdit": partial(known["ultraedit"], at=(at,), rate=1e-2),
        "LoRA": partial(known["lora"], layers=(at,), steps=5, rate=2e-2),
    }


def row(kind: str) -> Row:
    """What came of one type."""
    try:
        lm = build(kind)
    except Exception as error:  # of any kind: transformers' own, about a config
        return {"built": f"no: {_sentence(error)}"}
    found: Row = {"built": "yes"}
    layers, path, why = _editable(lm)
    if path:
        lm.mlp_path = path
    found["at"] = f"{path} (the MLP: {why})" if path else "" if layers else f"refused: {why}"
    _plain(lm, FACT.text, FACT.target)  # BigBird puts other modules in place in its first pass
    before = _digest(lm.model)
    if layers:
        for name, make in settings(layers).items():
            found[name] = _tried(lm, lambda make=make: _edited(lm, make(), before))
        found["passes"] = _tried(lm, lambda: _passes(lm, layers[(len(layers) - 1) // 3]))
    found["ask"] = _tried(lm, lambda: _asked(lm))
    if _digest(lm.model) != before:
        found["left"] = "wrong: the model is not as it was"
    return found


def _editable(lm: LM) -> tuple[list[int], str | None, str]:
    """Layers that can be edited, the path to give for it, and why one is needed or nothing can."""
    try:
        blocks = range(len(lm.blocks))
    except ErrataError as error:
        return [], None, str(error)
    layers, why = [], ""
    for layer in blocks:
        try:
            lm.mlp_out(layer)
            layers.append(layer)
        except ErrataError as error:
            why = why or str(error)
    if layers:
        return layers, None, ""
    for layer in blocks:
        site = lm.attention_out(layer)
        path = site and site.name.removeprefix(f"{lm.blocks[layer]}.")
        there = [i for i in blocks if path and path in dict(lm.module(lm.blocks[i]).named_modules())]
        if there:
            return there, path, why
    return [], None, why


def _tried(lm: LM, do: Callable[[], str]) -> str:
    try:
        return do()
    except ErrataError as error:
        return f"refused: {_sentence(error)}"
    except Exception as error:  # a raw error is what should not be
        return f"wrong: {type(error).__name__}: {_sentence(error)}"


def _edited(lm: LM, method: Method, before: str) -> str:
    """Whether an edit takes, and is undone to the bit."""
    patch = method.edit(lm, [FACT])
    first = _plain(lm, FACT.text, FACT.target)
    with patch.applied(lm):
        then = _plain(lm, FACT.text, FACT.target)
        asked = ask(lm, [Probe("efficacy", FACT.text, FACT.target)])[0].answer
    if _digest(lm.model) != before:
        return "wrong: not undone"
    if asked is None or abs(asked.logprob - then) > NEAR:
        return f"wrong: asked {asked and asked.logprob:.3f}, by a plain pass {then:.3f}"
    return "yes" if then > first else f"wrong: log p {first:.2f} before, {then:.2f} after"


def _passes(lm: LM, layer: int) -> str:
    """How an edit's passes are run, when they are right: one row first, then several, then those that stay."""
    name = lm.mlp_out(layer).name
    with lm.asked():
        for some in (EDITS[:1], EDITS):
            batch = lm.encode([passage(e, answer=e.target) for e in some])
            run = passes(lm, batch, [name], batch.subject)
            rows = torch.arange(len(batch))
            want = [_logits(lm, batch.ids[i, : int(batch.ends[i]) + 1])[-1] for i in rows]
            for kept in (rows, rows, rows[1:]):
                if len(kept) < len(run.start):
                    run.keep(kept)
                if len(kept):
                    got = run.logits(torch.arange(len(kept)), batch.ends[kept])
                    if max(float((got[k] - want[i]).abs().max()) for k, i in enumerate(kept)) > NEAR:
                        return f"wrong: {type(run).__name__} of {len(kept)} rows is off"
    if not isinstance(run, Replay):
        return "whole"
    return "replayed" if run.past else "from the first token"


def _asked(lm: LM) -> str:
    """How a model is asked, when the answers are right: one question first, then several."""
    ask(lm, PROBES[:1])
    for probe, answer in zip(PROBES, ask(lm, PROBES), strict=True):
        if answer.answer is None:
            raise ErrataError(str(answer.unasked))
        want = _plain(lm, probe.prompt, probe.answer)
        if abs(answer.answer.logprob - want) > NEAR:
            return f"wrong: {answer.answer.logprob:.3f} for {want:.3f}"
        if answer.text != stopped(_said(lm, probe.prompt)):
            return f"wrong: said {answer.text!r}, by plain passes {_said(lm, probe.prompt)!r}"
    gone_on = [lm.memo.get(("proven", "goes on", what)) is not None for what in ("forced", "greedy")]
    return "from its cache" if all(gone_on) else "whole" if not any(gone_on) else "partly from its cache"


# Without errata


@torch.no_grad()
def _logits(lm: LM, ids: Tensor) -> Tensor:
    """(seq, vocabulary) of one row."""
    return lm.model(input_ids=ids[None], use_cache=False).logits[0].float()


def _plain(lm: LM, prompt: str, answer: str) -> float:
    """The mean log-probability of an answer."""
    head, ids = (lm.tokenizer(text)["input_ids"] for text in (prompt, f"{prompt} {answer}"))
    cols = torch.arange(len(head), len(ids))
    return float(_logits(lm, torch.tensor(ids)).log_softmax(-1)[cols - 1, torch.tensor(ids)[cols]].mean())


def _said(lm: LM, prompt: str, most: int = 24) -> str:
    """The greedy continuation, each token by a pass over all before it."""
    ids = lm.tokenizer(prompt)["input_ids"]
    head = len(ids)
    while len(ids) < head + most and (len(ids) == head or ids[-1] not in lm.end_tokens):
        ids = [*ids, int(_logits(lm, torch.tensor(ids))[-1].argmax())]
    return lm.tokenizer.decode(ids[head:], skip_special_tokens=True)


def _digest(model: nn.Module) -> str:
    """Of every number of a model, and of what is hooked into it."""
    out = hashlib.sha256()
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        out.update(f"{name} {t.requires_grad}".encode() + t.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    for name, module in model.named_modules():
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
        out.update(f"{name} {type(module).__name__} {module.training} {hooks}".encode())
    return out.hexdigest()


def _corpus() -> Path:
    path = Path(tempfile.gettempdir()) / "errata-models.txt"
    if not path.exists():
        path.write_text("\n".join(tiny.corpus()))
    return path


def _sentence(error: Exception) -> str:
    """What an error says; what it names as a set is in the order of letters."""
    said = " ".join(str(error).split())[:300]
    return re.sub(r"\{([^{}]*)\}", lambda found: "{" + ", ".join(sorted(found[1].split(", "))) + "}", said)


# The table

COLUMNS = ("ROME", "MEMIT", "GRACE", "FT-M", "UltraEdit", "LoRA")


def table(rows: dict[str, Row]) -> str:
    """The page's counts and tables."""
    built = {kind: r for kind, r in rows.items() if r["built"] == "yes"}
    wrong = {kind: [f"{k}: {v}" for k, v in r.items() if v.startswith("wrong")] for kind, r in built.items()}
    edited = [kind for kind, r in built.items() if any(r.get(c) == "yes" for c in COLUMNS)]
    wrongly = sum(bool(w) for w in wrong.values())
    lines = [
        f"transformers {transformers.__version__} has {len(rows)} causal types, of which {len(built)} build. "
        f"Of these, {len(edited)} are edited, {len(built) - len(edited)} are refused, and {wrongly} go wrong.",
        "",
    ]
    for name in COLUMNS:
        count = Counter(_mark(r.get(name, "refused")) for r in built.values())
        lines.append(f"- {name}: {count['yes']} edited, {count['–']} refused, {count['**wrong**']} wrong")
    for name, words in (("passes", "of an edit's search"), ("ask", "of questions")):
        count = Counter(r.get(name, "refused").split(":")[0] for r in built.values())
        lines.append(f"- passes {words}: " + ", ".join(f"{n} {what}" for what, n in count.most_common()))
    lines += ["", f"| type | {' | '.join(COLUMNS)} | search | ask |", "|---" * (len(COLUMNS) + 3) + "|"]
    for kind, r in sorted(built.items()):
        cells = [_mark(r.get(name, "refused")) for name in (*COLUMNS, "passes", "ask")]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    lines += ["", "## What is refused, and why", ""]
    lines += [f"- {which}: {why}" for why, which in _reasons(built).items()]
    for title, found in (("Wrong", {k: "; ".join(w) for k, w in wrong.items() if w}), ("Not built", _unbuilt(rows))):
        if found:
            lines += ["", f"## {title}", "", *(f"- {kind}: {_plain_text(why)}" for kind, why in found.items())]
    return "\n".join(lines) + "\n"


def _mark(found: str) -> str:
    return "–" if found.startswith("refused") else "**wrong**" if found.startswith("wrong") else found


def _reasons(built: dict[str, Row]) -> dict[str, str]:
    """Which types and methods are refused, by the sentence that says so, types' names and layers left out."""
    found: dict[str, dict[str, list[str]]] = {}
    for kind, r in built.items():
        for name, said in r.items():
            if said.startswith("refused: ") or (name == "at" and said):
                why = _plain_text(said.removeprefix("refused: "))
                found.setdefault(why, {}).setdefault(kind, []).append(name)
    return {
        why: ", ".join(
            f"{kind} ({', '.join(n for n in names if n != 'at') or 'the place'})" for kind, names in who.items()
        )
        for why, who in found.items()
    }


def _unbuilt(rows: dict[str, Row]) -> dict[str, str]:
    return {kind: r["built"].removeprefix("no: ") for kind, r in rows.items() if r["built"] != "yes"}


def _plain_text(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


def main(kinds: Sequence[str]) -> None:
    """Make rows, all or some, and write them and their table."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("errata").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    data = HERE / "models.json"
    rows: dict[str, Row] = json.loads(data.read_text()) if data.exists() and kinds else {}
    for kind in kinds or KINDS:
        rows[kind] = row(kind)
        print(kind, rows[kind], file=sys.stderr, flush=True)
    written = json.dumps(rows, indent=1, sort_keys=True)
    data.write_text(f"{written}\n")
    page = HERE / "models.md"
    head = page.read_text().split("<!-- made -->")[0]
    page.write_text(f"{head}<!-- made -->\n\n{table(json.loads(written))}")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as store:
        os.environ["ERRATA_STORE"] = store  # moments of tiny models are nobody's
        main(sys.argv[1:])
