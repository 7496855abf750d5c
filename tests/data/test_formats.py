from __future__ import annotations

import json
from pathlib import Path

import pytest

from errata import Case, Edit, Probe
from errata.data import load

HERE = Path(__file__).parent
SHARED = HERE.parents[2] / "shared" / "data"

NATIVE = Edit("The mother tongue of {} is", "Danielle Darrieux", "English", "French")
FLAT = {
    "case_id": 0,
    "prompt": "The mother tongue of Danielle Darrieux is",
    "target_new": "English",
    "subject": "Danielle Darrieux",
    "ground_truth": "French",
    "rephrase_prompt": "Where Danielle Darrieux is from, people speak the language of",
    "locality_prompt": "Michel Rocard is a native speaker of",
    "locality_ground_truth": "French",
}
MEND = {
    "subject": "IAAF Combined Events Challenge",
    "src": "When was the inception of IAAF Combined Events Challenge?",
    "pred": "2011",
    "rephrase": "When was the IAAF Combined Events Challenge launched?",
    "alt": "2006",
    "answers": ["1998"],
    "loc": "nq question: what is the name of the last episode of spongebob",
    "loc_ans": "The String",
    "cond": "2011 >> 2006 || When was the inception of IAAF Combined Events Challenge?",
    "portability": {
        "Recalled Relation": "(IAAF Combined Events Challenge, event type, athletics)",
        "New Question": "What type of sports event is the IAAF Combined Events Challenge, established in 2006?",
        "New Answer": "Athletics",
    },
}
KNOWEDIT = {
    "subject": "Epaspidoceras",
    "target_new": "Noctuidae",
    "prompt": "Which family does Epaspidoceras belong to?",
    "ground_truth": ["Aspidoceratidae"],
    "rephrase_prompt": "What family are Epaspidoceras?",
    "locality": {"Relation_Specificity": [{"prompt": "Epaspidoceras taxon rank", "ground_truth": [["genus", "rank"]]}]},
    "portability": {
        "Reasoning": [{"prompt": "What is the common name for its family?", "ground_truth": "Owlet moths"}],
        "Subject_Aliasing": [],
    },
}


def loaded(tmp_path: Path, *rows: object) -> list[Case]:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    return load(path)


def test_counterfact_as_rome_has_it():
    case = load(HERE / "counterfact.json")[0]
    same = "Shayna does this and Yossel goes still and dies. Danielle Darrieux, a native"
    assert (case.id, case.edit, case.relation) == (0, NATIVE, "P103")
    assert [p.kind for p in case.probes] == ["efficacy", *["paraphrase"] * 2, *["neighbourhood"] * 4]
    assert case.probes[1] == Probe("paraphrase", same, "English", "French")
    assert case.probes[3] == Probe("neighbourhood", "The mother tongue of Léon Blum is", "French", "English")


def test_counterfact_as_easyedit_has_it(tmp_path: Path):
    near = Probe("neighbourhood", "Michel Rocard is a native speaker of", "French", "English")
    same = Probe("paraphrase", FLAT["rephrase_prompt"], "English", "French")
    assert loaded(tmp_path, FLAT) == [Case(0, NATIVE, (same, near))]


def test_easyedits_form_with_nothing_but_the_edit(tmp_path: Path):
    bare = {k: FLAT[k] for k in ("prompt", "subject", "target_new")}
    assert loaded(tmp_path, bare) == [Case(1, Edit(NATIVE.prompt, NATIVE.subject, "English"))]


def test_zsre_as_mend_has_it(tmp_path: Path):
    (case,) = loaded(tmp_path, MEND)
    assert case.edit == Edit("When was the inception of {}?", "IAAF Combined Events Challenge", "2006", "1998")
    assert case.probes[1:] == (
        Probe("paraphrase", MEND["rephrase"], "2006", "1998"),
        Probe("neighbourhood", MEND["loc"], "The String", "2006"),
        Probe("portability", MEND["portability"]["New Question"], "Athletics"),
    )


def test_knowedit_with_aspects_and_several_ways_to_write_an_answer(tmp_path: Path):
    (case,) = loaded(tmp_path, KNOWEDIT)
    assert case.edit == Edit("Which family does {} belong to?", "Epaspidoceras", "Noctuidae", "Aspidoceratidae")
    near = Probe("neighbourhood", "Epaspidoceras taxon rank", "genus", "Noctuidae", ("rank",), "Relation_Specificity")
    onward = Probe("portability", "What is the common name for its family?", "Owlet moths", aspect="Reasoning")
    assert case.probes[2:] == (near, onward)


def test_a_probe_that_has_no_answer_in_the_file_is_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    asked = [{"prompt": "The spouse of Epaspidoceras is", "ground_truth": [[]]}]
    (case,) = loaded(tmp_path, {**KNOWEDIT, "locality": {"Forgetfulness": asked}})
    assert "neighbourhood" not in [p.kind for p in case.probes]
    assert "rows.json, row 1, field 'locality.Forgetfulness'" in caplog.text


@pytest.mark.parametrize(
    ("file", "cases", "bad"),
    [
        ("counterfact/rome_format_500.json", 500, 0),
        ("counterfact/easyedit_format_edit.json", 9780, 0),
        ("counterfact/easyedit_format_train.json", 9769, 0),
        ("zsre/mend_train_1k.json", 998, 2),
        ("zsre/mend_eval_portability_400.json", 400, 0),
        ("knowedit/zsre_test_400.json", 400, 0),
        ("knowedit/wiki_counterfact_train.json", 1428, 0),
        ("knowedit/wiki_recent_train.json", 570, 0),
    ],
)
def test_published_files_load_whole(file: str, cases: int, bad: int, caplog: pytest.LogCaptureFixture):
    if not (SHARED / file).is_file():
        pytest.skip(f"../shared/data/{file} is not here")
    found = load(SHARED / file)
    assert len(found) == cases
    assert caplog.text.count("; left out") == bad
    assert {"efficacy", "neighbourhood"} <= {p.kind for c in found for p in c.probes}


def test_both_forms_of_counterfact_say_the_same():
    files = [SHARED / f"counterfact/{name}.json" for name in ("rome_format_500", "easyedit_format_edit")]
    if not all(f.is_file() for f in files):
        pytest.skip("../shared/data/counterfact is not here")
    rome, flat = ({c.id: c.edit for c in load(f)} for f in files)
    both = rome.keys() & flat.keys()
    assert len(both) > 100
    assert [i for i in both if rome[i] != flat[i]] == []
