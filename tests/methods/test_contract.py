"""What every method promises, on every kind of architecture: the model comes back, the edit takes, the patch is a file.

A method is found here by being registered. One that needs other settings on a tiny model says so in `small_settings`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import errata
from errata import LM, Edit, Method, Patch, changes, sequential
from errata.tokens import Passage
from tests import tiny

A, B, _ = tiny.EDITS
C = Edit(tiny.PROMPT, "Japan", "Paris")
"""By a single token, so that it takes in the few steps of the tiny settings on every processor's tiny models."""
SEVERAL = (A, Edit(tiny.PROMPT, "Kenya", "Paris"))


@dataclass
class Made:
    """A method on a model, with what most promises are about: one edit, made once."""

    method: Method
    lm: LM
    state: dict[str, Any]
    patch: Patch
    held: tuple[dict[str, Any], dict[str, Any]]
    """What errata's modules held before and after the edit."""


@pytest.fixture(scope="module", params=tiny.ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=errata.methods().values(), ids=lambda m: m.name)
def made(request: pytest.FixtureRequest, architecture: str, corpus_file: str) -> Made:
    lm = tiny.trained(architecture)
    before = tiny.state(lm.model)
    method = tiny.small_settings(request.param, lm, corpus_file)
    held = module_state()
    patch = method.edit(lm, [A])
    return Made(method, lm, before, patch, (held, module_state()))


def module_state() -> dict[str, Any]:
    """Every variable of errata's modules and of their classes: which object it is, and of how many parts."""
    modules = [m for n, m in sorted(sys.modules.items()) if n.partition(".")[0] == "errata"]
    spaces = {m.__name__: vars(m) for m in modules}
    for name, variables in list(spaces.items()):
        spaces |= {f"{name}.{k}": vars(v) for k, v in variables.items() if isinstance(v, type)}
    return {
        f"{space}.{name}": (id(value), len(value) if isinstance(value, dict | list | set) else None)
        for space, variables in spaces.items()
        for name, value in variables.items()
        if not (name.startswith(("__", "_abc")) or isinstance(value, ModuleType))
    }


@pytest.fixture(autouse=True)
def _as_it_was(made: Made) -> Iterator[None]:
    """1. The model is left exactly as it was, whatever a test below does to it (pitfalls 6 and 9)."""
    yield
    assert tiny.differences(made.state, tiny.state(made.lm.model)) == []
    assert made.lm.patched == 0


def bits(patch: Patch) -> dict[str, torch.Tensor]:
    return patch._tensors()


def same(a: Patch, b: Patch) -> bool:
    x, y = bits(a), bits(b)
    return a.edits == b.edits and x.keys() == y.keys() and all(tiny.same_bits(x[k], y[k]) for k in x)


def takes(lm: LM, edit: Edit, before: float) -> bool:
    """Whether p(target) has risen; where facts are only told, to models too small to listen, whether it is told."""
    if any(isinstance(reader, changes.context._Before) for reader in lm.readers):
        return f"{edit.text} {edit.target}" in lm.tokenizer.decode(lm.encode([Passage(edit.text)]).ids[0])
    return tiny.probability(lm, edit) > before


def test_1_the_model_comes_back_after_an_exception_within_an_edit(made: Made):
    if changes.WHOLE in made.patch.changes:
        pytest.skip("edits without running the model")

    class Boom(Exception):
        pass

    calls = iter(range(10**9))

    def bomb(*_: Any) -> None:
        if next(calls) > 2:  # a method may need no more than one pass
            raise Boom

    handles = [made.lm.module(n).register_forward_pre_hook(bomb) for n in made.lm.blocks]
    try:
        with pytest.raises(Boom):
            made.method.edit(LM(made.lm.model, made.lm.tokenizer), [A])
    finally:
        for handle in handles:
            handle.remove()


def test_1_the_model_comes_back_after_an_exception_within_applied(made: Made):
    with pytest.raises(ZeroDivisionError), made.patch.applied(made.lm):
        raise ZeroDivisionError


def test_2_no_edits_no_change(made: Made):
    assert made.method.edit(made.lm, []).changes == {}
    assert made.method.edit(made.lm, [], made.patch) is made.patch


def test_3_the_edit_takes(made: Made):
    """Pitfall 1: asked of the model in hand, with the patch that was returned."""
    before = tiny.probability(made.lm, A)
    with made.patch.applied(made.lm):
        assert takes(made.lm, A, before)
    assert tiny.probability(made.lm, A) == before


def test_3_every_edit_of_a_batch_takes(made: Made):
    if not made.method.batched:
        pytest.skip("makes one edit at a time")
    before = [tiny.probability(made.lm, e) for e in SEVERAL]
    with made.method.edit(made.lm, SEVERAL).applied(made.lm):
        assert all(takes(made.lm, e, p) for e, p in zip(SEVERAL, before, strict=True))


def test_4_saved_and_loaded_it_gives_the_same_logits_exactly(made: Made, tmp_path: Path):
    made.patch.save(tmp_path / "p.safetensors")
    again = Patch.load(tmp_path / "p.safetensors")
    assert same(again, made.patch)
    assert again.about == made.patch.about
    found = []
    for patch in (made.patch, again):
        with patch.applied(made.lm):
            found.append(tiny.logits(made.lm, A.text, B.text))
    assert tiny.same_bits(*found)


def test_5_a_fold_equals_one_that_stopped_and_went_on_from_disk(made: Made, tmp_path: Path):
    *_, fold = sequential(made.method, made.lm, [[A], [B]])
    made.patch.save(tmp_path / "p.safetensors")
    later = LM(made.lm.model, made.lm.tokenizer)  # another process: nothing is remembered
    assert same(made.method.edit(later, [B], Patch.load(tmp_path / "p.safetensors")), fold)


def test_5_a_later_edit_stands_on_the_earlier_ones(made: Made):
    """Pitfall 11: `prior` is not ignored, and the earlier edits are kept."""
    after = made.method.edit(made.lm, [C], made.patch)
    assert after.edits == (A, C)
    assert after.about["steps"][-1]["edits"] == 2
    before = tiny.probability(made.lm, C)
    with after.applied(made.lm):
        assert takes(made.lm, C, before)


def test_6_the_same_seed_gives_the_same_patch(made: Made):
    """Pitfall 7 too: nothing that was computed for another model object has a part in it."""
    torch.manual_seed(12345)
    other = tiny.lm("gpt2" if made.lm.config.model_type != "gpt2" else "opt", seed=1)
    with suppress(errata.ErrataError):  # an editor that was trained for this model is refused there
        dataclasses.replace(made.method, seed=7).prepare(other)
    fresh = LM(made.lm.model, made.lm.tokenizer, name="by another name")
    assert same(made.method.edit(fresh, [A]), made.patch)


def test_6_nothing_of_an_edit_stays_in_a_module(made: Made):
    """Pitfall 7: what is computed of a model is kept with it, and nowhere else."""
    before, after = made.held
    assert {k: after[k] for k in before} == before


def test_6_every_edit_by_itself_in_shared_passes_is_the_edit_alone(made: Made):
    """Pitfalls 2 and 6: prompts of several lengths, padded together; each from the unedited model."""
    longer = Edit("Today we learn. People in {} govern from", "New Zealand", "Cairo")
    several = (A, longer, B)
    for found, edit in zip(made.method.each(made.lm, several), several, strict=True):
        alone = made.method.edit(made.lm, [edit])
        assert found.edits == alone.edits
        assert found.about == alone.about
        for (name, x), y in zip(bits(found).items(), bits(alone).values(), strict=True):
            scale = y.float().abs().max().item()
            torch.testing.assert_close(x, y, atol=2e-3 * scale, rtol=2e-2, msg=lambda m, n=name: f"{n}: {m}")


def test_7_dtype_follows_the_model_and_the_patch_is_float32(made: Made, corpus_file: str):
    lm = tiny.trained(made.lm.model.config._name_or_path.removeprefix("tiny-"))
    lm.model.to(torch.bfloat16)
    patch = tiny.small_settings(type(made.method), lm, corpus_file).edit(lm, [C])
    assert {t.dtype for t in bits(patch).values()} <= {torch.float32, torch.int64, torch.uint8}  # uint8: texts
    before = tiny.probability(lm, C)
    with patch.applied(lm):
        assert {p.dtype for p in lm.model.parameters()} == {torch.bfloat16}
        assert tiny.probability(lm, C) >= before or takes(lm, C, before)
        assert tiny.logits(lm, A.text).dtype == torch.bfloat16


def test_8_a_low_rank_patch_is_a_lora_with_equal_logits(made: Made, tmp_path: Path):
    if not made.patch.low_rank:
        pytest.skip("not low-rank")
    if importlib.util.find_spec("errata.export") is None:
        pytest.skip("errata.export is not there yet")
    peft = pytest.importorskip("peft")
    from errata import export

    export.to_peft(made.patch, made.lm, tmp_path)
    lm, base = (tiny.trained(made.lm.model.config._name_or_path.removeprefix("tiny-")) for _ in range(2))
    for one in (lm, base):  # where a large update cancels, float32 tells how it was added up
        one.model.double()
    with made.patch.applied(lm):
        wanted = tiny.logits(lm, A.text, B.text)
    served = LM(peft.PeftModel.from_pretrained(base.model, tmp_path).double(), base.tokenizer)
    torch.testing.assert_close(tiny.logits(served, A.text, B.text), wanted, atol=1e-3, rtol=1e-4)


def test_the_callers_random_state_is_left_alone(made: Made):
    """Pitfall 13."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    made.method.edit(LM(made.lm.model, made.lm.tokenizer), [A])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_settings_of_every_listed_model_can_be_made(made: Made):
    """Pitfall 14: a default that can't run."""
    for name in errata.presets._tables()["models"]:
        if name != "almanac" or type(made.method).name in errata.presets._tables()["models"][name]:
            assert isinstance(type(made.method).preset(name), Method)
