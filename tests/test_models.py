"""What `docs/models.md` says of every causal type of transformers is so: tried on one of each kind."""

from __future__ import annotations

import json
import re

import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from docs import models

ONE_OF_EACH = (
    "gpt2",
    "llama",
    "gemma3_text",
    "qwen3_5_text",
    "lfm2",
    "falcon_h1",
    "mamba",
    "bart",
    "llama4_text",
    "qwen3_moe",
    "bert",
)
ROWS = json.loads((models.HERE / "models.json").read_text())


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_a_type_is_edited_and_asked_rightly_or_refused_as_the_table_says(kind: str):
    assert models.row(kind) == ROWS[kind]


def test_every_type_is_right_or_refused():
    assert [(kind, what) for kind, row in ROWS.items() for what in row if row[what].startswith("wrong")] == []


def test_the_table_is_of_every_causal_type():
    page = (models.HERE / "models.md").read_text()
    assert page.endswith(models.table(ROWS))
    made_with = re.search(r"transformers (\S+) has", page)
    assert made_with
    if made_with[1] == transformers.__version__:
        assert set(ROWS) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
