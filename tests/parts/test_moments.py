"""Second moments: one pass for all layers, kept by content, resumed after a kill, ended when they no longer move."""

import json
import sys
import types
import warnings

import pytest
import torch

import errata
from errata import MEMIT, ROME, ErrataError, UsageError
from errata.parts import corpus as sources
from errata.parts import moments, solve
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


def of_texts(lm, names, texts, **settings):
    return moments.second_moments(lm, names, sources.tokenized(lm, texts), **settings)


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
    found = of_texts(lm, names, TEXTS[:50])
    for layer, name in zip((1, 2), names, strict=True):
        C, count = by_hand(lm, layer, TEXTS[:50])
        assert found[name].tokens == count
        assert torch.allclose(found[name].C, C, rtol=1e-4, atol=1e-6)


def test_all_layers_come_from_one_pass_that_stops_after_the_last(lm):
    """Pitfall 12: one pass over the corpus per layer, and the layers above for nothing."""
    calls = dict.fromkeys(range(len(lm.blocks)), 0)
    for i, name in enumerate(lm.blocks):
        lm.module(name).register_forward_pre_hook(lambda m, a, i=i: calls.__setitem__(i, calls[i] + 1))
    of_texts(lm, [lm.mlp_out(i).name for i in (0, 1)], TEXTS[:20])
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
    monkeypatch.setattr(moments, "TOLERANCE", 0)
    site = lm.mlp_out(1)
    whole = of_texts(lm, [site.name], sources.texts(corpus))[site.name]

    def kill(tokens, _change):
        if tokens > whole.tokens / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        moments.prepare(lm, [site], corpus, kill)
    seen = []
    fresh = tiny.lm("gpt2")
    monkeypatch.setattr(moments, "_add", lambda *a, add=moments._add: seen.extend(map(len, a[2])) or add(*a))
    resumed = moments.prepare(fresh, [site], corpus)[site.name]
    assert sum(seen) < 0.6 * whole.tokens
    assert resumed.tokens == whole.tokens
    assert torch.equal(resumed.C, whole.C)


def test_the_pass_ends_when_more_text_changes_nothing(lm):
    read = []

    def source():
        for text in TEXTS * 50:
            read.append(text)
            yield text

    found = of_texts(lm, [lm.mlp_out(1).name], source(), tolerance=0.05)[lm.mlp_out(1).name]
    assert found.change < 0.05
    assert len(read) < len(TEXTS) * 50 / 2
    whole = of_texts(lm, [lm.mlp_out(1).name], TEXTS)[lm.mlp_out(1).name]
    assert (found.C - whole.C).norm() < 0.1 * whole.C.norm()


def test_long_texts_are_cut_to_the_models_context(lm):
    long = " ".join(TEXTS[:40])
    found = of_texts(lm, [lm.mlp_out(0).name], [long])[lm.mlp_out(0).name]
    assert found.tokens == len(lm.tokenizer(long)["input_ids"]) > lm.context


def test_a_corpus_may_be_lines_json_lines_or_a_folder(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "three"}) + "\n")
    assert list(sources.texts(str(tmp_path))) == ["one", "two", "three"]


def test_a_bad_corpus_is_told_by_file_and_line(tmp_path, monkeypatch):
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n{"txt": 3}\n')
    with pytest.raises(UsageError, match=r"b\.jsonl, line 2: .*'text'"):
        list(sources.texts(str(tmp_path / "b.jsonl")))
    with pytest.raises(UsageError, match="there is no corpus"):
        list(sources.texts(str(tmp_path / "none.txt")))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"errata\[data\]"):
        list(sources.texts("wikipedia"))


def test_the_standard_error_is_how_far_two_samples_are_apart(lm):
    """E |C_1 - C_2|^2 is twice its square, and it falls with the square root of the texts."""
    name, draw = lm.mlp_out(1).name, torch.Generator().manual_seed(0)
    texts = [tiny.corpus()[int(i)] for i in torch.randint(len(tiny.corpus()), (1200,), generator=draw)]
    found = [of_texts(lm, [name], texts[i : i + 100])[name] for i in range(0, 1200, 100)]
    C = torch.stack([m.C for m in found])
    apart = float((C[::2] - C[1::2]).square().sum((1, 2)).mean() / 2) ** 0.5 / float(C.mean(0).norm())
    errors = [m.error for m in found]
    assert sum(errors) / len(errors) == pytest.approx(apart, rel=0.35)
    whole = of_texts(lm, [name], texts)[name]
    assert whole.error == pytest.approx(sum(errors) / len(errors) / 12**0.5, rel=0.15)


def test_what_is_kept_says_how_good_each_matrix_is(lm, corpus):
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
    assert torch.allclose(moments.cholesky(lm, site, moments.OWN), 2**0.5 * C.double())
    moments.give(lm, site, moments.Moment(4 * C, 10, 0.0))  # nothing is left of what came from the first
    assert torch.allclose(moments.cholesky(lm, site, moments.OWN), 2 * C.double())
    assert torch.equal(moments.prepare(lm, [site], moments.OWN)[site.name].C, 4 * C)
    with pytest.raises(UsageError, match="inputs"):
        moments.give(lm, site, moments.Moment(torch.eye(3), 10, 0.0))


def test_a_data_set_that_can_not_be_read_is_one_sentence(monkeypatch):
    def load_dataset(*_args, **_kwargs):
        raise ConnectionError("no network\nand a long story")

    hub = types.ModuleType("datasets")
    monkeypatch.setattr(hub, "load_dataset", load_dataset, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    with pytest.raises(ErrataError, match=r"'wikipedia' is no file here and can't be read .* \(no network\)"):
        list(sources.texts("wikipedia"))
    monkeypatch.setattr(hub, "load_dataset", lambda *_a, **_k: [{"title": "a", "body": "b"}])
    with pytest.raises(UsageError, match="has fields title, body"):
        list(sources.texts("wikipedia"))


# The model's own samples


def test_by_default_a_moment_is_of_the_models_own_samples_and_needs_no_file():
    lm = tiny.trained("llama")
    site = lm.mlp_out(1)
    ids = sources.samples(lm)
    assert ids.numel() >= sources.TIMES * site.shape[1]
    assert (ids[:, 0] == lm.tokenizer.bos_token_id).all()  # as the tokenizer has every text begin
    found = moments.prepare(lm, [site])[site.name]
    C, count = mean_by_hand(lm, 1, ids)
    assert found.tokens == count
    assert torch.allclose(found.C, C, rtol=1e-4, atol=1e-6)
    assert ROME(layer=1).corpus == MEMIT(layers=(1,)).corpus == sources.OWN


def mean_by_hand(lm, layer, ids):
    seen = []
    hook = lm.mlp_out(layer).module.register_forward_hook(lambda m, a, o: seen.append(a[0].flatten(0, 1)))
    with torch.no_grad():
        lm.model(ids)
    hook.remove()
    keys = seen[0].double()
    return (keys.T @ keys / len(keys)).float(), len(keys)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
def test_samples_are_drawn_from_what_the_model_says(architecture):
    """Surprise and entropy are the same on average: 4 standard errors of their difference are allowed, which greedy
    words, another temperature or a text read wrongly are far beyond."""
    lm = tiny.lm(architecture, steps=20)  # still of many minds
    opened = sources._opening(lm)
    said = sources._drawn(lm, 3, 100, 12)
    ids = torch.cat([torch.tensor([opened] * len(said)), said], 1)
    with torch.no_grad():
        logp = lm.model(ids).logits[:, len(opened) - 1 : -1].float().log_softmax(-1)
    surprise = -logp.gather(2, said[..., None])[..., 0]
    apart = (surprise + (logp.exp() * logp).sum(-1)).sum(1)
    assert surprise.mean() > 1
    assert apart.mean().abs() < 4 * apart.std() / len(apart) ** 0.5


def test_samples_are_seeded_kept_by_fingerprint_and_draw_nothing_of_the_callers(monkeypatch):
    lm, state = tiny.lm("gpt2"), torch.get_rng_state()
    first = sources.samples(lm)
    drawn = []
    real = sources._drawn
    monkeypatch.setattr(sources, "_drawn", lambda *a: drawn.append(1) or real(*a))
    assert torch.equal(sources.samples(tiny.lm("gpt2")), first)
    assert not drawn, "they were in the store"
    assert not torch.equal(sources.samples(tiny.lm("gpt2", seed=1)), first)
    monkeypatch.setenv("ERRATA_STORE", str(Store().folder / "other"))
    assert torch.equal(sources.samples(lm), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_without_a_token_that_begins_a_text_has_samples_too(monkeypatch):
    lm = tiny.lm("gpt2")
    assert sources._opening(lm) == [lm.tokenizer.bos_token_id]
    lm.tokenizer.bos_token = lm.tokenizer.eos_token = None
    monkeypatch.setattr(type(lm), "end_tokens", ())
    assert lm.tokenizer.decode(sources._opening(lm)).strip() == "The"


# How good it is


@pytest.fixture(scope="module")
def random_keys():
    """Independent rows of one token, whose keys fill all dimensions."""
    lm = tiny.lm("gpt2")
    draw = torch.Generator().manual_seed(0)
    return lm, torch.randint(5, len(lm.tokenizer), (60_000, 4), generator=draw).tolist()


def test_how_many_more_tokens_it_takes_is_told_honestly(random_keys, monkeypatch):
    """From the first looks on, within a factor of two of where the pass ends."""
    lm, rows = random_keys
    name = lm.mlp_out(1).name
    ended = moments.second_moments(lm, [name], rows, tolerance=moments.TOLERANCE)[name]
    assert ended.converged
    assert ended.more == 0
    for share in (8, 4, 2):
        early = moments.second_moments(lm, [name], rows[: ended.tokens // share // 4])[name]
        assert not early.converged
        assert ended.tokens / 2 < early.tokens + early.more < 2 * ended.tokens


def test_a_single_long_text_is_looked_at_after_so_many_tokens(lm):
    name = lm.mlp_out(1).name
    found = of_texts(lm, [name], [" ".join(TEXTS * 2)])[name]
    assert 0 < found.change < 10
    assert found.more > 0


def test_one_text_alone_says_nothing_of_others(lm):
    name = lm.mlp_out(1).name
    found = of_texts(lm, [name], TEXTS[:1])[name]
    assert found.error == float("inf")
    assert found.shrinkage == 1


def test_a_moment_is_warned_of_by_its_own_error_once_and_with_what_to_do(lm, tmp_path):
    """Not by its file's name: almanac's corpus is good enough for some models, and a user's file may be too short."""
    (tmp_path / "short.txt").write_text("The capital of Peru is\nLima")
    (tmp_path / "long.txt").write_text("\n".join(TEXTS))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for layer in (0, 1):
            moments.prepare(lm, [lm.mlp_out(layer)], str(tmp_path / "long.txt"))
        assert not told
        for layer in (0, 1):
            moments.prepare(lm, [lm.mlp_out(layer)], str(tmp_path / "short.txt"))
        moments.prepare(lm, [lm.mlp_out(0)])  # how many samples of its own are drawn is no user's doing
    (one,) = [str(w.message) for w in told]
    assert "standard error" in one
    assert "errata stats --model tiny-gpt2 --text FILE" in one


def test_a_moment_of_few_tokens_is_drawn_to_the_identity_as_its_own_error_says(random_keys):
    """On average over samples it comes as near to the truth as any share can bring it (Ledoit and Wolf)."""
    lm, rows = random_keys
    name = lm.mlp_out(1).name
    true = moments.second_moments(lm, [name], rows[-20_000:])[name]
    few = [moments.second_moments(lm, [name], rows[i : i + 4])[name] for i in range(0, 80, 4)]

    def far(share):
        eye = torch.eye(len(true.C))
        drawn = [(1 - share) * m.C + share * m.C.diagonal().mean() * eye for m in few]
        return float(torch.stack([(C - true.C).square().sum() for C in drawn]).mean())

    best = min(torch.linspace(0, 1, 21).tolist(), key=far)
    assert sum(m.shrinkage for m in few) / len(few) == pytest.approx(best, abs=0.1)
    assert float(torch.stack([(m.shrunk() - true.C).square().sum() for m in few]).mean()) < 0.9 * far(0)
    assert true.shrinkage < 0.001


def test_an_update_by_few_tokens_moves_other_keys_less_for_it(random_keys):
    lm, rows = random_keys
    site = lm.mlp_out(1)
    true = moments.second_moments(lm, [site.name], rows[-20_000:])[site.name].C.double()
    few = moments.second_moments(lm, [site.name], rows[:200])[site.name]
    k = torch.randn(20, len(true), generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def leak(L):
        u = solve.whiten(L, k)
        u = u / (u * k).sum(1, keepdim=True)
        return float(((u @ true) * u).sum(1).mean())

    moments.give(lm, site, few, "few")
    assert leak(moments.cholesky(lm, site, "few")) < 0.9 * leak(solve.factor(few.C))


def test_almanac_is_solved_with_all_of_its_own_corpus_as_it_is():
    """Its presets were tuned so."""
    lm = errata.load("almanac")
    rome = ROME.preset(lm)
    assert {m.preset(lm).corpus for m in (ROME, MEMIT, errata.EMMET, errata.PMET)} == {sources.BUILT_IN}
    site = lm.site(rome.layer)
    found = moments.prepare(lm, [site], rome.corpus)[site.name]
    whole = sum(map(len, sources.rows(lm, sources.BUILT_IN)))
    assert found.tokens == whole
    L = moments.cholesky(lm, site, rome.corpus)
    assert torch.allclose(L @ L.T, found.C.double(), atol=1e-6 * float(found.C.max()))
