"""What an editor is trained on is what its patch does; a batch of edits is their sum; MALMEN's is joined."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from errata import KE, MALMEN, MEND, Edit, ErrataError, UsageError
from errata.methods.malmen import solved
from errata.methods.mend import numbered
from errata.parts import outer
from errata.parts.outer import apart, losses, own, questions, weights
from errata.parts.taps import answers, change, places, tap
from tests import tiny

WHERE = {"at": (0, "model.layers.2.mlp.down_proj"), "step": 1e-2}
MADE = {
    "mend": MEND(**WHERE, rank=4),
    "mend, white": MEND(at=WHERE["at"], step=2e-4, rank=4, whiten=True, tokens="subject"),
    "ke": KE(**WHERE, hidden=8),
    "malmen": MALMEN(**WHERE, rank=4),
    "malmen, white": MALMEN(**WHERE, rank=4, whiten=True),
    "mend, polyak": MEND(at=WHERE["at"], step=1.0, rank=4, tokens="target", polyak=True),
    "malmen, polyak": MALMEN(at=WHERE["at"], step=0.1, rank=4, polyak=True),
    "malmen, twice": MALMEN(at=WHERE["at"], step=0.1, rank=4, polyak=True, whiten=True, rounds=2),
    "malmen, near": MALMEN(
        at=WHERE["at"], step=0.1, rank=4, polyak=True, whiten=True, rounds=2, tokens="target", likes=3.0, namesakes=1
    ),
}


@pytest.fixture(scope="module")
def lm():
    return tiny.trained("llama")


def stirred(how, lm):
    """A network that is not the identity any more."""
    torch.manual_seed(1)
    network = how.network(lm)
    how.fit(lm, network, tiny.cases())
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return network


SOLVED = 1e-9
"""Relative error of what a solve in float64 gives, where A's condition number is 1e4 (seen: 1e-11).

In float32 two ways to one gradient differ by 1e-3 of it, and on another processor by more.
"""


def exact(monkeypatch):
    """A model that computes in float64, and so does errata around it."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    lm = tiny.trained("llama")
    lm.model.double()
    return lm


@pytest.mark.parametrize("name", ["mend", "mend, white", "mend, polyak", "ke"])
def test_training_sees_each_edit_as_its_own_patch(monkeypatch, name):
    how, cases, lm = MADE[name], tiny.cases()[:3], exact(monkeypatch)
    with lm.frozen(), torch.no_grad():
        network, sites = stirred(how, lm).double(), places(lm, how.at)
        edits = [c.edit for c in cases]
        found = how.made(lm, network, edits)
        asked = questions(lm, cases, random.Random(0))
        with own(sites, found):
            together = lm.logits(*asked.tokens.reads, **asked.tokens.inputs)
        rows = asked.tokens.reads[0] // outer.ROWS
        for i, case in enumerate(cases):
            (made,) = [how.made(lm, network, [case.edit])]
            undo = [change(*parts).attach(site) for site in sites for parts in [made[site.name]]]
            alone = lm.logits(*asked.tokens.reads, **asked.tokens.inputs)
            for back in undo:
                back()
            torch.testing.assert_close(together[rows == i], alone[rows == i], atol=SOLVED, rtol=0)


def test_mends_batch_is_the_sum_of_its_edits(lm):
    how, edits = MADE["mend"], list(tiny.EDITS)
    with lm.frozen():
        network, sites = stirred(how, lm), places(lm, how.at)
        together = how.made(lm, network, edits)
        alone = [how.made(lm, network, [e]) for e in edits]
    for site in sites:
        _, left, right = together[site.name]
        wanted = sum(one[site.name][1].T @ one[site.name][2] for one in alone)
        torch.testing.assert_close(left.T @ right, wanted, atol=1e-5, rtol=1e-3)


def test_polyaks_step_would_take_every_loss_to_zero_were_it_linear(lm):
    """An edit goes as far as its own loss asks for: what the gradient says of its update is -step times the loss."""
    how, edits = MADE["mend, polyak"], list(tiny.EDITS)
    with lm.frozen(), torch.no_grad():
        network, sites = how.network(lm), places(lm, how.at)
        how.fit(lm, network, tiny.cases())
        for _, net, _ in numbered(network, sites):
            net.normal.mean.zero_()
        seen = network["basis"].seen(tap(lm, sites, edits, how.tokens))
        found = how.factors(lm, network, sites, seen, edits)
    told = torch.zeros(len(edits))
    for site in sites:
        owner, left, right = found[site.name]
        told.index_add_(0, owner, (left * seen.G[site.name]).sum(1) * (right * seen.K[site.name]).sum(1))
    loss = torch.stack([seen.loss[seen.owner == i][0] for i in range(len(edits))])
    assert loss.max() > 1.05 * loss.min()
    torch.testing.assert_close(told, -how.step * loss, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["malmen", "malmen, white", "malmen, polyak", "malmen, twice", "malmen, near"])
def test_malmens_decoupled_gradients_are_those_of_the_whole_graph(monkeypatch, name):
    """The network learns the same as if the loss had been differentiated through the updates of all rounds at once.

    What a round is shown of the model is given, also where the round before it had a part in that.
    """
    how, cases = MADE[name], apart(tiny.cases()[:4])
    edits, lm = [c.edit for c in cases], exact(monkeypatch)
    with lm.frozen(), torch.enable_grad():
        network, sites = stirred(how, lm).double(), places(lm, how.at)
        basis, total, near = network["basis"], {}, how.near(lm, sites, edits)
        for _ in range(how.rounds):
            with weights(sites, {n: t.detach() for n, t in total.items()}):
                found, _ = how.round(network, sites, near, keep=False)
            total = {n: total.get(n, 0) + basis.out(n, found[n][1].float()) for n in found}
        asked = questions(lm, cases, random.Random(0), shared=True)
        with weights(sites, total):
            edit, stay = losses(lm, asked)
        (how.weight * edit + stay).backward()
        direct = {n: p.grad.clone() for n, p in network.named_parameters()}
        network.zero_grad()
        how.learn(lm, network, cases, random.Random(0))
        for name, p in network.named_parameters():
            scale = direct[name].abs().max().item()
            torch.testing.assert_close(p.grad, direct[name], atol=SOLVED * scale, rtol=0)


def test_a_second_round_is_the_same_batch_edited_again(lm):
    """As it would be one after the other, on what the first round left; and it gets the edits' loss further down."""
    once = dataclasses.replace(MADE["malmen, twice"], rounds=1)
    edits, sites = list(tiny.EDITS), places(lm, once.at)
    with lm.frozen(), torch.no_grad():
        network = stirred(once, lm)
        first = once.moved(lm, network, edits)
        with weights(sites, first):
            second = once.moved(lm, network, edits)
        both = MADE["malmen, twice"].moved(lm, network, edits)
        losses = [tap(lm, sites, edits).loss.mean()]
        for made in (first, both):
            with weights(sites, made):
                losses.append(tap(lm, sites, edits).loss.mean())
    for name, update in both.items():
        torch.testing.assert_close(update, first[name] + second[name])
    assert losses[2] < losses[1] < losses[0]


def alike(lm) -> list[Edit]:
    """Edits of three subjects that the model gives one answer to, and of one that it gives another."""
    targets = {"New Zealand": "Lima", "New Zealand New": "Oslo", "Zealand New Zealand": "Paris", "Peru": "Rome"}
    edits = [Edit(tiny.PROMPT, name, target) for name, target in targets.items()]
    said = answers(lm, edits)
    assert said[0] == said[1] == said[2] != said[3]
    return edits


def test_likes_weigh_what_edits_of_one_answer_have_in_common(monkeypatch):
    """As if each had shown their mean too, so many times, and nothing there should move."""
    lm = exact(monkeypatch)
    how = MALMEN(at=WHERE["at"], step=0.1, rank=4, tokens="target", whiten=True, likes=5.0)
    with lm.frozen(), torch.no_grad():
        edits, sites, network = alike(lm), places(lm, how.at), stirred(how, lm).double()
        found, _ = how.round(network, sites, how.near(lm, sites, edits), keep=False)
        seen = network["basis"].seen(tap(lm, sites, edits, "target"))
        first = [seen.owner.tolist().index(i) for i in range(3)]
        for site, net, number in numbered(network, sites):
            V = net.values(seen.K[site.name], seen.G[site.name], number).double()
            K = seen.K[site.name].double()
            shown = torch.cat([K, K[first].mean(0).expand(3, -1) * 5.0**0.5])
            wanted = torch.cat([V, V.new_zeros(3, V.shape[1])])
            A = shown.T @ shown + net.log_ridge[number].double().exp() * torch.eye(K.shape[1]).double()
            direct = torch.linalg.solve(A, shown.T @ wanted).T
            torch.testing.assert_close(found[site.name][1], direct, atol=SOLVED * direct.abs().max().item(), rtol=0)


def test_namesakes_are_drawn_back(lm):
    """Rounds that look at them leave a tenth of the drift there, and the edits are made all the same."""
    drifts, told = [], []
    with lm.frozen(), torch.no_grad():
        edits, sites = alike(lm), places(lm, WHERE["at"])
        begin = tap(lm, sites, edits, "target").loss.mean()
        for n in (0, 2):
            how = MALMEN(
                at=WHERE["at"], step=0.5, rank=4, tokens="target", whiten=True, polyak=True, rounds=8, namesakes=n
            )
            network = how.network(lm)
            how.fit(lm, network, tiny.cases())
            near = dataclasses.replace(how, namesakes=2).near(lm, sites, edits)
            with weights(sites, how.moved(lm, network, edits)):
                shown = list(near.namesakes[0].drift("target", near.namesakes[1]))
                told.append(tap(lm, sites, edits, "target").loss.mean())
            drifts.append(torch.cat([t.loss for t in shown]).mean())
    assert drifts[1] < 0.1 * drifts[0]
    assert max(told) < 0.5 * begin


def test_likes_need_one_token_of_each_edit():
    with pytest.raises(UsageError, match="give tokens='target'"):
        MALMEN(likes=1.0)


def test_malmens_batch_weighs_no_edit_less_for_its_company(lm):
    """The drop at batches above one that another implementation shows: here the batch is one least-squares problem."""
    how, edits = MADE["malmen"], list(tiny.EDITS)
    with lm.frozen(), torch.no_grad():
        network, sites = stirred(how, lm), places(lm, how.at)
        site = sites[0]
        every = tap(lm, sites, edits, how.tokens)
        update = solved(how.normal(network, sites, [every]))[site.name][1]
        net = network["x".join(map(str, site.shape))]
        K, V = every.K[site.name].double(), net.values(every.K[site.name], every.G[site.name], 0).double()
        A = torch.cat([K, (net.log_ridge[0].double() / 2).exp() * torch.eye(K.shape[1]).double()])
        wanted = torch.linalg.lstsq(A, torch.cat([V, torch.zeros(K.shape[1], V.shape[1]).double()])).solution.T
    torch.testing.assert_close(update, wanted, atol=1e-6 * wanted.abs().max().item(), rtol=1e-4)


def test_a_model_that_says_no_finite_numbers_is_refused_in_a_sentence(lm):
    settings = {"at": WHERE["at"], "step": 0.1, "rank": 4}
    made = MALMEN(**settings, editor=tiny.editor(MALMEN, lm, settings))
    (site, *_) = places(lm, WHERE["at"])
    broken = weights([site], {site.name: torch.full(site.shape, torch.inf)})
    with broken, pytest.raises(ErrataError, match="no finite change"):
        made.edit(lm, [tiny.EDITS[0]])


def test_what_cannot_be_solved_gives_no_finite_update():
    """And no error of its own: `Method.edit` refuses it in a sentence, and a run notes the failed edit and goes on."""
    A, B = torch.ones(3, 3).double(), torch.ones(2, 3).double()
    assert not solved({"a": (A, B)})["a"][1].isfinite().any()
