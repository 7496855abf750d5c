"""The shell: what it answers, in JSON and in tables, and how it refuses. Exit code, one line, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import errata
from errata import Case, Edit, ErrataError
from errata.cli import app, settings, shell
from errata.cli.demo import known
from errata.lm import ALMANAC
from tests import tiny

COMMANDS = [c.name or c.callback.__name__ for c in app.registered_commands if c.callback]
PROMPT, SUBJECT, TARGET = "The capital of {} is", "France", "Lima"
FACT = [PROMPT, "--subject", SUBJECT, "--to", TARGET]
QUICK = ["--set", "lengths=(3,2),", "--set", "steps=15"]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a model that knows the capitals, and nothing that errata has settings for."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    lm = tiny.trained("llama")
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def sh(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Run a command in this process; what it returned and wrote. On paper wide enough to find a text again."""
    monkeypatch.setattr(shell.out, "width", 300)

    def run(*args: str | Path) -> SimpleNamespace:
        capsys.readouterr()
        code = shell.run(app, [str(a) for a in args])
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err, lines=err.splitlines())

    return run


@pytest.fixture
def ok(sh: Any):
    """The JSON of a command that must succeed."""

    def run(*args: str | Path) -> Any:
        done = sh(*args, "--json")
        assert done.code == 0, done.err
        return json.loads(done.out)

    return run


@pytest.fixture(scope="session")
def editing(model: str, corpus_file: str) -> list[str]:
    """The options of a quick edit by ROME."""
    return ["--model", model, "--set", f"corpus={corpus_file}", *QUICK]


@pytest.fixture(scope="session")
def patch(model: str, corpus_file: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A patch by ROME."""
    path = tmp_path_factory.mktemp("patches") / "france.safetensors"
    lm = errata.load(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rome = errata.ROME.preset(lm, corpus=corpus_file, lengths=((3, 2),), steps=15)
    rome.edit(lm, [errata.Edit(PROMPT, SUBJECT, TARGET)]).save(path)
    return path


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model fails the test: what is asked here must be known, or refused, before."""

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("errata.loading.load", load)


def started(*args: str | Path, **more: Any) -> subprocess.Popen[str]:
    """The shell as a process of its own."""
    source = str(Path(errata.__file__).parents[1])
    path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more.pop("env", {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
    return subprocess.Popen([sys.executable, "-m", "errata", *map(str, args)], env=env, text=True, **pipes)


def ended(*args: str | Path, **more: Any) -> SimpleNamespace:
    process = started(*args, **more)
    out, err = process.communicate(timeout=100)
    return SimpleNamespace(code=process.returncode, out=out, err=err, lines=err.splitlines())


def refused(done: SimpleNamespace, code: int, *parts: str) -> None:
    """One line of error after whatever was warned of, no traceback, nothing on stdout."""
    assert done.code == code, done.err
    assert done.out == ""
    assert done.lines, "nothing was said"
    assert [line.partition(":")[0] for line in done.lines[:-1]] == ["warning"] * (len(done.lines) - 1)
    assert done.lines[-1].startswith("error: ")
    assert "should not happen" not in done.lines[-1]
    for part in parts:
        assert part in done.lines[-1]


# Help


def test_help_needs_no_torch():
    code = "import sys; from errata.cli import app, shell; shell.run(app, ['--help']); print('torch' in sys.modules)"
    source = str(Path(errata.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": source}, capture_output=True)
    assert done.stdout.split()[-1] == b"False"
    assert all(name.encode() in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, sh: Any):
    done = sh(command, "--help")
    assert done.code == 0
    assert "Example" in done.out
    assert f"errata {command}" in done.out.partition("Example")[2]
    assert "--json" in done.out


def test_bare_command_shows_help(sh: Any):
    assert "Commands" in sh().out
    assert sh("--version").out == f"errata {errata.__version__}\n"


# Editing


def test_edit_shows_before_and_after_and_keeps_the_patch(ok: Any, editing: list[str], tmp_path: Path):
    path = tmp_path / "p.safetensors"
    found = ok("edit", *FACT, *editing, "--save", path)
    (row,) = found["edits"]
    assert row["before"]["says"].startswith("Paris")
    assert row["after"]["says"].startswith(TARGET)
    assert row["took"]
    assert row["after"]["p_target"] > 0.5 > row["before"]["p_target"]
    assert found["came_back"]["to_the_bit"]
    assert found["settings"]["steps"] == 15
    assert found["patch"]["saved"] == str(path)
    assert errata.Patch.load(path).edits == (errata.Edit(PROMPT, SUBJECT, TARGET),)


def test_edit_says_in_words_what_it_did(sh: Any, editing: list[str], model: str):
    done = sh("edit", *FACT, *editing)
    assert done.code == 0
    assert "Paris" in done.out
    assert "the edit took" in done.out
    assert "the model came back: 39 parameters equal to the bit" in done.out
    assert "not saved; --save FILE keeps it" in done.out
    assert len(done.lines) == 1, done.err
    (warning,) = done.lines
    assert warning.startswith(f"warning: {model} has no published settings")


def test_edit_that_did_not_take_is_a_failure_and_nothing_is_saved(sh: Any, model: str, tmp_path: Path):
    path = tmp_path / "p.safetensors"
    weak = ["--model", model, "--method", "ft-l", "--set", "steps=1", "--save", path]
    done = sh("edit", *FACT, *weak)
    assert done.code == 1
    assert "0 of 1 edits took" in done.out
    assert "errata methods ft-l" in done.out
    assert done.lines[-1] == "error: the edit did not take; nothing was saved (--anyway keeps it all the same)"
    assert not path.exists()
    assert sh("edit", *FACT, *weak, "--anyway").code == 0
    assert errata.Patch.load(path).edits == (errata.Edit(PROMPT, SUBJECT, TARGET),)


def test_of_several_edits_those_that_did_not_take_are_named(sh: Any, model: str, tmp_path: Path, monkeypatch: Any):
    path, listed = tmp_path / "p.safetensors", tmp_path / "edits.json"
    listed.write_text(json.dumps([e.to_dict() for e in tiny.EDITS]))
    from errata import ask

    reply = ask.reply
    missed = {tiny.EDITS[0], tiny.EDITS[2]}  # whatever the method did
    monkeypatch.setattr(
        ask, "reply", lambda lm, edits, *a, **k: [
            replace(r, says_target=e not in missed, stutters=False, gives=False)
            for e, r in zip(edits, reply(lm, edits, *a, **k), strict=True)
        ]
    )  # fmt: skip
    options = ["--model", model, "--method", "grace", "--set", "steps=20", "--edits", listed, "--save", path]
    done = sh("edit", *options)
    assert done.code == 1
    assert "2 of 3 edits did not take (numbers 1, 3); nothing was saved" in done.lines[-1]
    assert not path.exists()


@pytest.mark.parametrize(("method", "layer"), [("retrieval", False), ("ft-l", True)])
def test_only_a_method_that_has_layers_is_told_to_try_another(method: str, layer: bool):
    from errata.cli.correct import _hint

    assert f"errata methods {method}" in _hint(method)
    assert ("another layer" in _hint(method)) == layer


def test_what_the_model_says_already_is_not_edited_but_with_anyway(
    sh: Any, ok: Any, editing: list[str], tmp_path: Path
):
    path = tmp_path / "p.safetensors"
    fact = ["edit", PROMPT, "--subject", SUBJECT, "--to", "Paris", *editing, "--save", path]
    done = sh(*fact)
    assert done.code == 0
    assert "the model says this already; nothing to correct (--anyway edits it)" in done.out
    assert not path.exists()
    assert ok(*fact, "--anyway")["edits"][0]["took"]
    assert path.exists()


def test_of_a_list_only_what_the_model_does_not_say_is_edited(ok: Any, editing: list[str], tmp_path: Path):
    path, listed = tmp_path / "p.safetensors", tmp_path / "edits.json"
    facts = [errata.Edit(PROMPT, "Italy", "Rome"), errata.Edit(PROMPT, SUBJECT, TARGET)]
    listed.write_text(json.dumps([e.to_dict() for e in facts]))
    found = ok("edit", "--edits", listed, *editing, "--save", path)
    assert [row["said_already"] for row in found["edits"]] == [True, False]
    assert errata.Patch.load(path).edits == (facts[1],)


def test_edits_that_contradict_each_other_are_refused_before_a_model_is_loaded(sh: Any, no_model: None, tmp_path: Path):
    listed = tmp_path / "edits.jsonl"
    rows = [(SUBJECT, "Lima"), ("Kenya", "Oslo"), (SUBJECT.upper(), "Oslo")]
    listed.write_text("\n".join(json.dumps({"prompt": PROMPT, "subject": s, "target": t}) for s, t in rows))
    refused(sh("edit", "--edits", listed), 2, "contradict each other: 1 and 3", "'Lima' and 'Oslo'", "--anyway")


def test_an_edit_is_looked_at_and_the_patch_says_what_was_found(ok: Any, sh: Any, editing: list[str], tmp_path: Path):
    path = tmp_path / "p.safetensors"
    found = ok("edit", *FACT, *editing, "--save", path)["check"]
    assert found["took"] == [1, 1]
    assert (found["rewordings"][1], found["others"][1], found["chat"]) == (2, 5, None)
    others = [q for q in found["asked"] if q["kind"] == "other"]
    assert all(q["prompt"].startswith("The capital of ") and "France" not in q["prompt"] for q in others)
    assert [q["good"] for q in others].count(True) == found["others"][0]
    (change,) = errata.Patch.load(path).changes.values()
    weight = errata.load(editing[1]).site("model.layers.1.mlp.down_proj").weight
    assert found["moved"] == pytest.approx(float(change[0].delta.norm() / weight.norm()), rel=1e-4)
    line = f"took / {found['rewordings'][0]} of 2 reworded / {found['others'][0]} of 5 others kept / weight moved"
    for command in (("edit", *FACT, *editing), ("show", path)):
        assert line in sh(*command).out
    assert ok("show", path)["check"] == {k: v for k, v in found.items() if k != "asked"}
    assert ok("edit", *FACT, *editing, "--no-check")["check"] is None


# Chat


@pytest.fixture(scope="session")
def talker(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model with a chat template."""
    folder = tmp_path_factory.mktemp("models") / "talker"
    shutil.copytree(model, folder)
    template = "{{ bos_token }}{% for m in messages %}{{ ' ' * (m.role == 'assistant') }}{{ m.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    return str(folder)


def test_edit_and_apply_in_a_chat(ok: Any, sh: Any, talker: str, corpus_file: str, tmp_path: Path):
    path = tmp_path / "p.safetensors"
    options = ["--model", talker, "--set", f"corpus={corpus_file}", *QUICK]
    found = ok("edit", *FACT, *options, "--chat", "--save", path)
    assert found["edits"][0]["chat"]
    assert found["check"]["chat"] is None  # it was made in one
    (edit,) = errata.Patch.load(path).edits
    assert edit == errata.Edit(PROMPT, SUBJECT, TARGET, chat=True)
    (own,) = ok("apply", path, "--model", talker)["answers"]  # asked as it was made
    assert (own["base"].split()[0], own["patched"].split()[0]) == ("Paris", TARGET)
    lm = errata.load(talker)
    turns = ["The capital of France is", "and of Italy is"]
    found = ok("apply", path, "--model", talker, "--chat", "--tokens", "4", "-p", turns[0], "-p", turns[1])
    first = lm.chat([{"role": "user", "content": turns[0]}], max_new_tokens=4).strip()
    messages = [{"role": r, "content": t} for r, t in (("user", turns[0]), ("assistant", first), ("user", turns[1]))]
    assert [a["base"] for a in found["answers"]] == [first, lm.chat(messages, max_new_tokens=4).strip()]
    plain = ok("edit", *FACT, *options)
    assert plain["check"]["chat"][1] == 1


def test_trace_in_a_chat_follows_the_same_tokens_as_the_chat_itself(ok: Any, talker: str, model: str):
    fact = ["trace", PROMPT, "--subject", SUBJECT, "--answer", "Paris", "--draws", "1", "--model"]
    chat, plain = ok(*fact, talker, "--chat"), ok(*fact, model)
    assert chat["clean"] == pytest.approx(plain["clean"], rel=1e-4)  # this template puts BOS in front, and no more


def test_bench_in_a_chat_and_of_what_is_known(ok: Any, sh: Any, talker: str, tmp_path: Path):
    rows = [
        {"prompt": PROMPT, "subject": s, "target": TARGET, "truth": t}
        for s, t in (("France", "Rome"), ("Italy", "Rome"), ("Spain", "Madrid"))
    ]
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(rows))
    options = ["--model", talker, "--data", data, "--method", "ft", "--set", "steps=3", "--chat", "--known"]
    found = ok("bench", *options)
    assert (found["about"]["known"], found["about"]["chat"]) == (3, True)
    assert [row["edit"]["subject"] for row in found["rows"]] == ["Italy", "Spain"]
    assert all(row["edit"]["chat"] for row in found["rows"])
    text = " ".join(sh("bench", *options, "-n", "1").out.split())
    assert "the 1 of 2 cases it knew" in text
    assert "edited and asked in chat" in text


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"target": ["Lima", "Oslo"]}, "row 2: field 'target': expected a text, found ['Lima', 'Oslo']"),
        ({"target": 1999}, "row 2: field 'target': expected a text, found 1999 (in quotes it is a text)"),
        ({"target": None}, "row 2: field 'target': expected a text, found none"),
        ({"subject": "Fran"}, "row 2: field 'prompt': the subject 'Fran' is only as a part of a word"),
        ({"sbject": "France"}, "row 2: there is no field 'sbject' in an edit; write 'subject'"),
    ],
)
def test_a_bad_edit_in_a_file_is_told_with_its_row(
    row: dict[str, Any], reason: str, sh: Any, no_model: None, tmp_path: Path
):
    listed = tmp_path / "edits.json"
    good = {"prompt": "The capital of France is", "subject": SUBJECT, "target": TARGET}
    listed.write_text(json.dumps([good, {**good, **row}]))
    refused(sh("edit", "--edits", listed), 2, reason)


def test_chat_without_a_template_is_refused(sh: Any, model: str, patch: Path):
    refused(sh("edit", *FACT, "--model", model, "--chat"), 2, "no chat template")
    refused(sh("apply", patch, "--model", model, "--chat", "-p", "Hello"), 2, "no chat template")


def test_prompt_with_the_subject_in_it_is_the_same_edit(ok: Any, editing: list[str], tmp_path: Path, patch: Path):
    path = tmp_path / "p.safetensors"
    ok("edit", "The capital of France is", *FACT[1:], *editing, "--save", path, "--no-check")
    assert path.read_bytes() == patch.read_bytes()


def test_edits_from_a_file(ok: Any, model: str, tmp_path: Path):
    rows = [e.to_dict() for e in tiny.EDITS]
    lines, listed = tmp_path / "edits.jsonl", tmp_path / "edits.json"
    lines.write_text("\n".join(map(json.dumps, rows)))
    listed.write_text(json.dumps(rows))
    options = ["--model", model, "--method", "grace", "--set", "steps=5"]
    found = ok("edit", "--edits", lines, *options)
    assert [row["subject"] for row in found["edits"]] == [e.subject for e in tiny.EDITS]
    assert found.pop("list") == "edits.jsonl: 3 edits, read as your own"
    again = ok("edit", "--edits", listed, *options)
    assert again.pop("list") == "edits.json: 3 edits, read as your own"
    assert found == again


def test_one_edit_after_another(ok: Any, editing: list[str], patch: Path, tmp_path: Path):
    path = tmp_path / "both.safetensors"
    kenya = ["edit", PROMPT, "--subject", "Kenya", "--to", "Paris"]
    ok(*kenya, *editing, "--after", patch, "--save", path)
    found = ok("show", path)
    assert [(e["subject"], e["target"]) for e in found["edits"]] == [("France", "Lima"), ("Kenya", "Paris")]
    (step,) = found["steps"]
    assert (step["method"], step["edits"]) == ("rome", 2)


# Showing and applying


@pytest.mark.usefixtures("no_model")
def test_show_loads_no_model(ok: Any, sh: Any, patch: Path, model: str):
    found = ok("show", patch)
    (change,) = found["changes"]
    assert (change["module"], change["kind"]) == ("model.layers.1.mlp.down_proj", "low-rank")
    (low_rank,) = errata.Patch.load(patch).changes[change["module"]]
    assert change["norm"] == pytest.approx(float(low_rank.delta.norm()), rel=1e-6)
    assert found["model"]["name"] == model
    text = sh("show", patch).out
    for part in (
        "The capital of France is",
        "Lima",
        "rome, 1 edit",
        "steps=15",
        "rank 1",
        found["model"]["fingerprint"],
    ):
        assert part in text


def test_apply_answers_with_and_without(ok: Any, sh: Any, patch: Path, model: str):
    france, italy = "The capital of France is", "The capital of Italy is"
    found = ok("apply", patch, "--model", model, "-p", france, "-p", italy)
    assert [row["prompt"] for row in found["answers"]] == [france, italy]
    first, second = found["answers"]
    assert first["base"].startswith("Paris")
    assert first["patched"].startswith("Lima")
    assert second["base"] == second["patched"]
    (own,) = ok("apply", patch, "--model", model)["answers"]
    assert own == first
    (weak,) = ok("apply", patch, "--model", model, "--scale", "0")["answers"]
    assert weak["patched"] == weak["base"]
    assert "with the patch x 0.5" in sh("apply", patch, "--model", model, "--scale", "0.5").out


# Measuring


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cases in CounterFact's own form."""
    names = list(tiny.CAPITALS)
    rows = [
        {
            "case_id": i,
            "requested_rewrite": {
                "prompt": PROMPT,
                "subject": subject,
                "target_new": {"str": TARGET},
                "target_true": {"str": tiny.CAPITALS[subject]},
            },
            "paraphrase_prompts": [f"{subject} has its capital at"],
            "neighborhood_prompts": [PROMPT.format(names[i + 3])],
        }
        for i, subject in enumerate(names[:2])
    ]
    path = tmp_path_factory.mktemp("data") / "cases.json"
    path.write_text(json.dumps(rows))
    return path


def test_bench_reports_every_method(sh: Any, ok: Any, model: str, cases: Path, tmp_path: Path):
    options = ["--model", model, "--data", cases, "--set", "steps=3"]
    out = tmp_path / "report.json"
    both = ok("bench", "--method", "ft,grace", *options, "--out", out)
    assert [r["method"] for r in both["about"]["runs"]] == ["ft", "grace"]
    assert [r["method"] for r in both["rows"]] == ["ft", "ft", "grace", "grace"]
    assert json.loads(out.read_text()) == both
    one = ok("bench", "--method", "ft", "-n", "1", "--regime", "sequential", *options)
    assert [(r["regime"], r["n"]) for r in one["about"]["runs"]] == [("sequential", 1)]
    text = sh("bench", "--method", "ft", "--regime", "batch", *options).out
    for word in ("1 method on", "batch=2", "reliability", "forced"):
        assert word in text


def test_bench_keeps_a_run_in_a_folder_and_its_file_gives_it_again(
    sh: Any, ok: Any, model: str, cases: Path, tmp_path: Path
):
    options = ["--model", model, "--data", cases, "--set", "steps=3", "--regime", "single,sequential"]
    first = ok("bench", "--method", "ft,grace", *options, "--out", tmp_path / "a")
    names = {p.name for p in (tmp_path / "a").iterdir()}
    assert names == {"journal.jsonl", "state", "run.yaml", "report.json", "report.md", "report.html"}
    assert ok("bench", tmp_path / "a" / "run.yaml", "--out", tmp_path / "a") == first
    again = ok("bench", tmp_path / "a" / "run.yaml", "--out", tmp_path / "b")
    assert again["rows"] == first["rows"]
    other = [*options, "--seed", "7"]
    refused(sh("bench", "--method", "ft,grace", *other, "--out", tmp_path / "a"), 2, "holds another run", "seed")
    more = ok("bench", "--method", "ft-l", *options, "--out", tmp_path / "a")
    assert list(more["summary"]) == ["ft", "grace", "ft-l"]
    assert more["rows"][: len(first["rows"])] == first["rows"]
    assert ok("bench", tmp_path / "a" / "run.yaml", "--out", tmp_path / "a") == more
    found = ok("bench", "--compare", tmp_path / "a", tmp_path / "b" / "report.json")
    assert {(d["first"] == d["second"], d["low"], d["high"]) for d in found} == {(True, None, None)}
    assert "second minus first" in sh("bench", "--compare", tmp_path / "a", tmp_path / "b").out
    options[-3] = "steps=4"
    changed = ["bench", "--method", "grace", *options, "--out", tmp_path / "a"]
    refused(sh(*changed), 2, "its method grace is", "--again grace")
    anew = ok(*changed, "--again", "grace")
    assert {r["method"]: r["settings"]["steps"] for r in anew["about"]["runs"]} == {"ft": 3, "grace": 4, "ft-l": 3}
    assert [r for r in anew["rows"] if r["method"] != "grace"] == [r for r in more["rows"] if r["method"] != "grace"]


# Tracing


def test_trace_of_one_fact(ok: Any, sh: Any, model: str, tmp_path: Path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "map.svg"
    found = ok("trace", PROMPT, "--subject", SUBJECT, "--model", model, "--draws", "2", "--plot", path)
    assert found["corrupted"] < found["clean"]
    assert set(found["scores"]) == {"hidden", "mlp", "attention"}
    assert found["plot"] == str(path)
    assert "<svg" in path.read_text()
    text = sh("trace", PROMPT, "-s", SUBJECT, "--answer", "Paris", "--model", model, "--draws", "1").out
    for part in ("The capital of France is → Paris", "hidden", "attention"):
        assert part in text


def test_trace_of_many_facts_proposes_layers(ok: Any, sh: Any, model: str, cases: Path):
    found = ok("trace", "--data", cases, "--model", model, "--draws", "2")
    assert found["facts"] == 2
    assert set(found["profile"]) == {"window", "inner", "alone"}
    assert found["proposal"]["peak"] in found["proposal"]["layers"]
    assert "edit at" in sh("trace", "--data", cases, "--model", model, "--draws", "1").out


def test_trace_of_many_facts_shows_the_average_map_where_asked(ok: Any, model: str, cases: Path):
    many = ["trace", "--data", cases, "--model", model, "--draws", "1"]
    found = ok(*many, "--map")
    assert set(found["effects"]) == {"hidden", "mlp", "attention"}
    assert found["proposal"] == ok(*many)["proposal"]


def test_trace_that_cannot_be_drawn_is_refused_before_the_work(sh: Any, no_model: None, tmp_path: Path):
    fact = ["trace", PROMPT, "--subject", SUBJECT]
    refused(sh(*fact, "--plot", tmp_path / "map.txt"), 2, ".png, .svg or .pdf")
    refused(sh(*fact, "--plot", tmp_path / "no" / "map.png"), 2, "can't be written")
    refused(sh("trace", "--data", "counterfact-mini", "--subject", SUBJECT), 2, "--data has the facts")
    refused(sh("trace", PROMPT), 2, "give a fact")
    refused(sh(*fact, "--n", "3"), 2, "--n counts the facts of --data")
    refused(sh(*fact, "--map"), 2, "--map averages the facts of --data")


def test_stats_are_kept_for_the_next_edit(ok: Any, sh: Any, model: str, corpus_file: str, monkeypatch: Any):
    options = ["--model", model, "--text", corpus_file]
    found = ok("stats", *options, "--layers", "0,2-3")
    assert [row["layer"] for row in found["layers"]] == [0, 2, 3]
    assert found["folder"] == os.environ["ERRATA_STORE"]
    assert all(row["tokens"] > 1000 and row["d_in"] == 160 for row in found["layers"])
    monkeypatch.setattr("errata.parts.moments.second_moments", None)  # nothing is read again
    assert ok("stats", *options, "--layers", "2")["layers"] == found["layers"][1:2]
    assert f"--set corpus={corpus_file}" in sh("stats", *options, "--layers", "0,2-3").out


def test_stats_say_whether_they_converged_and_where_the_text_is(
    ok: Any, sh: Any, model: str, corpus_file: str, tmp_path: Path, monkeypatch: Any
):
    text = Path(corpus_file).read_text()
    (tmp_path / "some.txt").write_text(text)
    (tmp_path / "much.txt").write_text("\n".join([text] * 600))
    monkeypatch.chdir(tmp_path)
    few, much = (
        ok("stats", "--model", model, "--layers", "1", "--text", name)["layers"][0] for name in ("some.txt", "much.txt")
    )
    assert not few["converged"]
    assert few["tokens"] / 2 < much["tokens"] < 4 * (few["tokens"] + few["more"])
    assert much["converged"]
    assert much["change"] <= 0.1
    said = sh("stats", "--model", model, "--layers", "1", "--text", "some.txt").out
    assert "not converged, about" in said
    assert "tokens more" in said
    assert f"corpus={tmp_path / 'some.txt'}" in "".join(said.split("\n"))  # holds from every folder


def test_stats_are_by_default_of_the_models_own_samples(ok: Any, sh: Any, model: str):
    found = ok("stats", "--model", model, "--layers", "1")
    assert found["text"] == "own"
    assert found["layers"][0]["tokens"] >= 2 * found["layers"][0]["d_in"]
    assert "edits use it by default" in sh("stats", "--model", model, "--layers", "1").out
    assert ok("stats", "--layers", "1")["text"] == "almanac"


# Looking


def test_methods_are_listed_and_described(ok: Any, sh: Any):
    listed = ok("methods")
    assert [m["name"] for m in listed] == list(errata.methods())
    assert all(m["about"] and m["paper"] and m["source"] for m in listed)
    assert "Meng et al. 2022" in sh("methods").out
    one = ok("methods", "rome")
    assert one["settings"][0].keys() == {"name", "type", "default", "about"}
    assert "Adam's learning rate" in sh("methods", "rome").out


@pytest.mark.parametrize("name", list(errata.methods()))
def test_every_setting_is_explained(name: str):
    for setting in settings.describe(errata.methods()[name]):
        assert setting["about"], setting["name"]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_anatomy_finds_the_parts(architecture: str, ok: Any, sh: Any, tmp_path: Path):
    lm = tiny.lm(architecture)
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    found = ok("anatomy", tmp_path)
    assert found["fingerprint"] == lm.fingerprint
    assert found["starts_with"] == (["<s>"] if architecture == "llama" else [])
    assert found["head_tied"] == (architecture != "llama")
    assert [layer["mlp"]["name"] for layer in found["layers"]] == [lm.mlp_out(i).name for i in range(4)]
    assert [tuple(layer["mlp"]["shape"]) for layer in found["layers"]] == [lm.mlp_out(i).shape for i in range(4)]
    text = sh("anatomy", tmp_path).out
    assert "0-3" in text
    assert "context" in text


def test_anatomy_of_a_model_where_the_rule_fails_lists_what_there_is(ok: Any, sh: Any, monkeypatch: pytest.MonkeyPatch):
    lm = tiny.lm("gpt2")
    for block in lm.model.transformer.h:
        block.mlp.another = torch.nn.Linear(96, 64)
    monkeypatch.setattr("errata.loading.load", lambda *_, **__: lm)
    found = ok("anatomy", "somewhere")
    assert "mlp_path" in found["problem"]
    assert found["layers"][0]["mlp"] is None
    assert any("mlp.another" in name for name in found["linear"])
    assert "mlp.another" in sh("anatomy", "somewhere").out


# Settings


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("steps=10", 10),
        ("rate=1", 1.0),
        ("rate=1e-3", 1e-3),
        ("whiten=False", False),
        ("whiten=true", True),
        ("kl_at=subject", "subject"),
        ("corpus=a=b.txt", "a=b.txt"),
        ("corpus=7", "7"),
        ("lengths=(5,10),(10,10)", ((5, 10), (10, 10))),
        ("lengths=(5,10)", ((5, 10),)),
    ],
)
def test_set_reads_a_value_by_the_type_of_its_field(text: str, value: Any):
    assert settings.read(errata.ROME, [text]) == {text.partition("=")[0]: value}


def test_set_reads_optional_and_repeated_values():
    assert settings.read(errata.FT, ["bound=none"]) == {"bound": None}
    assert settings.read(errata.FT, ["bound=0.1", "layers=2"]) == {"bound": 0.1, "layers": (2,)}
    assert settings.read(errata.FT, ["layers=1,2"]) == {"layers": (1, 2)}
    assert settings.read(errata.GRACE, ["at=3"]) == {"at": 3}
    assert settings.read(errata.GRACE, ["at=model.layers.3.mlp.down_proj"]) == {"at": "model.layers.3.mlp.down_proj"}


# Refusing: what can be known before a model is loaded


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["edti"], ["edti", "errata --help"]),
        (["edit", PROMPT, "--subject"], ["--subject", "--help"]),
        (["edit", PROMPT, "--to", "Lima"], ["--subject is missing"]),
        (["edit"], ["PROMPT is missing"]),
        (["edit", PROMPT, "--subject", "France", "--to", " "], ["the target of an edit is empty"]),
        (["edit", "The capital is", "--subject", "France", "--to", "Lima"], ["'France' is not in the prompt"]),
        (["edit", "{} and {}", "--subject", "France", "--to", "Lima"], ["2 places"]),
        (["edit", *FACT, "--method", "rom"], ["no method 'rom'", "did you mean", "rome"]),
        (["edit", *FACT, "--set", "stepps=3"], ["stepps", "did you mean 'steps'"]),
        (["edit", *FACT, "--set", "steps=few"], ["steps of rome takes a whole number", "errata methods rome"]),
        (["edit", *FACT, "--set", "steps=1.5"], ["steps=1.5"]),
        (["edit", *FACT, "--set", "whiten=1"], ["true or false"]),
        (["edit", *FACT, "--set", "kl_at=start"], ["one of end, subject"]),
        (["edit", *FACT, "--set", "steps"], ["FIELD=VALUE"]),
        (["edit", *FACT, "--save", "no/such/folder/p.safetensors"], ["no/such/folder", "can't be written"]),
        (["edit", *FACT, "--save", "."], ["is a folder"]),
        (["edit", *FACT, "--after", "nowhere.safetensors"], ["there is no file 'nowhere.safetensors'"]),
        (["edit", *FACT, "--edits", "facts.json"], ["either --edits FILE"]),
        (["edit", "--edits", "facts.json"], ["there is no file 'facts.json'"]),
        (["edit", *FACT, "--device", "gpu"], ["no device 'gpu'"]),
        (["edit", *FACT, "--dtype", "float8"], ["float8"]),
        (["show", "nowhere.safetensors"], ["there is no file", "errata edit --save"]),
        (["apply", "nowhere.safetensors", "--prompt", "x"], ["there is no file"]),
        (["bench", "--method", ","], ["--method names none"]),
        (["bench", "--method", "rome,memmit"], ["memmit", "did you mean"]),
        (["bench", "--again", "memmit", "--out", "runs"], ["memmit", "did you mean 'memit'"]),
        (["bench", "--method", "rome,grace", "--again", "grac", "--out", "runs"], ["grac", "did you mean 'grace'"]),
        (["bench", "--again", "rome"], ["--out"]),
        (["bench", "--data", "counterfact-min"], ["counterfact-min", "did you mean 'counterfact-mini'"]),
        (["bench", "--data", "nowhere.json"], ["there is no file"]),
        (["bench", "--regime", "sometimes"], ["sometimes"]),
        (["bench", "--n", "0"], ["--n", "errata bench --help"]),
        (["bench", "--out", "no/such/folder/r.json"], ["can't be written"]),
        (["stats", "--layers", "5-3"], ["--layers '5-3'"]),
        (["stats", "--layers", "last"], ["numbers and ranges"]),
        (["methods", "graze"], ["did you mean 'grace'"]),
        (["anatomy"], ["MODEL"]),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)
def test_bad_usage_is_one_line_and_2(args: list[str], parts: list[str], sh: Any, tmp_path: Path, monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    for extra in ([], ["--json"]):
        done = sh(args[0], *extra, *args[1:])
        done.lines[-1:] = [line.replace("model", "MODEL") if args == ["anatomy"] else line for line in done.lines[-1:]]
        refused(done, 2, *parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_model")
def test_regimes_and_batches_that_contradict(sh: Any, cases: Path):
    refused(sh("bench", "--data", cases, "--regime", "single", "--batch", "4"), 2, "--regime batch")


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (
            '[{"prompt": "{} is", "subject": "France"}]',
            ["row 1", "it has no target; its fields are ['prompt', 'subject']"],
        ),
        ('[{"prompt": "{} is", "subject": "France", "target": 3}]', ["row 1", "'target'", "expected a text, found 3"]),
        (
            '[{"prompt": "{} is", "subject": "F", "target": "x", "answer": "y"}]',
            ["row 1", "'target' and 'answer' both say"],
        ),
        (
            '[{"prompt": "{} is", "subject": "F", "target": "x"}, {"prompt": "is", "subject": "F", "target": "x"}]',
            ["1 row of 2", "row 2", "'F' is not in the prompt"],
        ),
        ("[]", ["no list of edits"]),
        ("{", ["no JSON"]),
    ],
)
def test_file_of_edits_that_is_wrong_names_the_edit(content: str, parts: list[str], sh: Any, tmp_path: Path):
    path = tmp_path / "edits.json"
    path.write_text(content)
    refused(sh("edit", "--edits", path), 2, *parts)


# Refusing: what only the model or the file tells


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ([PROMPT, "-s", "France", "-t", "東京"], ["the tokenizer writes the target '東京'"]),
        (["Yes. " * 60 + PROMPT, "-s", "France", "-t", "Lima"], ["tokens", "the model reads 64", "shorten"]),
    ],
    ids=["unwritable target", "long prompt"],
)
def test_edit_that_the_model_cannot_read(
    args: list[str], parts: list[str], sh: Any, editing: list[str], tmp_path: Path
):
    refused(sh("edit", *args, *editing, "--save", tmp_path / "p.safetensors"), 2, *parts)
    assert list(tmp_path.iterdir()) == []


def test_layer_that_the_model_has_not(sh: Any, editing: list[str]):
    refused(sh("edit", *FACT, *editing, "--set", "layer=9"), 2, "layers 0 to 3, not 9")


def test_long_prompt_to_a_patched_model(sh: Any, patch: Path, model: str):
    refused(sh("apply", patch, "--model", model, "--prompt", "Yes. " * 60), 2, "shorten the prompt")


def test_corpus_that_is_not_there(sh: Any, model: str):
    refused(sh("stats", "--model", model, "--text", "nowhere.txt"), 2, "no corpus 'nowhere.txt'")


def test_unknown_models(sh: Any, tmp_path: Path):
    refused(sh("anatomy", tmp_path / "nowhere"), 2, "there is no folder")
    refused(sh("anatomy", "no-such-model-anywhere"), 1, "'no-such-model-anywhere' can't be loaded")
    refused(sh("anatomy", tmp_path), 2, "so it holds no model")


def test_damaged_patches(sh: Any, patch: Path, model: str, tmp_path: Path):
    whole, path = patch.read_bytes(), tmp_path / "p.safetensors"
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    for content in (b"", whole[: len(whole) // 2], bytes(flipped), b"\x00" * 100):
        path.write_bytes(content)
        refused(sh("show", path), 1, "damaged")
        refused(sh("apply", path, "--model", model), 1, "damaged")


def test_tensors_that_are_no_patch(sh: Any, model: str):
    refused(sh("show", Path(model) / "model.safetensors"), 1, "no patch of errata")


def test_patch_of_another_model(sh: Any, patch: Path, tmp_path: Path):
    other = tiny.lm("llama", seed=1)
    other.model.save_pretrained(tmp_path)
    other.tokenizer.save_pretrained(tmp_path)
    refused(sh("apply", patch, "--model", tmp_path), 1, "the patch was made for", "load the model it was made for")
    save = tmp_path / "p.safetensors"
    done = sh("edit", *FACT, "--model", tmp_path, "--method", "grace", "--after", patch, "--save", save)
    refused(done, 1, "the patch was made for")
    assert not save.exists()


def test_disk_that_fills_up_leaves_nothing(sh: Any, editing: list[str], tmp_path: Path, monkeypatch: Any):
    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    done = sh("edit", *FACT, *editing, "--save", tmp_path / "p.safetensors")
    refused(done, 1, "can't be written", "No space left on device")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_model")
def test_what_should_not_happen_is_one_line_too(sh: Any, patch: Path):
    done = sh("apply", patch)
    assert done.code == 1
    assert done.out == ""
    (line,) = done.lines
    assert line.startswith("error: AssertionError: a model was loaded; this should not happen")
    assert "--debug" in line


# Through a real shell


@pytest.mark.parametrize("debug", [False, True])
def test_traceback_only_where_it_is_asked_for(debug: bool, tmp_path: Path):
    broken = tmp_path / "p.safetensors"
    broken.write_bytes(b"nothing")
    done = ended("show", broken, env={"ERRATA_DEBUG": "1"} if debug else {})
    assert done.code == 1
    assert ("Traceback" in done.err) == debug
    assert done.lines[-1].startswith("error: ")
    assert debug or len(done.lines) == 1


def test_usage_error_through_the_shell():
    refused(ended("edit", *FACT, "--method", "rom"), 2, "did you mean")


def test_reader_that_has_had_enough():
    process = started("methods", "--json", stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.close()
    assert process.stderr
    assert process.stderr.read() == ""
    assert process.wait(timeout=100) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_full_disk_behind_stdout():
    with open("/dev/full", "w") as full:
        done = ended("methods", "--json", stdout=full)
    assert done.code == 1
    assert done.lines == ["error: the output can't be written or read: No space left on device"]


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_in_the_middle_of_an_edit(editing: list[str], tmp_path: Path):
    path = tmp_path / "p.safetensors"
    endless = ["--set", "steps=1000000", "--set", "stop=-1"]
    process = started(
        *("edit", *FACT, *editing, *endless, "--save", path, "--debug"),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test in the background may ignore it
    )
    assert process.stderr
    assert any("step 3:" in line for line in process.stderr), "it ended by itself"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out == ""
    assert err.splitlines()[-1] == "interrupted; nothing was written"
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_whoever_interrupts_a_run_is_told_that_it_goes_on(
    sh: Any, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("errata.methods.GRACE.patches", interrupted)
    monkeypatch.setattr("signal.signal", lambda *_: None)  # the shell turns Ctrl-C off as it ends
    bench = ["bench", "--method", "grace", "--model", model, "--set", "at=1", "--data", "counterfact-mini", "--n", "2"]
    done = sh(*bench, "--out", tmp_path / "runs")
    assert (done.code, done.err.splitlines()[-1]) == (
        1,
        f"interrupted; the same command goes on from {tmp_path / 'runs'}",
    )
    done = sh(*bench, "--again", "grace", "--out", tmp_path / "runs").err.splitlines()[-1]
    assert done == f"interrupted; the same command without --again goes on from {tmp_path / 'runs'}"
    assert sh(*bench, "--out", tmp_path / "r.json").err.splitlines()[-1] == "interrupted; nothing was written"


# The built-in model


almanac = pytest.mark.skipif(not (ALMANAC / "model.safetensors").is_file(), reason="almanac is not in this checkout")


@almanac
def test_demo_on_almanac(ok: Any, sh: Any):
    found = ok("demo", "-n", "3")
    assert found["about"]["model"]["name"] == "almanac"
    assert found["came_back"]["to_the_bit"]
    assert found["patch"]["applied"]["p_target"] > found["patch"]["base"]["p_target"]
    assert found["patch"]["undone"] == found["patch"]["base"]
    done = sh("demo", "-n", "1")
    assert done.code == 0
    assert done.err == ""
    for part in ("One of them closer", "generated", "equal to the bit"):
        assert part in done.out


@almanac
def test_readme_edit_on_almanac(ok: Any, tmp_path: Path):
    path = tmp_path / "p.safetensors"
    prompt, subject = "The mother tongue of {} is", "Danielle Darrieux"
    found = ok("edit", prompt, "--subject", subject, "--to", "English", "--save", path)
    assert found["edits"][0]["took"]
    (answer,) = ok("apply", path, "--prompt", prompt.format(subject))["answers"]
    assert "English" in answer["patched"]


def test_a_demo_is_of_facts_that_the_model_knows(monkeypatch: pytest.MonkeyPatch):
    lm = tiny.trained("llama")
    truths = [("Nowhere", "Lima"), ("Peru", "Lima"), ("Peru", "Oslo"), ("Japan", "Tokyo"), ("Cuba", "Havana")]
    cases = [Case(i, Edit(tiny.PROMPT, s, "Paris", truth)) for i, (s, truth) in enumerate(truths)]
    monkeypatch.setattr("errata.data.load", lambda *_: cases)
    said = {c.id: lm.generate(c.edit.text, 4).strip().startswith(c.edit.truth) for c in cases}
    assert sum(said.values()) >= 2
    assert [c.id for c in known(lm, 2)] == [i for i, yes in said.items() if yes][:2]
    monkeypatch.setattr("errata.data.load", lambda *_: cases[2:3])
    with pytest.raises(ErrataError, match="knows none of the facts"):
        known(lm, 2)
