"""GGUF files, as llama.cpp has them, as plain models of transformers: the numbers that the quantised ones stand for."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from .errors import ErrataError, UsageError


def one_in(folder: Path) -> Path | None:
    """The GGUF file of a folder that holds no other model; None where there is none.

    Raises:
        UsageError: there are several.
    """
    files = sorted(f for f in folder.glob("*.gguf") if not f.name.startswith("mmproj"))  # a vision tower's projector
    if len(files) > 1:
        names = ", ".join(repr(f.name) for f in files[:5])
        raise UsageError(f"{str(folder)!r} holds {len(files)} GGUF files ({names}); give one of them")
    return files[0] if files else None


def read(file: Path, dtype: torch.dtype, **given: Any) -> tuple[Any, Any]:
    """The model and the tokenizer in a file.

    Args:
        file: one GGUF file; one that was split is joined by llama.cpp's `llama-gguf-split --merge`.
        dtype: of the weights, which are dequantised.
        given: what else `from_pretrained` takes.

    Raises:
        ErrataError: a package is missing, or transformers can't read the file: it builds the models and tokenizers
            of some architectures only.
    """
    for package in ("gguf", "accelerate"):
        if find_spec(package) is None:
            raise ErrataError(f"GGUF files are read by the package {package}: pip install 'errata[gguf]'")
    where: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    if (kind := getattr(transformers, "GgufConfig", None)) is not None:  # else it is dequantised anyway
        where |= {"quantization_config": kind(dequantize=True)}
    packed = AutoModelForCausalLM.from_pretrained(**where, dtype=dtype, **given)
    where.pop("quantization_config", None)
    return _plain(packed), AutoTokenizer.from_pretrained(**where)


def _plain(packed: Any) -> Any:
    """The same numbers in a model that knows nothing of the file: one from GGUF refuses to be saved."""
    config = copy.deepcopy(packed.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.random.fork_rng(devices=[]):  # its first weights are drawn
        model = AutoModelForCausalLM.from_config(config, dtype=packed.dtype)
    model.load_state_dict(packed.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = packed.generation_config
    return model
