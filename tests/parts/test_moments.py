"""Second moments: one pass for all layers, kept by content, resumed after a kill, ended when they no longer move."""

import json
import sys
import types

import pytest
import torch

from errata import ErrataError, UsageError
from errata.parts import moments
from errata.store import Store
from tests import tiny

TEXTS = [t for t in tiny.corpus() for _ in range(3)]


@pytest.fixture
def lm():
    return tiny.lm("gpt2")


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(TEXTS))
    return str(path)


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("ERRATA_STORE", str(tmp_path / "store"))
    return Store()


def by_hand(lm, layer, texts):
    """The definition, one text at a time, through a plain hook."""
    seen = []
    hook = lm.mlp_out(layer).module.register_forward_hook(lambda m, a, o: seen.append(a[0].reshape(-1, a[0].shape[-1])))
    with torch.no_grad():
        for t in texts:
            lm.model(torch.tensor([lm.tokenizer(t)["input_ids"]]))
    hook.remove()
    keys = torch.cat(seen).double()
    return (keys.T @ keys / len(keys)).float(), len(keys)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "opt"])
def test_moments_are_the_mean_over_every_token(architecture):
    lm = tiny.lm(architecture)
    names = [lm.mlp_out(i).name for i in (1, 2)]
    found = moments.second_moments(lm, names, TEXTS[:50], tolerance=0)
    for layer, name in zip((1, 2), names, strict=True):
        C, count = by_hand(lm, layer, TEXTS[:50])
        assert found[name].tokens == count
        assert torch.allclose(found[name].C, C, rtol=1e-4, atol=1e-6)


def test_all_layers_come_from_one_pass_that_stops_after_the_last(lm):
    """Pitfall 12: one pass over the corpus per layer, and the layers above for nothing."""
    calls = dict.fromkeys(range(len(lm.blocks)), 0)
    for i, name in enumerate(lm.blocks):
        lm.module(name).register_forward_pre_hook(lambda m, a, i=i: calls.__setitem__(i, calls[i] + 1))
    moments.second_moments(lm, [lm.mlp_out(i).name for i in (0, 1)], TEXTS[:20], tolerance=0)
    assert calls[0] == calls[1] > 0
    assert calls[2] == calls[3] == 0


def test_they_are_kept_by_content_and_not_by_name(lm, corpus, monkeypatch):
    """Pitfall 8: one file of statistics for all models."""
    site = lm.mlp_out(1)
    first = moments.prepare(lm, [site], corpus)[site.name]
    passes = []
    real = moments.second_moments
    monkeypatch.setattr(moments, "second_moments", lambda *a, **k: passes.append(1) or real(*a, **k))

    again = tiny.lm("gpt2")  # the same weights in another object: from the store
    assert torch.equal(moments.prepare(again, [again.mlp_out(1)], corpus)[site.name].C, first.C)
    assert not passes

    other = tiny.lm("gpt2", seed=1)  # another model of the same shape and name
    assert not torch.equal(moments.prepare(other, [other.mlp_out(1)], corpus)[site.name].C, first.C)
    with open(corpus, "a") as file:
        file.write("\nPeople in Norway govern from Oslo")
    third = tiny.lm("gpt2")  # another text under the same name
    assert not torch.equal(moments.prepare(third, [third.mlp_out(1)], corpus)[site.name].C, first.C)
    assert len(passes) == 2


def test_a_killed_pass_goes_on_and_ends_with_the_same_bits(lm, corpus, monkeypatch):
    monkeypatch.setattr(moments, "WINDOW", 40)
    monkeypatch.setattr(moments, "TOLERANCE", 0)
    site = lm.mlp_out(1)
    whole = moments.second_moments(lm, [site.name], moments.texts(corpus), tolerance=0)[site.name]

    def kill(tokens, _change):
        if tokens > whole.tokens / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        moments.prepare(lm, [site], corpus, kill)
    seen = []
    fresh = tiny.lm("gpt2")
    monkeypatch.setattr(moments, "_add", lambda *a, add=moments._add: seen.append(int((a[2] >= 0).sum())) or add(*a))
    resumed = moments.prepare(fresh, [site], corpus)[site.name]
    assert sum(seen) < 0.6 * whole.tokens
    assert resumed.tokens == whole.tokens
    assert torch.equal(resumed.C, whole.C)


def test_the_pass_ends_when_more_text_changes_nothing(lm, monkeypatch):
    monkeypatch.setattr(moments, "WINDOW", 50)
    read = []

    def source():
        for text in TEXTS * 50:
            read.append(text)
            yield text

    found = moments.second_moments(lm, [lm.mlp_out(1).name], source(), tolerance=0.05)[lm.mlp_out(1).name]
    assert found.change < 0.05
    assert len(read) < len(TEXTS) * 50 / 2
    whole = moments.second_moments(lm, [lm.mlp_out(1).name], TEXTS, tolerance=0)[lm.mlp_out(1).name]
    assert (found.C - whole.C).norm() < 0.1 * whole.C.norm()


def test_long_texts_are_cut_to_the_models_context(lm):
    long = " ".join(TEXTS[:40])
    found = moments.second_moments(lm, [lm.mlp_out(0).name], [long], tolerance=0)[lm.mlp_out(0).name]
    assert found.tokens == len(lm.tokenizer(long)["input_ids"]) > lm.context


def test_a_corpus_may_be_lines_json_lines_or_a_folder(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "three"}) + "\n")
    assert list(moments.texts(str(tmp_path))) == ["one", "two", "three"]


def test_a_bad_corpus_is_told_by_file_and_line(tmp_path, monkeypatch):
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n{"txt": 3}\n')
    with pytest.raises(UsageError, match=r"b\.jsonl, line 2: .*'text'"):
        list(moments.texts(str(tmp_path / "b.jsonl")))
    with pytest.raises(UsageError, match="there is no corpus"):
        list(moments.texts(str(tmp_path / "none.txt")))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"errata\[data\]"):
        list(moments.texts("wikipedia"))


def test_the_small_corpus_for_another_model_is_warned_of(lm):
    if not (moments.ALMANAC / "corpus.txt").is_file():
        pytest.skip("the built-in corpus is not there")
    with pytest.warns(UserWarning, match="small corpus of almanac"):
        moments.prepare(lm, [lm.mlp_out(0)], moments.BUILT_IN)


def test_the_standard_error_is_how_far_two_samples_are_apart(lm):
    """E |C_1 - C_2|^2 is twice its square, and it falls with the square root of the texts."""
    name, draw = lm.mlp_out(1).name, torch.Generator().manual_seed(0)
    texts = [tiny.corpus()[int(i)] for i in torch.randint(len(tiny.corpus()), (1200,), generator=draw)]
    found = [moments.second_moments(lm, [name], texts[i : i + 100])[name] for i in range(0, 1200, 100)]
    C = torch.stack([m.C for m in found])
    apart = float((C[::2] - C[1::2]).square().sum((1, 2)).mean() / 2) ** 0.5 / float(C.mean(0).norm())
    errors = [m.error for m in found]
    assert sum(errors) / len(errors) == pytest.approx(apart, rel=0.35)
    whole = moments.second_moments(lm, [name], texts)[name]
    assert whole.error == pytest.approx(sum(errors) / len(errors) / 12**0.5, rel=0.15)


def test_what_is_kept_says_how_good_each_matrix_is(lm, corpus, monkeypatch):
    monkeypatch.setattr(moments, "WINDOW", 60)
    sites = [lm.mlp_out(i) for i in (0, 2)]
    first = moments.prepare(lm, sites, corpus)
    again = moments.prepare(tiny.lm("gpt2"), sites, corpus)  # from the store
    for site in sites:
        told, kept = first[site.name], again[site.name]
        assert (told.tokens, told.change, told.error) == (kept.tokens, kept.change, kept.error)
        assert 0 < told.error < 1
    assert first[sites[0].name].change != first[sites[1].name].change


def test_a_moment_from_elsewhere_is_solved_with(lm):
    site = lm.mlp_out(1)
    C = torch.eye(site.shape[1])
    moments.give(lm, site, moments.Moment(2 * C, 10, 0.0))
    assert torch.allclose(moments.cholesky(lm, site, moments.BUILT_IN), 2**0.5 * C.double())
    moments.give(lm, site, moments.Moment(4 * C, 10, 0.0))  # nothing is left of what came from the first
    assert torch.allclose(moments.cholesky(lm, site, moments.BUILT_IN), 2 * C.double())
    assert torch.equal(moments.prepare(lm, [site], moments.BUILT_IN)[site.name].C, 4 * C)
    with pytest.raises(UsageError, match="inputs"):
        moments.give(lm, site, moments.Moment(torch.eye(3), 10, 0.0))


def test_a_data_set_that_can_not_be_read_is_one_sentence(monkeypatch):
    def load_dataset(*_args, **_kwargs):
        raise ConnectionError("no network\nand a long story")

    hub = types.ModuleType("datasets")
    monkeypatch.setattr(hub, "load_dataset", load_dataset, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    with pytest.raises(ErrataError, match=r"'wikipedia' is no file here and can't be read .* \(no network\)"):
        list(moments.texts("wikipedia"))
    monkeypatch.setattr(hub, "load_dataset", lambda *_a, **_k: [{"title": "a", "body": "b"}])
    with pytest.raises(UsageError, match="has fields title, body"):
        list(moments.texts("wikipedia"))
