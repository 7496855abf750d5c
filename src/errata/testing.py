"""The contract that every method keeps, for whoever writes one in a package of their own:

    def test_nudge_keeps_the_contract():
        errata.testing.check_method(Nudge(layer=3), errata.load("almanac"), facts)

A promise is a function of what was made; it returns why it asks nothing of this method, if so.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import tokens
from .edit import Edit
from .errors import ErrataError, UsageError
from .lm import LM
from .method import Method, sequential
from .patch import Patch

# What an edit could leave behind, and what a model says


def state(model: Any) -> dict[str, Any]:
    """Everything an edit could leave behind: numbers, modes, what takes gradients, hooks."""
    modules = dict(model.named_modules())
    numbers = [*model.named_parameters(), *model.named_buffers()]
    return {
        "numbers": {k: v.detach().clone() for k, v in numbers},
        "modes": {n: m.training for n, m in modules.items()},
        "wanting": {n: p.requires_grad for n, p in model.named_parameters()},
        "gradients": [n for n, p in model.named_parameters() if p.grad is not None],
        "hooks": {n: _hooks(m) for n, m in modules.items()},
    }


def _hooks(module: Any) -> list[tuple[str, list[int]]]:
    return [(kind, list(there)) for kind, there in vars(module).items() if kind.endswith("_hooks") and there]


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Names of what is not as it was, to the bit."""
    a, b = before["numbers"], after["numbers"]
    out = [k for k in a.keys() | b.keys() if k not in a or k not in b or not same_bits(a[k], b[k])]
    return out + [k for k in before if k != "numbers" and before[k] != after[k]]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal to the bit (also where NaN is, and the sign of 0)."""
    raw = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


@torch.no_grad()
def probability(lm: LM, edit: Edit) -> float:
    """The geometric mean of p(token) over the target's tokens.

    By a plain forward pass over the joined text; through the LM where a patch changes what is asked or who answers.
    """
    if lm.readers:
        batch = lm.encode([tokens.passage(edit, answer=edit.target)])
        return lm.said(batch).log_softmax(-1).gather(1, batch.wanted[:, None]).mean().exp().item()
    head = lm.tokenizer(edit.text, add_special_tokens=True)["input_ids"]
    ids = lm.tokenizer(f"{edit.text} {edit.target}", add_special_tokens=True)["input_ids"]
    logits = lm.model(torch.tensor([ids], device=lm.device)).logits[0].float()
    at = range(len(head), len(ids))
    return logits.log_softmax(-1)[[i - 1 for i in at], [ids[i] for i in at]].mean().exp().item()


@torch.no_grad()
def logits(lm: LM, *texts: str) -> Tensor:
    """What the model says after each text, read as `probability` reads it; (texts, vocabulary)."""
    if lm.readers:
        batch = lm.encode([tokens.follow(text, "Paris") for text in texts])
        first = batch.target.sum(1).cumsum(0) - batch.target.sum(1)
        return lm.said(batch)[first].to(lm.dtype)
    out = [lm.model(torch.tensor([lm.tokenizer(t)["input_ids"]], device=lm.device)).logits[0, -1] for t in texts]
    return torch.stack(out)


def takes(lm: LM, edit: Edit, before: float) -> bool:
    """Whether p(target) has risen; where facts are only told, whether it is told.

    A model may be too small to listen to what it is told.
    """
    if any(reader.answerer is None for reader in lm.readers):
        told = lm.tokenizer.decode(lm.encode([tokens.Passage(edit.text)]).ids[0])
        return f"{edit.text} {edit.target}" in told
    return probability(lm, edit) > before


# What was made


@dataclass(frozen=True)
class Made:
    """A method on a model, with what most promises are about: one edit, made once."""

    method: Method
    lm: LM
    edits: tuple[Edit, Edit, Edit]
    """The one that was made, and two others, of other subjects."""
    before: Mapping[str, Any]
    """The model's state before the edit."""
    patch: Patch

    @classmethod
    def of(cls, method: Method, lm: LM, edits: Sequence[Edit]) -> Made:
        """Make the first of three edits."""
        if len(edits) < 3:
            raise UsageError(f"the contract is about three edits, not {len(edits)}; give more")
        one, two, three = edits[:3]
        before = state(lm.model)
        return cls(method, lm, (one, two, three), before, method.edit(lm, [one]))

    def anew(self) -> LM:
        """The model as another process would load it: nothing is remembered of it."""
        return LM(self.lm.model, self.lm.tokenizer)

    def comes_back(self) -> None:
        """1. The model is left exactly as it was."""
        changed = differences(self.before, state(self.lm.model))
        _must(not changed, f"the model did not come back: {', '.join(changed[:3])}")
        _must(self.lm.patched == 0, "a patch is still applied")


Promise = Callable[[Made], str | None]


def check_method(method: Method, lm: LM, edits: Sequence[Edit]) -> None:
    """Hold a method against the contract.

    Args:
        method: with settings for this model.
        lm: an unedited model.
        edits: three, of different subjects, that are not true of the model.

    Raises:
        AssertionError: promises are broken; it says which.
    """
    made, broken = Made.of(method, lm, edits), []
    for promise in PROMISES:
        try:
            promise(made)
            made.comes_back()
        except (AssertionError, ErrataError) as error:
            broken.append(f"{promise.__name__}: {error}")
    if broken:
        raise AssertionError(f"{method.name} breaks {len(broken)} of {len(PROMISES)} promises\n" + "\n".join(broken))


def _must(kept: bool, otherwise: str) -> None:
    if not kept:
        raise AssertionError(otherwise)


def same(a: Patch, b: Patch) -> bool:
    """Whether two patches are of the same edits and equal to the bit."""
    x, y = a._tensors(), b._tensors()
    return a.edits == b.edits and x.keys() == y.keys() and all(same_bits(x[k], y[k]) for k in x)


# The promises


class _Broken(Exception):
    """What a promise has a model raise."""


def the_model_comes_back_after_an_exception_in_an_edit(made: Made) -> str | None:
    """1. Whatever a pass of the model raises."""
    passes = itertools.count()

    def raises(*_: Any) -> None:
        if next(passes) > 2:  # a method may need no more than one pass
            raise _Broken

    blocks = [made.lm.module(name) for name in made.lm.blocks]
    handles = [block.register_forward_pre_hook(raises) for block in blocks]
    try:
        with suppress(_Broken):
            made.method.edit(made.anew(), [made.edits[0]])
    finally:
        for handle in handles:
            handle.remove()
    return None


def the_model_comes_back_after_an_exception_in_a_block(made: Made) -> str | None:
    """1. Whatever the block in which a patch is applied raises."""
    with suppress(_Broken), made.patch.applied(made.lm):
        raise _Broken
    return None


def no_edits_are_no_change(made: Made) -> str | None:
    """2. Neither from the unedited model nor after an edit."""
    _must(made.method.edit(made.lm, []).changes == {}, "no edits gave a change")
    _must(made.method.edit(made.lm, [], made.patch) is made.patch, "no edits changed the patch before")
    return None


def the_edit_takes(made: Made) -> str | None:
    """3. Asked of the model in hand, with the patch that was returned."""
    edit = made.edits[0]
    before = probability(made.lm, edit)
    with made.patch.applied(made.lm):
        after = probability(made.lm, edit)
        _must(takes(made.lm, edit, before), f"p({edit.target!r}) was {before:.4f} and is {after:.4f}")
    _must(probability(made.lm, edit) == before, "undone, the model says something else than before")
    return None


def every_edit_of_a_batch_takes(made: Made) -> str | None:
    """3. Of two at once."""
    if not made.method.batched:
        return "makes one edit at a time"
    several = made.edits[0], made.edits[2]
    before = [probability(made.lm, e) for e in several]
    with made.method.edit(made.lm, several).applied(made.lm):
        for edit, p in zip(several, before, strict=True):
            _must(takes(made.lm, edit, p), f"of two edits at once {edit.text!r} did not take")
    return None


def a_file_gives_the_same_logits(made: Made) -> str | None:
    """4. Saved and loaded, to the bit."""
    with tempfile.TemporaryDirectory() as folder:
        made.patch.save(Path(folder) / "patch.safetensors")
        again = Patch.load(Path(folder) / "patch.safetensors")
    _must(same(again, made.patch), "a patch that was saved and loaded is another one")
    _must(again.about == made.patch.about, "a patch that was saved and loaded says something else of itself")
    found = []
    for patch in (made.patch, again):
        with patch.applied(made.lm):
            found.append(logits(made.lm, *(e.text for e in made.edits)))
    _must(same_bits(*found), "a patch that was saved and loaded gives other logits")
    return None


def a_sequence_goes_on_from_a_file(made: Made) -> str | None:
    """5. A fold equals one that stopped and went on from disk, in another process."""
    one, two, _ = made.edits
    *_, fold = sequential(made.method, made.lm, [[one], [two]])
    with tempfile.TemporaryDirectory() as folder:
        made.patch.save(Path(folder) / "patch.safetensors")
        kept = Patch.load(Path(folder) / "patch.safetensors")
    on = made.method.edit(made.anew(), [two], kept)
    _must(same(on, fold), "going on from a saved patch gives another one than going on from the patch in hand")
    return None


def a_later_edit_stands_on_the_earlier_ones(made: Made) -> str | None:
    """5. What comes `prior` is not ignored, and is kept."""
    one, _, three = made.edits
    after = made.method.edit(made.lm, [three], made.patch)
    _must(after.edits == (one, three), "the earlier edit is gone from the patch")
    before = probability(made.lm, three)
    with after.applied(made.lm):
        _must(takes(made.lm, three, before), "after another edit, an edit did not take")
    return None


def the_same_seed_gives_the_same_patch(made: Made) -> str | None:
    """6. Whatever the caller's random state, the model's name and what was computed before."""
    torch.manual_seed(12345)
    fresh = LM(made.lm.model, made.lm.tokenizer, name="by another name")
    _must(same(made.method.edit(fresh, [made.edits[0]]), made.patch), "the same edit gave another patch")
    return None


def edits_in_shared_passes_are_those_made_alone(made: Made) -> str | None:
    """6. `each` is every edit from the unedited model; numbers may differ as sums of another order do."""
    for found, edit in zip(made.method.each(made.lm, made.edits), made.edits, strict=True):
        alone = made.method.edit(made.lm, [edit])
        _must((found.edits, found.about) == (alone.edits, alone.about), "`each` says something else of its edits")
        for (name, x), y in zip(found._tensors().items(), alone._tensors().values(), strict=True):
            scale = y.float().abs().max().item()
            near = torch.allclose(x.float(), y.float(), atol=2e-3 * scale, rtol=2e-2)
            _must(near, f"`each` gives another {name} for {edit.text!r} than `edit` does")
    return None


def the_dtype_follows_the_model(made: Made) -> str | None:
    """7. A model in bfloat16 stays that, and its patch is float32."""
    model = copy.deepcopy(made.lm.model).to(torch.bfloat16)
    lm, edit = LM(model, made.lm.tokenizer), made.edits[2]
    patch = made.method.edit(lm, [edit])
    kinds = {t.dtype for t in patch._tensors().values()}
    _must(kinds <= {torch.float32, torch.int64, torch.uint8}, f"the patch holds {kinds}")  # uint8: texts
    before = probability(lm, edit)
    with patch.applied(lm):
        _must({p.dtype for p in model.parameters()} == {torch.bfloat16}, "the patch changed the model's dtype")
        _must(probability(lm, edit) >= before or takes(lm, edit, before), "the edit did not take in bfloat16")
        _must(logits(lm, edit.text).dtype == torch.bfloat16, "the logits are not of the model's dtype")
    return None


def a_low_rank_patch_is_a_lora(made: Made) -> str | None:
    """8. With equal logits, in float64: where a large update cancels, float32 tells how it was added up."""
    if not made.patch.low_rank:
        return "not low-rank"
    if importlib.util.find_spec("peft") is None:
        return "PEFT is not installed"
    from peft import PeftModel  # pyright: ignore[reportMissingImports] - an extra

    from . import export

    texts = [e.text for e in made.edits]
    lm, base = (LM(copy.deepcopy(made.lm.model).double(), made.lm.tokenizer) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        export.to_peft(made.patch, made.lm, folder)
        served = LM(PeftModel.from_pretrained(base.model, folder).double(), base.tokenizer)
    with made.patch.applied(lm):
        wanted = logits(lm, *texts)
    near = torch.allclose(logits(served, *texts), wanted, atol=1e-3, rtol=1e-4)
    _must(near, "as a LoRA the patch gives other logits")
    return None


def the_callers_random_state_is_left_alone(made: Made) -> str | None:
    """A method draws by its own seed."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    made.method.edit(made.anew(), [made.edits[0]])
    _must(torch.equal(torch.get_rng_state(), before), "the caller's random state moved")
    return None


PROMISES: tuple[Promise, ...] = (
    the_model_comes_back_after_an_exception_in_an_edit,
    the_model_comes_back_after_an_exception_in_a_block,
    no_edits_are_no_change,
    the_edit_takes,
    every_edit_of_a_batch_takes,
    a_file_gives_the_same_logits,
    a_sequence_goes_on_from_a_file,
    a_later_edit_stands_on_the_earlier_ones,
    the_same_seed_gives_the_same_patch,
    edits_in_shared_passes_are_those_made_alone,
    the_dtype_follows_the_model,
    a_low_rank_patch_is_a_lora,
    the_callers_random_state_is_left_alone,
)
"""The contract, in its order."""
