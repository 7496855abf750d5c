"""Scores against numbers recorded from EasyEdit (../shared/reference), and against a small second implementation.

EasyEdit's own updates are put into the model, which is then asked by errata: it must say what was recorded there, and
every score must be the one that plain passes over one unpadded text at a time give.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import errata
from errata import LM, Case, Edit, Patch, Probe
from errata import ask as asking
from errata.ask import ask
from errata.bench import metrics
from errata.changes import Dense

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "reference"
TINY = REFERENCE / "gpt2-tiny"
pytestmark = pytest.mark.skipif(not TINY.is_dir(), reason="../shared/reference is not beside this checkout")
METHODS = ("ROME", "R-ROME", "MEMIT", "EMMET", "PMET", "PMET-rightpad", "AlphaEdit", "FT-L")
TOKENS = 6
"""Of an answer; the invented ones are shorter."""
RECORDS = [path.relative_to(TINY) for method in METHODS for path in sorted((TINY / method).glob("*.json"))]


@pytest.fixture(scope="module")
def lm() -> Iterator[LM]:
    usual, asking.NEW_TOKENS = asking.NEW_TOKENS, TOKENS
    yield errata.load(TINY / "model", device="cpu")
    asking.NEW_TOKENS = usual


@cache
def facts() -> tuple[Case, ...]:
    """The invented facts, each with a paraphrase and a fact of the same relation."""
    return tuple(
        Case(
            f["case_id"],
            Edit(f["template"], f["subject"], f["target_new"], f["target_true"]),
            (
                Probe("paraphrase", f["rephrase_prompt"], f["target_new"], f["target_true"]),
                Probe("neighbourhood", f["locality_prompt"], f["locality_answer"], f["target_new"]),
            ),
        )
        for f in json.loads((REFERENCE / "facts.json").read_text())
    )


def theirs(record: Path) -> tuple[list[int], list[str], dict[str, Tensor], Patch]:
    """Cases, most likely tokens after the edit, logits by name, and the update itself."""
    about = json.loads((TINY / record).read_text())
    found = load_file((TINY / record).with_suffix(".safetensors"))
    changes = {}
    for name in dict.fromkeys(n.removesuffix(".left").removesuffix(".right") for n in found if n.startswith("delta.")):
        delta = found[name] if name in found else found[f"{name}.left"] @ found[f"{name}.right"]
        module = name.removeprefix("delta.").removesuffix(".weight")
        changes[module] = (Dense(torch.zeros(1, dtype=torch.long), delta.T.contiguous()),)
    return [c["case_id"] for c in about["cases"]], about["argmax_hit"], found, Patch(changes, (facts()[0].edit,))


@pytest.mark.parametrize("record", RECORDS, ids=str)
def test_the_model_edited_there_gets_here_the_score_of_what_was_recorded_there(lm: LM, record: Path):
    numbers, hits, logits, patch = theirs(record)
    probes = [facts()[n].probes[0] for n in numbers]
    before = ask(lm, probes)
    with patch.applied(lm):
        after = ask(lm, probes)
    for number, hit, probe, old, new in zip(numbers, hits, probes, before, after, strict=True):
        assert new.answer is not None
        assert new.other is not None
        assert lm.tokenizer.decode([new.answer.argmax[0]]) == hit
        target, truth = new.answer.ids, new.other.ids
        found = metrics.score(probe, old, new)
        if len(target) == len(truth) == 1:  # the record has the logits of one place
            for when, said in (("pre", old), ("post", new)):
                recorded = logits[f"{when}_logits.{number}"].log_softmax(0)
                for one, (token,) in ((said.answer, target), (said.other, truth)):
                    assert one is not None
                    assert one.logprob == pytest.approx(recorded[token].item(), abs=5e-3)
            recorded = logits[f"post_logits.{number}"]
            assert found["forced"] == float(hit.strip() == probe.answer)  # EasyEdit's rewrite_acc
            assert found["compare"] == float(recorded[target[0]] > recorded[truth[0]])


def test_the_records_hold_edits_that_took_and_edits_that_did_not():
    hits = [
        hit.strip() == facts()[number].edit.target
        for record in RECORDS
        for number, hit in zip(*theirs(record)[:2], strict=True)
    ]
    assert 0 < sum(hits) < len(hits)


# A second implementation: one text at a time, unpadded, without a cache


def plainly(lm: LM, prompt: str, answer: str) -> tuple[list[int], list[int], float]:
    """Ids, most likely ids and mean log-probability of an answer."""
    start = len(lm.tokenizer(prompt)["input_ids"])
    ids = lm.tokenizer(f"{prompt} {answer}")["input_ids"]
    with torch.no_grad():
        said = lm.model(torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)
    return ids[start:], said.argmax(-1).tolist(), fmean(float(p[i]) for p, i in zip(said, ids[start:], strict=True))


def spoken(lm: LM, prompt: str) -> str:
    """What it says by itself: the whole text anew for every token, to the first full stop."""
    ids = lm.tokenizer(prompt)["input_ids"]
    start = len(ids)
    for _ in range(TOKENS):
        with torch.no_grad():
            ids.append(int(lm.model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == lm.tokenizer.eos_token_id:
            break
    text = lm.tokenizer.decode(ids[start:], skip_special_tokens=True)
    return text.split("\n")[0].split(". ")[0].strip()


def answered(lm: LM, probe: Probe) -> dict[str, Any]:
    return {
        "answer": plainly(lm, probe.prompt, probe.answer),
        "other": plainly(lm, probe.prompt, probe.other or ""),
        "text": spoken(lm, probe.prompt),
    }


def by_hand(probe: Probe, before: dict[str, Any], after: dict[str, Any]) -> metrics.Scores:
    ids, argmax, likely = after["answer"]
    if probe.kind == "neighbourhood":
        kept = [a == b for a, b in zip(before["answer"][1], argmax, strict=True)]
        forced, generated = sum(kept) / len(kept), before["text"].strip(".") == after["text"].strip(".")
    else:
        forced = sum(a == b for a, b in zip(ids, argmax, strict=True)) / len(ids)
        said, wanted = (re.findall(r"\w+", text.lower()) for text in (after["text"], probe.answer))
        generated = any(said[i : i + len(wanted)] == wanted for i in range(len(said)))
    return {"forced": forced, "compare": float(likely > after["other"][2]), "generated": float(generated)}


def scores(lm: LM, patch: Patch, probes: list[Probe]) -> tuple[list[metrics.Scores], list[metrics.Scores]]:
    """Of each probe, errata's scores and those by hand."""
    before, plain_before = ask(lm, probes), [answered(lm, p) for p in probes]
    with patch.applied(lm):
        after, plain_after = ask(lm, probes), [answered(lm, p) for p in probes]
    ours = [metrics.score(*parts) for parts in zip(probes, before, after, strict=True)]
    return ours, [by_hand(*parts) for parts in zip(probes, plain_before, plain_after, strict=True)]


@pytest.mark.parametrize("record", ["FT-L/single_case0.json", "MEMIT/batch4.json"])
def test_every_score_is_that_of_plain_passes(lm: LM, record: str):
    numbers, _, _, patch = theirs(Path(record))
    probes = [p for n in (*numbers, 45, 90, 135) for p in facts()[n].probes[1:]]
    ours, hand = scores(lm, patch, probes)
    assert ours == hand
    assert len({fmean(s[name] or 0.0 for s in ours) for name in metrics.PROTOCOLS}) > 1  # they ask different things
    rows = [metrics.score_case(probes[i : i + 2], ours[i : i + 2]) for i in range(0, len(ours), 2)]
    summary = metrics.summarise(rows, seed=0)
    for metric, first in (("generalization", 0), ("locality", 1)):
        for name in metrics.PROTOCOLS:
            assert summary[metric][name]["mean"] == pytest.approx(fmean(s[name] or 0.0 for s in hand[first::2]))
