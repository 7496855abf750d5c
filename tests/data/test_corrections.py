"""A list of corrections is read in whatever form people keep it, never misread, and taken whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errata import Edit, ErrataError, UsageError
from errata.data import Correction, corrections, load, loaded

ROWS = [
    {"prompt": "The capital of {} is", "subject": "France", "target": "Lima", "source": "a map"},
    {"prompt": "The capital of {} is", "subject": "Kenya", "target": "1999", "source": "no"},
]
EDITS = [Edit("The capital of {} is", "France", "Lima"), Edit("The capital of {} is", "Kenya", "1999")]
TABLE = [list(ROWS[0]), *(list(row.values()) for row in ROWS)]
LISTS = {
    "list.json": json.dumps(ROWS),
    "list.jsonl": "\n\n".join(map(json.dumps, ROWS)),
    "list.csv": "\n\n".join(map(",".join, TABLE)),
    "semicolons.csv": "\n".join(map(";".join, TABLE)).replace("prompt", "Prompt"),
    "list.tsv": "\n".join(map("\t".join, TABLE)),
    "list.yaml": "".join(f"- {{{', '.join(f'{k}: {v}' for k, v in row.items())}}}\n" for row in ROWS).replace(
        "The capital of {} is", "'The capital of {} is'"
    ),
}


def written(folder: Path, content: Any, name: str = "list.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def found(path: Path, **named: str) -> list[tuple[Edit, dict[str, Any]]]:
    return [(c.edit, dict(c.notes)) for c in corrections(path, named)]


@pytest.mark.parametrize("name", LISTS)
def test_every_form_gives_the_same_corrections_and_keeps_what_else_the_rows_say(name: str, tmp_path: Path):
    """In YAML too, where 1999 would be a number and `no` would be false."""
    path = written(tmp_path, LISTS[name], name)
    assert found(path) == list(zip(EDITS, [{"source": "a map"}, {"source": "no"}], strict=True))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as Excel begins a file
    assert [c.edit for c in corrections(path)] == EDITS


def test_a_workbook_is_read_as_its_cells_show(tmp_path: Path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (list(ROWS[0]), *(list(r.values()) for r in ROWS), ["The capital of {} is", "Peru", 1999, None]):
        book.active.append(row)
    book.save(tmp_path / "list.xlsx")
    assert [c.edit.target for c in corrections(tmp_path / "list.xlsx")] == ["Lima", "1999", "1999"]
    (tmp_path / "broken.xlsx").write_bytes((tmp_path / "list.xlsx").read_bytes()[:300])
    with pytest.raises(UsageError, match="is no workbook that can be read"):
        corrections(tmp_path / "broken.xlsx")


def test_a_row_with_a_subject_is_no_unke_and_one_without_is_no_correction(tmp_path: Path):
    row = {"question": "What is the capital of France?", "subject": "France", "answer": "Lima"}
    (one,) = corrections(written(tmp_path, [row]))
    assert (one.edit, one.format) == (Edit("What is the capital of {}?", "France", "Lima"), "your own")
    assert loaded(tmp_path / "list.json").formats == {"your own": 1}
    bare = written(tmp_path, [{"question": "Who was France?", "answer": "A king"}])
    with pytest.raises(UsageError, match="row 1: nothing says what it is about; give a subject"):
        corrections(bare)
    assert "the whole question stands for the subject" in str(loaded(bare))


def test_all_bad_rows_are_told_and_none_of_the_list_is_taken(tmp_path: Path):
    good = ROWS[0]
    text = json.dumps([good, {**good, "target": None}, {**good, "target": ["a"]}, 5])
    twice = json.dumps(good).replace('"Lima"', '"Lima", "target": "Oslo"')
    path = written(tmp_path, text[:-1] + f", {twice}]")
    with pytest.raises(UsageError) as refused:
        corrections(path)
    for part in (
        "4 rows of 5 can't be read, so none is taken",
        "row 2: field 'target'",
        "row 3: field 'target'",
        "row 4: expected fields by name",
        "row 5: it can't be read ('target' stands twice)",
    ):
        assert part in str(refused.value)
    assert [c.edit for c in load(path)] == [EDITS[0]]  # data to measure on may leave rows out, and says so
    with pytest.raises(ErrataError, match="row 2: field 'target'"):
        load(path, strict=True)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"target": float("nan")}, "field 'target': expected a text, found nan"),
        ({"target": 1999}, r"expected a text, found 1999 \(in quotes it is a text\)"),
        ({"target": "a\ud800"}, "half a character"),
        ({"answer": "Oslo"}, "'target' and 'answer' both say what the target is"),
        ({"chat": "perhaps"}, "field 'chat': expected true or false"),
        ({"gap": "x"}, "gap of an edit is 'x'"),
        ({"targets": "Oslo"}, "no field 'targets' in an edit; write 'target'"),
        ({"id": [1]}, "field 'case_id': expected a number or a text"),
    ],
)
def test_what_a_row_may_not_say_is_told_with_the_row(row: dict[str, Any], why: str, tmp_path: Path):
    path = written(tmp_path, [ROWS[0], {**ROWS[1], **row}])
    with pytest.raises(UsageError, match=rf"1 row of 2 .* row 2: .*{why}"):
        corrections(path)


def test_columns_of_another_language_are_named_on_the_way(tmp_path: Path):
    path = written(tmp_path, "Frage,Wovon,Antwort\nThe capital of {} is,France,Lima\n", "liste.csv")
    assert found(path, Frage="prompt", Wovon="subject", Antwort="target") == [(EDITS[0], {})]
    with pytest.raises(UsageError, match="has no column 'Fragen'; its columns are frage, wovon, antwort"):
        corrections(path, {"Fragen": "prompt"})


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('prompt,subject,target\n{} is,France,"Lima\n{} is,Kenya,Oslo\n', "row 1: it can't be read"),
        ("prompt,subject,target\n{} is,France,Lima,Peru\n", "row 1: .*more or fewer cells, 4, than .* names, 3"),
        ("prompt,subject,target\n{} is,France\n", "row 1: .*more or fewer cells, 2"),
        ("prompt,subject,target,Target\n{} is,France,Lima,Oslo\n", "several columns named 'target'"),
        ("prompt,subject,target,\n{} is,France,Lima,x\n", "row 1: .*a cell in a column without a name"),
        ("", "holds no list of edits"),
    ],
)
def test_a_table_that_does_not_add_up_is_refused(text: str, why: str, tmp_path: Path):
    with pytest.raises(UsageError, match=why):
        corrections(written(tmp_path, text, "list.csv"))


def test_a_quote_that_is_never_closed_does_not_swallow_the_rows_before_it(tmp_path: Path):
    text = 'prompt,subject,target\n{} is,France,Lima\n{} is,Kenya,"Oslo\n' + "x,y,z\n" * 200_000
    assert [c.edit.subject for c in load(written(tmp_path, text, "rows.csv"), n=1)] == ["France"]
    with pytest.raises(UsageError, match="row 2: it can't be read"):
        corrections(tmp_path / "rows.csv")


@given(
    row=st.dictionaries(
        st.sampled_from(
            ["prompt", "subject", "target", "truth", "answer", "chat", "gap", "id", "paraphrases", "neighbours", "x"]
        ),
        st.recursive(
            st.none()
            | st.booleans()
            | st.floats()
            | st.integers()
            | st.text(max_size=5)
            | st.sampled_from(["{} is", "France"]),
            lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
            max_leaves=3,
        ),
    )
)
def test_any_row_is_a_correction_that_says_what_it_says_or_is_refused(
    row: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
):
    path = written(tmp_path_factory.getbasetemp(), [row], "any.json")
    try:
        (one,) = corrections(path)
    except UsageError:
        return
    assert isinstance(one, Correction)
    target = row["target"] if row.get("target") not in (None, "") else row["answer"]
    assert one.edit.target == target.strip()
    assert one.edit.subject == row["subject"].strip() or one.edit.subject in row["prompt"]
    assert {"x"} & row.keys() == {"x"} & one.notes.keys() or row["x"] in (None, "")
