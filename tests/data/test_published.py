"""Formats beyond CounterFact, ZsRE and KnowEdit's facts: a published row becomes a case; a bad one is named."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from errata import Case, Edit, ErrataError, UsageError
from errata.data import hub, load

SHARED = Path(__file__).parents[3] / "shared" / "data"


def one(tmp_path: Path, *rows: Any, name: str = "rows.json") -> list[Case]:
    (tmp_path / name).write_text(json.dumps(list(rows)))
    return load(tmp_path / name, strict=True)


def asked(case: Case) -> list[tuple[str, str, str, str]]:
    return [(p.kind, p.aspect, p.prompt, p.answer) for p in case.probes[len(case.edits) :]]


def query(prompt: str, *answers: str) -> dict[str, Any]:
    found = [{"value": answers[0], "aliases": list(answers[1:])}]
    return {"test_queries": [{"prompt": prompt, "answers": found, "query_type": "regular"}], "test_condition": "OR"}


RIPPLE = {
    "example_type": "popular",
    "edit": {
        "prompt": "The name of the country of citizenship of Leonardo DiCaprio is Syria.",
        "relation": "COUNTRY_OF_CITIZENSHIP",
        "original_fact": {
            "prompt": "The name of the country of citizenship of Leonardo DiCaprio is United States of America."
        },
    },
    "Relation_Specificity": [query("The name of the mother of Leonardo DiCaprio is", "Irmelin DiCaprio")],
    "Compositionality_I": [query("The capital of the country of citizenship of DiCaprio is", "Damascus", "Sham")],
    "Forgetfulness": [],
}


def test_ripple_edits(tmp_path: Path):
    (case,) = one(tmp_path, RIPPLE)
    prompt = "The name of the country of citizenship of {} is"
    assert case.edit == Edit(prompt, "Leonardo DiCaprio", "Syria", "United States of America")
    assert asked(case) == [
        ("portability", "Compositionality_I", "The capital of the country of citizenship of DiCaprio is", "Damascus"),
        (
            "neighbourhood",
            "Relation_Specificity",
            "The name of the mother of Leonardo DiCaprio is",
            "Irmelin DiCaprio",
        ),
    ]
    assert case.probes[1].aliases == ("Sham",)


@pytest.mark.parametrize(
    ("sentence", "subject", "target"),
    [
        ("The place of birth of Ingrid of Sweden is Paris.", "Ingrid of Sweden", "Paris"),
        ("The names of the siblings of Anna are Bo.", "Anna", "Bo"),
        ("The name of the league which F.C. Porto plays in is NBA.", "F.C. Porto", "NBA"),
        ("The name of the position held by Frederic Piesch is mayor.", "Frederic Piesch", "mayor"),
        ("The number of children Ada Lovelace has is 3.", "Ada Lovelace", "3"),
        ("The name of the award Bob Dylan won is Oscar.", "Bob Dylan", "Oscar"),
        ("The name of the currency in Chad is peso.", "Chad", "peso"),
        ("Help! follows Rubber Soul.", "Help!", "Rubber Soul"),
    ],
)
def test_subject_and_answer_of_a_sentence_of_ripple_edits(sentence: str, subject: str, target: str, tmp_path: Path):
    (case,) = one(tmp_path, {"edit": {"prompt": sentence, "relation": "X"}})
    assert (case.edit.subject, case.edit.target) == (subject, target)
    assert f"{case.edit.text} {target}." == sentence


def test_mquake_makes_all_edits_of_a_case_together(tmp_path: Path):
    def rewrite(subject: str, new: str, old: str) -> dict[str, Any]:
        return {"prompt": "{} is in", "subject": subject, "target_new": {"str": new}, "target_true": {"str": old}}

    row = {
        "case_id": 7,
        "requested_rewrite": [rewrite("A", "B", "C"), rewrite("B", "D", "E")],
        "questions": ["Where is the place of A?"],
        "answer": "E",
        "new_answer": "D",
        "new_answer_alias": ["d."],
        "new_single_hops": [{"question": "Where is A?", "answer": "B", "answer_alias": []}],
    }
    (case,) = one(tmp_path, row)
    assert case.edits == (Edit("{} is in", "A", "B", "C"), Edit("{} is in", "B", "D", "E"))
    assert [(p.kind, p.prompt, p.answer) for p in case.probes[:2]] == [
        ("efficacy", "A is in", "B"),
        ("efficacy", "B is in", "D"),
    ]
    assert asked(case) == [
        ("portability", "multi-hop", "Where is the place of A?", "D"),
        ("portability", "single-hop", "Where is A?", "B"),
    ]
    assert (case.probes[2].other, case.probes[2].aliases) == ("E", ("d.",))


def test_long_answers(tmp_path: Path):
    unke = {
        "id": 3,
        "question": "What does George do?",
        "para_question": "George's work?",
        "answer": "He is active in politics. He was elected twice.",
        "sub_question": ["How often was he elected?"],
        "sub_answer": ["Twice."],
    }
    akew = {
        "case_id": 4,
        "requested_rewrite": {
            "prompt": "The mother tongue of {} is",
            "question": "What is the mother tongue of Ann?",
            "subject": "Ann",
            "target_new": {"str": "English"},
            "target_true": {"str": "French"},
            "relation_id": "P103",
            "fact_new_uns": "Ann grew up in Leeds. Her mother tongue is English.",
            "unsfact_triplets_GPT": [{"prompt": "{} grew up in", "subject": "Ann", "target": "Leeds"}],
        },
        "paraphrase_prompts": ["Ann speaks"],
    }
    first, second = one(tmp_path, unke, akew)
    assert first.id == 3
    assert first.edit.text == first.edit.subject == unke["question"]
    assert first.edit.target == unke["answer"]
    assert asked(first)[1] == ("portability", "sub-question", "How often was he elected?", "Twice")
    assert (second.edit.prompt, second.edit.subject) == ("What is the mother tongue of {}?", "Ann")
    assert second.edit.target.startswith("Ann grew up")
    assert asked(second) == [
        ("paraphrase", "", "Ann speaks", second.edit.target),
        ("portability", "sub-question", "Ann grew up in", "Leeds"),
    ]


def test_knowedits_other_tasks(tmp_path: Path):
    bio = {
        "text": "This is about rick mahler. Rick Mahler was a pitcher.",
        "labels": "He was drafted in 1975.",
        "concept": "rick mahler",
        "locality": {"Relation_Specificity": [{"prompt": "rick mahler died of", "ground_truth": ["age"]}]},
    }
    (case,) = one(tmp_path, bio)
    assert case.edit.text == bio["text"]
    assert case.edit.subject.lower() == "rick mahler"
    assert asked(case) == [("neighbourhood", "Relation_Specificity", "rick mahler died of", "age")]
    topics = [{"ent": t, "pos": ["I like it."], "neg": ["I do not."]} for t in ("tea", "rain")]
    first, second = one(tmp_path, *topics, name="topics.json")
    assert (first.edit.target, first.edit.truth) == ("I like it.", "I do not.")
    assert (second.edit.target, second.edit.truth) == ("I do not.", "I like it.")
    assert {p.kind for p in first.probes[1:]} == {"paraphrase"}
    refused = [{"question": f"Who is {n}?", "ground_truth": n, "target_new": "I don't know."} for n in "AB"]
    (tmp_path / "trivia.json").write_text(json.dumps({"success": refused, "locality": refused[1:]}))
    loaded = load(tmp_path / "trivia.json", strict=True)
    assert [c.edit.text for c in loaded] == ["Who is A?", "Who is B?"]
    assert asked(loaded[0]) == [("neighbourhood", "", "Who is B?", "B")]


QAEDIT = {"rephrase": "which", "locality": []}


def test_qaedit(tmp_path: Path):
    row = {
        "id": 9,
        "prompt": "who won the cup",
        "subject": "the Cup",
        "target": "Rosenborg",
        "rephrase": "which team took the cup",
        "locality": [{"loc": "who sang it", "loc_ans": "Keith"}],
    }
    (case,) = one(tmp_path, row)
    assert (case.edit.prompt, case.edit.subject) == ("who won {}", "the cup")
    assert asked(case) == [
        ("paraphrase", "", "which team took the cup", "Rosenborg"),
        ("neighbourhood", "", "who sang it", "Keith"),
    ]


def test_a_question_of_qaedit_that_lacks_a_space_keeps_its_subject_and_its_text(tmp_path: Path):
    question = "In which Thomas Hardynovel does John Loveday appear?"
    (case,) = one(tmp_path, {"prompt": question, "subject": "Thomas Hardy", "target": "Emma", **QAEDIT})
    assert (case.edit.text, case.edit.subject) == (question, "Thomas Hardy")
    with pytest.raises(ErrataError, match="only as a part of a word"):  # by accident, as far as one can tell
        one(tmp_path, {"prompt": "who is an artist", "subject": "art", "target": "Klee", **QAEDIT})


# A user's own


def test_ones_own_as_json_and_as_csv_are_the_same(tmp_path: Path):
    row = {
        "case_id": "a",
        "prompt": "The capital of {} is",
        "subject": "Peru",
        "target": "Oslo",
        "truth": "Lima",
        "paraphrases": ["Peru is governed from"],
        "neighbours": [{"prompt": 'The capital of "Cuba", is', "answer": "Havana"}],
        "portability": [{"prompt": "People in Peru's capital speak", "answer": "Norwegian"}],
    }
    (case,) = one(tmp_path, row)
    (tmp_path / "rows.csv").write_text(
        "case_id,prompt,subject,target,truth,paraphrase,neighbour_1,neighbour_answer_1,follows,follows_answer\n"
        'a,The capital of {} is,Peru,Oslo,Lima,Peru is governed from,"The capital of ""Cuba"", is",Havana,'
        "People in Peru's capital speak,Norwegian\n"
    )
    assert load(tmp_path / "rows.csv") == [case]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert load(tmp_path / "rows.jsonl") == [case]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"subject": "Chile"}, "field 'prompt': the subject 'Chile' is not in the prompt"),
        ({"target": 3}, "field 'target': expected a text, found 3"),
        ({"neighbours": [{"prompt": "Cuba is"}]}, r"field 'neighbours\.0\.answer': expected a text, found none"),
        ({"neighbours": ["Cuba is"]}, r"field 'neighbours\.0': expected fields by name, found 'Cuba is'"),
        ({"paraphrases": "Peru"}, "field 'paraphrases': expected a list of texts"),
    ],
)
def test_a_bad_row_is_named_by_file_row_and_field(
    change: Any, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    good = {"prompt": "The capital of Peru is", "subject": "Peru", "target": "Oslo"}
    (tmp_path / "mine.json").write_text(json.dumps([good, {**good, **change}]))
    with pytest.raises(ErrataError, match=f"mine.json, row 2: {said}"):
        load(tmp_path / "mine.json", strict=True)
    with caplog.at_level(logging.WARNING):
        assert len(load(tmp_path / "mine.json")) == 1
    assert "mine.json: 1 rows left out, 1 loaded" in caplog.text


def test_a_csv_line_with_a_cell_too_many_is_named(tmp_path: Path):
    (tmp_path / "mine.csv").write_text("prompt,subject,target\nPeru is,Peru,Oslo\nCuba is,Cuba,Rome,Lima\n")
    with pytest.raises(ErrataError, match=r"mine.csv, row 2: it can't be read \(it has more or fewer cells"):
        load(tmp_path / "mine.csv", strict=True)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b'[{"prompt": "\xe9"}]'])
def test_a_file_that_is_no_utf8_is_one_sentence(content: bytes, tmp_path: Path):
    (tmp_path / "mine.json").write_bytes(content)
    with pytest.raises(UsageError, match="can't be read .* in UTF-8"):
        load(tmp_path / "mine.json")


# By name


def test_a_name_resolves_on_the_hub_and_a_file_here_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    row = {"prompt": "Peru is", "subject": "Peru", "target": "Oslo"}
    seen = []
    monkeypatch.setattr(hub, "rows", lambda where, split: [seen.append((where, split)), [row]][1])
    assert load("somebody/facts")[0].edit.subject == "Peru"
    assert load("counterfact", part="validation")[0].edit.subject == "Peru"
    assert seen == [("somebody/facts", "train"), (hub.NAMES["counterfact"], "validation")]
    (tmp_path / "facts.json").write_text(json.dumps([row]))
    monkeypatch.setattr(hub, "file", lambda where: [seen.append(where), tmp_path / "facts.json"][1])
    assert load("somebody/facts:test.json")[0].edit.target == "Oslo"
    assert seen[-1] == "somebody/facts:test.json"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "somebody").mkdir()
    (tmp_path / "somebody" / "facts.json").write_text(json.dumps([row]))
    assert len(load("somebody/facts.json")) == 1


def test_a_hub_that_is_not_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("Cannot reach the hub.\nmore")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(ErrataError, match=r"can't be had from the hub \(Cannot reach the hub\); give its file instead"):
        load("knowedit-zsre")


# Real samples


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared samples are not here")
@pytest.mark.parametrize(
    ("name", "cases", "probes"),
    [
        ("mquake/mquake_hard_120.json", 120, {("portability", "multi-hop"): 360, ("portability", "single-hop"): 480}),
        ("qaedit/QAEdit_inter_1k.json", 1000, {("paraphrase", ""): 1000, ("neighbourhood", ""): 5000}),
        ("unke/final_data_v2.json", 1000, {("paraphrase", ""): 1000, ("portability", "sub-question"): 4729}),
        ("knowedit/wikibio_train.json", 464, {("neighbourhood", "Relation_Specificity"): 928}),
        (
            "zsre/mend_eval_portability_400.json",
            400,
            {("paraphrase", ""): 400, ("neighbourhood", ""): 400, ("portability", ""): 400},
        ),
    ],
)
def test_real_samples_load_whole(name: str, cases: int, probes: dict[tuple[str, str], int]):
    found = load(SHARED / name, strict=True)
    assert len(found) == cases
    counted = Counter((p.kind, p.aspect) for c in found for p in c.probes)
    assert {key: counted[key] for key in probes} == probes
