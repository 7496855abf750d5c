"""Tiny models and tokenizers, built from configs and a page of text, so that every test runs offline in moments."""

from __future__ import annotations

import copy
import random
import string
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from typing import Any

import torch
import transformers as T
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from errata import LM, Case, Edit, Method, Probe
from errata.parts.target import TargetSearch
from errata.testing import differences, logits, probability, same_bits, state
from errata.train import Course

__all__ = ["differences", "logits", "probability", "same_bits", "state"]  # what tests ask for by `tiny.`

T.logging.set_verbosity_error()

CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Japan": "Tokyo",
    "Egypt": "Cairo",
    "Peru": "Lima",
    "Cuba": "Havana",
    "Kenya": "Nairobi",
    "Norway": "Oslo",
    "Greece": "Athens",
    "New Zealand": "Wellington",
    "Sri Lanka": "Colombo",
}
PROMPT = "The capital of {} is"
EDITS = tuple(Edit(PROMPT, s, t) for s, t in (("France", "Lima"), ("New Zealand", "Oslo"), ("Kenya", "Paris")))
"""Facts that the trained models have otherwise."""


@cache
def corpus() -> tuple[str, ...]:
    """What the tokenizers and the trained models have read."""
    templates = (f"{PROMPT} {{}}", "{} has its capital at {}", "People in {} govern from {}")
    facts = [t.format(c, v) for c, v in CAPITALS.items() for t in templates]
    facts += [f"{c} is a country" for c in CAPITALS] + [f"{v} is a city" for v in CAPITALS.values()]
    return tuple(facts + [p + f for f in facts for p in ("Today we learn. ", "It is known. ", "Yes. ")])


# Tokenizers: the three kinds of token boundary


@cache
def bpe() -> Any:
    """Byte-level, as GPT-2's: a space belongs to the word after it; no BOS in front."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(made, trainers.BpeTrainer(vocab_size=600, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet))
    return T.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", bos_token="<eos>")


@cache
def unigram() -> Any:
    """As SentencePiece's: `▁` before every word, also the first; BOS in front; no padding token, as Llama's."""
    words = dict.fromkeys(w for text in corpus() for w in text.replace(".", " .").split())
    whole = {f"▁{w[:6]}": -4.0 for w in words} | {w[6:]: -4.0 for w in words if len(w) > 6}
    letters = dict.fromkeys("▁.,'-" + string.ascii_letters + string.digits, -9.0)
    special = {"<unk>": 0.0, "<s>": 0.0, "</s>": 0.0}
    made = Tokenizer(models.Unigram(list((special | letters | whole).items()), unk_id=0))
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.post_processor = _around(made, "<s> $A", "<s>")
    return T.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@cache
def wordpiece() -> Any:
    """As BERT's: the space belongs to no token, words go on with `##`; something before the text and behind it."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    _train(made, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"]))
    made.post_processor = _around(made, "[CLS] $A [SEP]", "[CLS]", "[SEP]")
    special = dict(pad_token="[PAD]", unk_token="[UNK]", bos_token="[CLS]", eos_token="[SEP]")
    return T.PreTrainedTokenizerFast(tokenizer_object=made, **special)


def _train(made: Tokenizer, trainer: Any) -> None:
    trainer.show_progress = False
    made.train_from_iterator(corpus(), trainer)


def _around(made: Tokenizer, single: str, *special: str) -> Any:
    return processors.TemplateProcessing(single=single, special_tokens=[(s, made.token_to_id(s)) for s in special])


# Models

SHAPE = dict(hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
CONTEXT = dict(max_position_embeddings=64)
ARCHITECTURES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "gpt2": lambda: (bpe(), T.GPT2Config(n_embd=64, n_layer=4, n_head=4, n_positions=64)),
    "gptj": lambda: (bpe(), T.GPTJConfig(n_embd=64, n_layer=4, n_head=4, n_positions=64, rotary_dim=8)),
    "llama": lambda: (unigram(), T.LlamaConfig(**SHAPE, **CONTEXT)),
    "gemma2": lambda: (unigram(), T.Gemma2Config(**SHAPE, **CONTEXT, head_dim=16)),
    "qwen3": lambda: (bpe(), T.Qwen3Config(**SHAPE, **CONTEXT, head_dim=16)),
    "opt": lambda: (bpe(), T.OPTConfig(**SHAPE, **CONTEXT, ffn_dim=160, word_embed_proj_dim=64)),
}
"""What differs between them: Conv1D, blocks that return tuples, post-norms, capped logits, flattened MLPs, BOS."""
BEHIND_THE_MLP: dict[str, Callable[[], tuple[Any, Any]]] = {
    "gemma2": ARCHITECTURES["gemma2"],
    "gemma3": lambda: (unigram(), T.Gemma3TextConfig(**SHAPE, **CONTEXT, head_dim=16)),
    "olmo2": lambda: (unigram(), T.Olmo2Config(**SHAPE, **CONTEXT)),
    "glm4": lambda: (unigram(), T.Glm4Config(**SHAPE, **CONTEXT, head_dim=16)),
    "granite": lambda: (unigram(), T.GraniteConfig(**SHAPE, **CONTEXT, residual_multiplier=0.22)),
}
"""Those with a norm, or a factor, between the MLP's write matrix and the residual stream."""


@cache
def _built(architecture: str, steps: int, seed: int) -> Any:
    tokenizer, config = (ARCHITECTURES | BEHIND_THE_MLP)[architecture]()
    config.vocab_size, config.initializer_range = len(tokenizer), 0.06
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, tokenizer.bos_token_id, tokenizer.eos_token_id
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        model = T.AutoModelForCausalLM.from_config(config).eval()  # eval: no dropout, also while it learns
        model.config._name_or_path = f"tiny-{architecture}"
        if steps:
            blind(LM(model, tokenizer))
            learn(model, tokenizer, steps, seed)
    return model


@torch.no_grad()
def blind(lm: LM) -> None:
    """Let tokens of the lower half see only themselves, so that a fact is kept where its subject stands.

    In so small a model that fact would otherwise be read off in the first block, before any place that can be edited.
    """
    for layer in range(len(lm.blocks) // 2):
        weight = lm.attention_out(layer).module.weight
        weight.zero_().requires_grad_(False)


def learn(model: Any, tokenizer: Any, steps: int, seed: int = 0) -> None:
    """Read the corpus for a few steps."""
    draw, optimiser = random.Random(seed), torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(steps):
        rows = [torch.tensor(tokenizer(t)["input_ids"]) for t in draw.sample(corpus(), 16)]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
        found = model(input_ids=ids.clamp(min=0), attention_mask=(ids >= 0).long(), labels=ids)
        optimiser.zero_grad()
        found.loss.backward()
        optimiser.step()


def lm(architecture: str = "gpt2", steps: int = 0, seed: int = 0) -> LM:
    """A model of its own (a test may do to it what it likes), untrained unless `steps` are given."""
    return LM(copy.deepcopy(_built(architecture, steps, seed)), (ARCHITECTURES | BEHIND_THE_MLP)[architecture]()[0])


def trained(architecture: str) -> LM:
    """A model that knows the capitals, and where a fact is kept at its subject."""
    return lm(architecture, steps=150 if architecture in ("llama", "gemma2") else 300)


def small_settings(method: type[Method], lm: LM, corpus_file: str) -> Method:
    """A method as somebody with an unlisted model gets it, with few steps and a corpus of its own."""
    small: dict[str, Any] = {"corpus": corpus_file, "lengths": ((3, 2),), "steps": 20}
    if issubclass(method, TargetSearch):  # facts are read off early in so small a model, and its values are short
        small |= {"layer": 0, "layers": (0, 1), "clamp": 20.0, "kl": 0.0}
    if method.trained:
        small |= {
            "at": (0, 1),
            "rank": 16,
            "hidden": 16,
            "step": 1.0 if method.name == "ke" else 1e-2,
            "weight": 1.0,
            "tokens": "all",
            "together": 2,
            "width": 64,
            "scope": 32,
        }
        small["editor"] = editor(method, lm, {k: v for k, v in small.items() if k in _names(method)})
    if method.name == "rect":  # few entries of so small a matrix carry a fact, and tiny GPT-2's first block none
        small |= {"share": 0.6, "layers": (1, 2)}
    if method.name == "ultraedit":
        small |= {"at": (0, 1), "rate": 1e-3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return method.preset(lm, **{f.name: small[f.name] for f in fields(method) if f.name in small})


# Learned editors


def _names(method: type[Method]) -> set[str]:
    return {f.name for f in fields(method)}


def cases() -> list[Case]:
    """The capitals, each with another country's, for editors to learn from."""
    names = list(CAPITALS)
    found = []
    for i, (country, other) in enumerate(zip(names, names[5:] + names[:5], strict=True)):
        edit = Edit(PROMPT, country, CAPITALS[other], CAPITALS[country])
        same = [Probe("paraphrase", f"{country} has its capital at", edit.target)]
        near = [Probe("neighbourhood", PROMPT.format(n), CAPITALS[n]) for n in names[i - 3 : i] or names[-3:]]
        found.append(Case(i, edit, (*same, *near)))
    return found


_editors: dict[tuple[str, str, str], str] = {}
_folder = tempfile.TemporaryDirectory()


def editor(method: type[Method], lm: LM, settings: dict[str, Any]) -> str:
    """A trained editor's file, made once a session for each model."""
    key = method.name, lm.fingerprint, str(settings)
    if key not in _editors:
        path = f"{_folder.name}/{len(_editors)}.safetensors"
        made: Any = method(**settings)
        made.train(lm, cases(), Course(steps=12, batch=4, rate=3e-3, every=6, held=2), out=path)
        _editors[key] = path
    return _editors[key]


# What must come back, and what is asked
