"""Causal tracing: what it puts back, on models of several families, and where it finds a planted fact."""

from __future__ import annotations

import io
import json
import sys
import warnings
from contextlib import ExitStack

import pytest
import torch
import transformers
from rich.console import Console

import errata
from errata import MEMIT, ROME, Edit, ErrataError, Patch, UsageError, causal
from errata.causal import restoring
from errata.replay import FullPasses
from errata.trace import read, rewrite
from tests import tiny

FACT = Edit(tiny.PROMPT, "New Zealand", "Oslo", "Wellington")
FACTS = [Edit(tiny.PROMPT, subject, "Atlantis", truth) for subject, truth in tiny.CAPITALS.items()]


def by_hand(lm, kind, layers, token, draws=2, answer=None):
    """p(answer) by plain passes of the whole model: noise added to the embeddings, one state put back, by hooks."""
    with torch.no_grad():
        asked = restoring.question(lm, FACT, answer)
        places = restoring.places_of(lm, [kind])[kind]
        scale, here = causal.noise_of(lm, [FACT]), slice(asked.subject.start, asked.subject.stop)
        shape = draws, len(asked.subject), lm.model.get_input_embeddings().weight.shape[1]
        noise = scale * torch.randn(shape[0] * shape[1], shape[2], generator=torch.Generator().manual_seed(0)).view(
            shape
        )
        ids = asked.batch.ids
        seen = read(lm, places, asked.batch, torch.zeros(ids.shape[1], dtype=torch.long), torch.arange(ids.shape[1]))

        def add(n):
            return lambda out: torch.cat([out[:, : here.start], out[:, here] + noise[n], out[:, here.stop :]], 1)

        def back(state):
            return lambda out: torch.cat([out[:, :token], state[None, token, None], out[:, token + 1 :]], 1)

        p = []
        for n in range(draws):
            with ExitStack() as stack:
                name = next(k for k, m in lm.model.named_modules() if m is lm.model.get_input_embeddings())
                stack.enter_context(rewrite(lm, name, 1, add(n)))
                for layer in layers:
                    stack.enter_context(rewrite(lm, places[layer], 1, back(seen[places[layer]][1])))
                logits = lm.model(**asked.batch.inputs).logits[0, asked.cols].log_softmax(-1)
            p.append(logits.gather(1, asked.wanted[:, None]).sum().exp())
        return float(torch.stack(p).mean())


@pytest.mark.parametrize("answer", [None, "Wellington"])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_every_score_is_that_of_plain_passes(architecture, answer):
    """However passes are cut, padded and replayed."""
    lm = tiny.trained(architecture)
    found = causal.trace(lm, FACT, answer, window=2, draws=2)
    depth, tokens = len(lm.blocks), len(found.tokens)
    assert found.corrupted == pytest.approx(by_hand(lm, "hidden", [], 0, answer=answer), abs=1e-5)
    for kind, scores in found.scores.items():
        for layer, token in ((0, found.subject[0]), (1, found.subject[-1]), (depth - 1, tokens - 1), (2, tokens - 2)):
            layers = [layer] if kind == "hidden" else range(max(0, layer - 1), layer + 1)
            want = by_hand(lm, kind, layers, token, answer=answer)
            assert scores[token, layer].item() == pytest.approx(want, rel=1e-3, abs=1e-5), (kind, layer, token)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_ends_of_the_hidden_map_are_known(architecture):
    found = causal.trace(tiny.trained(architecture), FACT, draws=3)
    hidden, first, last = found.scores["hidden"], found.subject[0], len(found.tokens) - 1
    assert hidden[last, -1].item() == pytest.approx(found.clean, abs=1e-5)  # nothing comes after it
    for kind, scores in found.scores.items():  # no noise reaches what is before the subject
        torch.testing.assert_close(scores[:first], torch.full_like(scores[:first], found.corrupted), msg=kind)
    read_by_nobody = torch.full_like(hidden[:last, -1], found.corrupted)
    torch.testing.assert_close(hidden[:last, -1], read_by_nobody, rtol=1e-4, atol=1e-6)
    assert found.corrupted < found.clean


@pytest.mark.parametrize("architecture", ["gpt2", "gptj", "gemma2", "opt"])
def test_one_restoration_at_a_time_gives_the_same(architecture, monkeypatch):
    lm = tiny.trained(architecture)
    together = causal.trace(lm, FACT, window=2, draws=2)
    monkeypatch.setattr(restoring, "TOKENS", 1)
    alone = causal.trace(lm, FACT, window=2, draws=2)
    for kind, scores in together.scores.items():
        torch.testing.assert_close(alone.scores[kind], scores, rtol=1e-4, atol=1e-5, msg=kind)


def test_a_model_that_cannot_be_replayed_is_traced_all_the_same(monkeypatch):
    lm = tiny.trained("gpt2")
    want = causal.trace(lm, FACT, draws=2)
    monkeypatch.setattr(restoring, "passes", lambda lm, batch, places, start: FullPasses(lm, batch, start))
    found = causal.trace(lm, FACT, draws=2)
    for kind, scores in found.scores.items():
        torch.testing.assert_close(scores, want.scores[kind], rtol=1e-4, atol=1e-5, msg=kind)


# Noise


def scaled() -> errata.LM:
    """Gemma 3, whose embedding module multiplies by the root of the width."""
    tokenizer = tiny.unigram()
    shape = tiny.SHAPE | tiny.CONTEXT | {"vocab_size": len(tokenizer), "head_dim": 16}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.Gemma3TextConfig(**shape)).eval()
    return errata.LM(model, tokenizer)


@pytest.mark.parametrize("lm", [scaled(), tiny.lm("gpt2")], ids=["scaled", "plain"])
def test_noise_is_three_times_the_spread_of_what_the_embedding_module_puts_out(lm):
    seen = []
    table = lm.model.get_input_embeddings()
    handle = table.register_forward_hook(lambda module, args, out: seen.append(out))
    found = causal.trace(lm, FACT, draws=1, kinds=["hidden"])
    asked = restoring.question(lm, FACT, None)
    seen.clear()
    lm.model(**asked.batch.inputs)
    handle.remove()
    subject = seen[0][0, asked.subject.start : asked.subject.stop]
    assert found.noise == pytest.approx(3 * float(subject.std()), rel=1e-5)
    run = restoring.Corrupted(lm, asked, found.noise, 400, seed=0)
    assert float(run.noise.std()) == pytest.approx(3 * float(subject.std()), rel=0.02)  # and drawn so


def test_noise_that_takes_nothing_away_is_warned_of_for_one_fact_and_for_many():
    lm = tiny.trained("llama")
    weak = {"noise": 1e-3, "draws": 1}
    for work in (
        lambda **how: causal.trace(lm, FACT, kinds=["mlp"], **how),
        lambda **how: causal.average(lm, FACTS[:2], kinds=["mlp"], **how),
        lambda **how: causal.scan(lm, FACTS[:2], **how),
        lambda **how: causal.scan(lm, FACTS[:1], **how),
    ):
        with pytest.warns(UserWarning, match=r"noise on the subject hardly lowers p\(answer\) of"):
            work(**weak)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            work(draws=2)


def test_an_answer_that_the_subject_does_not_bring_is_warned_of():
    with pytest.warns(UserWarning, match="hardly lowers"):
        causal.trace(tiny.trained("llama"), FACT, "Oslo", kinds=["mlp"], draws=3)


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
    assert restoring.window_at(5, 1, 12) == range(5, 6)
    assert restoring.window_at(20, 10, 48) == range(15, 25)  # as in the authors' code
    assert restoring.window_at(0, 3, 12) == range(2)
    assert restoring.window_at(11, 4, 12) == range(9, 12)


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


def carried_by(layer):
    """A model that learns the facts with no other MLP, and no attention before it, to write them."""
    lm = tiny.lm("gpt2")
    silent = [lm.mlp_out(other) for other in range(len(lm.blocks)) if other != layer]
    silent += [lm.attention_out(other) for other in range(layer + 1)]
    for site in silent:
        site.module.requires_grad_(False)
        site.weight.zero_()
    tiny.learn(lm.model, lm.tokenizer, steps=100)
    return lm


@pytest.mark.parametrize("layer", [1, 2])
def test_the_one_layer_that_carries_the_facts_is_proposed(layer):
    found = causal.propose(causal.scan(carried_by(layer), FACTS))
    assert (found.peak, found.layers) == (layer, (layer,))
    assert found.sure > 0.9
    assert found.effect > 0.01


def profile(alone, later, earlier, windows, facts=8, spread=0.02):
    """A scan with these effects by layer, which vary from fact to fact."""
    draw = torch.Generator().manual_seed(0)
    groups = (torch.tensor(effects) for effects in (windows, later, earlier, alone))
    rows = [g + spread * torch.randn(facts, len(g), generator=draw) for g in groups]
    ends = torch.ones(facts), torch.zeros(facts)
    return causal.Scan(tuple(FACTS[:1] * facts), *ends, *rows, window=3, noise=1.0)


def test_a_window_that_only_the_first_layer_fills_is_not_proposed():
    """Noise on embeddings takes away who the subject is, and the first MLP writes it anew, wherever the fact is."""
    first = profile(
        alone=[0.9, 0.0, 0.0, 0.1, 0.2, 0.1, 0.0, 0.0],
        windows=[0.9, 0.9, 0.1, 0.3, 0.4, 0.3, 0.1, 0.0],
        later=[0.0, 0.0, 0.1, 0.3, 0.3, 0.1, 0.0, 0.0],
        earlier=[0.9, 0.9, 0.0, 0.1, 0.3, 0.3, 0.1, 0.0],
    )
    found = causal.propose(first)
    assert (found.peak, found.layers) == (4, (3, 4, 5))
    assert found.effect == pytest.approx(0.3, abs=0.03)
    assert found.sure > 0.9
    assert first.effects["mlp"][1].argmax() == 4  # what is shown is what was decided by


def test_windows_of_which_none_stands_out_make_nothing_sure():
    flat = profile(
        alone=[0.9] + [0.0] * 11, windows=[0.9] * 2 + [0.0] * 10, later=[0.0] * 12, earlier=[0.9] * 2 + [0.0] * 10
    )
    assert causal.propose(flat).sure < 0.7


def test_a_scan_is_the_row_of_the_map_at_the_subjects_last_token():
    lm = tiny.trained("llama")
    traced = causal.trace(lm, FACT, kinds=["mlp"], window=2, draws=3)
    found = causal.scan(lm, [FACT], window=2, draws=3)
    torch.testing.assert_close(found.windows[0], traced.scores["mlp"][traced.subject[-1]], rtol=1e-4, atol=1e-6)
    single = causal.trace(lm, FACT, kinds=["mlp"], window=1, draws=3)
    torch.testing.assert_close(found.alone[0], single.scores["mlp"][traced.subject[-1]], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.later[0, 2], found.alone[0, 2])  # layers 1 and 2 without the first
    torch.testing.assert_close(found.earlier[0, 2], found.alone[0, 1])


def test_a_scan_reads_a_small_part_of_what_a_map_reads():
    """Counted in tokens that blocks are called with."""
    lm = tiny.trained("llama")
    read = [0]
    for name in lm.blocks:
        forward = lm.module(name).mlp.register_forward_pre_hook(
            lambda m, a: read.__setitem__(0, read[0] + a[0][..., 0].numel())
        )
        assert forward
    causal.scan(lm, [FACT], draws=4)
    read[0] = 0
    causal.scan(lm, [FACT], draws=4)
    scanned, read[0] = read[0], 0
    causal.trace(lm, FACT, kinds=["mlp"], draws=4)
    causal.trace(lm, FACT, kinds=["mlp"], draws=4)
    assert scanned < read[0] / 4


def test_on_almanac_layers_are_proposed_among_those_that_its_presets_edit():
    lm = errata.load("almanac")
    facts = [case.edit for case in errata.data.load("counterfact-mini", n=4)]
    found = causal.propose(causal.scan(lm, facts))
    assert set(found.layers) <= set(MEMIT.preset(lm).layers)
    assert abs(found.peak - ROME.preset(lm).layer) <= 1
    assert found.sure > 0.5


def test_a_single_fact_makes_nothing_sure():
    found = causal.scan(tiny.trained("gpt2"), FACTS[:1], draws=1)
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
    scanned = json.loads(json.dumps(causal.scan(tiny.trained("gpt2"), FACTS[:2], draws=1).to_dict()))
    assert scanned["facts"] == 2
    assert set(scanned["profile"]) == {"window", "inner", "alone"}


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
