"""EasyEdit's settings class of every method that it shares with errata, under its name there."""

from __future__ import annotations

from typing import Any

from transformers import BitsAndBytesConfig

from ..errors import ErrataError
from ..lm import LM
from ..loading import load
from ..method import Method
from .hparams import HyperParams
from .keys import Choice, Fields, Unused, Values, beside, maybe, module, modules, one, only

EVAL = Unused("the model is edited in eval mode")

# Locate, then edit


class LocatingHyperParams(HyperParams):
    """What the locate-then-edit methods share: how v* is found, and where second moments come from."""

    keys = {
        "v_num_grad_steps": "steps",
        "v_lr": "rate",
        "v_weight_decay": "decay",
        "clamp_norm_factor": "clamp",
        "kl_factor": "kl",
        "layers": "layers",
        "corpus": "corpus",
        "fact_token": only("subject_last"),
        "v_loss_layer": Unused("the loss is read at the last layer"),
        "layer_selection": Unused("the layers listed are edited"),
        "stats_dir": Unused("second moments are kept in errata's store, by the model's fingerprint"),
        "mom2_dataset": Unused("second moments are taken on the text that the setting `corpus` names"),
        "mom2_n_samples": Unused("the text that `corpus` names is read whole"),
        "mom2_dtype": Unused("second moments are accumulated in float32"),
        "mom2_adjustment": Unused("without second moments it would be another method; errata always has them"),
    }

    def prepared(self, lm: LM) -> Method:
        """As EasyEdit has it: a search ends by its loss alone, and MEMIT's contexts are no setting."""
        settings = {"lengths": ((10, 5),), **self.settings(lm), "margin": None}
        return self.method.preset(lm, **settings)


class ROMEHyperParams(LocatingHyperParams):
    """ROME's."""

    alg_name, errata_name = "ROME", "rome"
    keys = {"layers": one("layer"), "mom2_adjustment": "whiten", "context_template_length_params": "lengths"}


class R_ROMEHyperParams(ROMEHyperParams):
    """R-ROME's."""

    alg_name, errata_name = "R-ROME", "r-rome"


class MEMITHyperParams(LocatingHyperParams):
    """MEMIT's."""

    alg_name, errata_name = "MEMIT", "memit"
    keys = {"mom2_update_weight": "weight"}


class PMETHyperParams(MEMITHyperParams):
    """PMET's."""

    alg_name, errata_name = "PMET", "pmet"
    keys = {"nll_loss_factor": Unused("the target counts 1, and 0.1 once it is said")}


def _jitter(value: Any, values: Values) -> Fields:
    """EMMET's lambda softens keys whitened by `mom2_update_weight` C; errata's by C."""
    return {"jitter": float(value) * float(values.get("mom2_update_weight", 1.0))}


class EMMETHyperParams(LocatingHyperParams):
    """EMMET's."""

    alg_name, errata_name = "EMMET", "emmet"
    keys = {
        "emmet_lambda": _jitter,
        "mom2_update_weight": beside,
        "update_norm_lambda": only(0),
    }


class AlphaEditHyperParams(LocatingHyperParams):
    """AlphaEdit's."""

    alg_name, errata_name = "AlphaEdit", "alphaedit"
    keys = {
        "nullspace_threshold": "below",
        "L2": "weight",
        "mom2_update_weight": Unused("AlphaEdit projects instead of weighing"),
        "P_loc": Unused("projections are kept in errata's store, by the model's fingerprint"),
    }


class KNHyperParams(HyperParams):
    """KN's. EasyEdit has one set of prompts of `n_toks` sampled tokens, errata seven and the bare one."""

    alg_name, errata_name = "KN", "kn"
    keys = {
        "steps": "steps",
        "adaptive_threshold": "threshold",
        "p": "share",
        "n_toks": lambda value, _: {"lengths": ((int(value), 7),)},
        "lr_scale": Unused("it has no use in KN"),
        "refine": Unused("neurons are always refined over the prompts"),
    }


# Tuning


class FTHyperParams(HyperParams):
    """FT's: with `objective_optimization` prompt_last and a `norm_constraint` FT-L, with target_new FT-M."""

    alg_name, errata_name = "FT", "ft"
    keys = {
        "layers": "layers",
        "num_steps": "steps",
        "lr": "rate",
        "norm_constraint": maybe("bound"),
        "objective_optimization": Choice({"prompt_last": {"loss": "last"}, "target_new": {"loss": "target"}}),
        "weight_decay": only(0),
        "kl_factor": only(0),
    }


class LoRAHyperParams(HyperParams):
    """LoRA's and AdaLoRA's. There is no stop in EasyEdit's loop, so there is none here."""

    alg_name, errata_name = "LoRA", "lora"
    keys = {
        "lora_type": "kind",
        "layers": "layers",
        "target_modules": lambda value, _: {"modules": tuple(name.rpartition("*.")[2] for name in value)},
        "rank": "rank",
        "lora_alpha": "alpha",
        "lora_dropout": "dropout",
        "num_steps": lambda value, _: {"steps": value, "stop": 0.0},
        "lr": "rate",
        "weight_decay": "decay",
        "norm_constraint": only(False),
        "kl_factor": only(0),
    }


class QLoRAHyperParams(LoRAHyperParams):
    """QLoRA's: LoRA beside a model that is loaded quantised."""

    alg_name = "QLoRA"
    keys = {
        "lora_r": "rank",
        "quantization_bit": only(4, 8),
        "quant_type": only("nf4", "fp4"),
        "double_quant": only(True, False),
    }

    def loaded(self) -> LM:
        """The model that the file names, quantised as it says."""
        if not isinstance(self.model_name, str):
            return super().loaded()
        try:
            return load(self.model_name, quantization_config=self._quantised())
        except ErrataError as error:
            raise ErrataError(f"{error}; to load it quantised takes bitsandbytes") from error

    def _quantised(self) -> BitsAndBytesConfig:
        values = vars(self)
        return BitsAndBytesConfig(
            load_in_4bit=values.get("quantization_bit", 4) == 4,
            load_in_8bit=values.get("quantization_bit", 4) == 8,
            bnb_4bit_quant_type=values.get("quant_type", "nf4"),
            bnb_4bit_use_double_quant=values.get("double_quant", True),
        )


class UltraEditHyperParams(HyperParams):
    """UltraEdit's."""

    alg_name, errata_name = "ULTRAEDIT", "ultraedit"
    keys = {
        "inner_params": modules("at"),
        "lr": "rate",
        "token": Choice({"mask": {"tokens": "all"}, "ans": {"tokens": "target"}}),
        "batch_size_once": Unused("a batch is run in passes as large as memory allows"),
        "editor_batch_size": Unused("a batch is run in passes as large as memory allows"),
        "dropout": EVAL,
        "no_grad_layers": Unused("what needs no gradient gets none"),
        "silent": Unused("nothing is printed"),
    }


# Memories


class GraceHyperParams(HyperParams):
    """GRACE's."""

    alg_name, errata_name = "GRACE", "grace"
    keys = {
        "inner_params": module("at"),
        "edit_lr": "rate",
        "n_iter": "steps",
        "eps": "radius",
        "replacement": Choice({"replace_last": {"placement": "last"}, "replace_prompt": {"placement": "prompt"}}),
        "dist_fn": only("euc"),
        "val_init": only("cold"),
        "eps_expand": only("coverage"),
        "val_train": Unused("values are trained by Adam"),
        "val_reg": Unused("values are trained without a penalty"),
        "reg": Unused("values are trained for `n_iter` steps"),
        "num_pert": Unused("only perturbed training has a use for it"),
        "dropout": EVAL,
    }


class MELOHyperParams(HyperParams):
    """MELO's. The nested keys are named with their group."""

    alg_name, errata_name = "MELO", "melo"
    keys = {
        "model.target_modules": modules("at"),
        "grace.num_iter": "steps",
        "grace.edit_lr": "rate",
        "grace.init_radius": "radius",
        "grace.num_rank_per_block": "rank",
        "grace.num_edit_per_block": "per_block",
        "grace.num_block": lambda value, _: {"scale": float(value)},  # theirs is alpha / rank of all blocks together
        "grace.key_id": Choice({-1: {"keys": "prompt"}}),
        "grace.dist_fn": only("euc"),
        "grace.expand_mode": Unused("clusters that meet are moved, joined or told apart as in GRACE"),
        "grace.replacement": Unused("a block works where its key is seen"),
        **dict.fromkeys(
            ("grace.name", "grace.val_init", "grace.val_train", "grace.val_reg", "grace.reg", "grace.num_pert"),
            Unused("a block has no value to be trained like GRACE's"),
        ),
        "grace.metric_period": Unused("scores are taken when all edits are made"),
        "model.*": Unused("the model is the one that model_name names; the router looks at the edited matrices"),
        "lora.*": Unused("a block has the rank that `grace` gives, no dropout and no classifier"),
        "task": Unused("data sets don't differ in how they are edited"),
        "lora_task_type": Unused("every model here is a causal one"),
        "check_dir": Unused("nothing is written unless it is asked for"),
    }


def _merge(value: Any, values: Values) -> Fields:
    """EasyEdit counts edits from one merge to the next, errata full shards."""
    return {"merge": max(1, int(value) // int(values.get("save_freq", value)))}


class WISEHyperParams(HyperParams):
    """WISE's."""

    alg_name, errata_name = "WISE", "wise"
    keys = {
        "inner_params": module("at"),
        "mask_ratio": "mask",
        "edit_lr": "rate",
        "n_iter": "steps",
        "norm_constraint": maybe("bound"),
        "act_margin": lambda value, _: dict(zip(("near", "far", "apart"), value, strict=True)),
        "act_ratio": "ratio",
        "save_freq": "shard",
        "merge_freq": _merge,
        "merge_alg": only("ties"),
        "densities": "density",
        "weights": only(1.0),
        "retrieve": "retrieve",
        "replay": "replay",
        "objective_optimization": only("only_label"),
        "sequential_edit": Unused("it is an argument of edit"),
        "hidden_act": Unused("the gap is taken of outputs as they are"),
    }


class IKEHyperParams(HyperParams):
    """IKE's."""

    alg_name, errata_name = "IKE", "ike"
    keys = {
        "k": "k",
        "encoder": "encoder",
        "examples": "examples",
        "sentence_model_name": Unused("demonstrations are found as the setting `encoder` says"),
    }
