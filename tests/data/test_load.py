from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from errata import ErrataError, UsageError
from errata.data import load
from errata.data.read import BUILT_IN

FILE = Path(__file__).parent / "counterfact.json"
ROW = {"prompt": "The capital of France is", "subject": "France", "target_new": "Rome", "ground_truth": "Paris"}


def written(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_the_part_for_editing_is_the_default_and_never_meets_the_one_for_training():
    edit, train = ({c.id for c in load(FILE, part=part)} for part in ("edit", "train"))
    assert {c.id for c in load(FILE)} == edit == {0, 2, 4, 6}
    assert len(train) == 2
    assert not edit & train


def test_n_takes_the_first():
    assert [c.id for c in load(FILE, n=2)] == [c.id for c in load(FILE)][:2]


def test_n_counts_cases_not_rows(tmp_path: Path):
    path = written(tmp_path / "rows.json", [{}, ROW, {}, ROW, ROW])
    assert [c.id for c in load(path, n=2)] == [2, 4]


def test_fewer_than_asked_for_is_said(caplog: pytest.LogCaptureFixture):
    assert len(load(FILE, n=10)) == 4
    assert "10 cases asked for, it has 4" in caplog.text


@pytest.mark.parametrize("n", [0, -1])
def test_no_cases_can_not_be_asked_for(n: int):
    with pytest.raises(UsageError, match="at least one"):
        load(FILE, n=n)


def test_json_lines_and_json_give_the_same(tmp_path: Path):
    rows = json.loads(FILE.read_text())["edit"]
    path = written(tmp_path / "rows.jsonl", "\n".join(json.dumps(r) for r in rows) + "\n\n")
    assert load(path) == load(FILE)
    assert load(str(path)) == load(path)


def test_a_row_number_is_the_line_also_behind_an_empty_one(tmp_path: Path):
    path = written(tmp_path / "rows.jsonl", f"\n{json.dumps(ROW)}\n\n{json.dumps(ROW)}\n")
    assert [c.id for c in load(path)] == [2, 4]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({**ROW, "target_new": ""}, "field 'target_new': expected a text, found ''"),
        ({**ROW, "target_new": {"str": "Rome"}}, "field 'target_new': expected a text, found {'str': 'Rome'}"),
        ({**ROW, "subject": "Italy"}, "field 'prompt': the subject 'Italy' is not in the prompt"),
        ({**ROW, "locality_prompt": "Rome is in"}, "field 'locality_ground_truth': expected a text, found none"),
        ({**ROW, "case_id": [1]}, "field 'case_id': expected a number or a text"),
        ({"requested_rewrite": {}}, "field 'requested_rewrite.target_true.str': expected a text, found none"),
        ({"requested_rewrite": "x"}, "field 'requested_rewrite.target_true.str': expected a text, found none"),
        ({**ROW, "portability": [1]}, "field 'portability': expected groups"),
        ({**ROW, "locality": {"A": ["x"]}}, "field 'locality.A.0': expected fields by name, found 'x'"),
        ({"question": "?"}, "fields ['question'] are of no format"),
        ("France", "expected fields by name, found str"),
        (None, "expected fields by name, found NoneType"),
    ],
)
def test_a_malformed_row_is_named_and_the_rest_loads(
    row: object, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    path = written(tmp_path / "rows.json", [ROW, row, ROW])
    assert [c.id for c in load(path)] == [1, 3]
    assert f"rows.json, row 2: {said}" in caplog.text
    assert "rows.json: 1 rows left out, 2 loaded" in caplog.text
    with pytest.raises(ErrataError, match=r"rows\.json, row 2: ") as error:
        load(path, strict=True)
    assert said in str(error.value)


def test_a_damaged_line_is_a_malformed_row(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = written(tmp_path / "rows.jsonl", f"{json.dumps(ROW)}\n{{oops\n{json.dumps(ROW)}")
    assert len(load(path)) == 2
    assert "rows.jsonl, row 2: it can't be read" in caplog.text


def test_a_file_of_nothing_but_bad_rows_says_why(tmp_path: Path):
    path = written(tmp_path / "rows.json", [{**ROW, "subject": ""}])
    with pytest.raises(UsageError, match=r"no case that can be read \(rows.json, row 1: field 'subject'"):
        load(path)
    with pytest.raises(UsageError, match="no case that can be read"):
        load(written(tmp_path / "none.json", []))


@pytest.mark.parametrize("content", ["{", "", "\udcff"])
def test_a_damaged_file_is_refused(content: str, tmp_path: Path):
    path = tmp_path / "rows.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UsageError, match=r"rows\.json"):
        load(path)


def test_a_file_that_is_neither_list_nor_parts_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="expected a list of rows"):
        load(written(tmp_path / "rows.json", 3))


def test_an_unknown_part_is_an_error_also_where_there_are_none(tmp_path: Path):
    with pytest.raises(UsageError, match=r"no part of counterfact\.json 'trian'; did you mean 'train'"):
        load(FILE, part="trian")
    for path in (written(tmp_path / "rows.json", [ROW]), written(tmp_path / "rows.jsonl", json.dumps(ROW))):
        with pytest.raises(UsageError, match="'train'"):
            load(path, part="train")


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(UsageError, match="no data set 'counterfact-mni'; did you mean 'counterfact-mini'"):
        load("counterfact-mni")


@pytest.mark.parametrize("path", ["nowhere.json", "no/where", Path("nowhere")])
def test_a_missing_file_is_said(path: str | Path):
    with pytest.raises(UsageError, match="there is no file"):
        load(path)


def test_what_ships_keeps_its_parts_apart():
    if not BUILT_IN["counterfact-mini"].is_file():
        pytest.skip("counterfact-mini.json is not here")
    edit, train = ({c.edit for c in load("counterfact-mini", part=part, strict=True)} for part in ("edit", "train"))
    assert len(edit) >= 100
    assert {(e.text) for e in edit}.isdisjoint(e.text for e in train)


def test_reading_data_needs_no_torch():
    code = "import sys, errata; errata.data.load(sys.argv[1]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, str(FILE)], check=False).returncode == 0
