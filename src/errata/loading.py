"""Loading a model: the built-in one, a folder, a GGUF file, or a name on the hub.

What transformers would make up is refused: weights that a folder lacks (it draws them at random) or has too many of.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)
from transformers.utils import logging as transformers_logging

from . import gguf, pretrained
from .errors import ErrataError, UsageError
from .lm import ALMANAC, LM


def load(
    name: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
    **given: Any,
) -> LM:
    """Load a model: `almanac` (built in), a folder, a GGUF file, or a name on the hub.

    `smollm2-135m` and `gemma-3-270m` are small pretrained models that `errata models` fetches. Of a vision-language
    model the text is read and edited.

    Args:
        name: which model.
        dtype: of the weights; by default what they were saved in (`almanac`, GGUF: float32).
        device: where to; by default a GPU if there is one.
        trust_remote_code: run Python code that comes with the model. Off unless asked for.
        given: what else transformers' `from_pretrained` takes: `device_map`, `quantization_config` ...

    Raises:
        UsageError: there is no such file or folder, or it is none of a model.
        ErrataError: the model can't be found or read, or the weights are not those of its config.
    """
    place = located(name)
    with _in_a_sentence(name), _quiet(place == ALMANAC):
        if isinstance(place, Path) and place.suffix == ".gguf":
            model, tokenizer = gguf.read(place, _dtype(dtype), **given)
        else:
            wanted = torch.float32 if place == ALMANAC and dtype is None else dtype or "auto"
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
            model = _model(place, dtype=wanted, trust_remote_code=trust_remote_code, **given)
    target = device or ("cuda" if torch.cuda.is_available() else None)
    if target is not None and not given.keys() & {"device_map", "quantization_config"}:
        model.to(target)
    return LM(model.eval(), tokenizer, name=str(name))


def located(name: str | Path) -> str | Path:
    """What transformers loads for a name: a folder, a GGUF file, or the name itself, which is one on the hub.

    Raises:
        UsageError: there is no such file or folder, or it holds no model.
        ErrataError: it is a model that is still to be fetched.
    """
    if str(name) == "almanac":
        return ALMANAC
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "config.json").exists() or (path / "adapter_config.json").exists():
            return path
        if (file := gguf.one_in(path)) is not None:
            return file
        raise UsageError(f"the folder {str(name)!r} has no config.json and no GGUF file, so it holds no model")
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise UsageError(f"{str(name)!r} is no model: give a folder of transformers or a GGUF file")
    if str(name) in pretrained.MODELS:
        if (kept := pretrained.folder(str(name))).is_dir():
            return kept
        raise ErrataError(f"{name} is still to be fetched: `errata models {name}` (in a clone: `make models`)")
    if _looks_like_a_path(name):
        raise UsageError(f"there is no folder or file {str(name)!r}; give a model's, a name on the hub, or almanac")
    return str(name)


def config(name: str | Path) -> Any:
    """The config of a model, without its weights.

    Raises:
        UsageError, ErrataError: as `load`.
    """
    place = located(name)
    with _in_a_sentence(name):
        if isinstance(place, Path) and place.suffix == ".gguf":
            return AutoConfig.from_pretrained(place.parent, gguf_file=place.name)
        return AutoConfig.from_pretrained(place, trust_remote_code=False)


def _model(place: str | Path, trust_remote_code: bool, **given: Any) -> Any:
    """The model of a folder or a name on the hub, as whole as its config says."""
    kind = type(AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code))
    only_with_images = kind not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    only_with_images &= kind in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    auto: Any = AutoModelForImageTextToText if only_with_images else AutoModelForCausalLM
    told_by_name = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, told = auto.from_pretrained(place, trust_remote_code=trust_remote_code, **told_by_name, **given)
    for what, why in (
        ("missing", "transformers would draw them at random"),
        ("unexpected", "its config has no place for them"),
        ("mismatched", "they have another shape than its config says"),
    ):
        names = sorted(one if isinstance(one, str) else one[0] for one in told[f"{what}_keys"])
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ErrataError(
                f"the model {str(place)!r} has {what} weights: {', '.join(names[:3])}{more}; {why}. "
                "If that is meant, load it by transformers and give errata.LM(model, tokenizer)"
            )
    return model


def _dtype(asked: torch.dtype | str | None) -> torch.dtype:
    """The dtype that dequantised weights get."""
    found = getattr(torch, asked.removeprefix("torch."), None) if isinstance(asked, str) else asked
    return found if isinstance(found, torch.dtype) else torch.float32


@contextmanager
def _in_a_sentence(name: str | Path) -> Iterator[None]:
    """While inside, whatever a library makes of a foreign file is said in a sentence."""
    try:
        yield
    except ErrataError:
        raise
    except Exception as error:
        raise ErrataError(f"the model {str(name)!r} can't be loaded: {_sentence(error)}") from error


@contextmanager
def _quiet(yes: bool) -> Iterator[None]:
    bars = transformers_logging.is_progress_bar_enabled()
    if yes:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()


def _looks_like_a_path(name: str | Path) -> bool:
    return isinstance(name, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(".gguf")


def _sentence(error: Exception) -> str:
    """The first sentence of an error that goes on for lines; one that ends in a colon takes what it announces."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    first = next((i for i, line in enumerate(lines[:4]) if not line.endswith(":")), 0)
    return " ".join(lines[: first + 1]).rstrip(".")
