from __future__ import annotations

import json
import linecache
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from errata import LM, Edit, ErrataError, Patch, UsageError, store
from errata.changes import Codebook, Dense, LowRank
from errata.patch import added, applied_by_row
from tests import tiny

A, B, C = tiny.EDITS


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny.lm("gpt2")


@pytest.fixture(autouse=True)
def _as_it_was(lm: LM) -> Iterator[None]:
    """Whatever a test does, the model is what it was before."""
    before = tiny.state(lm.model)
    yield
    assert tiny.differences(before, tiny.state(lm.model)) == []
    assert lm.patched == 0


def about(lm: LM) -> dict[str, Any]:
    return {"base": {"fingerprint": lm.fingerprint, "name": lm.name}, "steps": [], "versions": {}}


def change(lm: LM, name: str, kind: type, seed: int, owner: int = 0) -> Any:
    d_out, d_in = lm.site(name).shape
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g) * 0.1  # noqa: E731
    one = torch.tensor([owner])
    if kind is LowRank:
        return LowRank(one, draw(d_out, 1), draw(1, d_in))
    if kind is Dense:
        return Dense(one, draw(d_out, d_in))
    return Codebook.of(one, draw(1, d_in), draw(1, d_out), torch.tensor([1.0]), one[None] + seed, one * 0)


def patch(lm: LM, kind: type = LowRank, seed: int = 0, edit: Edit = A, layer: int = 1) -> Patch:
    name = lm.mlp_out(layer).name
    return Patch({name: (change(lm, name, kind, seed),)}, (edit,), {}, about(lm))


def saved(lm: LM, folder: Path) -> Path:
    one = patch(lm) + patch(lm, Codebook, 1, B) + patch(lm, Dense, 2, C, layer=2)
    path = folder / "patch.safetensors"
    Patch(one.changes, one.edits, {"past": torch.arange(3.0)}, one.about).save(path)
    return path


# Applied, and undone


def test_a_thousand_rounds_of_nested_patches_and_exceptions_leave_every_bit(lm: LM):
    """Pitfalls 6 and 9: rollback is exact in whatever order things happen, and after whatever is raised."""
    draw = random.Random(0)
    names = [
        lm.mlp_out(0).name,
        lm.mlp_out(1).name,
        "transformer.h.2.mlp.c_fc",
        "transformer.h.1.attn.c_attn",
        "lm_head",
    ]
    changes = {(n, k): [change(lm, n, k, seed) for seed in range(3)] for n in names for k in (LowRank, Dense, Codebook)}
    before = tiny.state(lm.model)
    for round in range(1000):
        with ExitStack() as stack:
            raised = draw.random() < 0.5
            if raised:
                stack.enter_context(pytest.raises(ZeroDivisionError))
            for _ in range(draw.randint(1, 3)):
                picked = draw.sample(list(changes), draw.randint(1, 3))
                parts: dict[str, tuple] = {}
                for name, kind in picked:
                    parts[name] = (*parts.get(name, ()), draw.choice(changes[name, kind]))
                stack.enter_context(Patch(parts).applied(lm))
            if raised:
                raise ZeroDivisionError
        if round % 50 == 0:
            assert tiny.differences(before, tiny.state(lm.model)) == []
    assert tiny.differences(before, tiny.state(lm.model)) == []


def test_a_failing_change_takes_the_earlier_ones_with_it(lm: LM):
    class Failing(LowRank, kind="failing"):
        def attach(self, site: Any) -> Any:
            raise ZeroDivisionError

    fine, failing = patch(lm), patch(lm, layer=2)
    (name,) = failing.changes
    failing = Patch({name: (Failing(**failing.changes[name][0].tensors()),)})
    with pytest.raises(ZeroDivisionError), (fine + failing).applied(lm):
        pass


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_inside_puts_everything_back(lm: LM):
    with pytest.raises(KeyboardInterrupt), (patch(lm) + patch(lm, Codebook)).applied(lm):
        threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT)).start()
        while True:
            lm.generate("Peru is", 1)


def test_a_handler_of_ctrl_c_that_is_not_pythons_stays(lm: LM, monkeypatch: pytest.MonkeyPatch):
    """A program around Python may have its own, and at exit there is none: it can't be put back, so it isn't taken."""
    monkeypatch.setattr(signal, "getsignal", lambda _: None)
    monkeypatch.setattr(signal, "signal", lambda *_: pytest.fail("the handler was taken"))
    with patch(lm).applied(lm):
        pass


def test_ctrl_c_at_any_line_of_applying_and_undoing_puts_everything_back(lm: LM):
    """A signal may arrive before any line that does something (the interpreter looks for it at calls and jumps)."""
    two = patch(lm) + patch(lm, Codebook, 1, layer=2)
    before = tiny.state(lm.model)
    lines = 0
    for at in range(10_000):
        left = at

        def trace(frame: Any, event: str, _: Any) -> Any:
            nonlocal left
            if not any(part in frame.f_code.co_filename for part in ("errata/patch.py", "errata/changes/")):
                return None
            if event == "line" and linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip() != "try:":
                left -= 1
                if left == 0:
                    sys.settrace(None)
                    signal.raise_signal(signal.SIGINT)
            return trace

        try:
            sys.settrace(trace)
            with two.applied(lm):
                pass
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        assert tiny.differences(before, tiny.state(lm.model)) == [], f"after line {at}"
        assert lm.patched == 0, f"after line {at}"
        lines = at
        if left > 0:
            break
    assert lines > 30


def test_patches_apply_outside_the_main_thread(lm: LM):
    seen = []

    def work() -> None:
        with patch(lm).applied(lm):
            seen.append(lm.patched)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [1]


def test_a_weight_that_is_tied_to_another_is_patched_alone(lm: LM):
    """Pitfall 15; and methods learn a change of the head with the embeddings as they are."""
    head, embeddings = lm.model.lm_head, lm.model.transformer.wte
    assert head.weight is embeddings.weight
    kept = embeddings.weight.detach().clone()
    made = change(lm, "lm_head", LowRank, 0)
    with Patch({"lm_head": (made,)}).applied(lm):
        assert tiny.same_bits(embeddings.weight, kept)
        assert tiny.same_bits(head.weight, kept + made.delta)
    assert head.weight is embeddings.weight


def test_the_fingerprint_is_the_base_models_also_when_first_asked_for_inside():
    one = tiny.lm("gpt2")
    wanted = tiny.lm("gpt2").fingerprint
    name = one.mlp_out(1).name
    with Patch({name: (change(one, name, Dense, 0),)}).applied(one, check=False):
        assert one.fingerprint == wanted


# Refused


def test_a_patch_of_another_model_is_refused_unless_asked_not_to_check(lm: LM):
    other = tiny.lm("gpt2", seed=1)
    with pytest.raises(ErrataError, match=r"was made for tiny-gpt2 \(.{8}\), this model is tiny-gpt2 \(.{8}\)"):
        with patch(lm).applied(other):
            pass
    with patch(lm).applied(other, check=False):
        pass


def test_patches_of_two_models_cannot_be_added(lm: LM):
    with pytest.raises(ErrataError, match="patches of two models can't be added"):
        patch(lm) + patch(tiny.lm("gpt2", seed=1))


def test_a_patch_of_another_shape_is_refused(lm: LM):
    other = tiny.lm("llama")
    (changes,) = patch(lm).changes.values()
    with pytest.raises(ErrataError, match=r"does not fit .*, which is 64 x 160"):
        with Patch({other.mlp_out(1).name: changes}).applied(other):
            pass


def test_a_module_that_is_not_there_is_named(lm: LM):
    (changes,) = patch(lm).changes.values()
    with pytest.raises(UsageError, match=r"no module 'transformer.h.9.mlp.c_proj'"):
        with Patch({"transformer.h.9.mlp.c_proj": changes}).applied(lm):
            pass


# Algebra


def weights_under(lm: LM, p: Patch) -> torch.Tensor:
    with p.applied(lm):
        return lm.mlp_out(1).weight.clone()


def test_a_patch_is_told_in_one_line(lm: LM):
    """In a session at the keyboard a patch says what it is, not its ten thousand numbers."""
    name = lm.mlp_out(1).name
    step = {"method": "rome", "settings": {}, "edits": 1}
    one = Patch({name: (change(lm, name, LowRank, 0), change(lm, name, Dense, 1))}, (A,), about={"steps": [step, step]})
    assert repr(one) == f"<Patch: 1 edit by rome, {one.bytes:,} bytes; {name}: low-rank + dense>"
    assert repr(Patch()) == "<Patch: 0 edits, 0 bytes; no change>"


def test_nothing_added_is_nothing_changed(lm: LM):
    one = patch(lm)
    for same in (one + Patch(), Patch() + one):
        assert torch.equal(weights_under(lm, same), weights_under(lm, one))
        assert (same.edits, same.about) == (one.edits, one.about)
    assert not Patch()
    assert torch.equal(weights_under(lm, Patch()), lm.mlp_out(1).weight)


def test_a_sum_is_both_one_after_the_other(lm: LM):
    a, b = patch(lm, seed=1), patch(lm, seed=2, edit=B)
    with a.applied(lm), b.applied(lm):
        wanted = lm.mlp_out(1).weight.clone()
    torch.testing.assert_close(weights_under(lm, a + b), wanted)
    assert (a + b).edits == (A, B)


def test_scaled_by_one_zero_and_minus_one(lm: LM):
    one, base = patch(lm), lm.mlp_out(1).weight.clone()
    assert torch.equal(weights_under(lm, one.scaled(1)), weights_under(lm, one))
    assert torch.equal(weights_under(lm, one.scaled(0)), base)
    torch.testing.assert_close(weights_under(lm, one + one.scaled(-1)), base)


def test_without_an_edit_the_others_keep_what_they_wrote_and_their_numbers(lm: LM):
    a, b, c = (patch(lm, seed=i, edit=e) for i, e in enumerate((A, B, C)))
    for first, second in ((a, c), (patch(lm, Codebook, 5, A, 2), patch(lm, Codebook, 6, C, 2))):
        left = (first + b + second).without(B)
        for name, changes in (first + second).changes.items():
            for x, y in zip(changes, left.changes[name], strict=True):
                assert all(torch.equal(x.tensors()[k], y.tensors()[k]) for k in x.tensors())
        assert left.edits == (A, C)
        assert left.without(A).without(C).changes == {}


def test_without_an_edit_that_is_not_there_is_refused(lm: LM):
    with pytest.raises(UsageError, match="no edit 'The capital of New Zealand is' -> 'Oslo'"):
        patch(lm).without(B)


def test_without_refuses_what_a_carry_remembers(lm: LM):
    one = patch(lm)
    with pytest.raises(ErrataError, match="carry, which can't forget one"):
        Patch(one.changes, one.edits, {"past": torch.ones(1)}, one.about).without(A)


def test_equal_steps_become_one_and_keep_count(lm: LM):
    def step(rate: float) -> Patch:
        return Patch({}, (A,), {}, {**about(lm), "steps": [{"method": "ft", "settings": {"rate": rate}, "edits": 1}]})

    steps = added([step(1), step(1), step(2)]).about["steps"]
    assert [(s["settings"]["rate"], s["edits"]) for s in steps] == [(1, 2), (2, 1)]


# By row


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "gptj"])
def test_patches_by_row_answer_as_one_by_one(architecture: str):
    lm = tiny.lm(architecture)
    patches = [patch(lm, seed=1), Patch(), patch(lm, seed=2) + patch(lm, seed=3, edit=B), patch(lm, seed=4, layer=2)]
    ids = torch.randint(5, 200, (4, 7), generator=torch.Generator().manual_seed(0))
    wanted = []
    for row, one in zip(ids, patches, strict=True):
        with one.applied(lm), torch.no_grad():
            wanted.append(lm.model(row[None]).logits[0])
    before = tiny.state(lm.model)
    with applied_by_row(lm, patches), torch.no_grad():
        torch.testing.assert_close(lm.model(ids).logits, torch.stack(wanted), atol=2e-5, rtol=1e-4)
    assert tiny.differences(before, tiny.state(lm.model)) == []


def test_only_low_rank_patches_go_by_row(lm: LM):
    with pytest.raises(ErrataError, match="can't be applied row by row"), applied_by_row(lm, [patch(lm, Dense)]):
        pass


# On disk


def test_save_and_load_give_the_same_logits_exactly(lm: LM, tmp_path: Path):
    path = saved(lm, tmp_path)
    original = patch(lm) + patch(lm, Codebook, 1, B) + patch(lm, Dense, 2, C, layer=2)
    again = Patch.load(path)
    found = []
    for p in (original, again):
        with p.applied(lm):
            found.append(tiny.logits(lm, A.text, B.text))
    assert tiny.same_bits(*found)
    assert not torch.equal(found[0], tiny.logits(lm, A.text, B.text))
    assert again.edits == original.edits
    assert again.about == original.about
    assert torch.equal(again.carry["past"], torch.arange(3.0))


def test_an_empty_patch_can_be_saved(tmp_path: Path):
    Patch().save(tmp_path / "p.safetensors")
    assert not Patch.load(tmp_path / "p.safetensors")


def test_the_file_is_safetensors_with_a_json_header(lm: LM, tmp_path: Path):
    with safe_open(saved(lm, tmp_path), "pt") as file:
        header = json.loads(file.metadata()["errata"])
    assert header["format"] == 1
    assert header["edits"][0]["target"] == "Lima"


@pytest.fixture(scope="module")
def whole(lm: LM, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return saved(lm, tmp_path_factory.mktemp("whole")).read_bytes()


@settings(max_examples=400)
@given(data=st.data())
def test_one_damaged_byte_anywhere_is_noticed(whole: bytes, tmp_path_factory: pytest.TempPathFactory, data: Any):
    header = 8 + int.from_bytes(whole[:8], "little")  # where damage is hardest to notice: draw half of the places there
    at = data.draw(st.integers(0, header - 1) | st.integers(0, len(whole) - 1))
    damage = data.draw(st.integers(1, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(whole[:at] + bytes([whole[at] ^ damage]) + whole[at + 1 :])
    with pytest.raises(ErrataError, match=r"damaged|is no patch|newer"):
        Patch.load(path)


UNSOUND = {
    "left and right of two ranks": {"left": torch.randn(64, 2)},
    "half precision": {"left": torch.randn(64, 1).half()},
    "whole numbers": {"right": torch.ones(1, 256, dtype=torch.long)},
    "no number": {"left": torch.full((64, 1), float("nan"))},
    "an infinite one": {"right": torch.full((1, 256), float("inf"))},
    "one dimension too few": {"right": torch.randn(256)},
    "one part too few": {"right": None},
    "an edit that is not there": {"owners": torch.tensor([7])},
    "an edit before the first": {"owners": torch.tensor([-1])},
    "a part of another kind": {"delta": torch.randn(64, 256)},
}


@pytest.mark.parametrize("wrong", UNSOUND)
def test_parts_that_do_not_fit_each_other_are_damage_although_the_file_is_signed(wrong: str, lm: LM, tmp_path: Path):
    name = lm.mlp_out(1).name
    parts = {**change(lm, name, LowRank, 0).tensors(), **UNSOUND[wrong]}
    tensors = {f"change/0/{k}": t for k, t in parts.items() if t is not None}
    header = {"format": 1, "layout": [[name, LowRank.kind]], "edits": [A.to_dict()], "about": about(lm)}
    store.write(tmp_path / "p.safetensors", store.sealed("errata", tensors, header))
    with pytest.raises(ErrataError, match="is damaged: .*; get a whole copy"):
        Patch.load(tmp_path / "p.safetensors")


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"about": {"steps": []}}, "the model that it is for is none"),
        ({"about": {"base": {"name": "x", "fingerprint": 5}, "steps": [], "versions": {}}}, "the model that it is for"),
        (
            {"about": {"base": {"name": "x", "fingerprint": "f"}, "steps": [5], "versions": {}}},
            "the steps that made it",
        ),
        (
            {"about": {"base": {"name": "x", "fingerprint": "f"}, "steps": [], "versions": {}, "notes": []}},
            "the notes on",
        ),
        ({"about": "x"}, "what it says of itself is 'x'"),
        ({"edits": "x"}, "damaged"),
        ({"edits": [{"prompt": "{} is", "subject": 5, "target": "x"}]}, "damaged|subject"),
        ({"layout": [["m", "spell"]]}, "an unknown kind 'spell' at 'm'"),
        ({"layout": [[5, "low-rank"]]}, "an unknown kind"),
        ({"layout": []}, "tensors that belong to no change"),
        ({"format": True}, "its format is True"),
        ({"format": 99}, "written by a newer errata"),
    ],
)
def test_a_signed_header_that_says_something_else_is_refused(wrong: dict[str, Any], why: str, lm: LM, tmp_path: Path):
    name = lm.mlp_out(1).name
    tensors = {f"change/0/{k}": t for k, t in change(lm, name, LowRank, 0).tensors().items()}
    header = {"format": 1, "layout": [[name, LowRank.kind]], "edits": [A.to_dict()], "about": about(lm), **wrong}
    store.write(tmp_path / "p.safetensors", store.sealed("errata", tensors, header))
    with pytest.raises((ErrataError, UsageError), match=why):
        Patch.load(tmp_path / "p.safetensors")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(whole: bytes, tmp_path: Path, share: float):
    path = tmp_path / "half.safetensors"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ErrataError, match="is damaged or no safetensors file"):
        Patch.load(path)


def test_a_pickle_is_refused_and_never_run(tmp_path: Path):
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "sprung",))

    path = tmp_path / "patch.safetensors"
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ErrataError, match="no safetensors file"):
        Patch.load(path)
    torch.save({"x": Trap()}, path)
    with pytest.raises(ErrataError, match="no safetensors file"):
        Patch.load(path)
    assert not (tmp_path / "sprung").exists()


def test_foreign_tensors_are_refused(tmp_path: Path):
    save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ErrataError, match="holds tensors but is no patch of errata"):
        Patch.load(tmp_path / "model.safetensors")


def test_a_newer_format_is_refused(tmp_path: Path):
    save_file({}, tmp_path / "new.safetensors", metadata={"errata": json.dumps({"format": 2})})
    with pytest.raises(ErrataError, match=r"newer errata \(format 2\); upgrade"):
        Patch.load(tmp_path / "new.safetensors")


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(UsageError, match=r"there is no file '.*nowhere.safetensors'"):
        Patch.load(tmp_path / "nowhere.safetensors")


# Written whole or not at all


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(
    lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
):
    path = saved(lm, tmp_path)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(ErrataError, match="can't be written: No space left on device; nothing was changed"):
        patch(lm, seed=9).save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_is_full_half_way_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    """With a real limit on the size of files, which fails the write itself."""
    script = """
import resource, signal, sys
from errata.store import write
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
write(sys.argv[1], b"old")
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write(sys.argv[1], b"new" * 1000)
except Exception as error:
    print(type(error).__name__, error)
"""
    path = tmp_path / "file"
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    assert "ErrataError" in done.stdout
    assert "File too large; nothing was changed" in done.stdout
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_device_or_a_pipe_is_written_to_and_never_replaced(lm: LM, tmp_path: Path):
    """A file renamed over /dev/stdout would destroy it."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    (tmp_path / "link").symlink_to(pipe)
    for path in (pipe, tmp_path / "link"):
        store.write(path, b"whole")
        assert os.read(reader, 100) == b"whole"
        assert path.is_fifo()
    os.close(reader)


def test_a_link_stays_one(tmp_path: Path):
    (tmp_path / "there").mkdir()
    kept, link = tmp_path / "there" / "kept", tmp_path / "link"
    kept.write_bytes(b"old")
    link.symlink_to(kept)
    store.write(link, b"new")
    assert link.is_symlink()
    assert kept.read_bytes() == b"new"


def test_a_folder_that_is_not_there_is_said(lm: LM, tmp_path: Path):
    with pytest.raises(ErrataError, match="can't be written: No such file or directory"):
        patch(lm).save(tmp_path / "nowhere" / "patch.safetensors")
