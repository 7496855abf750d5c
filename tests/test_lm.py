"""Parts are found by shape in every dense family; logits and text are the model's own."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import errata
from errata import LM, ErrataError, Probe, Site, UsageError
from errata.ask import ask
from errata.changes import LowRank
from errata.tokens import Passage
from tests import tiny

D, WIDE, DEPTH = 32, 80, 3
COMMON = dict(
    vocab_size=600,
    hidden_size=D,
    intermediate_size=WIDE,
    num_hidden_layers=DEPTH,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=1,
)
EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)
GPT_NEO = dict(num_layers=DEPTH, num_heads=4, attention_types=[[["global"], DEPTH]])
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {  # config, what it is called there, the MLP's write matrix
    "gpt2": ("GPT2Config", dict(n_embd=D, n_layer=DEPTH, n_head=4, n_positions=64, n_inner=WIDE), "mlp.c_proj"),
    "gptj": ("GPTJConfig", dict(n_embd=D, n_layer=DEPTH, n_head=4, n_inner=WIDE, rotary_dim=4), "mlp.fc_out"),
    "gpt_neo": ("GPTNeoConfig", GPT_NEO, "mlp.c_proj"),
    "gpt_neox": ("GPTNeoXConfig", {}, "mlp.dense_4h_to_h"),
    "phi": ("PhiConfig", {}, "mlp.fc2"),
    "opt": ("OPTConfig", dict(ffn_dim=WIDE, word_embed_proj_dim=D), "fc2"),
    "bloom": ("BloomConfig", dict(n_layer=DEPTH, n_head=4), "mlp.dense_4h_to_h"),
    "mpt": ("MptConfig", dict(d_model=D, n_heads=4, n_layers=DEPTH, expansion_ratio=2), "ffn.down_proj"),
    "starcoder2": ("Starcoder2Config", {}, "mlp.c_proj"),
    **{
        name: (f"{config}Config", {}, "mlp.down_proj")
        for name, config in {
            "llama": "Llama",
            "mistral": "Mistral",
            "qwen2": "Qwen2",
            "qwen3": "Qwen3",
            "gemma": "Gemma",
            "gemma2": "Gemma2",
            "gemma3": "Gemma3Text",
            "phi3": "Phi3",
            "olmo": "Olmo",
            "olmo2": "Olmo2",
            "stablelm": "StableLm",
            "cohere": "Cohere",
            "granite": "Granite",
            "smollm3": "SmolLM3",
            "glm4": "Glm4",
        }.items()
    },
}
GPT = ("gpt2", "gptj", "gpt_neo")


@cache
def built(config: str, given: tuple[tuple[str, Any], ...]) -> Any:
    torch.manual_seed(0)
    return T.AutoModelForCausalLM.from_config(getattr(T, config)(**dict(given))).eval()


def family(name: str) -> LM:
    config, own, _ = FAMILIES[name]
    drop = ("intermediate_size",) if name == "gpt_neo" else ()
    common = {k: v for k, v in COMMON.items() if k not in drop}
    return LM(built(config, Frozen(common | own)), tiny.bpe(), name)


class Frozen(tuple):
    """The items of a mapping, hashed by what they print."""

    def __new__(cls, given: dict[str, Any]) -> Frozen:
        return super().__new__(cls, given.items())

    def __hash__(self) -> int:
        return hash(repr(tuple(self)))


def experts(config: str = "MixtralConfig") -> LM:
    return LM(built(config, Frozen(COMMON | EXPERTS)), tiny.bpe(), config)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_blocks_and_the_mlps_write_matrix_are_found_by_shape(name: str):
    """Pitfall 8: by shape, whatever the model is called."""
    lm = family(name)
    assert len(lm.blocks) == DEPTH
    for layer, block in enumerate(lm.blocks):
        site = lm.mlp_out(layer)
        assert site.name == f"{block}.{FAMILIES[name][2]}"
        assert site.shape == tuple(site.weight.shape)
        assert site.shape[0] == D != site.shape[1]
        assert site.writable


@pytest.mark.parametrize("name", FAMILIES)
def test_the_attentions_write_matrix_is_found_by_shape(name: str):
    site = family(name).attention_out(1)
    assert site is not None
    assert site.shape[0] == D
    assert "attn" in site.name or "attention" in site.name


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_logits_at_positions_are_those_of_the_full_pass(name: str):
    """Also where the model scales or caps them behind the head (Cohere, Granite, Gemma 2), and in a padded batch."""
    lm = family(name)
    texts = ("The capital of Peru is Lima", "Yes", "It is known. Peru is a country")
    batch = lm.encode([Passage(t) for t in texts])
    rows, cols = batch.mask.nonzero(as_tuple=True)
    found = lm.logits(rows, cols, **batch.inputs)
    assert found.dtype == torch.float32
    at = 0
    for text in texts:
        alone = lm.model(torch.tensor([lm.tokenizer(text)["input_ids"]])).logits[0]
        torch.testing.assert_close(found[at : at + len(alone)], alone, atol=1e-4, rtol=1e-4)
        at += len(alone)
    assert at == len(found)


def test_the_head_runs_only_where_logits_are_read():
    """Pitfall 12."""
    lm, seen = tiny.lm("llama"), []
    batch = lm.encode([Passage("The capital of Peru is Lima")])
    handle = lm.model.lm_head.register_forward_hook(lambda m, args, out: seen.append(out.shape[:-1].numel()))
    lm.logits(torch.tensor([0]), batch.last, **batch.inputs)
    handle.remove()
    assert seen == [1]


@pytest.mark.parametrize("config", ["MixtralConfig", "Qwen3MoeConfig", "GptOssConfig"])
def test_a_mixture_of_experts_is_refused_and_what_can_be_edited_is_named(config: str):
    lm = experts(config)
    with pytest.raises(ErrataError, match=r"it is a mixture of experts, .* its attention can be edited") as refused:
        lm.mlp_out(0)
    named = str(refused.value).rpartition("at='")[2].rstrip("'")
    assert lm.site(named).shape[0] == D
    assert "self_attn" in named
    for path in ("mlp.experts", "mlp.experts.down_proj", "mlp.experts.0.down_proj"):
        with pytest.raises(UsageError):
            LM(lm.model, lm.tokenizer, mlp_path=path).mlp_out(0)


SHARED = dict(n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1, kv_lora_rank=16)
LATENT = dict(q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, num_key_value_heads=4)
OWN: dict[str, tuple[dict[str, Any], list[str]]] = {  # the write matrix in the first two blocks
    "Qwen2MoeConfig": (dict(shared_expert_intermediate_size=WIDE), ["mlp.shared_expert.down_proj"] * 2),
    "DeepseekV3Config": (SHARED | LATENT, ["mlp.down_proj", "mlp.shared_experts.down_proj"]),
    "Qwen3_5TextConfig": (dict(linear_num_value_heads=4, linear_num_key_heads=2), ["mlp.down_proj"] * 2),
    "Lfm2Config": (dict(full_attn_idxs=[1], block_auto_adjust_ff_dim=False), ["feed_forward.w2"] * 2),
    "RecurrentGemmaConfig": (dict(lru_width=D, block_types=["recurrent"]), ["mlp_block.down_proj"] * 2),
    "FalconH1Config": (dict(mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8), ["feed_forward.down_proj"] * 2),
    "MambaConfig": ({}, ["mixer.out_proj"] * 2),
    "Gemma3nTextConfig": (
        dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=600, num_kv_shared_layers=0, laurel_rank=4),
        ["mlp.down_proj"] * 2,
    ),
}
"""Experts that all tokens share; convolutions, recurrences, low-rank side ways and gates beside one MLP."""


@pytest.mark.parametrize("config", OWN)
def test_the_one_mlp_of_a_block_of_many_parts_is_found(config: str):
    own, wanted = OWN[config]
    drop = ("head_dim",) if config == "DeepseekV3Config" else ()
    common = {k: v for k, v in (COMMON | EXPERTS).items() if k not in drop}
    lm = LM(built(config, Frozen(common | own)), tiny.bpe())
    assert [lm.mlp_out(i).name.removeprefix(f"{lm.blocks[i]}.") for i in (0, 1)] == wanted


def test_the_matrices_of_an_mlp_are_no_routers_and_no_gates_of_experts():
    lm = LM(built("Qwen2MoeConfig", Frozen(COMMON | EXPERTS | OWN["Qwen2MoeConfig"][0])), tiny.bpe())
    own = [f"model.layers.1.mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")]
    assert [site.name for site in lm.mlp(1)] == own
    assert {site.shape for site in lm.mlp(1)} == {(WIDE, D), (D, WIDE)}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_matrices_of_an_mlp_are_those_that_stand_with_its_write_matrix(name: str):
    lm = family(name)
    found = [site.name for site in lm.mlp(1)]
    assert lm.mlp_out(1).name in found
    assert len(found) == (3 if FAMILIES[name][2] == "mlp.down_proj" and name not in ("phi3", "glm4") else 2)
    assert not any("attn" in n or "attention" in n for n in found)


def test_attention_can_stand_for_the_mlp():
    lm = LM(experts().model, tiny.bpe(), mlp_path="self_attn.o_proj")
    assert [s.name for s in lm.mlp(1)] == [lm.mlp_out(1).name] == ["model.layers.1.self_attn.o_proj"]


def test_a_path_may_differ_from_block_to_block():
    model = built(
        "DeepseekV3Config", Frozen({k: v for k, v in (COMMON | EXPERTS | SHARED | LATENT).items() if k != "head_dim"})
    )
    lm = LM(model, tiny.bpe(), mlp_path="mlp.up_proj | mlp.shared_*.up_proj")
    assert lm.mlp_out(0).name == "model.layers.0.mlp.up_proj"
    assert lm.mlp_out(1).name == "model.layers.1.mlp.shared_experts.up_proj"
    for path, found in (("mlp.*_proj", r"\['mlp.gate_proj', .*\]"), ("nowhere.*", "nothing")):
        with pytest.raises(UsageError, match=f"names {found} in model.layers.0, where one matrix is wanted"):
            LM(model, tiny.bpe(), mlp_path=path).mlp_out(0)


# Weights that are not what they seem


class Coded(nn.Linear):
    """Its numbers are codes of eight bits, with a scale of its own beside them."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out, bias=False)
        self.weight = nn.Parameter(torch.randn(d_out, d_in).to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (0.1 * self.weight.float()).T


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 0.1 * super().forward(x)


class Rounding(nn.Linear):
    """To eight bits whenever it runs."""

    def forward(self, x: Tensor) -> Tensor:
        step = self.weight.abs().max() / 127
        return nn.functional.linear(x, (self.weight / step).round() * step)


class Spelled(nn.Linear):
    """An ordinary one with a forward of its own, as Falcon's."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


def parametrised() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(8, 4))


@pytest.mark.parametrize(
    ("make", "writable"),
    [
        (lambda: nn.Linear(8, 4), True),
        (lambda: nn.Linear(8, 4).bfloat16(), True),
        (lambda: Spelled(8, 4), True),
        (lambda: Conv1D(4, 8), True),
        (lambda: Coded(8, 4), False),
        (lambda: Scaled(8, 4), False),
        (lambda: Rounding(8, 4), False),
        (parametrised, False),
        (lambda: nn.utils.weight_norm(nn.Linear(8, 4)), False),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_a_weight_is_writable_where_its_numbers_are_what_the_module_does(make: Any, writable: bool):
    """Else a change is put beside it: what it adds to the output is the change times the input."""
    torch.manual_seed(0)
    site = Site("it", make())
    assert site.writable == writable
    change = LowRank(torch.zeros(1).long(), torch.randn(4, 1), torch.randn(1, 8))
    x = torch.randn(2, 3, 8).to(site.weight.dtype if writable else torch.float32)
    before = site.module(x)
    undo = change.attach(site)
    exact = 1e-5 if x.dtype == torch.float32 else 3e-2  # bfloat16 keeps eight bits of the sum
    torch.testing.assert_close(
        site.module(x) - before, (x.float() @ change.delta.T).to(x.dtype), atol=exact, rtol=exact
    )
    undo()
    assert torch.equal(site.module(x), before)


def test_a_square_mlp_is_refused_until_it_is_named():
    model = built("LlamaConfig", Frozen(COMMON | {"intermediate_size": D}))
    with pytest.raises(ErrataError, match=r"found none.*mlp_path"):
        LM(model, tiny.bpe()).mlp_out(1)
    assert LM(model, tiny.bpe(), mlp_path="mlp.down_proj").mlp_out(1).name == "model.layers.1.mlp.down_proj"


def test_two_lists_of_blocks_are_refused_until_one_is_named():
    lm = tiny.lm("gpt2")
    lm.model.transformer.more = nn.ModuleList([nn.Identity()] * 4)
    with pytest.raises(ErrataError, match=r"found \[.*'transformer.h'.*\]; name it: LM\(model, tokenizer, block_list"):
        lm.blocks  # noqa: B018
    assert LM(lm.model, lm.tokenizer, block_list="transformer.h").blocks[3] == "transformer.h.3"


def test_a_layer_that_is_not_there_is_refused():
    for layer in (4, -1):
        with pytest.raises(UsageError, match=f"has layers 0 to 3, not {layer}"):
            tiny.lm("gpt2").mlp_out(layer)


def test_a_site_is_a_layer_or_a_linear_module():
    """Pitfall 15: by module, so tied embeddings have their head."""
    lm = tiny.lm("gpt2")
    assert lm.site(1).name == lm.site("transformer.h.1.mlp.c_proj").name
    assert lm.site("lm_head").shape[1] == 64
    with pytest.raises(UsageError, match="is a GPT2Block, not a linear map"):
        lm.site("transformer.h.1")
    with pytest.raises(UsageError, match="no module 'nowhere'"):
        lm.site("nowhere")


def test_writing_to_a_sites_weight_writes_to_the_model():
    for architecture in ("gpt2", "llama"):
        lm = tiny.lm(architecture)
        with torch.no_grad():
            lm.mlp_out(1).weight[3, 5] = 42.0
        stored = lm.mlp_out(1).module.weight
        assert (stored[5, 3] if architecture == "gpt2" else stored[3, 5]) == 42.0


# Text


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "opt", "gemma2"])
@torch.no_grad()
def test_generate_is_a_greedy_loop(architecture: str):
    lm = tiny.lm(architecture, steps=40)
    prompts = ["The capital of Peru is", "Yes", "Today we learn. People in New Zealand"]
    wanted = []
    for prompt in prompts:
        ids = lm.tokenizer(prompt)["input_ids"]
        new: list[int] = []
        while len(new) < 6 and lm.model.generation_config.eos_token_id not in new:
            new.append(int(lm.model(torch.tensor([ids + new])).logits[0, -1].argmax()))
        wanted.append(lm.tokenizer.decode(new, skip_special_tokens=True))
    assert [lm.generate(p, max_new_tokens=6) for p in prompts] == wanted
    assert lm.generate(prompts, max_new_tokens=6) == wanted
    assert lm.generate([], max_new_tokens=6) == []


def test_generate_is_greedy_whatever_the_models_own_settings_are():
    lm = tiny.lm("llama", steps=40)
    wanted = lm.generate("The capital of Peru is", 8)
    lm.model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=5.0, num_beams=3)
    assert lm.generate("The capital of Peru is", 8) == wanted


def test_a_prompt_that_leaves_no_room_is_refused():
    lm = tiny.lm("gpt2")
    with pytest.raises(UsageError, match=r"tokens of prompt and 20 new ones don't fit the model's 64"):
        lm.generate("is " * 50)


# What it is


def test_a_model_is_told_in_one_line():
    assert repr(tiny.lm("gpt2")) == "<LM tiny-gpt2: GPT2LMHeadModel, torch.float32 on cpu>"


def test_the_fingerprint_is_of_the_weights_alone(tmp_path: Path):
    """Pitfalls 7 and 8: neither the name nor the object; a reload and an exact change of dtype keep it."""
    lm = tiny.lm("llama")
    lm.model.to(torch.bfloat16)
    wanted = LM(lm.model, lm.tokenizer).fingerprint
    assert LM(lm.model.float(), tiny.bpe(), name="other").fingerprint == wanted
    lm.model.save_pretrained(tmp_path)
    assert LM(T.AutoModelForCausalLM.from_pretrained(tmp_path), tiny.bpe()).fingerprint == wanted


def test_a_checkpoint_has_one_fingerprint_in_every_dtype_it_is_loaded_in():
    """A correction made in float32 is not refused by a server that runs the same fp16 files in bf16."""
    dtypes = torch.float32, torch.float16, torch.bfloat16
    loaded = [errata.load("almanac", dtype=dtype, device="cpu") for dtype in dtypes]
    assert len({lm.fingerprint for lm in loaded}) == 1


@pytest.mark.parametrize("layer", range(4))
def test_the_fingerprint_of_an_edited_model_is_another(layer: int):
    lm = tiny.lm("llama")
    weight = lm.mlp_out(layer).weight
    with torch.no_grad():
        weight += 1e-3 * torch.randn(64, 1) @ torch.randn(1, 160)
    assert lm.fingerprint != tiny.lm("llama").fingerprint
    assert tiny.lm("llama").fingerprint != tiny.lm("llama", seed=1).fingerprint


@pytest.mark.parametrize("error", [None, ZeroDivisionError])
def test_frozen_is_undone(error: type[Exception] | None):
    lm = tiny.lm("gpt2")
    lm.model.train()
    lm.model.transformer.h[0].eval()
    lm.model.lm_head.requires_grad_(False)
    before = tiny.state(lm.model)
    try:
        with lm.frozen():
            assert not any(m.training for m in lm.model.modules())
            assert not any(p.requires_grad for p in lm.model.parameters())
            if error:
                raise error
    except ZeroDivisionError:
        pass
    assert tiny.differences(before, tiny.state(lm.model)) == []


@torch.no_grad()
def test_a_token_that_the_tokenizer_alone_has_does_no_harm():
    """As padding it is another one, which is masked; in a text it is named."""
    lm = tiny.lm("llama", steps=40)
    asked = ["The capital of Peru is", "Yes"]
    wanted = lm.generate(asked, 3), [a.answer for a in ask(lm, [Probe("efficacy", p, "Lima") for p in asked])]
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id >= lm.vocabulary
    lm = LM(lm.model, tokenizer)
    found = lm.generate(asked, 3), [a.answer for a in ask(lm, [Probe("efficacy", p, "Lima") for p in asked])]
    assert found == wanted
    with pytest.raises(UsageError, match=r"the token '\[PAD\]', for which the model has no embedding"):
        lm.generate("The capital of [PAD] is")
