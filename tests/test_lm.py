"""Parts are found by shape in every dense family; logits and text are the model's own."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from torch import nn

import errata
from errata import LM, ErrataError, UsageError
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


@pytest.mark.parametrize("config", ["MixtralConfig", "Qwen3MoeConfig"])
def test_experts_are_refused_and_the_override_is_named(config: str):
    with pytest.raises(ErrataError, match=r"no single MLP write matrix \(found .*mlp_path=\.\.\.\)"):
        experts(config).mlp_out(0)


def test_a_square_mlp_is_refused_until_it_is_named():
    model = built("LlamaConfig", Frozen(COMMON | {"intermediate_size": D}))
    with pytest.raises(ErrataError, match=r"found none.*mlp_path"):
        LM(model, tiny.bpe()).mlp_out(1)
    assert LM(model, tiny.bpe(), mlp_path="mlp.down_proj").mlp_out(1).name == "model.layers.1.mlp.down_proj"


def test_two_lists_of_blocks_are_refused_until_one_is_named():
    lm = tiny.lm("gpt2")
    lm.model.more = nn.ModuleList([nn.Identity()] * 4)
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


# Loading


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lm = tiny.lm("llama")
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_a_folder_is_loaded_as_it_was_saved(folder: Path):
    lm = errata.load(folder, device="cpu")
    assert lm.fingerprint == tiny.lm("llama").fingerprint
    assert errata.load(folder, dtype=torch.bfloat16, device="cpu").dtype == torch.bfloat16
    assert not lm.model.training


def test_a_folder_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(UsageError, match="there is no folder"):
        errata.load(tmp_path / "nowhere")


@pytest.mark.parametrize("damage", ["weights", "config", "no config", "no tokenizer"])
def test_what_cannot_be_loaded_is_one_sentence(folder: Path, damage: str):
    if damage == "weights":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    elif damage == "config":
        (folder / "config.json").write_text("{")
    elif damage == "no config":
        (folder / "config.json").unlink()
    else:
        for path in folder.glob("tokenizer*"):
            path.unlink()
    with pytest.raises(ErrataError, match="can't be loaded") as refused:
        errata.load(folder)
    assert "\n" not in str(refused.value)


def test_code_that_comes_with_a_model_is_not_run_unless_asked_for(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    sprung = folder / "sprung"
    (folder / "theirs.py").write_text(f"open({str(sprung)!r}, 'w')\n")
    with pytest.raises(ErrataError, match="can't be loaded"):
        errata.load(folder)
    assert not sprung.exists()
