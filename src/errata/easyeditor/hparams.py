"""EasyEdit's hyper-parameter files, read as settings of errata's methods.

Each class says which of its keys are which field (`fields`), which have no counterpart and why (`without`); any other
key is named in a warning. A value that errata can't honour is an error: it would be another experiment.
"""

from __future__ import annotations

import difflib
import logging
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import yaml

from ..errors import UsageError
from ..lm import LM
from ..method import Method, method

log = logging.getLogger(__name__)

Read = Callable[[Any, Mapping[str, Any]], Any]
"""A key's value, and all values of the file, as a field's value."""

SHARED = ("alg_name", "model_name", "device", "fp16", "bf16", "batch_size", "max_length", "evaluation_type")
"""Keys that say where and how to work rather than how to edit."""

WITHOUT = {
    "stats_dir": "second moments are kept in errata's store, by the model's fingerprint",
    "P_loc": "projections are kept in errata's store, by the model's fingerprint",
    "mom2_dataset": "second moments are taken on the text file that the method's `corpus` names",
    "mom2_n_samples": "the text that `corpus` names is read whole",
    "mom2_dtype": "second moments are accumulated in float32",
    "v_loss_layer": "the loss is read at the last layer",
    "layer_module_tmp": "the parts of a model are found by shape",
    "mlp_module_tmp": "the parts of a model are found by shape",
    "attn_module_tmp": "the parts of a model are found by shape",
    "ln_f_module": "the parts of a model are found by shape",
    "lm_head_module": "the parts of a model are found by shape",
    "rewrite_module_tmps": "the parts of a model are found by shape",
    "layer_selection": "the layers listed are edited",
    "model_class": "transformers' auto classes load the model",
    "tokenizer_class": "transformers' auto classes load the tokenizer",
    "tokenizer_name": "the tokenizer is the one beside the model",
    "model_parallel": "the model is loaded on one device; pass model_name=(model, tokenizer) for one that is spread",
    "use_chat_template": "prompts are put as they are",
    "results_dir": "nothing is written unless it is asked for",
}
"""Keys that several methods have, and why they change nothing."""


def _value(value: Any, _: Mapping[str, Any]) -> Any:
    return tuple(map(_tuple, value)) if isinstance(value, list) else value


def _tuple(value: Any) -> Any:
    return tuple(map(_tuple, value)) if isinstance(value, list) else value


def _only(value: Any, values: Mapping[str, Any]) -> Any:
    if not isinstance(value, list):
        return value
    if len(value) != 1:
        raise UsageError(f"{values['alg_name']} edits one layer, and the file lists {value}; give one")
    return value[0]


def _bound(value: Any, _: Mapping[str, Any]) -> float | None:
    return None if value in (False, None, "none", "None") else float(value)


def _loss(value: Any, _: Mapping[str, Any]) -> str:
    known = {"prompt_last": "last", "target_new": "target"}
    if value not in known:
        raise UsageError(f"objective_optimization is {value!r}; errata has {', '.join(known)}")
    return known[value]


def _module(value: Any, values: Mapping[str, Any]) -> str:
    """`transformer.h[35].mlp.c_fc.weight` as the name of a module."""
    return re.sub(r"\[(\d+)\]", r".\1", _only(value, values)).removesuffix(".weight")


def _modules(value: Any, _: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(re.sub(r"\[(\d+)\]", r".\1", v).removesuffix(".weight") for v in value)


def _jitter(value: Any, values: Mapping[str, Any]) -> float:
    """EMMET's lambda softens keys whitened by `mom2_update_weight` C; errata's by C."""
    return float(value) * float(values.get("mom2_update_weight", 1.0))


def _lengths(value: Any, _: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    return ((int(value), 7),)


TARGET: dict[str, tuple[str, Read]] = {
    "v_num_grad_steps": ("steps", _value),
    "v_lr": ("rate", _value),
    "v_weight_decay": ("decay", _value),
    "clamp_norm_factor": ("clamp", _value),
    "kl_factor": ("kl", _value),
}
"""How v* is found, which the locate-then-edit methods share."""


class HyperParams:
    """Settings in EasyEdit's names. They are attributes; `settings(lm)` says what they are to errata.

    Args:
        values: as in a YAML file.

    Raises:
        UsageError: the file is of another method, or a value asks for what errata doesn't do.
    """

    alg_name: str = ""
    errata_name: ClassVar[str] = ""
    """The method's name in errata."""
    fields: ClassVar[dict[str, tuple[str, Read]]] = {}
    without: ClassVar[dict[str, str]] = {}
    wanted: ClassVar[dict[str, tuple[Any, ...]]] = {"fact_token": ("subject_last",)}
    """The values that a key may have, where errata has only some of EasyEdit's."""

    model_name: Any
    device: Any
    batch_size: int | None

    def __init__(self, **values: Any) -> None:
        values = {k: _number(v) for k, v in values.items()}
        found = values.setdefault("alg_name", type(self).alg_name)
        if found != type(self).alg_name:
            raise UsageError(f"the file is for {found}, and {type(self).__name__} is for {type(self).alg_name}")
        if "model_name" not in values:
            raise UsageError("model_name is missing; give a folder, a name on the hub, or almanac")
        for key, allowed in self.wanted.items():
            if values.get(key, allowed[0]) not in allowed:
                raise UsageError(f"{key} is {values[key]!r}; errata has {' or '.join(map(repr, allowed))}")
        self.ignored = self._ignored(values)
        """Keys that change nothing, and why."""
        self.__dict__.update({"device": None, "batch_size": None, "fp16": False} | values)

    @classmethod
    def from_hparams(cls, hparams_name_or_path: str) -> Self:
        """Read a YAML file; `.yaml` may be left out."""
        name = str(hparams_name_or_path)
        path = Path(name if name.endswith((".yaml", ".yml")) else f"{name}.yaml")
        if not path.is_file():
            raise UsageError(f"there is no file {str(path)!r}; give one of EasyEdit's hparams files")
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise UsageError(f"{str(path)!r} is no YAML: {error}") from error
        if not isinstance(values, dict):
            raise UsageError(f"{str(path)!r} holds no settings by name; give one of EasyEdit's hparams files")
        return cls(**values)

    @property
    def method(self) -> type[Method]:
        """The errata method."""
        return method(self.errata_name)

    def settings(self, lm: LM) -> dict[str, Any]:
        """The fields of the errata method that the file sets."""
        values = vars(self)
        out = {field: read(values[key], values) for key, (field, read) in self.fields.items() if key in values}
        self._check_places(lm, out)
        return out

    def prepared(self, lm: LM) -> Method:
        """The errata method with these settings; those that the file lacks are the preset's."""
        return self.method.preset(lm, **self.settings(lm))

    def _check_places(self, lm: LM, settings: Mapping[str, Any]) -> None:
        """Whether the layers' matrices that errata finds by shape are those that the file names."""
        named: str = getattr(self, "rewrite_module_tmp", "")
        layers = settings.get("layers", (settings["layer"],) if "layer" in settings else ())
        for layer in layers if named else ():
            wanted, found = named.format(layer).removesuffix(".weight"), lm.site(layer).name
            if wanted != found:
                raise UsageError(f"rewrite_module_tmp says {wanted}, and errata edits {found} there; change the file")

    def _ignored(self, values: Mapping[str, Any]) -> dict[str, str]:
        known = {*SHARED, *self.fields, *self.wanted, "rewrite_module_tmp"}
        reasons = {**WITHOUT, **self.without}
        for key in values.keys() - known - reasons.keys():
            near = difflib.get_close_matches(key, known | reasons.keys(), n=1, cutoff=0.7)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            warnings.warn(f"{self.alg_name} has no key {key!r}, and it changes nothing{hint}", stacklevel=4)
        found = {key: reasons[key] for key in values if key in reasons}
        for key, why in found.items():
            log.info("%s: %s has no counterpart: %s", self.alg_name, key, why)
        return found


def _number(value: Any) -> Any:
    """YAML reads `5e-1` as a text; EasyEdit's files mean a number."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    return value


class ROMEHyperParams(HyperParams):
    """ROME's."""

    alg_name, errata_name = "ROME", "rome"
    fields = {
        **TARGET,
        "layers": ("layer", _only),
        "mom2_adjustment": ("whiten", _value),
        "context_template_length_params": ("lengths", _value),
        "corpus": ("corpus", _value),
    }


class R_ROMEHyperParams(ROMEHyperParams):
    """R-ROME's."""

    alg_name, errata_name = "R-ROME", "r-rome"


class MEMITHyperParams(HyperParams):
    """MEMIT's."""

    alg_name, errata_name = "MEMIT", "memit"
    fields = {
        **TARGET,
        "layers": ("layers", _value),
        "mom2_update_weight": ("weight", _value),
        "corpus": ("corpus", _value),
    }
    without = {"mom2_adjustment": "MEMIT without second moments is another method; errata always has them"}


class EMMETHyperParams(MEMITHyperParams):
    """EMMET's."""

    alg_name, errata_name = "EMMET", "emmet"
    fields = {
        **{k: v for k, v in MEMITHyperParams.fields.items() if k != "mom2_update_weight"},
        "emmet_lambda": ("jitter", _jitter),
    }
    without = {
        **MEMITHyperParams.without,
        "mom2_update_weight": "it is a factor of emmet_lambda (errata's `jitter` is their product)",
        "update_norm_lambda": "the update's norm is not penalised",
    }


class PMETHyperParams(MEMITHyperParams):
    """PMET's."""

    alg_name, errata_name = "PMET", "pmet"
    without = {**MEMITHyperParams.without, "nll_loss_factor": "the target counts 1, and 0.1 once it is said"}


class AlphaEditHyperParams(MEMITHyperParams):
    """AlphaEdit's."""

    alg_name, errata_name = "AlphaEdit", "alphaedit"
    fields = {
        **{k: v for k, v in MEMITHyperParams.fields.items() if k != "mom2_update_weight"},
        "nullspace_threshold": ("below", _value),
        "L2": ("weight", _value),
    }
    without = {**MEMITHyperParams.without, "mom2_update_weight": "AlphaEdit projects instead of weighing"}


class UltraEditHyperParams(HyperParams):
    """UltraEdit's."""

    alg_name, errata_name = "ULTRAEDIT", "ultraedit"
    fields = {"inner_params": ("at", _modules), "lr": ("rate", _value)}
    without = {
        "token": "every token of a text is looked at, unless the setting `tokens` says otherwise",
        "batch_size_once": "a batch is run in passes as large as memory allows",
        "dropout": "the model is edited in eval mode",
        "no_grad_layers": "what needs no gradient gets none",
    }


class KNHyperParams(HyperParams):
    """KN's. EasyEdit has one set of prompts of `n_toks` sampled tokens, errata seven and the bare one."""

    alg_name, errata_name = "KN", "kn"
    fields = {
        "steps": ("steps", _value),
        "adaptive_threshold": ("threshold", _value),
        "p": ("share", _value),
        "n_toks": ("lengths", _lengths),
    }
    without = {
        "lr_scale": "it has no use in KN",
        "refine": "neurons are always refined over the prompts",
    }


class FTHyperParams(HyperParams):
    """FT's: with `objective_optimization` prompt_last and a `norm_constraint` FT-L, with target_new FT-M."""

    alg_name, errata_name = "FT", "ft"
    fields = {
        "layers": ("layers", _value),
        "num_steps": ("steps", _value),
        "lr": ("rate", _value),
        "norm_constraint": ("bound", _bound),
        "objective_optimization": ("loss", _loss),
    }
    wanted = {"weight_decay": (0, 0.0), "kl_factor": (0, 0.0)}


class GraceHyperParams(HyperParams):
    """GRACE's."""

    alg_name, errata_name = "GRACE", "grace"
    fields = {
        "inner_params": ("at", _module),
        "edit_lr": ("rate", _value),
        "n_iter": ("steps", _value),
        "eps": ("radius", _value),
    }
    wanted = {
        "dist_fn": ("euc",),
        "val_init": ("cold",),
        "replacement": ("replace_last",),
        "eps_expand": ("coverage",),
    }
    without = {
        "val_train": "values are trained by Adam",
        "val_reg": "values are trained without a penalty",
        "reg": "values are trained for `n_iter` steps",
        "num_pert": "only perturbed training has a use for it",
        "dropout": "the model is edited in eval mode",
    }


class IKEHyperParams(HyperParams):
    """IKE's."""

    alg_name, errata_name = "IKE", "ike"
    fields = {"k": ("k", _value), "encoder": ("encoder", _value), "examples": ("examples", _value)}
    without = {"sentence_model_name": "demonstrations are found as the setting `encoder` says"}
