"""Whatever order blocks end in, and wherever Ctrl-C comes: the base, and what is still applied."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle  # noqa: TID251 - what a user may do with a model
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import undo
from errata import LM, Edit, ErrataError, Patch, UsageError, ledger
from errata.changes import Codebook, Context, Dense, LowRank
from errata.changes.remembered import write
from errata.effects import Hook, Overlay, Parts
from errata.ledger import Ledger, hold, stand
from errata.trace import rewrite
from tests import tiny
from tests.test_patch import change

IDS = torch.tensor([[5, 6, 7]])


@pytest.fixture
def lm() -> Iterator[LM]:
    """Whatever a test does, in the end the model is what it was."""
    lm = tiny.lm("gpt2")
    lm.model.train()
    before = tiny.state(lm.model)
    yield lm
    gc.collect()
    assert tiny.differences(before, tiny.state(lm.model)) == []
    assert lm.patched == 0


def patch(lm: LM, seed: int, *kinds: type, name: str = "transformer.h.1.mlp.c_proj") -> Patch:
    changes = tuple(change(lm, name, kind, seed) for kind in kinds or (LowRank,))
    return Patch({name: changes}, (Edit("{} is", f"s{seed}", "t"),))


def weight(lm: LM) -> torch.Tensor:
    return lm.mlp_out(1).weight.detach().clone()


def under(lm: LM, *patches: Patch) -> torch.Tensor:
    """The weight with these patches alone."""
    with contextlib.ExitStack() as stack:
        for one in patches:
            stack.enter_context(one.applied(lm))
        return weight(lm)


def suspended(lm: LM, one: Patch) -> Generator[str]:
    with one.applied(lm):
        while True:
            yield lm.generate("Peru is", 1)


# Orders


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_what_is_left_equals_what_is_still_applied_in_its_order(lm: LM, order: tuple[int, ...]):
    patches = [patch(lm, 1), patch(lm, 2, Dense, Codebook), patch(lm, 3)]
    wanted = {
        frozenset(some): under(lm, *(patches[i] for i in some))
        for some in ((0, 1), (1, 2), (0, 2), (0,), (1,), (2,), ())
    }
    base = lm.model.transformer.h[1].mlp.c_proj.weight
    open_ = [suspended(lm, one) for one in patches]
    for one in open_:
        next(one)
    left = {0, 1, 2}
    for i in order:
        open_[i].close()
        left.remove(i)
        assert tiny.same_bits(weight(lm), wanted[frozenset(left)])
        assert lm.patched == len(left)
    assert lm.model.transformer.h[1].mlp.c_proj.weight is base


def test_as_long_as_blocks_end_last_in_first_out_a_weight_stays_the_same_object(lm: LM):
    """Whoever holds it (an optimiser) holds it still after an inner block."""
    module = lm.model.transformer.h[1].mlp.c_proj
    with patch(lm, 1).applied(lm):
        outer = module.weight
        with patch(lm, 2).applied(lm):
            assert module.weight is not outer
        assert module.weight is outer


def test_a_block_that_is_never_left_ends_when_it_is_let_go_of(lm: LM):
    one, two = patch(lm, 1), patch(lm, 2, Codebook)
    left = [one.applied(lm), two.applied(lm)]
    for block in left:
        block.__enter__()
    wanted = under(lm, one, one)
    assert lm.patched == 2
    with one.applied(lm):
        del left[0], block
        assert lm.patched == 2
    assert not tiny.same_bits(weight(lm), wanted)
    left.clear()


def test_frozen_blocks_in_any_order_hold_until_the_last_is_over(lm: LM):
    def generator() -> Generator[None]:
        with lm.frozen():
            yield

    first, second = generator(), generator()
    next(first), next(second)
    first.close()
    assert not any(m.training for m in lm.model.modules())
    assert not any(p.requires_grad for p in lm.model.parameters())
    second.close()


def test_a_block_is_entered_once(lm: LM):
    block = patch(lm, 1).applied(lm)
    with block:
        pass
    with pytest.raises(RuntimeError, match="entered before"), block:
        pass


def test_a_block_that_nobody_holds_is_told_to_be_none(lm: LM):
    """It would be over at once, and the patch off, in silence."""
    before = tiny.state(lm.model)
    with pytest.raises(UsageError, match="nobody holds this block"):
        patch(lm, 1).applied(lm).__enter__()
    assert tiny.differences(before, tiny.state(lm.model)) == []
    held = patch(lm, 1).applied(lm)
    held.__enter__()
    assert tiny.differences(before, tiny.state(lm.model)) != []
    del held
    assert tiny.differences(before, tiny.state(lm.model)) == []


def test_a_kind_that_sees_to_its_own_undo_is_taken_at_its_word(lm: LM):
    class Own(LowRank, kind="own"):
        def attach(self, site: Any) -> Callable[[], None]:
            return site.module.register_forward_hook(lambda *_: seen.append(site.name) or None).remove

    seen: list[str] = []
    name = lm.mlp_out(1).name
    with Patch({name: (Own(**change(lm, name, LowRank, 0).tensors()),)}).applied(lm):
        lm.generate("Peru is", 1)
    assert seen == [name]


# Left on


def test_apply_leaves_a_patch_on_and_undo_takes_it_off_in_any_order(lm: LM):
    one, two, three = patch(lm, 1), patch(lm, 2), patch(lm, 3, Codebook)
    wanted = under(lm, two)
    for each in (one, two, three):
        each.apply(lm)
    gc.collect()
    assert lm.patched == 3
    three.undo(lm)
    one.undo(lm)
    assert tiny.same_bits(weight(lm), wanted)
    two.undo(lm)


def test_a_patch_is_applied_once_and_undone_once_also_when_read_again(lm: LM, tmp_path: Any):
    one = patch(lm, 1)
    about = {"base": {"fingerprint": lm.fingerprint, "name": lm.name}, "steps": [], "versions": {}}
    Patch(one.changes, one.edits, {}, about).save(tmp_path / "one.safetensors")
    again = [Patch.load(tmp_path / "one.safetensors") for _ in range(2)]
    with pytest.raises(UsageError, match="is not applied to tiny-gpt2; `apply` puts it on"):
        one.undo(lm)
    again[0].apply(lm)
    with pytest.raises(UsageError, match="is applied to tiny-gpt2 already; take it off by `undo`"):
        again[1].apply(lm)
    assert tiny.same_bits(weight(lm), under_base(lm, one))
    again[1].undo(lm)


def under_base(lm: LM, one: Patch) -> torch.Tensor:
    with lm.unedited():
        return under(lm, one)


def test_what_does_not_fit_is_not_left_on(lm: LM):
    (other,) = patch(lm, 1, name="transformer.h.1.attn.c_attn").changes.values()
    two = Patch(
        {
            "transformer.h.0.mlp.c_proj": patch(lm, 2).changes[lm.mlp_out(1).name],
            lm.mlp_out(1).name: other,
        }
    )
    with pytest.raises(ErrataError, match="does not fit"):
        two.apply(lm)


def test_a_model_that_is_converted_while_a_patch_is_on_comes_back_converted(lm: LM):
    """`model.to(...)` sees what is in place only."""
    one, other = patch(lm, 1), tiny.lm("gpt2")
    base = other.model.transformer.h[1].mlp.c_proj.weight
    one.apply(other)
    other.model.to(torch.bfloat16)
    with patch(lm, 2).applied(other):
        assert other.mlp_out(1).weight.dtype == torch.bfloat16
    one.undo(other)
    assert other.model.transformer.h[1].mlp.c_proj.weight is base
    assert (
        tiny.differences(
            tiny.state(other.model),
            tiny.state(tiny.lm("gpt2").model.train(False).to(torch.bfloat16)),
        )
        == []
    )


def test_what_is_written_into_a_patched_weight_goes_with_the_patch_and_the_log_says_so(
    lm: LM, caplog: pytest.LogCaptureFixture
):
    with patch(lm, 1).applied(lm), torch.no_grad():
        lm.model.transformer.h[1].mlp.c_proj.weight.add_(1)
    assert caplog.messages == ["a patched weight was written to; that goes with the patch"]


# Ctrl-C


def test_five_hundred_rounds_in_any_order_under_ctrl_c_leave_no_difference():
    told: list[str] = []
    counts = undo.run(500, seed=3, tell=told.append)
    assert told == []
    assert counts["wrong answers"] == 0
    assert counts["interrupted"] > 50
    assert min(counts[kind] for kind in ("nested", "generators", "left_on", "threads")) > 50


def test_the_rounds_notice_what_is_left_behind(monkeypatch: pytest.MonkeyPatch):
    """The one above would be empty otherwise."""
    settle = Overlay.settle
    monkeypatch.setattr(Overlay, "settle", lambda self: settle(self) if self.live else None)
    told: list[str] = []
    undo.run(5, seed=0, tell=told.append)
    assert told


def test_ctrl_c_at_the_very_entry_of_every_exit_undoes_all_though_the_traceback_is_kept(lm: LM):
    """A session at the keyboard keeps the last traceback, and with it whatever the frames in it hold."""
    before, kept = tiny.state(lm.model), []

    def at(number: int) -> Callable[..., None]:
        left = [number]

        def see(frame: Any, event: str, _: Any) -> None:
            if event == "call" and frame.f_code.co_name in (
                "close",
                "_close",
                "__exit__",
                "settle",
                "clear",
            ):
                left[0] -= 1
                if not left[0]:
                    sys.setprofile(None)
                    raise KeyboardInterrupt

        return see

    for number in range(1, 200):
        try:
            with patch(lm, 1).applied(lm), lm.frozen(), patch(lm, 2, Dense, Codebook).applied(lm):
                sys.setprofile(at(number))
        except KeyboardInterrupt as error:
            kept.append(error)
        else:
            break
        finally:
            sys.setprofile(None)
        assert tiny.differences(before, tiny.state(lm.model)) == [], f"at call {number}"
        assert lm.patched == 0
    assert len(kept) > 20


def test_a_real_signal_anywhere_in_asking_leaves_the_model_as_it_was(lm: LM):
    """Not only SIGINT: whatever a handler raises."""
    before, draw = tiny.state(lm.model), random.Random(0)
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    came, end = 0, time.process_time() + 2
    try:
        while time.process_time() < end:
            try:
                signal.setitimer(signal.ITIMER_REAL, 10 ** draw.uniform(-4, -2.3))
                for _ in range(100):  # in a finaliser an interrupt is lost, as Python ignores what is raised there
                    with lm.frozen(), patch(lm, 1).applied(lm):
                        lm.generate("Peru is", 1)
            except KeyboardInterrupt:
                came += 1
            assert tiny.differences(before, tiny.state(lm.model)) == []
            assert torch.is_grad_enabled()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert came > 20


def test_ctrl_c_while_a_hook_is_registered_takes_it_away(lm: LM):
    def see(frame: Any, event: str, _: Any) -> None:
        if event == "return" and frame.f_code.co_name == "register_forward_hook":
            sys.setprofile(None)
            raise KeyboardInterrupt

    for run in (
        lambda: rewrite(lm, lm.blocks[0], 1, torch.neg),
        lambda: patch(lm, 1, Codebook).applied(lm),
    ):
        sys.setprofile(see)
        with pytest.raises(KeyboardInterrupt), run():
            pytest.fail("the block was entered")


# Threads


def test_threads_take_turns_and_each_is_answered_by_its_own_patch(lm: LM):
    lm.model.eval()
    patches = [None, patch(lm, 1), patch(lm, 2, Dense), patch(lm, 3, Codebook)]

    def answer(one: Patch | None) -> torch.Tensor:
        with one.applied(lm) if one else contextlib.nullcontext(), lm.asked():
            return lm.logits(torch.tensor([0]), torch.tensor([2]), input_ids=IDS)

    wanted, wrong = [answer(one) for one in patches], []

    def work(number: int) -> None:
        for _ in range(20):
            if not tiny.same_bits(answer(patches[number]), wanted[number]):
                wrong.append(number)

    run(*(lambda n=n: work(n) for n in (0, 1, 2, 3, 0)))
    assert wrong == []
    assert all(not torch.equal(wanted[0], other) for other in wanted[1:3])
    lm.model.train()


def run(*work: Callable[[], None]) -> None:
    """In threads, at once; what one raises is raised here."""
    errors: list[BaseException] = []

    def caught(one: Callable[[], None]) -> None:
        try:
            one()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=caught, args=(one,)) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "it waits for ever"
    if errors:
        raise errors[0]


def test_blocks_of_two_threads_that_overlap_leave_the_base(lm: LM):
    inside = threading.Event()
    seen = []

    def first() -> None:
        with patch(lm, 1).applied(lm):
            inside.set()
            time.sleep(0.1)
            seen.append(weight(lm))

    def second() -> None:
        inside.wait()
        with patch(lm, 2).applied(lm):
            seen.append(weight(lm))

    wanted = under(lm, patch(lm, 1)), under(lm, patch(lm, 2))
    run(first, second)
    assert all(tiny.same_bits(a, b) for a, b in zip(seen, wanted, strict=True))


def test_a_thread_that_has_a_patch_applied_does_not_wait_for_itself(lm: LM):
    one = suspended(lm, patch(lm, 1))
    next(one)
    assert lm.generate("Peru is", 2) is not None
    with patch(lm, 2).applied(lm):
        lm.generate("Peru is", 1)
    one.close()


def test_another_thread_waits_until_the_block_is_left_and_the_log_says_for_whom(
    lm: LM, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ledger, "PATIENCE", 0.0)
    bare, said = lm.generate("Peru is", 3), []
    other = threading.Thread(target=lambda: said.append(lm.generate("Peru is", 3)))
    with patch(lm, 1, Dense).applied(lm):
        other.start()
        other.join(1.5)
        assert said == []
    other.join(30)
    assert said == [bare]
    assert "waiting for the thread MainThread" in caplog.messages[0]


def test_a_patch_that_is_left_on_is_there_for_every_thread(lm: LM):
    one, said = patch(lm, 1, Dense), []
    with one.applied(lm):
        wanted = lm.generate("Peru is", 3)
    one.apply(lm)
    run(lambda: said.append(lm.generate("Peru is", 3)), lambda: one.undo(lm) if said else None)
    if lm.patched:
        one.undo(lm)
    assert said == [wanted]


def test_a_generator_may_be_stepped_and_closed_in_another_thread(lm: LM):
    """As web servers do that stream an answer."""
    one, said = suspended(lm, patch(lm, 1, Dense)), []
    run(lambda: said.append(next(one)))
    run(lambda: said.append(next(one)))
    other = suspended(lm, patch(lm, 2))
    next(other)
    said.append(next(other))
    other.close()
    run(one.close)
    assert len(said) == 3


def test_a_thread_that_ended_inside_a_block_keeps_nobody_waiting(lm: LM):
    one = suspended(lm, patch(lm, 1, Dense))
    wanted = under(lm, patch(lm, 1, Dense))
    run(lambda: next(one))
    assert lm.generate("Peru is", 1) is not None
    assert tiny.same_bits(weight(lm), wanted)
    one.close()


# What is computed once


def test_the_fingerprint_is_the_unedited_models_whichever_lm_is_asked(lm: LM):
    wanted = tiny.lm("gpt2").fingerprint
    with patch(lm, 1, Dense, name="lm_head").applied(lm, check=False):
        assert LM(lm.model, lm.tokenizer).fingerprint == wanted
        assert lm.fingerprint == wanted


def test_moments_and_contexts_asked_for_under_a_patch_are_the_unedited_models(corpus_file: str):
    from errata.parts import contexts, moments

    found = []
    for inside in (True, False):
        lm = tiny.trained("gpt2")
        one = patch(lm, 1, Dense, name=lm.mlp_out(0).name)
        with one.applied(lm, check=False) if inside else contextlib.nullcontext():
            moment = moments.prepare(lm, [lm.mlp_out(1)], corpus_file)[lm.mlp_out(1).name].C
            found.append((moment, contexts.sample(lm, ((3, 2),), 0)))
    assert tiny.same_bits(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_unedited_takes_text_away_too(lm: LM):
    written, lengths = write([("Peru", "Peru is", "New fact: Peru is big.\n")])
    told = Context(torch.tensor([0]), written, lengths, torch.tensor([0.5]))
    with Patch({"": (told,)}).applied(lm):
        assert len(lm.readers) == 1
        with lm.unedited():
            assert lm.readers == []
            assert lm.patched == 0
        assert len(lm.readers) == 1


def test_an_edit_of_another_lm_of_the_same_model_is_refused_while_a_patch_is_applied(lm: LM):
    from errata import FT

    with (
        patch(lm, 1).applied(lm),
        pytest.raises(UsageError, match="tiny-gpt2 has a patch applied; take it off"),
    ):
        FT(layers=(1,), steps=1).edit(LM(lm.model, lm.tokenizer), [tiny.EDITS[0]])


# Copies


def test_a_copy_of_a_patched_model_is_edited_for_good_and_has_nothing_of_errata(lm: LM):
    one = patch(lm, 1, Dense, Codebook)
    with one.applied(lm), torch.no_grad():
        twin, wanted = copy.deepcopy(lm.model).eval(), weight(lm)
    assert tiny.same_bits(twin.transformer.h[1].mlp.c_proj.weight.T, wanted)
    assert len(twin.transformer.h[1].mlp.c_proj._forward_hooks) == 1
    fresh = LM(twin, lm.tokenizer)
    assert fresh.patched == 0


def test_a_copy_of_a_patched_lm_knows_nothing_of_the_unedited_one(lm: LM):
    lm.memo["known"] = 1
    assert copy.deepcopy(lm).memo == {"known": 1}
    base = lm.fingerprint
    with patch(lm, 1, Dense).applied(lm):
        twin = copy.deepcopy(lm)
    assert twin.memo == {}
    assert twin.fingerprint != base


def test_a_patched_model_can_be_pickled(lm: LM):
    with patch(lm, 1).applied(lm):
        found = pickle.loads(pickle.dumps(lm.model))  # noqa: S301
        wanted = weight(lm)
    assert tiny.same_bits(found.transformer.h[1].mlp.c_proj.weight.T, wanted)
    assert LM(found, lm.tokenizer).patched == 0


# Settings


def test_a_models_own_generation_config_comes_back_also_beneath_an_adapter():
    peft = pytest.importorskip("peft")
    base = tiny.lm("llama")
    model = peft.get_peft_model(base.model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    lm, own = LM(model, base.tokenizer), base.model.generation_config
    with patch(lm, 1, name=lm.mlp_out(1).name).applied(lm):
        lm.generate("Peru is", 1)
    assert base.model.generation_config is own
    assert model.generation_config is own


def test_what_became_of_modules_parameters_and_hooks_is_put_back_and_named(lm: LM):
    parts, block = Parts(lm.model), lm.model.transformer.h[1]
    with lm.hold(parts):
        block.mlp = nn.Identity()
        lm.model.lm_head.weight = nn.Parameter(torch.zeros(2, 2))
        lm.model.transformer.h[0].register_forward_hook(lambda *_: None)
    assert sorted(parts.changed) == [
        "a hook of transformer.h.0",
        "lm_head.weight",
        "transformer.h.1.mlp",
    ]


def test_what_ends_during_a_pass_goes_when_the_pass_is_over(lm: LM):
    """A collection of garbage may end a block anywhere; no pass sees two models."""
    one = suspended(lm, patch(lm, 1, Dense))
    next(one)
    seen = []

    def in_the_middle(*_: Any) -> None:
        one.close()
        seen.append(weight(lm))

    wanted = weight(lm)
    with hold(Ledger(), lambda: [Hook(lm.model.transformer.h[0], in_the_middle)]):
        lm.logits(torch.tensor([0]), torch.tensor([1]), input_ids=IDS)
    assert tiny.same_bits(seen[0], wanted)
    assert not tiny.same_bits(weight(lm), wanted)


def test_a_place_that_was_empty_is_empty_again():
    module = nn.Linear(2, 2)
    back = stand(Overlay(module, "forward", lambda _: lambda x: x + 1))
    again = stand(Overlay(module, "forward", lambda below: lambda x: below(x) * 2))
    assert module(torch.ones(2)).tolist() == [4.0, 4.0]
    back()
    with pytest.raises(TypeError):
        module(torch.ones(2))  # nothing is beneath
    again()
    assert "forward" not in vars(module)


def test_blocks_are_left_by_c_code():
    """On which it rests that Ctrl-C can't come before an exit has begun."""
    assert type(io.IOBase.__exit__).__name__ == "method_descriptor"
