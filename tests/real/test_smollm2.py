"""What is promised of tiny models, on one that was really pretrained: SmolLM2-135M-Instruct."""

from __future__ import annotations

import pytest

from errata import LM

pytestmark = pytest.mark.real


def test_it_knows_what_it_should(smollm2: LM):
    """The weights and the tokenizer that came out of the GGUF file are those of the model."""
    assert smollm2.generate("The capital of France is", 1) == " Paris"
    assert smollm2.generate("The mother tongue of Danielle Darrieux is", 1) == " French"
    assert smollm2.tokenizer.decode(smollm2.tokenizer("in 2015, ½ of Zürich")["input_ids"]) == "in 2015, ½ of Zürich"
