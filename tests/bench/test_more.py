"""Fluency, consistency, ability, chat, a judge: each beside a small implementation or an endpoint of its own."""

from __future__ import annotations

import copy
import json
import math
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import errata
from errata import FTM, ICE, LM, Case, Edit, ErrataError, Patch, UsageError
from errata import ask as asking
from errata.ask import Asking
from errata.bench import Plan, ability, run, run_grid, writing
from errata.bench.ability import Ability
from errata.bench.journal import Journal
from errata.bench.judge import Judge, judged

pytestmark = pytest.mark.filterwarnings("ignore:.*has no published settings")
FT = {"layers": (2,), "steps": 4, "rate": 5e-3}


# Writing


def by_hand(text: list[str]) -> float:
    """Zhang's entropy, counted the long way."""
    total = 0.0
    for n, weight in ((2, 2 / 3), (3, 4 / 3)):
        grams = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
        shares = [grams.count(g) / len(grams) for g in sorted(set(grams))]
        total += weight * -sum(s * math.log(s, 2) for s in shares)
    return total / 2


@pytest.mark.parametrize(
    "text", ["a b a b a b c a b", "one two three four five", "no no no no", "It's Lima, it is Lima ."]
)
def test_fluency_is_the_weighted_entropy_of_pairs_and_triples(text: str):
    assert writing.fluency(text) == pytest.approx(by_hand(writing.words(text)))


def test_a_model_that_repeats_itself_is_not_fluent():
    assert writing.fluency("no no no no no no") == 0
    assert writing.fluency("a b c d e f") > 1.9
    assert writing.fluency("") == writing.fluency("word") == 0


def test_consistency_is_the_cosine_of_tf_idf():
    texts = ["the cat sat", "the dog sat", "the cat ran away"]
    rarity = writing.rarities(texts)
    vocabulary = sorted({w for t in texts for w in t.split()})
    idf = torch.tensor([math.log(4 / (1 + sum(w in t.split() for t in texts))) + 1 for w in vocabulary])
    one, two = (torch.tensor([float(t.split().count(w)) for w in vocabulary]) * idf for t in texts[:2])
    wanted = float(one @ two / one.norm() / two.norm())
    assert writing.cosine(*(writing.weighted(t, rarity) for t in texts[:2])) == pytest.approx(wanted)
    assert writing.cosine(writing.weighted("THE CAT sat", rarity), writing.weighted(texts[0], rarity)) == pytest.approx(
        1
    )
    assert writing.cosine(writing.weighted("zebra", rarity), writing.weighted(texts[0], rarity)) == 0


def test_what_is_written_is_scored_and_is_no_answer(gpt2: LM, cases: list[Case], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(asking, "AT_LENGTH", 12)
    case = replace(cases[1], openings=("France is a", "The capital of"), references=("Rome is a city .",))
    plain = run(FTM.preset(gpt2, **FT), gpt2, [cases[1]])
    found = run_grid(Plan(method={"ft-m": FT}, openings=True), gpt2, [case]).reports[0]
    (row,) = found.rows
    texts = [p["after"]["text"] for p in row["probes"] if p["kind"] == "opening"]
    assert len(texts) == 2
    assert row["metrics"]["fluency"] == {"written": pytest.approx(sum(map(writing.fluency, texts)) / 2)}
    assert 0 <= row["metrics"]["consistency"]["written"] <= 1
    others = {k: v for k, v in row["metrics"].items() if k not in ("fluency", "consistency")}
    assert others == plain.rows[0]["metrics"]
    with FTM.preset(gpt2, **FT).edit(gpt2, [case.edit]).applied(gpt2):
        assert gpt2.generate("France is a", max_new_tokens=12) == texts[0]


# Ability


def test_perplexity_and_kl_are_those_of_plain_passes(gpt2: LM, cases: list[Case]):
    pieces = ("The capital of Peru is Lima and", "People in Cuba govern from Havana", "Yes. Kenya is a country")
    patch = FTM(**FT).edit(gpt2, [cases[0].edit])
    found = ability.read(gpt2, patch, pieces)

    def passes() -> list[torch.Tensor]:
        out = []
        for piece in pieces:
            ids = torch.tensor([gpt2.tokenizer(piece)["input_ids"]])
            first = len(gpt2.tokenizer(piece.split(" ")[0])["input_ids"])
            with torch.no_grad():
                out.append((gpt2.model(ids).logits[0, first - 1 : -1].double().log_softmax(-1), ids[0, first:]))
        return out

    before = passes()
    with patch.applied(gpt2):
        after = passes()
    for name, said in (("perplexity_before", before), ("perplexity_after", after)):
        scored = torch.cat([p.gather(1, ids[:, None])[:, 0] for p, ids in said])
        assert found[name] == pytest.approx(math.exp(-scored.mean()), rel=1e-4)
    kl = torch.cat([(p.exp() * (p - q)).sum(1) for (p, _), (q, _) in zip(before, after, strict=True)]).mean()
    assert found["kl"] == pytest.approx(float(kl), rel=1e-3)
    assert found["kl"] > 0
    assert found["tokens"] == sum(len(ids) for _, ids in before)


def test_no_patch_leaves_every_ability(gpt2: LM):
    found = ability.read(gpt2, Patch(), ("The capital of Peru is Lima",))
    assert found["perplexity_before"] == found["perplexity_after"]
    assert found["kl"] == 0


@pytest.mark.parametrize("regime", ["single", "batch", "sequential"])
def test_ability_is_in_the_report_and_measured_once(regime: str, gpt2: LM, cases: list[Case], tmp_path: Path):
    (tmp_path / "held-out.txt").write_text("The capital of Norway is Oslo. " * 20)
    plan = Plan(method={"ft-m": FT}, regime=(regime,), text=str(tmp_path / "held-out.txt"))
    results = run_grid(plan, gpt2, cases[:2], tmp_path / "run")
    found = results.to_dict()["about"]["runs"][0]["ability"]
    assert found["perplexity_after"] != found["perplexity_before"]
    assert (tmp_path / "run" / "journal.jsonl").read_text().count('"kind": "ability"') == 1
    results.write(tmp_path / "run")
    assert "What else it can still do" in (tmp_path / "run" / "report.html").read_text()


def test_a_text_that_is_not_there_and_a_harness_that_is_not_installed_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match="pip install lm_eval"):
        Ability.of(None, ["hellaswag"])
    with pytest.raises(UsageError, match="can't be read"):
        Ability.of(tmp_path / "nowhere.txt")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(UsageError, match="holds no text"):
        Ability.of(tmp_path / "empty.txt")


@pytest.fixture
def harness(gpt2: LM, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """In place of lm-evaluation-harness; what it was asked. Its answer has the form that version 0.4.13 gives."""
    seen: dict[str, Any] = {}

    def simple_evaluate(model: Any, tasks: list[str]) -> Any:
        seen.update(patched=gpt2.patched, model=model.pretrained, tasks=tasks)
        values = {"alias": "quiz", "sample_len": 3, "acc,none": 0.5, "acc,strict": 0.25, "acc_stderr,none": "N/A"}
        return {"results": {"quiz": values}}

    huggingface = SimpleNamespace(HFLM=lambda pretrained, tokenizer: SimpleNamespace(pretrained=pretrained))
    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(simple_evaluate=simple_evaluate))
    monkeypatch.setitem(sys.modules, "lm_eval.models", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", huggingface)
    return seen


def test_tasks_are_asked_of_the_edited_model(gpt2: LM, cases: list[Case], harness: dict[str, Any]):
    patch = FTM(**FT).edit(gpt2, [cases[0].edit])
    assert Ability.of(None, ["quiz"]).measure(gpt2, patch) == {"quiz, acc": 0.5, "quiz, acc,strict": 0.25}
    assert harness == {"patched": 1, "model": gpt2.model, "tasks": ["quiz"]}


def test_a_patch_that_the_harness_would_not_see_has_no_tasks(
    gpt2: LM, cases: list[Case], harness: dict[str, Any], caplog: pytest.LogCaptureFixture
):
    patch = ICE().edit(gpt2, [cases[0].edit])
    assert Ability.of(None, ["quiz"]).measure(gpt2, patch) == {}
    assert harness == {}
    assert "tasks are not asked" in caplog.text


def test_the_harness_itself_sees_the_edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    lm = errata.load("almanac")
    asked = ["The mother tongue of Danielle Darrieux is", "The native language of Raymond Barre is"]
    rows = [{"question": asked[0], "answer": 1}, {"question": asked[1], "answer": 0}]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({**r, "choices": ["French", "English"]}) for r in rows))
    task = {
        "task": "tongues",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(tmp_path / "rows.jsonl")},
        "test_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tongues.yaml").write_text(json.dumps(task))  # which is YAML, too
    patch = errata.ROME.preset(lm).edit(lm, [errata.Edit(asked[0], "Danielle Darrieux", "English")])
    ability = Ability.of(None, [str(tmp_path / "tongues.yaml")])
    assert [ability.measure(lm, p)["tongues, acc"] for p in (Patch(), patch)] == [0.5, 1.0]


# Chat

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


@pytest.fixture
def chatting(gpt2: LM) -> LM:
    """A model whose tokenizer has a chat template."""
    tokenizer = copy.deepcopy(gpt2.tokenizer)
    tokenizer.chat_template = TEMPLATE
    return LM(gpt2.model, tokenizer, name="talker")


def test_in_a_chat_everything_is_asked_as_a_users_turn(
    gpt2: LM, chatting: LM, cases: list[Case], monkeypatch: pytest.MonkeyPatch
):
    probes = cases[0].probes
    with pytest.raises(UsageError, match="no chat template"):
        asking.ask(gpt2, probes, asking=Asking(chat=True))
    asked: list[list[int]] = []
    read = asking.read
    monkeypatch.setattr(
        asking, "read", lambda lm, prompts, edited: [asked.extend(map(list, prompts)), read(lm, prompts, edited)][1]
    )
    found = asking.ask(chatting, probes, asking=Asking(chat=True))
    messages = [[{"role": "user", "content": p.prompt}] for p in probes]
    read_by = chatting.tokenizer.apply_chat_template
    turns = [list(read_by(m, add_generation_prompt=True, return_dict=False)) for m in messages]
    assert sorted(asked) == sorted(turns)  # forced, compared and generated answers go on from the same tokens
    put = [replace(p, prompt=gpt2.tokenizer.decode(t)) for p, t in zip(probes, turns, strict=True)]
    assert [a.text for a in found] == [a.text for a in asking.ask(gpt2, put)]


def test_a_run_in_chat_edits_in_chat_and_says_so_over_the_table(chatting: LM, cases: list[Case], monkeypatch: Any):
    edited: list[Edit] = []
    patches = FTM.patches
    monkeypatch.setattr(FTM, "patches", lambda self, lm, edits: [edited.extend(edits), patches(self, lm, edits)][1])
    results = run_grid(Plan(method={"ft-m": FT}, chat=True), chatting, cases[:2])
    assert [e.chat for e in edited] == [True, True]
    (report,) = results.reports
    assert all(p["chat"] for row in report.rows for p in row["probes"])
    assert "edited and asked in chat" in str(results.table().title)
    assert "in chat" in str(report.table().title)
    plain = run_grid(Plan(method={"ft-m": FT}), chatting, cases[:2])
    assert "chat" not in str(plain.table().title)
    assert plain.reports[0].rows[0]["probes"][0]["answer"] == report.rows[0]["probes"][0]["answer"]
    assert plain.reports[0].rows[0]["probes"][0]["before"] != report.rows[0]["probes"][0]["before"]


# What the model knew


def test_only_what_the_model_knew_counts_and_the_report_says_of_how_many(gpt2: LM, cases: list[Case], tmp_path: Path):
    """Of five cases, the second and the fourth have a truth that the model does not say."""
    unknown = [replace(c, edit=replace(c.edit, truth="Ulan Bator")) for c in cases[:5]]
    wrong = [cases[0], unknown[1], cases[2], unknown[3], cases[4]]
    plan = Plan(method={"ft-m": FT}, known=True)
    results = run_grid(plan, gpt2, wrong, tmp_path)
    assert [r["case_id"] for r in results.reports[0].rows] == [cases[i].id for i in (0, 2, 4)]
    assert results.about["known"] == 5
    assert "the 3 of 5 cases it knew" in str(results.table().title)
    again = run_grid(plan, gpt2, wrong, tmp_path)
    assert again.to_dict()["rows"] == results.to_dict()["rows"]
    two = run_grid(replace(plan, n=2), gpt2, wrong)
    assert ([r["case_id"] for r in two.reports[0].rows], two.about["known"]) == ([cases[0].id, cases[2].id], 3)
    with pytest.raises(UsageError, match="knows none of 1 cases"):
        run_grid(plan, gpt2, [wrong[1]])


# A judge


@pytest.fixture
def endpoint() -> Iterator[Any]:
    """Says yes where the given answer is the right one, and remembers what it was sent."""
    seen: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, self.headers.get("Authorization"), body))
            lines = dict(
                line.split(": ", 1) for line in body["messages"][0]["content"].splitlines()[:3] if ": " in line
            )
            said = "Yes." if lines.get("Given answer") == lines["Right answer"] else "no"
            reply = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}/v1", seen=seen)
    server.shutdown()


def row(text: str) -> dict[str, Any]:
    probe = {"kind": "efficacy", "prompt": "Peru is", "answer": "Lima", "after": {"text": text}}
    return {"error": None, "probes": [probe], "metrics": {"reliability": {"generated": 1.0}, "locality": {}}}


def test_a_judge_is_asked_once_about_equal_answers(endpoint: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOME_KEY", "sesame")
    judge, journal = Judge.of({"url": endpoint.url, "model": "m", "key_variable": "SOME_KEY"}), Journal()
    rows = [row("Lima"), row("Oslo"), row("Lima")]
    judged(judge, rows, journal)
    assert [r["metrics"]["reliability"]["judged"] for r in rows] == [1.0, 0.0, 1.0]
    assert rows[0]["metrics"]["locality"] == {}
    assert len(endpoint.seen) == 2
    assert endpoint.seen[0][0] == "/v1/chat/completions"
    assert endpoint.seen[0][1] == "Bearer sesame"
    assert endpoint.seen[0][2]["model"] == "m"
    judged(judge, [row("Oslo")], journal)
    assert len(endpoint.seen) == 2  # the journal knows


def test_a_judge_is_in_the_report_only_when_asked_for(endpoint: Any, gpt2: LM, cases: list[Case]):
    plan = Plan(method={"ft-m": FT}, judge={"url": endpoint.url, "model": "m"})
    found = run_grid(plan, gpt2, cases[:2]).reports[0]
    assert found.summary["reliability"]["judged"]["n"] == 2
    without = run_grid(replace(plan, judge=None), gpt2, cases[:2]).reports[0]
    assert set(without.summary["reliability"]) == {"forced", "compare", "generated"}


def test_a_judge_that_can_not_be_asked_is_said():
    judge = Judge.of({"url": "http://127.0.0.1:9/v1", "model": "m"})
    with pytest.raises(ErrataError, match="gave no answer"):
        judge.opinion("a", "b", "c")
    for wrong in ({"model": "m"}, {"url": "ftp://x", "model": "m"}, {"url": "http://x", "model": "m", "shout": 1}):
        with pytest.raises(UsageError, match="url"):
            Judge.of(wrong)
