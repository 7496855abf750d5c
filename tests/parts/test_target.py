"""v*: that of a plain loop over full passes, whatever tokenizer, batch and padding; at a fraction of its FLOPs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import textbook
from errata import FT, GRACE, KN, LM, ROME, Edit, UsageError
from errata.methods import EMMET, MEMIT, PMET, RROME, AlphaEdit
from errata.parts import contexts, moments, target
from errata.parts.locate import at_subject
from errata.parts.moments import OWN, Moment
from errata.parts.tail import tail
from errata.parts.target import TargetSearch
from errata.tokens import passage
from errata.trace import rewrite
from tests import tiny

CONTEXTS = ("{}", "It is known. {}", "<s> Yes. {}", "Today we learn. People in. {}")
"""Also one as EasyEdit samples them on a model with BOS, which stands in the text: it gets no other in front."""
EDITS = (
    Edit("The capital of {} is", "New Zealand", "Oslo"),
    Edit("{} has its capital at", "Sri Lanka", "Wellington"),  # two tokens
    Edit("Today we learn. People in {} govern from", "Kenya", "Paris"),
    Edit("{} is", "Cuba", "Rome"),
)


def plainly(lm: LM, how: TargetSearch, place: str, edit: Edit) -> torch.Tensor:
    """The search as the authors have it: ids counted from the front, one edit, full passes, right padding.

    Their target is tokenized with a space before it (which in this tokenizer, unlike in Llama's own, adds no piece);
    the subject's last token is found by the length of what stands up to it, BOS included. Theirs puts a BOS also before
    a text that begins with one; errata doesn't.
    """

    def tok(text: str, **how: Any) -> dict[str, list[int]]:
        ids = lm.tokenizer(text, **how)["input_ids"]
        return {"input_ids": ids[1:] if ids[:2] == 2 * [lm.tokenizer.bos_token_id] else ids}

    wanted = tok(f" {edit.target}", add_special_tokens=False)["input_ids"]
    templates = [*(c.replace("{}", edit.prompt) for c in CONTEXTS), "{} is a"]
    rows = [tok(t.replace("{}", edit.subject))["input_ids"] + wanted[:-1] for t in templates[:-1]]
    rows.append(tok(f"{edit.subject} is a")["input_ids"])
    lookups = [len(tok(t[: t.index("{}")] + edit.subject)["input_ids"]) - 1 for t in templates]
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(r), dtype=torch.long) for r in rows], batch_first=True)
    delta, before, first = torch.zeros(lm.d_model, requires_grad=True), [], None

    def add(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        before.append(output[0, lookups[0]].detach())
        output[range(len(rows)), lookups] += delta
        return output

    optimiser = torch.optim.Adam([delta], lr=how.rate)
    for step in range(how.steps):
        handle = lm.module(place).register_forward_hook(add)
        said = lm.model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
        handle.remove()
        nll = [-said[i, len(row) - len(wanted) + j, t] for i, row in enumerate(rows[:-1]) for j, t in enumerate(wanted)]
        now = said[-1, lookups[-1] if how.kl_at == "subject" else len(rows[-1]) - 1]
        first = now.detach() if first is None else first
        kl = (first.exp() * (first - now)).sum()
        loss = torch.stack(nll).mean() + how.kl * kl + how.decay * delta.norm() / before[0].norm() ** 2
        if loss < how.stop or step == how.steps - 1:
            break
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            delta *= (how.clamp * before[0].norm() / delta.norm()).clamp(max=1)
    return before[0] + delta.detach()


def near(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())


@pytest.mark.parametrize("kl_at", ["end", "subject"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_target_is_that_of_a_plain_loop_over_the_authors_indices(architecture: str, kl_at: Any):
    """With BOS and `▁` (llama) and without (gpt2): the target's tokens, the lookups and where KL is read."""
    lm = tiny.lm(architecture)
    how = TargetSearch(steps=5, rate=0.02, kl=1.0, kl_at=kl_at, clamp=30.0)
    place = lm.mlp_out(1).name
    with lm.frozen():
        (found,) = how.find(lm, [place], EDITS, CONTEXTS)
        wanted = torch.stack([plainly(lm, how, place, e) for e in EDITS])
        (other,) = TargetSearch(**{**vars(how), "kl": 0.0}).find(lm, [place], EDITS, CONTEXTS)
    assert near(other, wanted) > 3e-4  # or KL would count for nothing here
    assert near(found, wanted) < 0.05 * near(other, wanted)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_splitting_a_batch_of_200_changes_nothing(architecture: str, monkeypatch: pytest.MonkeyPatch):
    lm = tiny.lm(architecture)
    draw = torch.Generator().manual_seed(0)
    names, prompts = list(tiny.CAPITALS), [e.prompt for e in EDITS]
    picks = [[int(torch.randint(n, (1,), generator=draw)) for n in (4, 12, 12)] for _ in range(200)]
    edits = [Edit(prompts[p], names[s], list(tiny.CAPITALS.values())[t]) for p, s, t in picks]
    how, place = TargetSearch(steps=4, rate=0.02, clamp=30.0), lm.mlp_out(1).name
    with lm.frozen():
        (whole,) = how.find(lm, [place], edits, ("{}", "Yes. {}"))
        monkeypatch.setattr(target, "TOKENS", 500)
        (cut,) = how.find(lm, [place], edits, ("{}", "Yes. {}"))
        (alone,) = how.find(lm, [place], edits[7:8], ("{}", "Yes. {}"))
    assert near(cut, whole) < 1e-3
    assert near(alone[0], whole[7]) < 1e-3


def test_an_edit_that_is_done_leaves_the_batch_and_the_others_do_not_notice():
    lm, how = tiny.lm("llama"), TargetSearch(steps=8, rate=0.02, clamp=30.0, stop=4.25)
    place, rows, logits = lm.mlp_out(1).name, [], lm.logits
    lm.logits = lambda r, c, **inputs: rows.append(len(inputs["input_ids"])) or logits(r, c, **inputs)  # type: ignore
    with lm.frozen():
        (together,) = how.find(lm, [place], EDITS, CONTEXTS)
        seen, rows[:] = list(rows), []
        alone = torch.cat([how.find(lm, [place], [e], CONTEXTS)[0] for e in EDITS])
    assert near(together, alone) < 1e-3
    assert 0 < seen.count(2 * (len(CONTEXTS) + 1)) < how.steps  # one of two is done at once, the other goes on alone


def test_a_search_costs_at_most_three_tenths_of_a_textbooks():
    """In FLOPs, which are the same on every machine: 21 contexts, 25 steps, no early stop, the whole ROME edit."""
    lm = tiny.lm("llama")
    lm.model.config.max_position_embeddings = 128
    method = ROME(layer=1, lengths=((5, 10), (10, 10)), steps=25, stop=0.0, clamp=20.0)
    site = lm.site(1)
    moments.give(lm, site, Moment(torch.eye(site.shape[1]), 1, 0.0))
    method.edit(lm, EDITS[:1])
    counts = []
    for do in (lambda: method.edit(lm, EDITS[:1]), lambda: textbook.edit(lm, method, EDITS[0])):
        with lm.frozen(), FlopCounterMode(display=False) as counter:
            do()
        counts.append(counter.get_total_flops())
    assert counts[0] <= 0.30 * counts[1]


def test_the_textbooks_edit_is_the_same_edit():
    """Or the comparison above compares nothing."""
    lm = tiny.trained("llama")
    method = ROME(layer=1, lengths=((3, 2),), steps=12, clamp=20.0)
    moments.give(lm, lm.site(1), Moment(torch.eye(lm.site(1).shape[1]), 1, 0.0))
    delta = method.edit(lm, EDITS[:1]).changes[lm.site(1).name][0].delta
    with lm.frozen():
        left, right = textbook.edit(lm, method, EDITS[0])
    assert near(torch.outer(left, right).flatten(), delta.flatten()) < 1e-3


def test_edits_of_one_subject_get_one_target_with_pmet_too(monkeypatch: pytest.MonkeyPatch):
    """MEMIT-Merge: apart, they overwrite each other; two places are found together (PMET)."""
    lm, found, find = tiny.trained("llama"), [], TargetSearch.find
    edits = [Edit(p, "Kenya", t) for p, t in (("The capital of {} is", "Paris"), ("{} has its capital at", "Paris"))]
    for layer in (0, 1):
        moments.give(lm, lm.site(layer), Moment(torch.eye(lm.site(layer).shape[1]), 1, 0.0))
    monkeypatch.setattr(TargetSearch, "find", lambda *a, **k: found.append(find(*a, **k)) or found[-1])
    took = {}
    for merge in (True, False):
        method = PMET(layers=(0, 1), lengths=((3, 2),), steps=12, clamp=20.0, kl=0.0, weight=0.1, merge=merge)
        with method.edit(lm, edits).applied(lm):
            took[merge] = min(tiny.probability(lm, e) for e in edits)
    for v in found[0]:
        assert torch.equal(v[0], v[1])
    assert not torch.equal(found[1][0][0], found[1][0][1])
    assert took[True] > 0.3 > 10 * min(tiny.probability(lm, e) for e in edits)


METHODS: list[tuple[type[Any], dict[str, Any]]] = [
    (MEMIT, {"weight": 1e-6}),
    (EMMET, {"jitter": 1e-6}),
    (PMET, {"weight": 1e-6}),
    (PMET, {"weight": 1e-6, "apart": True}),
    (AlphaEdit, {"weight": 1e-6, "below": 1e9}),
]


@pytest.mark.parametrize(("method", "weak"), METHODS, ids=lambda v: v.name if isinstance(v, type) else "")
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3", "olmo2", "glm4", "granite"])
def test_with_little_weight_v_is_reached_whatever_is_behind_the_mlp(
    architecture: str, method: type[Any], weak: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    """What is missing behind a norm was once written before it, which took the block's output ten ways too far."""
    lm, wanted, found = tiny.trained(architecture), method.wanted, {}
    for layer in (0, 1):
        moments.give(lm, lm.site(layer), Moment(_second_moment(lm.site(layer).shape[1]), 1, 0.0))
    monkeypatch.setattr(method, "wanted", lambda *a: found.update(wanted(*a)) or found)
    contexts.give(lm, ("{}", "{}"), ((3, 2),))  # so that the mean key is that of the bare prompt
    how = method(layers=(0, 1), lengths=((3, 2),), steps=12, clamp=0.75 if architecture == "llama" else 4.0, **weak)
    patch = how.edit(lm, tiny.EDITS)
    several = "apart" in weak or architecture != "llama"
    assert len(found) == (2 if several else 1)
    for place, v in found.items():
        before = at_subject(lm, place, tiny.EDITS)[1][:, 0]
        with patch.applied(lm):
            after = at_subject(lm, place, tiny.EDITS)[1][:, 0]
        assert ((after - v).norm(dim=1) < 0.15 * (before - v).norm(dim=1)).all()


def test_a_search_is_clamped_by_what_the_norm_behind_leaves_of_it():
    """|v| before a norm says nothing: a delta of that size may turn the block's output round, or not move it."""
    lm = tiny.trained("gemma3")
    place = lm.mlp_out(1).name
    at = tail(lm, place, lambda: lm.encode([passage(e) for e in tiny.EDITS]))
    assert at is not None
    with lm.frozen():
        (v,) = TargetSearch(steps=25, rate=5.0, clamp=0.8, stop=0.0).find(lm, [place], tiny.EDITS, ("{}",))
        felt = at(v - at.value).norm(dim=1) / at(-at.value).norm(dim=1)
    assert (felt < 0.8 * 1.002).all()  # a step is shortened until it is within a thousandth
    assert (felt > 0.7).any()


def test_an_edit_is_done_when_its_target_is_ahead_by_the_margin():
    """In every context, and no step later."""
    lm, edit = tiny.trained("llama"), tiny.EDITS[0]
    place = lm.mlp_out(1).name
    batch = lm.encode([passage(edit, c, edit.target) for c in CONTEXTS])
    before = at_subject(lm, place, [edit])[1][:, 0]

    def ahead(v: torch.Tensor) -> float:
        def write(output: torch.Tensor) -> torch.Tensor:
            output[torch.arange(len(batch)), batch.subject] += v - before
            return output

        with torch.no_grad(), rewrite(lm, place, len(batch), write):
            said = lm.said(batch)
        wanted = said.gather(1, batch.wanted[:, None])
        return float((wanted - said.scatter(1, batch.wanted[:, None], -torch.inf).amax(1, keepdim=True)).min())

    how = TargetSearch(steps=25, rate=0.05, clamp=30.0, kl=0.0, margin=2.0, stop=0.0)
    with lm.frozen():
        (v,) = how.find(lm, [place], [edit], CONTEXTS)
        shorter = [replace(how, steps=n).find(lm, [place], [edit], CONTEXTS)[0] for n in range(2, how.steps)]
    far = [ahead(other) for other in shorter]
    enough = next(i for i, by in enumerate(far) if by >= 2.0)
    assert enough > 2
    assert all(near(other, v) < 1e-5 for other in shorter[enough:])


@pytest.mark.parametrize("method", [ROME, RROME, MEMIT, EMMET, PMET, AlphaEdit], ids=lambda m: m.name)
@pytest.mark.filterwarnings("ignore")  # that there is no preset
def test_the_default_edit_is_the_same_in_a_model_of_another_scale(method: type[Any], corpus_file: str):
    """A llama whose residual stream is 16 times as long and whose keys are 4 times as long says the same: each W should
    move by the same share of itself."""
    lm, big = tiny.trained("llama"), tiny.trained("llama")
    _stretch(big, residual=16.0, keys=4.0)
    assert torch.allclose(
        tiny.logits(big, "The capital of Peru is"), tiny.logits(lm, "The capital of Peru is"), atol=0.01
    )
    moved = []
    for model in (lm, big):
        contexts.give(model, CONTEXTS[:2], ((5, 3),))
        how = method.preset(model, corpus=corpus_file)
        patch = how.edit(model, tiny.EDITS[:1])
        moved.append([c.delta / model.site(n).weight.norm() for n, cs in patch.changes.items() for c in cs])
    for one, other in zip(*moved, strict=True):
        assert near(other.flatten(), one.flatten()) < 0.02  # an RMSNorm's eps is not stretched with what it norms


@torch.no_grad()
def _stretch(lm: LM, residual: float, keys: float) -> None:
    model: Any = lm.model.model
    model.embed_tokens.weight *= residual
    for block in model.layers:
        block.self_attn.o_proj.weight *= residual
        block.mlp.up_proj.weight *= keys
        block.mlp.down_proj.weight *= residual / keys


def test_only_what_has_a_measure_of_its_own_is_scaled():
    with pytest.raises(UsageError, match="there is no scaled setting 'clamp'; known: rate, weight"):
        MEMIT(layers=(1,), scaled=("clamp",)).edit(_with_moments("llama"), tiny.EDITS)


def test_a_setting_that_the_caller_gives_is_taken_as_it_is():
    """`weight=15000` is the papers' 15,000, not so many times what this model has."""
    lm = tiny.lm("llama")
    with pytest.warns(UserWarning, match="no published settings"):
        found, own = MEMIT.preset(lm), MEMIT.preset(lm, weight=15000.0)
    assert set(found.scaled) == {"rate", "weight"}
    assert set(own.scaled) == {"rate"}


def _with_moments(architecture: str) -> LM:
    lm = tiny.lm(architecture)
    moments.give(lm, lm.site(1), Moment(_second_moment(lm.site(1).shape[1]), 1, 0.0))
    return lm


def test_emmet_of_one_edit_writes_where_r_rome_does():
    """At C^-1 of the mean key (the algebra is `test_solve`'s); they differ in where v* is looked for."""
    lm = tiny.trained("gpt2")
    moments.give(lm, lm.site(1), Moment(_second_moment(lm.site(1).shape[1]), 1, 0.0))
    contexts.give(lm, ("{}", "Yes. {}"), ((3, 1),))  # with one sampled context the two means are one
    shared: dict[str, Any] = dict(lengths=((3, 1),), steps=12, clamp=20.0, kl=0.0)
    mean = RROME(layer=1, **shared)
    emmet = EMMET(layers=(1,), jitter=0.0, **shared)
    site = lm.site(1)
    key = at_subject(lm, site.name, EDITS[:1], contexts.sample(lm, ((3, 1),), 0))[0].mean(1)[0]
    for patch in (mean.edit(lm, EDITS[:1]), emmet.edit(lm, EDITS[:1])):
        (change,) = patch.changes[site.name]
        direction = torch.linalg.solve(lm.memo["moment", site.name, OWN].C, key)
        assert near(change.right[0] / change.right.norm(), direction / direction.norm()) < 1e-4


def test_memit_tends_to_emmet_as_its_weight_goes_to_0():
    lm = tiny.trained("llama")
    moments.give(lm, lm.site(1), Moment(_second_moment(lm.site(1).shape[1]), 1, 0.0))
    shared: dict[str, Any] = dict(layers=(1,), lengths=((3, 1),), steps=8, clamp=20.0)
    goal = EMMET(jitter=0.0, **shared).edit(lm, EDITS).changes[lm.site(1).name][0].delta
    far = [
        near(MEMIT(weight=w, **shared).edit(lm, EDITS).changes[lm.site(1).name][0].delta.flatten(), goal.flatten())
        for w in (1.0, 1e-2, 1e-5)
    ]
    assert far == sorted(far, reverse=True)
    assert far[-1] < 1e-2


def _second_moment(d: int) -> torch.Tensor:
    keys = torch.randn(4 * d, d, generator=torch.Generator().manual_seed(0))
    return keys.T @ keys / len(keys)


@pytest.mark.parametrize(
    ("method", "told"),
    [
        (ROME(layer=1, steps=0, whiten=False), "steps=0"),
        (ROME(layer=1, steps=1, whiten=False), "steps=1"),
        (ROME(layer=1, rate=0.0, whiten=False), "rate=0"),
        (ROME(layer=1, clamp=-1.0, whiten=False), "clamp=-1"),
        (FT(layers=(1,), steps=0), "steps=0"),
        (FT(layers=(1,), rate=-0.1), "rate=-0.1"),
        (FT(layers=(1,), bound=0.0), "bound=0"),
        (GRACE(at=1, steps=0), "steps=0"),
        (GRACE(at=1, radius=0.0), "radius=0"),
        (KN(steps=0), "steps=0"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_a_setting_that_can_not_work_is_refused_by_name(method: Any, told: str):
    lm = tiny.lm("gpt2")
    with pytest.raises(UsageError, match=f"^{told} can't be used; give more than"):
        method.edit(lm, EDITS[:1])


@pytest.mark.parametrize("template", ["no place", "{} and {}"])
def test_a_context_from_elsewhere_has_one_place(template: str):
    with pytest.raises(UsageError, match="give one {}"):
        contexts.give(tiny.lm("gpt2"), ("{}", template), ((3, 1),))
