"""A hundred edits in a row on almanac, stopped in the middle: the rest goes on from the file to the same bits."""

import pytest
import torch

import errata
from errata.data import load


@pytest.mark.slow
def test_a_sequence_that_stops_goes_on_from_disk_to_the_same_bits(tmp_path):
    lm = errata.load("almanac")
    method = errata.ROME.preset(lm, steps=4)
    batches = [[case.edit] for case in load("counterfact-mini", n=100)]
    *_, whole = errata.sequential(method, lm, batches)
    *_, half = errata.sequential(method, lm, batches[:50])
    half.save(tmp_path / "half.safetensors")
    *_, resumed = errata.sequential(
        method, errata.load("almanac"), batches[50:], errata.Patch.load(tmp_path / "half.safetensors")
    )
    assert resumed.edits == whole.edits
    answers = []
    for patch in (whole, resumed):
        with patch.applied(lm):
            weights = {name: w.clone() for name, w in lm.model.state_dict().items()}
            answers.append((weights, lm.generate("The mother tongue of Danielle Darrieux is", max_new_tokens=4)))
    (first, said), (second, again) = answers
    assert said == again
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(
        first["model.layers.3.mlp.down_proj.weight"], lm.model.state_dict()["model.layers.3.mlp.down_proj.weight"]
    )
