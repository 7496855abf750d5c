"""What is promised of blocks with a norm behind the MLP, on a pretrained model that has them: Gemma 3 270M."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from errata import LM, Edit
from errata.methods import EMMET, MEMIT, PMET, AlphaEdit
from errata.parts.locate import at_subject

pytestmark = [pytest.mark.real, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]

EDITS = (
    Edit("The capital of {} is", "France", "Rome"),
    Edit("The mother tongue of {} is", "Danielle Darrieux", "English"),
    Edit("{} plays the", "Miles Davis", "violin"),
)
METHODS: list[tuple[type[Any], dict[str, Any]]] = [
    (MEMIT, {"weight": 1e-6}),
    (EMMET, {"jitter": 1e-6}),
    (PMET, {"weight": 1e-6}),
    (AlphaEdit, {"weight": 1e-9}),
]


@pytest.mark.parametrize(("method", "weak"), METHODS, ids=lambda v: v.name if isinstance(v, type) else "")
def test_with_little_weight_v_is_reached(
    gemma3: LM, method: type[Any], weak: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    """Without contexts, whose keys differ from the bare prompt's, so that all that is left is what the solve leaves."""
    wanted, found = method.wanted, {}
    monkeypatch.setattr(method, "wanted", lambda *a: found.update(wanted(*a)) or found)
    how = replace(method.preset(gemma3), lengths=(), **weak)
    patch = how.edit(gemma3, EDITS)
    assert set(found) == {gemma3.site(layer).name for layer in how.layers}
    for place, v in found.items():
        before = at_subject(gemma3, place, EDITS)[1][:, 0]
        with patch.applied(gemma3):
            after = at_subject(gemma3, place, EDITS)[1][:, 0]
        assert ((after - v).norm(dim=1) < 0.15 * (before - v).norm(dim=1)).all()
    with patch.applied(gemma3):
        said = gemma3.generate([e.text for e in EDITS], 4)
    if method is not PMET:  # of whose target a part is attention's, which is not written
        # within 0.15 of v* a fact may still be missed: MEMIT's and AlphaEdit's second is (dev/LOG.md)
        assert sum(s.strip().startswith(e.target) for s, e in zip(said, EDITS, strict=True)) >= 2
