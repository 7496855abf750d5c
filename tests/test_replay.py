"""A replay gives what full passes give, on every architecture, whatever the padding and however the batch is cut."""

import logging

import pytest
import torch
import transformers as T
from torch.utils.flop_counter import FlopCounterMode

from errata import LM, Edit
from errata.replay import FullPasses, Replay, passes
from errata.tokens import passage
from errata.trace import rewrite
from tests.tiny import bpe, unigram

WIDE = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=64
)
GROUPED = dict(WIDE, num_key_value_heads=2)
GPT = dict(n_embd=64, n_layer=4, n_head=4, n_positions=64)
CONFIGS = {
    "gpt2": GPT,
    "gptj": dict(GPT, rotary_dim=8),
    "gpt_neo": dict(
        hidden_size=64, num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]], window_size=4
    ),
    "gpt_neox": WIDE,
    "llama": GROUPED,
    "qwen3": dict(GROUPED, head_dim=16),
    "mistral": dict(GROUPED, sliding_window=6),
    "gemma2": dict(GROUPED, head_dim=16, sliding_window=6),
    "gemma3_text": dict(GROUPED, head_dim=16, sliding_window=6),
    "phi": WIDE,
    "opt": dict(WIDE, ffn_dim=96, word_embed_proj_dim=64),
    "bloom": dict(hidden_size=64, n_layer=4, n_head=4),
    "cohere": GROUPED,
    "granite": GROUPED,
}
EDITS = [
    Edit("The capital of {} is", "New Zealand", "Paris"),
    Edit("{} has its capital at", "Sri Lanka", "Oslo"),
    Edit("Today we learn. People in {} govern from", "Kenya", "Lima"),
    Edit("{} is", "Cuba", "Rome"),
]


def build(kind: str) -> LM:
    tokenizer = unigram() if kind in {"llama", "mistral", "gemma2", "gemma3_text"} else bpe()
    torch.manual_seed(0)
    ids = dict(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=1)
    config = T.AutoConfig.for_model(kind, **CONFIGS[kind], **ids, initializer_range=0.1)
    return LM(T.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False), tokenizer, name=kind)


def both(lm: LM, place: str, edits=EDITS):
    tokens = lm.encode([passage(e, c, e.target) for e in edits for c in ("{}", "It is known that. {}")])
    places = [place]
    return tokens, FullPasses(lm, tokens, tokens.subject), Replay(lm, tokens, places, tokens.subject)


def edited(lm: LM, place: str, run, tokens, delta: torch.Tensor) -> torch.Tensor:
    """Logits where targets are read, with `delta` (batch, d) added at the subjects."""

    def write(output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[torch.arange(len(tokens)), run.start] += delta
        return output

    with rewrite(lm, place, len(tokens), write):
        return run.logits(*tokens.reads)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_replay_equals_full_passes(kind: str, layer: int):
    lm = build(kind)
    place = lm.mlp_out(layer).name
    tokens, full, replay = both(lm, place)
    for _ in range(3):  # a pass leaves nothing behind that the next one would see
        delta = torch.randn(len(tokens), lm.d_model) * 3
        want = edited(lm, place, full, tokens, delta)
        assert (edited(lm, place, replay, tokens, delta) - want).abs().max() < 1e-4 * want.std()
    assert (edited(lm, place, full, tokens, delta) - edited(lm, place, full, tokens, 0 * delta)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gptj", "gemma2"])
def test_gradients_of_a_replay_are_those_of_full_passes(kind: str):
    lm = build(kind)
    place = lm.blocks[2]
    tokens, full, replay = both(lm, place)
    grads = []
    for run in (full, replay):
        delta = torch.zeros(len(tokens), lm.d_model, requires_grad=True)
        edited(lm, place, run, tokens, delta).log_softmax(-1).gather(1, tokens.wanted[:, None]).sum().backward()
        grads.append(delta.grad)
    assert torch.allclose(*grads, rtol=1e-3, atol=1e-5 * float(grads[0].abs().max()))
    assert grads[0].abs().max() > 0


def test_what_is_kept_for_the_way_back_does_not_hold_the_past_again():
    lm = build("gpt2")
    before = "It is known. " * 9
    tokens = lm.encode([passage(e, f"{before}{{}}", e.target) for e in EDITS])
    replay = Replay(lm, tokens, [lm.blocks[1]], tokens.subject)
    past = {t.data_ptr() for layer in replay.past.kept[2:] for t in layer["whole"]}
    width = replay.inputs["attention_mask"].shape[1]
    kept: list[torch.Tensor] = []
    delta = torch.zeros(len(tokens), lm.d_model, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        edited(lm, lm.blocks[1], replay, tokens, delta).sum().backward()
    assert past == {t.data_ptr() for t in kept if t.ndim == 4 and t.shape[-2] == width}


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_architecture_is_replayed_and_not_fallen_back_on(kind: str):
    lm = build(kind)
    tokens = lm.encode([passage(e, answer=e.target) for e in EDITS])
    assert isinstance(passes(lm, tokens, [lm.mlp_out(2).name], tokens.subject), Replay)


def test_a_replay_runs_fewer_tokens_and_blocks():
    lm = build("llama")
    place = lm.mlp_out(2).name
    tokens, _, replay = both(lm, place)
    seen = []
    handles = [
        lm.module(b).register_forward_hook(lambda m, a, o, b=b: seen.append((b, a[0].shape[1])))
        for b in (lm.blocks[1] + ".mlp", lm.blocks[2] + ".mlp", lm.blocks[3] + ".mlp")
    ]
    replay.logits(*tokens.reads)
    for handle in handles:
        handle.remove()
    suffix = int((tokens.last - tokens.subject).max())  # the target's last token is not read
    assert seen == [(lm.blocks[2] + ".mlp", suffix), (lm.blocks[3] + ".mlp", suffix)]
    assert suffix < tokens.ids.shape[1]


def test_what_the_edited_block_does_before_the_place_is_done_once():
    lm = build("llama")
    place = lm.mlp_out(2).name
    tokens, _, replay = both(lm, place)
    with FlopCounterMode(display=False) as counter:
        replay.logits(*tokens.reads)
    block = f"LlamaForCausalLM.{lm.blocks[2]}"
    done = {name for name, ops in counter.get_flop_counts().items() if name.startswith(block) and sum(ops.values())}
    assert done == {block, f"{block}.mlp", f"LlamaForCausalLM.{place}"}


def test_a_model_that_replays_wrongly_gets_full_passes_and_the_log_says_so(caplog):
    lm = build("llama")
    block = lm.module(lm.blocks[1])
    forward = block.forward
    # a block that also looks at how long the pass is: cutting the prefix off changes what it says
    block.forward = lambda hidden, *a, **k: forward(hidden * hidden.shape[1], *a, **k)
    tokens = lm.encode([passage(e, answer=e.target) for e in EDITS])
    with caplog.at_level(logging.WARNING):
        assert isinstance(passes(lm, tokens, [lm.mlp_out(2).name], tokens.subject), FullPasses)
    assert "every pass runs the whole model" in caplog.text


def test_a_replay_leaves_the_blocks_as_they_were_also_after_an_exception():
    lm = build("gpt2")
    before = [dict(vars(lm.module(b))) for b in lm.blocks]
    tokens, _, replay = both(lm, lm.mlp_out(2).name)

    def fail(_output: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"), rewrite(lm, lm.blocks[3], len(tokens), fail):
        replay.logits(*tokens.reads)
    assert [dict(vars(lm.module(b))) for b in lm.blocks] == before
