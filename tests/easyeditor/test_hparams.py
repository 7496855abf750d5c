"""A file of EasyEdit's is read as the settings of errata's method; what can't be honoured is refused or named."""

from __future__ import annotations

import logging
import warnings
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import torch

import errata
from errata import LM, ErrataError, UsageError, easyeditor
from errata.easyeditor import EMMETHyperParams, FTHyperParams, HyperParams, QLoRAHyperParams, ROMEHyperParams
from tests import tiny

MODEL = "model_name: almanac, device: 0, model_parallel: false"
LOCATING = f"""{MODEL}, stats_dir: ./data/stats, layer_selection: all, fact_token: subject_last, v_num_grad_steps: 20,
    v_lr: 5e-1, v_loss_layer: 31, v_weight_decay: 0.5, clamp_norm_factor: 4, kl_factor: 0.0625, mom2_adjustment: true,
    rewrite_module_tmp: "model.layers.{{}}.mlp.down_proj", layer_module_tmp: "model.layers.{{}}",
    mlp_module_tmp: "model.layers.{{}}.mlp", attn_module_tmp: "model.layers.{{}}.self_attn", ln_f_module: model.norm,
    lm_head_module: lm_head, mom2_dataset: wikipedia, mom2_n_samples: 100000, mom2_dtype: float32"""
TRAINING = f"""{MODEL}, archive: null, model_class: LlamaForCausalLM, tokenizer_class: LlamaTokenizer,
    tokenizer_name: x, lr: 1e-6, dropout: 0.0, train_base: False, no_grad_layers: null, batch_size: 2,
    model_save_pt: 5000, silent: False, max_iters: 1000, log_interval: 100, eval_log_interval: 100, final_eval: True,
    val_interval: 50, early_stop_patience: 200, early_stop_key: loss/total_edit_val, eval_only: False, debug: False,
    save: False, val_batch_size: 5, val_steps: 500, results_dir: ./results"""
META = f"""{TRAINING}, edit_lr: 1e-4, lr_lr: 1e-4, seed: 42, cedit: 0.1, cloc: 2.0, cbase: 1.0, half: False,
    verbose: True, accumulate_bs: 10, opt: Adam, grad_clip: 100."""
MLP = [f"model.layers.{layer}.mlp.{name}" for layer in (1, 2) for name in ("up_proj", "down_proj")]
INNER = f"inner_params: [{', '.join(f'{name}.weight' for name in MLP)}]"
TARGET = {"steps": 20, "rate": 0.5, "decay": 0.5, "clamp": 4, "kl": 0.0625}

FILES: list[tuple[str, str, dict[str, Any]]] = [
    (
        "ROMEHyperParams",
        LOCATING.replace("mom2_adjustment: true", "mom2_adjustment: false") + ", layers: [1]",
        {**TARGET, "layer": 1, "whiten": False},
    ),
    (
        "R_ROMEHyperParams",
        f"{LOCATING}, layers: [1], context_template_length_params: [[5, 10], [10, 10]]",
        {**TARGET, "layer": 1, "whiten": True, "lengths": ((5, 10), (10, 10))},
    ),
    (
        "MEMITHyperParams",
        f"{LOCATING}, layers: [0, 1], mom2_update_weight: 15000",
        {**TARGET, "layers": (0, 1), "weight": 15000},
    ),
    (
        "PMETHyperParams",
        f"{LOCATING}, layers: [0, 1], mom2_update_weight: 15000, nll_loss_factor: 1, rewrite_module_tmps: [x]",
        {**TARGET, "layers": (0, 1), "weight": 15000},
    ),
    (
        "EMMETHyperParams",
        f"{LOCATING}, layers: [1], mom2_update_weight: 10000, update_norm_lambda: 0, emmet_lambda: 0.1",
        {**TARGET, "layers": (1,), "jitter": 1000.0},  # as EMMET's own docstring derives it
    ),
    (
        "AlphaEditHyperParams",
        f"{LOCATING}, layers: [1], mom2_update_weight: 15000, P_loc: p.pt, nullspace_threshold: 2e-2, L2: 10",
        {**TARGET, "layers": (1,), "below": 0.02, "weight": 10},
    ),
    (
        "KNHyperParams",
        f"{MODEL}, lr_scale: 1.0, n_toks: 10, refine: false, batch_size: 1, steps: 3, adaptive_threshold: 0.1, p: 0.4",
        {"steps": 3, "threshold": 0.1, "share": 0.4, "lengths": ((10, 7),)},
    ),
    (
        "FTHyperParams",
        f"""{MODEL}, layers: [1], num_steps: 30, batch_size: 1, max_length: 40, lr: 5e-4, weight_decay: 0, kl_factor: 0,
        norm_constraint: false, objective_optimization: prompt_last,
        rewrite_module_tmp: "model.layers.{{}}.mlp.down_proj.weight" """,
        {"layers": (1,), "steps": 30, "rate": 5e-4, "bound": None, "loss": "last"},
    ),
    (
        "LoRAHyperParams",
        f"""{MODEL}, lora_type: adalora, layers: [], num_steps: 30, lr: 5e-3, weight_decay: 0, kl_factor: 0, rank: 4,
        lora_alpha: 16, lora_dropout: 0.1, norm_constraint: false, use_chat_template: true,
        target_modules: [q_proj, "model.layers.*.self_attn.v_proj"]""",
        {"kind": "adalora", "rank": 4, "alpha": 16, "dropout": 0.1, "steps": 30, "rate": 5e-3, "stop": 0.0}
        | {"modules": ("q_proj", "self_attn.v_proj"), "layers": ()},
    ),
    (
        "QLoRAHyperParams",
        f"{MODEL}, quantization_bit: 4, double_quant: true, quant_type: nf4, lora_type: lora, lora_r: 6, num_steps: 1",
        {"kind": "lora", "rank": 6, "steps": 1},
    ),
    (
        "UltraEditHyperParams",
        f"""{MODEL}, {INNER}, lr: 2e-6, token: mask, dropout: 0.0, no_grad_layers: null, batch_size: 100,
        batch_size_once: 10, editor_batch_size: 1024, silent: False, half: True, model_class: AutoModelForCausalLM""",
        {"at": tuple(MLP), "rate": 2e-6, "tokens": "all"},
    ),
    (
        "GraceHyperParams",
        f"""{MODEL}, inner_params: ["model.layers[1].mlp.down_proj.weight"], edit_lr: 0.5, n_iter: 40, eps: 2.0,
        dist_fn: euc, val_init: cold, val_train: sgd, val_reg: None, reg: early_stop, replacement: replace_prompt,
        eps_expand: coverage, num_pert: 8, dropout: 0.0""",
        {"at": "model.layers.1.mlp.down_proj", "rate": 0.5, "steps": 40, "radius": 2.0, "placement": "prompt"},
    ),
    (
        "MELOHyperParams",
        f"""{MODEL}, max_length: 512, task: hall, lora_task_type: CAUSAL_LM, check_dir: null,
        grace: {{name: grace, num_iter: 40, init_radius: 0.7, dist_fn: euc, val_init: cold, val_train: sgd,
            reg: early_stop, replacement: replace_prompt, expand_mode: moving_avg, num_pert: 8, key_id: -1,
            num_edit_per_block: 4, num_block: 350, num_rank_per_block: 3, metric_period: 400, edit_lr: 2e-3}},
        model: {{name: x, fan_in_fan_out: True, target_modules: [{MLP[1]}, {MLP[3]}], grace_layer: {MLP[0]}}},
        lora: {{cls_name: x, lora_r: 64, lora_alpha: 64, lora_dropout: 0.0}}""",
        {"at": (MLP[1], MLP[3]), "steps": 40, "radius": 0.7, "rank": 3, "per_block": 4, "scale": 350.0, "rate": 2e-3},
    ),
    (
        "WISEHyperParams",
        f"""{MODEL}, mask_ratio: 0.3, edit_lr: 0.9, n_iter: 70, norm_constraint: 1.0, act_margin: [4.0, 18.0, 11.0],
        act_ratio: 0.5, save_freq: 300, merge_freq: 900, merge_alg: ties, objective_optimization: only_label,
        inner_params: ["model.layers[1].mlp.down_proj.weight"], densities: 0.6, weights: 1.0, retrieve: False,
        replay: True, sequential_edit: False""",
        {"at": "model.layers.1.mlp.down_proj", "mask": 0.3, "rate": 0.9, "bound": 1.0, "near": 4.0, "far": 18.0}
        | {"apart": 11.0, "ratio": 0.5, "shard": 300, "merge": 3, "density": 0.6, "retrieve": False, "replay": True},
    ),
    ("IKEHyperParams", f"{MODEL}, sentence_model_name: x, results_dir: ./results, k: 16", {"k": 16}),
    (
        "MENDTrainingHparams",
        f"""{META}, alg: MEND, {INNER}, rank: 8, n_hidden: 2, hidden_dim: null, init: id, norm: True, combine: True,
        x_only: False, delta_only: False, one_sided: False, act: relu, mlp_class: IDMLP, shared: True""",
        {"at": tuple(MLP), "step": 1e-4, "weight": 0.05, "rank": 8, "depth": 3},
    ),
    (
        "MALMENTrainingHparams",
        f"""{TRAINING}, alg: MALMEN, {INNER}, rank: 8, n_blocks: 3, meta_lr: 1e-5, loc_coef: 2, max_grad_norm: 1,
        token: mask, n_edits: 20, editor_batch_size: 1024""",
        {"at": tuple(MLP), "step": 1e-6, "weight": 0.5, "rank": 8, "depth": 3, "tokens": "all"},
    ),
    ("KETrainingHparams", f"{META}, alg: KE, {INNER}", {"at": tuple(MLP), "weight": 0.05}),
    (
        "SERACTrainingHparams",
        f"""{META}, alg: SERAC, inner_params: [], small_name: x, cls_name: x, cls_class: AutoModel, supervised: False,
        soft_weighting: False, checkpoint_grad: False, cross_attend: False, cos: False, freeze: null, square: True,
        bound_embeds: False, use_all_negatives: False, freeze_cntr: False, dist_heads: 1, lora: null, edit_bs: 1,
        log_errors: False, unlikelihood: True""",
        {},
    ),
]
"""A class, a file with the keys that EasyEdit's own have, and settings of errata's that it must come to."""


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny.lm("llama")


@pytest.mark.parametrize(("name", "text", "wanted"), FILES, ids=[name for name, _, _ in FILES])
def test_a_file_is_read_as_the_settings_of_errata(name: str, text: str, wanted: dict, lm: LM, tmp_path: Path):
    cls, learned = getattr(easyeditor, name), "Training" in name
    (tmp_path / "f.yaml").write_text(f"{{{text}{'' if learned else f', alg_name: {cls.alg_name}'}}}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # every key is known
        found = cls.from_hparams(str(tmp_path / "f"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no published settings")
        method = found.untrained(lm) if learned else found.prepared(lm)
    assert isinstance(method, errata.methods()[cls.errata_name])
    assert {field: getattr(method, field) for field in wanted} == wanted
    assert "model_parallel" in found.ignored
    if learned:
        course = found.training(lm)
        assert (course.steps, course.batch, course.every, course.patience) == (100, 20, 5, 4)
        assert (course.rate, course.clip) == ((1e-5, 1) if "MALMEN" in name else (1e-6, 100.0))


def test_every_class_has_its_file_here():
    classes = {cls for cls in vars(easyeditor).values() if isinstance(cls, type) and issubclass(cls, HyperParams)}
    read = {getattr(easyeditor, name) for name, _, _ in FILES}
    assert {cls.__name__ for cls in classes - read - {base for cls in read for base in cls.__mro__}} == set()


def test_an_unknown_key_is_named_and_one_without_a_counterpart_explained(caplog: pytest.LogCaptureFixture):
    with pytest.warns(UserWarning, match="ROME has no key 'v_lrr', and it changes nothing; did you mean 'v_lr'"):
        ROMEHyperParams(model_name="almanac", v_lrr=1)
    with caplog.at_level(logging.INFO, "errata"), warnings.catch_warnings():
        warnings.simplefilter("error")
        found = ROMEHyperParams(model_name="almanac", mom2_dataset="wikipedia")
    assert "mom2_dataset has no counterpart: second moments are taken on" in caplog.text
    assert set(found.ignored) == {"mom2_dataset"}


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("ROMEHyperParams", {"alg_name": "MEMIT"}, "the file is for MEMIT, and ROMEHyperParams is for ROME"),
        ("ROMEHyperParams", {"fact_token": "last"}, "fact_token is 'last'; errata has 'subject_last'"),
        ("FTHyperParams", {"weight_decay": 0.1}, "weight_decay is 0.1"),
        ("FTHyperParams", {"weight_decay": [0.1]}, r"weight_decay is \[0.1\]"),
        ("MELOHyperParams", {"grace": {"dist_fn": "cos"}}, "grace.dist_fn is 'cos'; errata has 'euc'"),
        ("WISEHyperParams", {"merge_alg": "dare"}, "merge_alg is 'dare'"),
        ("MENDHyperParams", {"train_base": True}, "train_base is True; errata has False"),
    ],
)
def test_what_would_be_another_experiment_is_refused(name: str, values: dict, message: str):
    with pytest.raises(UsageError, match=message):
        getattr(easyeditor, name)(**{"model_name": "almanac", **values})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "holds no settings by name"),
        ("a: [", "is no YAML"),
        ("alg_name: ROME\n", "model_name is missing"),
    ],
)
def test_a_file_that_is_none_is_refused(text: str, message: str, tmp_path: Path):
    (tmp_path / "f.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        ROMEHyperParams.from_hparams(str(tmp_path / "f.yaml"))
    with pytest.raises(UsageError, match="there is no file"):
        ROMEHyperParams.from_hparams(str(tmp_path / "other"))


def test_places_that_are_not_where_the_file_says_are_refused(lm: LM):
    for values, message in (
        ({"layers": [1], "rewrite_module_tmp": "transformer.h.{}.mlp.c_proj"}, "rewrite_module_tmp says"),
        ({"layers": [1, 2]}, "give one"),
    ):
        with pytest.raises(UsageError, match=message):
            ROMEHyperParams(model_name=(lm.model, lm.tokenizer), **values).settings(lm)


def test_what_a_script_changes_after_reading_counts(lm: LM):
    found = EMMETHyperParams(model_name="almanac", layers=[1], emmet_lambda=0.1)
    found.layers, found.mom2_update_weight = [2], 100
    assert found.settings(lm) == {"layers": (2,), "jitter": 10.0}


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ({}, torch.float32),
        ({"fp16": True}, torch.float16),
        ({"bf16": True}, torch.bfloat16),
        ({"dtype": "torch.bfloat16"}, torch.bfloat16),
    ],
)
def test_the_precision_and_a_device_that_is_there_are_taken_from_the_file(values: dict, dtype: torch.dtype):
    found = FTHyperParams(model_name="almanac", device=0, **values).loaded()
    assert (found.dtype, found.device.type) == (dtype, "cuda" if torch.cuda.is_available() else "cpu")


def test_qlora_says_what_it_needs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("transformers.utils.import_utils._is_package_available", lambda *_, **__: (False, "N/A"))
    with pytest.raises(ErrataError, match="'almanac' can't be loaded.*to load it quantised takes bitsandbytes"):
        QLoRAHyperParams(model_name="almanac", quantization_bit=4).loaded()


@pytest.mark.parametrize("alg", ["Grace", "FT", "LoRA", "UltraEdit", "MELO", "WISE"])
def test_a_files_numbers_are_plain_on_a_model_that_is_not_listed(alg: str):
    """The presets of such models count in shares."""
    lm, kind = tiny.lm("llama"), getattr(easyeditor, f"{alg}HyperParams")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        method = kind(model_name="x").prepared(lm)
    own = {f.name: f.default for f in fields(method) if f.default is not MISSING}
    assert own.pop("scaled") == method.scaled == ()
    assert {k: v for k, v in own.items() if getattr(method, k) != v} in ({}, {"loss": own.get("loss")})
