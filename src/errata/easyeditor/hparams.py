"""EasyEdit's hyper-parameter files, read as settings of errata's methods.

Each class says what its keys mean (`keys`); one that means nothing here is explained in the log and in `ignored`, and
any other is named in a warning. A value that errata can't honour is an error: it would be another experiment.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import warnings
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from .. import presets
from ..documents import is_file, parsed_yaml, said
from ..errors import UsageError
from ..lm import LM
from ..loading import load
from ..method import Method, method
from ..parts.scaled import Scaled
from ..typed import hints
from .keys import Fields, Keys, Unused, fields, flat, meaning, number

log = logging.getLogger(__name__)

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "half": torch.float16}
"""Keys that make numbers shorter, and to what."""
PLACES = "rewrite_module_tmp"
ATTRIBUTES = ("alg_name", "model_name", "device", "batch_size")
"""What a file says that is an attribute of the class too."""

BY_SHAPE = Unused("the parts of a model are found by shape")
BY_CLASS = Unused("transformers' auto classes load model and tokenizer")


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
    keys: ClassVar[Keys] = {
        **dict.fromkeys(("layer_module_tmp", "mlp_module_tmp", "attn_module_tmp", "ln_f_module"), BY_SHAPE),
        **dict.fromkeys(("lm_head_module", "rewrite_module_tmps"), BY_SHAPE),
        **dict.fromkeys(("model_class", "tokenizer_class", "class_name"), BY_CLASS),
        "tokenizer_name": Unused("the tokenizer is the one beside the model"),
        "model_parallel": Unused(
            "the model is loaded on one device; model_name=(model, tokenizer) takes one that is spread"
        ),
        "use_chat_template": Unused("prompts are put as they are; errata.bench can ask by the template"),
        "max_length": Unused("a text is taken whole; one longer than the model's context is an error"),
        "evaluation_type": Unused("scores are `forced`; errata.bench has others"),
        "results_dir": Unused("nothing is written unless it is asked for"),
    }
    """What the keys mean; a class adds its own to those of the class it is derived from."""

    model_name: Any
    device: Any = None
    batch_size: int | None = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.keys = {**cls.__base__.keys, **cls.keys}  # pyright: ignore

    def __init__(self, **values: Any) -> None:
        found = values.setdefault("alg_name", values.get("alg", self.alg_name))
        if found != self.alg_name:
            named = found if isinstance(found, str) else said(found)
            raise UsageError(f"the file is for {named}, and {type(self).__name__} is for {self.alg_name}")
        self._refuse_unusable(values)
        self.ignored = self._explained(flat(self.keys, values))
        """Keys that change nothing, and why."""
        fields(self.keys, flat(self.keys, values))
        self.__dict__.update({key: number(value) for key, value in values.items()})

    def _refuse_unusable(self, values: Fields) -> None:
        """Refuse what would take the place of something of the class, and models and devices that are none."""
        if "model_name" not in values:
            raise UsageError("model_name is missing; give a folder, a name on the hub, or almanac")
        for key in values:
            if key not in ATTRIBUTES and hasattr(HyperParams, key):
                raise UsageError(f"{self.alg_name} has no key {key!r}, and a name of this class can't be one")
        model, device = values["model_name"], values.get("device")
        if not isinstance(model, str) and not (isinstance(model, tuple | list) and len(model) == 2):
            raise UsageError(f"model_name is {said(model)}; give a folder, a name on the hub, or almanac")
        if isinstance(device, bool) or not isinstance(device, int | str | None):
            raise UsageError(f"device is {said(device)}; give the number of a GPU, or cpu")
        self._named_dtype(values.get("dtype", "float32"))

    @classmethod
    def from_hparams(cls, hparams_name_or_path: str) -> Self:
        """Read a YAML file; `.yaml` may be left out."""
        name = str(hparams_name_or_path)
        path = Path(name if name.endswith((".yaml", ".yml")) else f"{name}.yaml")
        if not is_file(path):
            raise UsageError(f"there is no file {str(path)!r}; give one of EasyEdit's hparams files")
        try:
            values = parsed_yaml(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{str(path)!r} is no YAML: {error}") from error
        if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
            raise UsageError(f"{str(path)!r} holds no settings by name; give one of EasyEdit's hparams files")
        return cls(**values)

    @property
    def method(self) -> type[Method]:
        """The errata method."""
        return method(self.errata_name)

    def settings(self, lm: LM) -> Fields:
        """The fields of the errata method that the file sets."""
        found, known = fields(self.keys, flat(self.keys, vars(self))), hints(self.method)
        found |= self.method.checked({name: value for name, value in found.items() if name in known})
        self._check_places(lm, found)
        return found

    def prepared(self, lm: LM) -> Method:
        """The errata method with these settings; those that the file lacks are the preset's."""
        return self.method.preset(lm, **self._plain(lm), **self.settings(lm))

    def _plain(self, lm: LM) -> Fields:
        """For a model that is not listed, the defaults of a method whose preset counts in other units than the file."""
        if presets.recognised(lm.config) or not issubclass(self.method, Scaled):
            return {}
        own = {f.name: f.default for f in dataclasses.fields(self.method) if f.default is not dataclasses.MISSING}
        return {name: value for name, value in own.items() if name not in self.settings(lm)}

    def loaded(self) -> LM:
        """The model that the file names."""
        if not isinstance(self.model_name, str):
            model, tokenizer = self.model_name
            if not hasattr(model, "config") or not callable(tokenizer):
                raise UsageError(f"model_name is {said(self.model_name)}; give a name, or a model and its tokenizer")
            return LM(model, tokenizer)
        device = f"cuda:{self.device}" if isinstance(self.device, int) else self.device
        if str(device).startswith("cuda") and not torch.cuda.is_available():
            log.warning("the file asks for %s, and there is no GPU: the model is on the CPU", device)
            device = "cpu"
        return load(self.model_name, dtype=self._dtype(), device=device)

    def _dtype(self) -> torch.dtype:
        short = [dtype for key, dtype in DTYPES.items() if getattr(self, key, False)]
        return short[0] if short else self._named_dtype(getattr(self, "dtype", "float32"))

    def _named_dtype(self, named: Any) -> torch.dtype:
        found = getattr(torch, str(named).removeprefix("torch."), None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise UsageError(f"dtype is {said(named)}; give float32, bfloat16 or float16")
        return found

    def _check_places(self, lm: LM, settings: Fields) -> None:
        """Whether the layers' matrices that errata finds by shape are those that the file names."""
        named: Any = getattr(self, PLACES, "")
        if not isinstance(named, str):
            raise UsageError(f"{PLACES} is {said(named)}; give a module's name with {{}} for the layer")
        layers = settings.get("layers", (settings["layer"],) if "layer" in settings else ())
        for layer in layers if named else ():
            wanted, found = named.replace("{}", str(layer)).removesuffix(".weight"), lm.site(layer).name
            if wanted != found:
                raise UsageError(f"{PLACES} says {wanted}, and errata edits {found} there; change the file")

    def _explained(self, values: Fields) -> dict[str, str]:
        """Name what is unknown; log, and give, what is known to mean nothing."""
        known = {*self.keys, "alg_name", "alg", "model_name", "device", "batch_size", "dtype", *DTYPES, PLACES}
        for key in (key for key in values if key not in known and meaning(self.keys, key) is None):
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            warnings.warn(f"{self.alg_name} has no key {key!r}, and it changes nothing{hint}", stacklevel=4)
        found = {k: m.why for k in values if isinstance(m := meaning(self.keys, k), Unused)}
        for key, why in found.items():
            log.info("%s: %s has no counterpart: %s", self.alg_name, key, why)
        return found
