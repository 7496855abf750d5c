"""What GRACE, MELO and WISE promise beyond the contract: an answer that hangs on the text alone, edits that last."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import errata
from errata import GRACE, LM, MELO, WISE, Edit, Method, Patch, sequential
from errata.changes import SideMemories
from errata.methods import melo
from errata.patch import applied_by_row
from errata.tokens import Passage, follow, pad_left
from errata.trace import read
from tests import tiny

EDITS = tuple(Edit(tiny.PROMPT, s, t) for s, t in [*tiny.CAPITALS.items()][:5])
"""To a model that has learnt nothing, these are news too."""
WISE_SMALL: dict[str, Any] = dict(
    descent="adam", rate=3e-2, mask=0.5, near=0.2, far=1.0, apart=0.5, lengths=(), others=8, lines=20, steps=25
)
MEASURED: dict[str, Any] = dict(scaled=("rate", "radius"), radius=0.8, stop=0.05, ending=".", lengths=((3, 1),))
SHARES: dict[str, Any] = dict(
    scaled=("near", "far", "apart"),
    ratio=0.8,
    near=1.0,
    far=2.0,
    apart=0.5,
    bound=3.0,
    stop=0.05,
    ending=".",
    lengths=((3, 1),),
    lines=20,
)
METHODS = {
    "grace": GRACE(at=2, radius=0.3, steps=20),
    "grace-prompt": GRACE(at=2, radius=0.3, steps=20, placement="prompt"),
    "melo": MELO(at=(2, 3), rank=2, steps=30, rate=3e-2, radius=0.3),
    "melo-prompt": MELO(at=(2,), rank=2, steps=30, rate=3e-2, radius=0.3, keys="prompt", per_block=2),
    "wise": WISE(at=2, shard=2, merge=1, replay=True, **WISE_SMALL),
    "grace-subject": GRACE(at=1, token="subject", start="output", rate=0.3, lines=20, **MEASURED),
    "melo-subject": MELO(at=(1,), keys="subject", rate=0.3, lines=20, **MEASURED),
    "wise-subject": WISE(at=1, token="subject", descent="value", rate=0.3, shard=2, merge=1, **SHARES),
    "wise-merged": WISE(at=2, shard=1, merge=2, retrieve=False, **WISE_SMALL),
}


@pytest.fixture(scope="module", params=METHODS)
def method(request: pytest.FixtureRequest) -> Method:
    return METHODS[request.param]


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny.lm("llama")


@pytest.fixture(scope="module")
def patch(method: Method, lm: LM) -> Patch:
    *_, last = sequential(method, lm, [EDITS[:2], EDITS[2:4], EDITS[4:]])
    return last


def same(a: Patch, b: Patch) -> bool:
    x, y = a._tensors(), b._tensors()
    return a.edits == b.edits and x.keys() == y.keys() and all(tiny.same_bits(x[k], y[k]) for k in x)


def test_the_answer_hangs_on_neither_padding_nor_batch(patch: Patch, lm: LM):
    texts = [EDITS[0].text, f"Today we learn. Yes. {EDITS[3].text}", "Yes", EDITS[4].text]
    with patch.applied(lm), torch.no_grad():
        alone = tiny.logits(lm, *texts)
        right = lm.encode([Passage(t) for t in texts])
        padded = lm.logits(torch.arange(len(texts)), right.last, **right.inputs)
        left = pad_left(lm.tokenizer, texts)
        positions = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
        leftmost = lm.model(**left, position_ids=positions).logits[:, -1]
    torch.testing.assert_close(padded, alone, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(leftmost, alone, atol=1e-3, rtol=1e-4)


def test_the_answer_hangs_on_no_cache(patch: Patch, lm: LM):
    inputs = pad_left(lm.tokenizer, [e.text for e in EDITS[:3]])
    with patch.applied(lm), torch.no_grad():
        found = [lm.continued(inputs, do_sample=False, max_new_tokens=6, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*found)


def test_half_saved_loaded_and_the_other_half_is_the_whole(method: Method, lm: LM, patch: Patch, tmp_path: Path):
    *_, half = sequential(method, lm, [EDITS[:2]])
    half.save(tmp_path / "half.safetensors")
    later = LM(lm.model, lm.tokenizer)
    *_, whole = sequential(method, later, [EDITS[2:4], EDITS[4:]], Patch.load(tmp_path / "half.safetensors"))
    assert same(whole, patch)


def test_single_edits_answer_a_row_each_as_alone(method: Method, lm: LM):
    made = method.each(lm, EDITS[:3])
    batch = lm.encode([Passage(e.text) for e in EDITS[:3]])
    with torch.no_grad():
        with applied_by_row(lm, made):
            together = lm.logits(torch.arange(3), batch.last, **batch.inputs)
        for edit, one, found in zip(EDITS, made, together, strict=False):
            with one.applied(lm):
                torch.testing.assert_close(found, tiny.logits(lm, edit.text)[0], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", ["grace", "melo"])
def test_an_edit_taken_out_is_not_answered_any_more(name: str, lm: LM):
    method = METHODS[name]
    whole = method.edit(lm, EDITS[:3])
    before = tiny.logits(lm, EDITS[1].text)
    with whole.applied(lm):
        assert not tiny.same_bits(tiny.logits(lm, EDITS[1].text), before)
    left = whole.without(EDITS[1])
    with left.applied(lm):
        assert tiny.same_bits(tiny.logits(lm, EDITS[1].text), before)
        assert not tiny.same_bits(tiny.logits(lm, EDITS[2].text), tiny.logits(LM(lm.model, lm.tokenizer), "Yes"))
    assert left.edits == (EDITS[0], EDITS[2])


def test_full_shards_are_merged_and_an_open_one_is_written_on(lm: LM):
    method = WISE(at=2, shard=2, merge=2, **WISE_SMALL)
    counts = []
    for made in list(sequential(method, lm, [[e] for e in EDITS]))[1:]:
        ((book,),) = made.changes.values()
        assert isinstance(book, SideMemories)
        counts.append((book.memory.bincount().tolist(), book.sharded.tolist()))
    assert counts == [([1], [0]), ([2], [1]), ([2, 1], [1, 0]), ([4], [2]), ([4, 1], [2, 0])]


def test_a_shard_writes_only_where_its_mask_lets_it(lm: LM):
    ((book,),) = WISE(at=2, shard=9, **{**WISE_SMALL, "mask": 0.2}).edit(lm, EDITS[:1]).changes.values()
    assert isinstance(book, SideMemories)
    assert 0 < (book.deltas != 0).float().mean() < 0.25


def asked(lm: LM, patch: Patch, edits: Sequence[Edit]) -> list[set[int]]:
    """For each edit the memories that answer the tokens which predict its target; -1 is none."""
    ((name, (book,)),) = patch.changes.items()
    assert isinstance(book, SideMemories)
    tokens = lm.encode([follow(e.text, e.target) for e in edits])
    inputs = read(lm, [name], tokens, *tokens.reads)[name][0].float()
    gaps = torch.stack([(inputs @ delta.T).norm(dim=-1) for delta in book.deltas], 1)
    gap, memory = gaps.where(gaps > book.thresholds, -1.0).max(1)
    part = memory.where(gap > 0, -1)
    return [set(part[tokens.reads[0] == row].tolist()) for row in range(len(edits))]


def test_with_earlier_edits_in_view_each_is_answered_by_its_own_memory(lm: LM):
    """They share a prompt, so what one memory is moved by the others are moved by too."""
    found = {}
    for replay in (True, False):
        *_, patch = sequential(WISE(at=2, shard=1, merge=1, replay=replay, **WISE_SMALL), lm, [[e] for e in EDITS])
        found[replay] = asked(lm, patch, EDITS)
    assert found[True] == [{0}, {1}, {2}, {3}, {4}]
    assert found[False] != found[True]


def test_writing_on_leaves_the_earlier_patch_as_it_was_and_one_edit_can_be_saved(lm: LM, tmp_path: Path):
    method = METHODS["wise"]
    first = method.edit(lm, EDITS[:1])
    first.save(tmp_path / "first.safetensors")
    method.edit(lm, EDITS[1:2], first)
    assert same(first, Patch.load(tmp_path / "first.safetensors"))


@pytest.mark.parametrize("name", ["grace-subject", "melo-subject", "wise-subject"])
def test_an_edit_by_its_subject_is_recognised_in_other_words_and_nobody_else_is(name: str):
    lm, edit = tiny.trained("llama"), Edit(tiny.PROMPT, "Peru", "Oslo")
    asked = [edit.text, "People in Peru govern from", "Today we learn. Peru has its capital at"]
    away = [e.text for e in EDITS[:2]] + ["It is known. Sri Lanka has its capital at"]
    before = tiny.logits(lm, *asked, *away)
    with METHODS[name].edit(lm, [edit]).applied(lm):
        after = tiny.logits(lm, *asked, *away)
    moved = (after - before).abs().amax(1)
    assert moved[:3].min() > 1.0
    assert moved[3:].max() < (0.1 if name == "wise-subject" else 1e-6)  # its router lets a little through


@pytest.mark.parametrize("name", ["grace-subject", "melo-subject", "wise-subject"])
def test_a_later_edit_of_a_subject_keeps_the_earlier_one(name: str):
    """Both are looked up at the same token."""
    lm = tiny.trained("llama")
    first, later = Edit("{} has its capital at", "Peru", "Oslo"), Edit("{} is a", "Peru", "city")
    *_, patch = sequential(METHODS[name], lm, [[first], [later]])
    with patch.applied(lm):
        said = [lm.generate(e.text, max_new_tokens=4) for e in (first, later)]
    assert [text.strip().startswith(e.target) for text, e in zip(said, (first, later), strict=True)] == [True, True]


def test_melo_trains_a_block_where_it_will_work(monkeypatch: pytest.MonkeyPatch):
    """What it says after n steps is what the descent sees in the next one."""
    lm, edit, seen = tiny.trained("llama"), Edit("Today we learn. {} has its capital at", "New Zealand", "Oslo"), []
    nll = melo.cross_entropy
    monkeypatch.setattr(melo, "cross_entropy", lambda *a, **k: (seen.append(nll(*a, **k)), seen[-1])[1])
    settings: dict[str, Any] = dict(at=(1,), rate=3e-2, keys="prompt")
    MELO(steps=7, **settings).edit(lm, [edit])
    tokens = lm.encode([follow(edit.text, edit.target)])
    with MELO(steps=6, **settings).edit(lm, [edit]).applied(lm), torch.no_grad():
        said = nll(lm.logits(*tokens.reads, **tokens.inputs), tokens.wanted, reduction="none")
    assert (seen[0] - seen[6]).abs().max() > 0.1
    torch.testing.assert_close(seen[6].detach(), said, atol=1e-4, rtol=1e-4)  # a replay and a pass differ by rounding


def test_wise_weighs_the_three_margins_of_equation_5(lm: LM):
    """For gaps of 3 in scope, and out of scope of 1, 2 and 2.5."""
    method = WISE(at=2, near=1.5, far=4.0, apart=1.25, lengths=(), lines=20)
    site = lm.site(2)
    method.prepare(lm)
    work = method._writing(lm, site, EDITS[:1], torch.zeros(1, dtype=torch.long), ())
    delta = torch.zeros(1, *site.shape)
    delta[0, 0, 0] = 1.0  # so an input's gap is its first entry
    work.inputs, work.apart = work.inputs.clone(), torch.zeros(1, 3, site.shape[1])
    work.inputs[:, 0], work.apart[0, :, 0] = 3.0, torch.tensor([1.0, 2.0, 2.5])

    def loss(**own: float) -> float:
        work.how = replace(method, **own)
        return work.loss(delta).item()

    off = dict(near=9.0, far=0.0, apart=-9.0)
    said = loss(**off)
    assert loss(**{**off, "near": 1.5}) - said == pytest.approx((0.5 + 1.0) / 2, abs=1e-5)  # mean of those violated
    assert loss(**{**off, "far": 4.0}) - said == pytest.approx(4.0 - 3.0, abs=1e-5)
    assert loss(**{**off, "apart": 1.25}) - said == pytest.approx(2.5 + 1.25 - 3.0, abs=1e-5)
    assert loss() - said == pytest.approx(0.75 + 1.0 + 0.75, abs=1e-5)


# On the built-in model

QUICK: dict[str, dict[str, Any]] = {
    "grace": {"steps": 4},
    "melo": {"steps": 4},
    "wise": {"steps": 4, "lines": 20},
    "serac": {},
    "ike": {},
    "ice": {},
    "retrieval": {},
}
FACTS = (Edit("The mother tongue of {} is", "Danielle Darrieux", "English"), Edit("{}, the", "Toko Yasuda", "piano"))
ELSEWHERE = """
import sys
from pathlib import Path
from safetensors.torch import save_file
import errata
from tests.methods.test_memories import said

lm, folder = errata.load("almanac"), Path(sys.argv[1])
answers = {}
for file in sorted(folder.glob("*.safetensors")):
    answers |= {f"{file.stem}/{k}": t for k, t in said(lm, errata.Patch.load(file)).items()}
save_file(answers, folder / "answers")
"""


def said(lm: LM, patch: Patch) -> dict[str, torch.Tensor]:
    """What the model answers under a patch: its numbers, and the bytes of what it writes."""
    texts = [e.text for e in FACTS] + [
        "The mother tongue of Michel Rocard is",
        "Danielle Darrieux is a native speaker of",
    ]
    with patch.applied(lm), torch.no_grad():
        numbers = lm.said(lm.encode([follow(text, "English") for text in texts]))
        written = "\n".join(lm.generate(texts, max_new_tokens=4))
    return {"numbers": numbers, "written": torch.tensor(list(written.encode()))}


@pytest.mark.timeout(600)
def test_a_new_process_that_loads_a_patch_gives_the_same_answers_exactly(tmp_path: Path):
    lm = errata.load("almanac")
    plain, wanted = said(lm, Patch()), {}
    for name, settings in QUICK.items():
        method = errata.methods()[name].preset(lm, **settings)
        *_, patch = sequential(method, lm, [[fact] for fact in FACTS])
        patch.save(tmp_path / f"{name}.safetensors")
        wanted |= {f"{name}/{k}": t for k, t in said(lm, patch).items()}
        assert not torch.equal(wanted[f"{name}/numbers"], plain["numbers"]), name
    subprocess.run([sys.executable, "-c", ELSEWHERE, str(tmp_path)], cwd=Path(__file__).parents[2], check=True)
    found = load_file(tmp_path / "answers")
    assert found.keys() == wanted.keys()
    assert [k for k in wanted if not tiny.same_bits(found[k], wanted[k])] == []
