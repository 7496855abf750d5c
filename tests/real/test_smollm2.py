"""What is promised of tiny models, on one that was really pretrained: SmolLM2-135M-Instruct."""

from __future__ import annotations

import json

import pytest

from errata import LM
from errata.cli import main

pytestmark = pytest.mark.real


def test_it_knows_what_it_should(smollm2: LM):
    """The weights and the tokenizer that came out of the GGUF file are those of the model."""
    assert smollm2.generate("The capital of France is", 1) == " Paris"
    assert smollm2.generate("The mother tongue of Danielle Darrieux is", 1) == " French"
    assert smollm2.tokenizer.decode(smollm2.tokenizer("in 2015, ½ of Zürich")["input_ids"]) == "in 2015, ½ of Zürich"


def test_the_demo_corrects_what_the_model_knows(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--model", "smollm2-135m", "-n", "1", "--json"])
    found = json.loads(capsys.readouterr().out)
    edit, says = found["patch"]["edit"], {k: found["patch"][k]["says"] for k in ("base", "applied", "undone")}
    assert ended.value.code == 0
    assert says["base"] == says["undone"]
    assert says["base"].startswith(edit["truth"])
    assert says["applied"].startswith(edit["target"])
    assert found["came_back"]["to_the_bit"]
