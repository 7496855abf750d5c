from __future__ import annotations

import copy
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import errata
from errata import FT, FTL, GRACE, LM, ROME, Edit, ErrataError, Method, Patch, UsageError, sequential
from errata import method as method_module
from errata.changes import LowRank
from tests import tiny

A, B, C = tiny.EDITS


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny.lm("llama")


@pytest.fixture(autouse=True)
def _as_it_was(lm: LM) -> Iterator[None]:
    before = tiny.state(lm.model)
    yield
    assert tiny.differences(before, tiny.state(lm.model)) == []
    assert lm.patched == 0


@dataclass(frozen=True, kw_only=True)
class Noise(Method):
    """Writes what it draws, or what is not a number."""

    name = "noise"
    batched = False
    what: Literal["noise", "nan", "inf"] = "noise"

    def patch(self, lm: LM, edits: Sequence[Edit], prior: Patch) -> Patch:
        site = lm.site(1)
        left = (
            torch.randn(site.shape[0], 1) if self.what == "noise" else torch.full((site.shape[0], 1), float(self.what))
        )
        return Patch({site.name: (LowRank(torch.zeros(1, dtype=torch.long), left, torch.ones(1, site.shape[1])),)})


def only(patch: Patch) -> Any:
    ((change,),) = patch.changes.values()
    return change


# The registry


def test_methods_are_found_by_name_also_after_their_package_was_imported():
    """`errata.methods` is the registry, and the package of that name."""
    for _ in range(2):
        assert errata.methods()["r-rome"] is errata.RROME
    from errata.methods.rome import ROME as same

    assert errata.methods()["rome"] is same is errata.ROME


def test_an_unknown_method_is_answered_with_the_nearest():
    with pytest.raises(UsageError, match=r"there is no method 'grase'; did you mean 'grace'\?"):
        method_module.method("grase")
    with pytest.raises(UsageError, match=r"there is no method 'qqqqq'; known: .*rome"):
        method_module.method("qqqqq")


def test_an_unknown_setting_is_answered_with_the_nearest(lm: LM):
    with pytest.raises(UsageError, match=r"there is no setting of ft 'rat'; did you mean 'rate'\?"):
        FT.preset(lm, rat=1.0)


@pytest.mark.parametrize("broken", [False, True])
def test_a_method_of_another_package_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: bool, caplog: Any
):
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[errata.methods]\ntheirs = theirs_method:Theirs\n")
    (tmp_path / "theirs_method.py").write_text(
        "import errata\nclass Theirs(errata.FT, name='theirs'): pass\n" + "import no_such_thing\n" * broken
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(Method, "registry", {k: v for k, v in Method.registry.items() if k != "theirs"})
    method_module._discover.cache_clear()
    try:
        found = errata.methods()
    finally:
        method_module._discover.cache_clear()
        sys.modules.pop("theirs_method", None)
    assert "rome" in found
    if broken:  # and what is broken there does not take the others with it
        assert "theirs" in caplog.text
    else:
        assert found["theirs"].__name__ == "Theirs"


# Presets


def test_a_model_that_is_not_listed_gets_settings_for_any_and_a_warning_that_says_so(lm: LM):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no place is left to be chosen
        assert GRACE.preset(lm, at=2).at == 2
    with pytest.warns(UserWarning, match=r"tiny-llama has no published settings: .* \(grace: at = 1\); `errata tune"):
        assert 0 <= GRACE.preset(lm).at < 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was said in this process
        assert 0 <= ROME.preset(lm).layer < 4


def test_presets_know_a_model_by_its_shape_and_not_by_its_name(lm: LM):
    """Pitfall 8."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        named = FT.preset(LM(lm.model, lm.tokenizer, name="gpt2-xl"))
        assert named == FT.preset(LM(lm.model, lm.tokenizer, name="/any/folder"))
        assert named.layers != FT.preset("gpt2-xl").layers


def test_an_unknown_preset_is_answered_with_the_nearest():
    with pytest.raises(UsageError, match=r"did you mean 'gpt2-xl'\?"):
        FT.preset("gpt2-xxl")


# Editing


def test_a_method_of_one_edit_refuses_several(lm: LM):
    with pytest.raises(UsageError, match=r"noise makes one edit at a time, not 2; fold them"):
        Noise().edit(lm, [A, B])


@pytest.mark.parametrize("what", ["nan", "inf"])
def test_what_is_not_finite_is_refused_before_it_is_attached(lm: LM, what: Literal["nan", "inf"]):
    """Pitfall 16."""
    for run in (Noise(what=what).edit, Noise(what=what).each):
        with pytest.raises(ErrataError, match=r"noise found no finite change of .*; nothing was changed"):
            run(lm, [A])


@pytest.mark.parametrize("how", [FT(layers=(1,), steps=3), GRACE(at=1, steps=3)])
def test_a_search_that_runs_into_nan_writes_nothing(how: Method, lm: LM, monkeypatch: pytest.MonkeyPatch):
    """Pitfall 16."""
    where, loss = sys.modules[type(how).__module__], torch.nn.functional.cross_entropy
    monkeypatch.setattr(where, "cross_entropy", lambda *a, **k: float("nan") * loss(*a, **k))
    with pytest.raises(ErrataError, match="no finite change"):
        how.edit(lm, [A])


@pytest.mark.parametrize("how", [FT(layers=(1,), steps=3), GRACE(at=1, steps=3, lengths=((3, 1),))])
def test_a_model_of_nan_is_refused(how: Method):
    broken = tiny.lm("gpt2")
    with torch.no_grad():
        broken.mlp_out(2).weight.fill_(float("nan"))
    with pytest.raises(ErrataError, match="tiny-gpt2 puts out nan for a plain text"):
        how.edit(broken, [A])


def test_each_is_every_edit_alone_with_its_own_seed(lm: LM):
    found = Noise().each(lm, [A, B, C])
    for patch, edit in zip(found, (A, B, C), strict=True):
        assert tiny.same_bits(only(patch).left, only(Noise().edit(lm, [edit])).left)
        assert patch.edits == (edit,)
    assert not torch.equal(only(Noise(seed=1).edit(lm, [A])).left, only(found[0]).left)


def test_the_callers_random_states_are_left_alone(lm: LM):
    """Pitfall 13."""
    torch.manual_seed(5)
    random.seed(5)
    before = torch.get_rng_state(), random.getstate()
    Noise().edit(lm, [A])
    Noise().each(lm, [A, B])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_editing_a_model_that_has_a_patch_applied_is_refused(lm: LM):
    """Pitfall 6: what stands on another edit says so, by `prior`."""
    patch = Noise().edit(lm, [A])
    for run in (Noise().edit, Noise().each):
        with patch.applied(lm), pytest.raises(UsageError, match="has a patch applied; .* as `prior`"):
            run(lm, [B])


def test_a_prior_of_another_model_is_refused(lm: LM):
    with pytest.raises(ErrataError, match="the patch was made for"):
        Noise().edit(lm, [B], Noise().edit(tiny.lm("llama", seed=1), [A]))


def test_a_sequence_stands_on_what_it_changed(lm: LM):
    """Pitfall 11: the second edit sees the first."""
    ft = FT(layers=(1,), steps=3)
    *_, fold = sequential(ft, lm, [[A], [B]])
    assert fold.edits == (A, B)
    assert not torch.allclose(only(fold).delta, only(ft.edit(lm, [A]) + ft.edit(lm, [B])).delta)
    with ft.edit(lm, [A]).applied(lm):
        edited = LM(copy.deepcopy(lm.model), lm.tokenizer)  # a model of its own: this one is refused
    stood = only(ft.edit(edited, [B])).delta
    torch.testing.assert_close(only(fold).delta, only(ft.edit(lm, [A])).delta + stood)


def test_a_sequence_that_fails_in_the_middle_leaves_the_model_as_it_was(lm: LM):
    """Pitfall 9; the fixture above looks."""
    with pytest.raises(UsageError):
        list(sequential(FT(layers=(1,), steps=2), lm, [[A], [Edit("{} is", "Peru", "日本")]]))


def test_editing_one_model_changes_nothing_of_another(lm: LM, corpus_file: str):
    """Pitfall 7: no state at a module's level."""
    rome = ROME(layer=1, steps=3, lengths=((2, 2),), corpus=corpus_file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = only(rome.edit(tiny.lm("gpt2"), [A]))
        rome.edit(tiny.lm("gpt2", seed=1), [A])
        rome.edit(lm, [B])
        found = only(rome.edit(tiny.lm("gpt2"), [A]))
    assert tiny.same_bits(wanted.left, found.left)
    assert tiny.same_bits(wanted.right, found.right)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_within_an_edit_puts_everything_back(lm: LM):
    for prior in (None, Noise().edit(lm, [B])):
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            FT(layers=(1,), steps=10**9, stop=-1.0).edit(lm, [A], prior)


def test_a_patch_says_what_it_is(lm: LM):
    patch = FTL(layers=(1, 2), steps=2).edit(lm, [A, B])
    assert patch.about["base"] == {"fingerprint": lm.fingerprint, "name": "tiny-llama"}
    (step,) = patch.about["steps"]
    assert (step["method"], step["edits"], step["settings"]["layers"]) == ("ft-l", 2, [1, 2])
    assert patch.about["versions"].keys() == {"errata", "torch", "transformers"}


def test_the_bound_of_ft_l_holds_for_every_entry(lm: LM):
    assert only(FTL(layers=(1,), steps=9, rate=1e-2, bound=1e-3).edit(lm, [A])).delta.abs().max() <= 1e-3
    assert only(FT(layers=(1,), steps=9, rate=1e-2).edit(lm, [A])).delta.abs().max() > 1e-3


def test_a_method_without_settings_of_its_own_has_those_of_the_method_it_is_derived_from(lm: LM):
    class Softer(errata.MEMIT, name="softer"):
        pass

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert Softer.preset(lm).layers == errata.MEMIT.preset(lm).layers
        assert Softer.preset("llama-2-7b").weight == errata.MEMIT.preset("llama-2-7b").weight == 15000.0
    finally:
        del Method.registry["softer"]


def test_a_field_that_has_no_value_anywhere_is_named(lm: LM):
    @dataclass(frozen=True, kw_only=True)
    class Bare(Method, name="bare"):
        place: int

        def patch(self, lm: LM, edits: Sequence[Edit], prior: Patch) -> Patch:
            return Patch()

    try:
        with pytest.raises(UsageError, match=r"bare has no preset of place for .*; give it: `preset\(lm, place=...\)`"):
            Bare.preset(lm)
        assert Bare.preset(lm, place=3).place == 3
    finally:
        del Method.registry["bare"]


def test_a_second_method_of_a_name_is_refused():
    with pytest.raises(UsageError, match=r"a method 'rome' already, errata\.methods\.rome\.ROME"):

        class Mine(errata.ROME, name="rome"):
            pass

    assert errata.methods()["rome"] is errata.ROME


def test_a_class_that_is_defined_again_takes_its_own_place():
    """As a notebook's cell is run again."""
    for _ in range(2):

        class Again(errata.ROME, name="again"):
            pass

    assert Method.registry.pop("again") is Again
