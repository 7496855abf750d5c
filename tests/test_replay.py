"""A replay gives what full passes give, on every architecture, whatever the padding and however the batch is cut."""

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers as T
from torch.utils.flop_counter import FlopCounterMode

from errata import LM, Edit
from errata.replay import FullPasses, Passes, Replay, passes
from errata.tokens import Tokens, passage
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
LINEAR = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16)
MAMBA = dict(mamba_n_heads=4, mamba_d_head=32, mamba_d_state=8, mamba_n_groups=1)
BART = dict(d_model=64, encoder_layers=4, decoder_layers=4, decoder_ffn_dim=96, decoder_attention_heads=4, init_std=0.1)
HALF = ["linear_attention", "full_attention"] * 2
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5_text": ("mlp.down_proj", dict(GROUPED, head_dim=16, layer_types=HALF, **LINEAR)),
    "olmo_hybrid": ("mlp.down_proj", dict(GROUPED, layer_types=HALF, **LINEAR)),
    "lfm2": ("feed_forward.w2", dict(GROUPED, full_attn_idxs=[1, 3], block_auto_adjust_ff_dim=False)),
    "falcon_h1": ("feed_forward.down_proj", dict(GROUPED, mamba_d_ssm=128, mamba_chunk_size=8, **MAMBA)),
    "bamba": ("feed_forward.down_proj", dict(GROUPED, attn_layer_indices=[1], mamba_chunk_size=8, **MAMBA)),
    "granitemoehybrid": (
        "shared_mlp.output_linear",
        dict(GROUPED, layer_types=HALF, mamba_chunk_size=8, num_local_experts=4, shared_intermediate_size=80, **MAMBA),
    ),
    "recurrent_gemma": (
        "mlp_block.down_proj",
        dict(GROUPED, head_dim=16, lru_width=64, block_types=["recurrent", "attention"], attention_window_size=8),
    ),
    "llama4_text": (
        "feed_forward.shared_expert.down_proj",
        dict(GROUPED, head_dim=16, intermediate_size_mlp=96, num_local_experts=4, attention_chunk_size=8),
    ),
    "bart": ("fc2", BART),
}
"""Models with states that a pass writes over, with experts, or with positions counted from the cache; and the paths of
their MLPs' matrices."""
EDITS = [
    Edit("The capital of {} is", "New Zealand", "Paris"),
    Edit("{} has its capital at", "Sri Lanka", "Oslo"),
    Edit("Today we learn. People in {} govern from", "Kenya", "Lima"),
    Edit("{} is", "Cuba", "Rome"),
]


def build(kind: str) -> LM:
    path, settings = OTHERS[kind] if kind in OTHERS else (None, CONFIGS[kind])
    tokenizer = unigram() if kind in {"llama", "mistral", "gemma2", "gemma3_text"} else bpe()
    torch.manual_seed(0)
    ids = dict(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=1)
    config = T.AutoConfig.for_model(kind, **{"initializer_range": 0.1} | settings | ids)
    model = T.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    return LM(model, tokenizer, name=kind, mlp_path=path)


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


def pulled(lm: LM, place: str, run: Passes, tokens: Tokens, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits where targets are read, and the gradient of the targets' log-probability, with `delta` at the subjects."""
    delta = delta.clone().requires_grad_()
    logits = edited(lm, place, run, tokens, delta)
    logits.log_softmax(-1).gather(1, tokens.wanted[:, None]).sum().backward()
    assert delta.grad is not None
    return logits.detach(), delta.grad


def same(lm: LM, place: str, run: Passes, tokens: Tokens) -> None:
    """Pass after pass, what a run gives is what full passes give, also on the way back."""
    full = FullPasses(lm, tokens, tokens.subject)
    for _ in range(2):
        delta = torch.randn(len(tokens), lm.d_model)
        for got, want in zip(*(pulled(lm, place, r, tokens, delta) for r in (run, full)), strict=True):
            assert (got - want).norm() < 1e-4 * want.norm()
            assert want.norm() > 0


def batch(lm: LM, edits: Sequence[Edit], *contexts: str) -> Tokens:
    return lm.encode([passage(e, c, e.target) for e in edits for c in contexts or ("{}",)])


@pytest.mark.parametrize("kind", [*CONFIGS, *OTHERS])
def test_edits_are_run_as_by_full_passes_whatever_was_run_before(kind: str):
    lm = build(kind)
    place = lm.mlp_out(2).name
    one, many = batch(lm, EDITS[2:3]), batch(lm, EDITS, "{}", "It is known that. {}")
    for tokens in (one, many, many[1:]):
        run = passes(lm, tokens, [place], tokens.subject)
        same(lm, place, run, tokens)
        rows = torch.tensor([5, 1, 3])[: len(tokens) - 1]
        if len(rows):
            run.keep(rows)
            same(lm, place, run, tokens[rows])


@pytest.mark.parametrize("kind", ["qwen3_5_text", "lfm2", "falcon_h1", "recurrent_gemma"])
def test_where_a_pass_writes_over_the_cache_only_the_blocks_below_are_spared(kind: str):
    lm = build(kind)
    tokens = batch(lm, EDITS)
    run = passes(lm, tokens, [lm.mlp_out(2).name], tokens.subject)
    assert isinstance(run, Replay)
    assert run.start.equal(tokens.subject)  # passes begin with the first token
    read: list[str] = []
    for block in lm.blocks:  # one that stands still is not run: its norms are silent
        norm = next(m for m in lm.module(block).modules() if "Norm" in type(m).__name__)
        norm.register_forward_hook(lambda *_, block=block: read.append(block))
    run.logits(*tokens.reads)
    assert set(read) <= set(lm.blocks[2:])
    assert lm.blocks[3] in read


def test_experts_are_told_from_rows():
    lm = build("llama4_text")
    tokens = batch(lm, EDITS)  # as many rows as there are experts
    run = passes(lm, tokens, [lm.mlp_out(1).name], tokens.subject)
    assert isinstance(run, Replay)
    paused = {module for modules, _ in run.still for module in modules}
    assert lm.module(f"{lm.blocks[1]}.feed_forward.experts") not in paused
    assert lm.module(f"{lm.blocks[1]}.self_attn") in paused


class Faulty:
    """A llama whose second block does something else in some passes, and the runs that `passes` gives for it."""

    def __init__(self, fault) -> None:
        self.lm = build("llama")
        block = self.lm.module(self.lm.blocks[3])
        forward = block.forward
        block.forward = lambda hidden, *a, **k: fault(forward(hidden, *a, **k), k)

    def run(self, edits: Sequence[Edit], context: str = "{}", start: int | None = None) -> Passes:
        tokens = batch(self.lm, edits, context)
        first = tokens.subject if start is None else torch.full_like(tokens.subject, start)
        return passes(self.lm, tokens, [self.lm.mlp_out(1).name], first)


def padded(mask: torch.Tensor | None) -> bool:
    """Whether some row of a pass stands before a token of its own that is not to be looked at."""
    return mask is not None and bool((~mask[:, 0, -1, 0].bool()).any())


def spoilt(out: torch.Tensor, where: Any) -> torch.Tensor:
    return out.roll(1, -1) if where else out


KENYA = EDITS[2:3]
AFTER_MUCH = "It is known that it is known that it is known. {}"
FAULTS = {
    "in a padded batch": (
        lambda out, k: spoilt(out, out.shape[1] < 9 and padded(k["attention_mask"])),
        [(KENYA,)],
        (EDITS,),
    ),
    "where there are several rows": (
        lambda out, k: spoilt(out, out.shape[1] < 9 and len(out) > 1),
        [(KENYA,)],
        (KENYA * 2,),
    ),
    "with gradients": (
        lambda out, k: out.detach() + 0 * out if out.requires_grad and out.shape[1] < 9 else out,
        [],
        (KENYA,),
    ),
    "where a longer text is read": (
        lambda out, k: spoilt(out, out.shape[1] < 9 and k["position_ids"].max() > 25),
        [(KENYA,)],
        (KENYA, AFTER_MUCH),
    ),
    "where something comes before the start": (
        lambda out, k: spoilt(out, out.shape[1] < 9),
        [(KENYA, AFTER_MUCH, 0)],
        (KENYA,),
    ),
    "after rows have left": (
        lambda out, k: spoilt(out, out.shape[1] < 9 and len(out) == 3),
        [],
        (EDITS,),
    ),
}
"""What a block does, what is run rightly before, and what is not."""


@pytest.mark.parametrize("where", FAULTS)
def test_a_replay_that_is_wrong_only_in_one_use_is_found_out_there_and_the_log_says_so_once(where: str, caplog):
    fault, right, wrong = FAULTS[where]
    model = Faulty(fault)
    with caplog.at_level(logging.WARNING):
        for use in right:
            assert isinstance(model.run(*use), Replay)
        assert not caplog.text
        assert isinstance(model.run(*wrong), FullPasses)
        for use in right:  # nor is it believed any more
            assert isinstance(model.run(*use), FullPasses)
    assert caplog.text.count("every pass runs the whole model") == 1


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
