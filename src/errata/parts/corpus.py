"""The ordinary text on which second moments are taken: a file, a data set on the hub, or the model's own samples.

A model's own samples need no file and no network, and are in the languages and forms it was trained on. They are drawn
once for a model, at temperature 1 from where its texts begin, and kept by its fingerprint.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ErrataError, UsageError
from ..lm import ALMANAC, LM
from ..store import Store
from ..tokens import prefix

log = logging.getLogger(__name__)

OWN = "own"
"""Samples of the model itself."""
BUILT_IN = "almanac"
"""The corpus that ships with the built-in model."""
TIMES, LENGTH = 2, 32
"""Tokens that are drawn for every input of the MLP's write matrix, and tokens of each sample (dev/LOG.md)."""
OPENER = "The"
"""Begins the samples of a model that has no token for that."""
LONGEST = 1024
"""A longer text is cut into pieces of so many tokens."""
TOGETHER = 128
"""Texts that are tokenized, or drawn, together."""


def rows(lm: LM, corpus: str) -> Iterator[list[int]]:
    """Token ids, text after text, as the model reads them."""
    return iter(samples(lm).tolist()) if corpus == OWN else tokenized(lm, texts(corpus))


def tokenized(lm: LM, source: Iterable[str]) -> Iterator[list[int]]:
    """Token ids of texts, each with what opens a text (BOS, mostly); a long text in pieces."""
    start, source = prefix(lm.tokenizer), iter(source)
    step = min(lm.context or LONGEST, LONGEST) - len(start)
    while some := list(itertools.islice(source, TOGETHER)):
        for ids in lm.tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]:
            yield from (start + ids[i : i + step] for i in range(0, len(ids), step))


# The model's own samples


def samples(lm: LM) -> Tensor:
    """Texts that the model says of itself, (samples, tokens) ids, each with what opens a text; from the store."""
    start, store = prefix(lm.tokenizer), Store()
    length = min(LENGTH, (lm.context or LENGTH) - len(start) - 1)
    count = -(-TIMES * lm.mlp_out(0).shape[1] // length)
    key = {"samples": [count, length], "model": lm.fingerprint, "dtype": str(lm.dtype)}

    def draw() -> dict[str, Tensor]:
        log.info("drawing %d tokens of text from %s, once for all edits", count * length, lm.name)
        with lm.asked():
            said = torch.cat([_drawn(lm, i, min(TOGETHER, count - i), length) for i in range(0, count, TOGETHER)])
        return {"ids": torch.cat([torch.tensor(start, dtype=torch.long).expand(count, -1), said.cpu()], 1)}

    return store.get(key, draw)["ids"]


def _drawn(lm: LM, seed: int, count: int, length: int) -> Tensor:
    """What follows the beginning of a text, at temperature 1; (count, length)."""
    draw = torch.Generator().manual_seed(seed)

    def choose(_ids: Tensor, scores: Tensor) -> Tensor:
        """One number a row decides, where `multinomial` draws one for every token of the vocabulary."""
        below = scores.float().softmax(-1).cumsum(-1)
        at = torch.rand(count, 1, generator=draw).to(below) * below[:, -1:]
        chosen = torch.searchsorted(below, at).clamp(max=below.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)

    opened = torch.tensor([_opening(lm)] * count, device=lm.device)
    inputs = {"input_ids": opened, "attention_mask": torch.ones_like(opened)}
    out = lm.continued(inputs, scores=[choose], max_new_tokens=length, eos_token_id=None)
    return out[:, opened.shape[1] :]


def _opening(lm: LM) -> list[int]:
    """The tokens after which the model expects a text to begin: its BOS, or what ends the text before."""
    if start := prefix(lm.tokenizer):
        return start
    known = (lm.tokenizer.bos_token_id, *lm.end_tokens, lm.tokenizer.eos_token_id)
    vocabulary = lm.model.get_input_embeddings().weight.shape[0]
    found = [token for token in known if token is not None and token < vocabulary]
    return found[:1] or lm.tokenizer(OPENER, add_special_tokens=False)["input_ids"]


# Sources of text


def texts(corpus: str) -> Iterator[str]:
    """The texts of a corpus, one after another."""
    for path in _files(corpus):
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _text(line, path, number) if path.suffix == ".jsonl" else line.strip()
    if not _files(corpus):
        for row in _hub(corpus):
            if not isinstance(row.get("text"), str):
                raise UsageError(f"the data set {corpus!r} has fields {', '.join(row)}; a corpus needs a field 'text'")
            if row["text"].strip():
                yield row["text"]


def _text(line: str, path: Path, number: int) -> str:
    try:
        return json.loads(line)["text"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise UsageError(
            f"{path}, line {number}: a corpus in .jsonl has an object with a field 'text' in every line"
        ) from None


def _files(corpus: str) -> list[Path]:
    """The files of a corpus; none if it is a name on the hub."""
    path = ALMANAC / "corpus.txt" if corpus == BUILT_IN else Path(corpus).expanduser()
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.suffix in {".txt", ".jsonl"})
    if path.is_file() or corpus == BUILT_IN:
        return [path]
    if path.suffix in {".txt", ".jsonl"} or corpus.startswith((".", "/", "~")):
        raise UsageError(
            f"there is no corpus {corpus!r}; give a text file (one text a line), a folder, or a data set's name"
        )
    return []


def _hub(corpus: str) -> Iterator[dict[str, Any]]:
    """A data set on the hub, `name` or `name:configuration`, streamed."""
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UsageError(
            f"{corpus!r} is no file here, and reading data sets from the hub needs: pip install 'errata[data]'"
        ) from None
    name, _, configuration = corpus.partition(":")
    try:
        yield from load_dataset(name, configuration or None, split="train", streaming=True)
    except Exception as error:  # whatever the hub, the network or a data set's own reader raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ErrataError(
            f"the corpus {corpus!r} is no file here and can't be read from the hub ({reason}); give a text file"
        ) from error


def digest(corpus: str) -> str:
    """What tells a corpus from others: the content of files, the name of a data set on the hub."""
    if corpus == OWN:
        return f"{OWN} {TIMES}x{LENGTH}"  # the rest is the model's
    if not (files := _files(corpus)):
        return f"hub:{corpus}"
    found = hashlib.sha256()
    for path in files:
        found.update(path.read_bytes())
    return found.hexdigest()
