"""Causal tracing: what it puts back, on models of several families, and where it finds a planted fact."""

from __future__ import annotations

import io
import json
import sys
import warnings

import pytest
import torch
from rich.console import Console

import errata
from errata import MEMIT, ROME, Edit, ErrataError, Patch, UsageError, causal
from tests import tiny

FACT = Edit(tiny.PROMPT, "New Zealand", "Oslo", "Wellington")
FACTS = [Edit(tiny.PROMPT, subject, "Atlantis", truth) for subject, truth in tiny.CAPITALS.items()]


def corrupted(lm, answer=None, draws=3):
    """The model with noise on FACT's subject, as `trace` sets it up."""
    with torch.no_grad():
        question = causal._question(lm, FACT, answer)
        noise = causal._noise(lm, question, draws, causal.noise_of(lm, [FACT]), seed=0)
    return causal._Corrupted(lm, question, noise)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_all_states_put_back_give_the_clean_probability(architecture):
    lm = tiny.trained(architecture)
    run, found = corrupted(lm), causal.trace(lm, FACT, draws=3)
    every = torch.ones(1, len(lm.blocks), run.question.prompt, dtype=torch.bool)
    with torch.no_grad():
        assert float(run.restored(lm.blocks, every)) == pytest.approx(found.clean, abs=1e-5)
        assert float(run.restored(lm.blocks, ~every)) == found.corrupted
    assert found.corrupted < found.clean


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_ends_of_the_hidden_map_are_known(architecture):
    found = causal.trace(tiny.trained(architecture), FACT, draws=3)
    hidden, first, last = found.scores["hidden"], found.subject[0], len(found.tokens) - 1
    assert hidden[last, -1].item() == pytest.approx(found.clean, abs=1e-5)  # nothing comes after it
    for kind, scores in found.scores.items():  # no noise reaches what is before the subject
        torch.testing.assert_close(scores[:first], torch.full_like(scores[:first], found.corrupted), msg=kind)
    torch.testing.assert_close(hidden[:last, -1], torch.full_like(hidden[:last, -1], found.corrupted))  # read by nobody


@pytest.mark.parametrize("architecture", ["gpt2", "gptj", "gemma2", "opt"])
def test_one_restoration_at_a_time_gives_the_same(architecture, monkeypatch):
    lm = tiny.trained(architecture)
    together = causal.trace(lm, FACT, window=2, draws=2)
    monkeypatch.setattr(causal, "TOKENS", 1)
    alone = causal.trace(lm, FACT, window=2, draws=2)
    for kind, scores in together.scores.items():
        torch.testing.assert_close(alone.scores[kind], scores, rtol=1e-4, atol=1e-5, msg=kind)


def test_an_answer_that_the_noise_does_not_take_away_is_warned_of_unless_it_is_one_of_many():
    lm = tiny.trained("llama")
    with pytest.warns(UserWarning, match=r"noise on 'New Zealand' does not lower p\('Oslo'\)"):
        causal.trace(lm, FACT, "Oslo", kinds=["mlp"], draws=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        causal.trace(lm, FACT, kinds=["mlp"], draws=2)
        causal.average(lm, FACTS[:2], kinds=["mlp"], draws=1)


def test_the_probability_is_that_of_a_plain_pass():
    lm = tiny.trained("llama")
    found = causal.trace(lm, FACT, draws=1)
    asked = causal.trace(lm, FACT, answer="Wellington", draws=1)
    assert found.clean == pytest.approx(float(tiny.logits(lm, FACT.text)[0].softmax(-1).max()), abs=1e-5)
    assert "Wellington".startswith(found.answer)
    ids = lm.tokenizer("Wellington", add_special_tokens=False)["input_ids"]
    truth = Edit(FACT.prompt, FACT.subject, "Wellington")
    assert len(ids) > 1, "this is a test of answers of several tokens"
    assert asked.clean == pytest.approx(tiny.probability(lm, truth) ** len(ids), rel=1e-4)
    assert asked.scores["hidden"].shape == found.scores["hidden"].shape  # the answer's tokens are no part of the map


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_subject_is_marked(architecture):
    found = causal.trace(tiny.lm(architecture), FACT, draws=1)
    assert "".join(found.tokens[i] for i in found.subject) == "NewZealand"


def test_the_model_comes_back_and_the_seed_decides():
    lm = tiny.trained("gpt2")
    before, drawn = tiny.state(lm.model), torch.get_rng_state()
    one, same, other = (causal.trace(lm, FACT, draws=2, seed=seed) for seed in (0, 0, 1))
    assert tiny.differences(before, tiny.state(lm.model)) == []
    assert torch.equal(drawn, torch.get_rng_state())
    assert one.to_dict() == same.to_dict()
    assert one.corrupted != other.corrupted


def test_no_noise_has_no_effect():
    found = causal.trace(tiny.trained("gpt2"), FACT, noise=0.0, draws=1)
    assert all(e.abs().max() < 1e-6 for e in found.effects.values())


def test_windows_are_centred_and_cut_at_the_ends():
    assert causal._window(5, 1, 12) == range(5, 6)
    assert causal._window(20, 10, 48) == range(15, 25)  # as in the authors' code
    assert causal._window(0, 3, 12) == range(2)
    assert causal._window(11, 4, 12) == range(9, 12)


@pytest.mark.parametrize("window", [0, 99])
def test_a_window_that_the_model_has_not_is_refused(window):
    lm = tiny.lm("gpt2")
    with pytest.raises(UsageError, match=f"window={window} can't be used; .* has {len(lm.blocks)} layers"):
        causal.trace(lm, FACT, window=window)


# Many facts


def test_roles_of_tokens():
    found = causal.trace(tiny.lm("gpt2"), Edit("See {} and all of it is", "New Zealand town", "x"), draws=1)
    roles = [found.role(i) for i in range(len(found.tokens))]
    assert roles[: found.subject[0]] == [None] * found.subject[0]
    assert roles[found.subject[0]] == "first subject token"
    assert roles[found.subject[-1]] == "last subject token"
    assert roles[found.subject[-1] + 1] == "first further token"
    assert roles[-1] == "last token"
    assert set(roles[found.subject[-1] + 2 : -1]) == {"further tokens"}
    assert set(roles) - {None} == set(causal.ROLES)


def test_the_average_is_that_of_the_traces():
    lm = tiny.trained("gpt2")
    found = causal.average(lm, FACTS, draws=2)
    last = torch.stack([t.effects["mlp"][t.subject[-1]] for t in found.traces]).mean(0)
    torch.testing.assert_close(found.effects["mlp"][2], last)
    several = [t for t in found.traces if len(t.subject) > 1]  # a subject of one token has no first besides its last
    first = torch.stack([t.effects["mlp"][t.subject[0]] for t in several]).mean(0)
    torch.testing.assert_close(found.effects["mlp"][0], first)
    assert len({t.noise for t in found.traces}) == 1


def test_facts_that_the_model_does_not_know_are_left_out():
    lm = tiny.trained("gpt2")
    wrong = Edit(tiny.PROMPT, "France", "x", "Lima")
    silent = Edit(tiny.PROMPT, "Italy", "x")
    assert causal.known(lm, [*FACTS, wrong, silent]) == (*FACTS, silent)
    with pytest.raises(UsageError, match="knows none of the 1 facts"):
        causal.average(lm, [wrong])


@pytest.mark.parametrize("layer", [1, 2])
def test_the_one_layer_that_carries_the_facts_is_proposed(layer):
    """The model learns the facts with no other MLP, and no attention before it, to write them."""
    lm = tiny.lm("gpt2")
    silent = [lm.mlp_out(other) for other in range(len(lm.blocks)) if other != layer]
    silent += [lm.attention_out(other) for other in range(layer + 1)]
    for site in silent:
        site.module.requires_grad_(False)
        site.weight.zero_()
    tiny.learn(lm.model, lm.tokenizer, steps=100)
    found = causal.propose(causal.average(lm, FACTS, draws=4))
    assert (found.peak, found.layers) == (layer, (layer,))
    assert found.sure > 0.9
    assert found.effect > 0.01


def test_on_almanac_layers_are_proposed_among_those_that_its_presets_edit():
    lm = errata.load("almanac")
    facts = [case.edit for case in errata.data.load("counterfact-mini", n=4)]
    found = causal.propose(causal.average(lm, facts, kinds=["mlp"], draws=2))
    assert set(found.layers) <= set(MEMIT.preset(lm).layers)
    assert abs(found.peak - ROME.preset(lm).layer) <= 1
    assert found.sure > 0.5


def test_a_single_fact_makes_nothing_sure():
    found = causal.average(tiny.trained("gpt2"), FACTS[:1], draws=1)
    assert causal.propose(found).sure == 0


# Shown


@pytest.mark.parametrize("name", ["map.png", "map.svg"])
def test_a_figure_is_written(name, tmp_path):
    pytest.importorskip("matplotlib")
    found = causal.trace(tiny.lm("gpt2"), Edit("What $5 in {} buys", "New Zealand", "x"), draws=1)
    found.plot(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    assert content.startswith(b"\x89PNG") or b"<svg" in content
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_figure_that_cannot_be_drawn_says_why(tmp_path, monkeypatch):
    found = causal.trace(tiny.lm("gpt2"), FACT, draws=1)
    with pytest.raises(UsageError, match=r"\.png, \.svg or \.pdf"):
        found.plot(tmp_path / "map.txt")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ErrataError, match=r"pip install 'errata\[plot\]'"):
        found.plot(tmp_path / "map.png")
    assert not list(tmp_path.iterdir())


def test_the_table_says_the_same_with_and_without_colours():
    found = causal.trace(tiny.trained("llama"), FACT, draws=2)
    plain, coloured = io.StringIO(), io.StringIO()
    Console(file=plain, width=100).print(found.table())
    Console(file=coloured, width=100, force_terminal=True, color_system="truecolor").print(found.table())
    assert "█" in plain.getvalue()
    assert "\x1b" not in plain.getvalue()
    assert "48;2;" in coloured.getvalue()  # a background
    for token in found.labels:
        assert token in plain.getvalue()


def test_both_maps_are_plain_values():
    found = causal.average(tiny.trained("gpt2"), FACTS[:2], draws=1, kinds=["mlp"])
    assert json.loads(json.dumps(found.to_dict()))["roles"] == list(causal.ROLES)
    one = json.loads(json.dumps(found.traces[0].to_dict()))
    assert set(one["scores"]) == {"mlp"}
    assert one["tokens"][one["subject"][0]] == "France"


# Asked differently


def test_what_the_model_has_not_is_refused(monkeypatch):
    lm = tiny.lm("gpt2")
    with pytest.raises(UsageError, match="did you mean 'attention'"):
        causal.trace(lm, FACT, kinds=["attentions"])  # type: ignore[list-item]
    monkeypatch.setattr(type(lm), "attention_out", lambda self, layer: None)
    assert set(causal.trace(lm, FACT, draws=1).scores) == {"hidden", "mlp"}
    with pytest.raises(UsageError, match="attention"):
        causal.trace(lm, FACT, kinds=["attention"], draws=1)


def test_an_edited_model_can_be_traced():
    lm = tiny.trained("gpt2")
    with Patch().applied(lm):
        assert causal.trace(lm, FACT, draws=1).clean > 0
