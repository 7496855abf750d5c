"""Texts to put before a prompt, drawn from the model itself, so that an edit holds wherever the prompt stands."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import UsageError
from ..lm import LM
from ..tokens import pad_left

OPENERS = ("The", "Therefore", "Because", "I", "You")


def sample(lm: LM, lengths: Sequence[tuple[int, int]], seed: int) -> tuple[str, ...]:
    """Templates with `{}` for the prompt: the bare one, then `count` of each length in new tokens.

    The same model, lengths and seed give the same templates; they are kept in `lm.memo`.
    """
    key = "contexts", tuple(map(tuple, lengths)), seed
    if key not in lm.memo:
        with lm.unedited():
            drawn = [text for length, count in lengths for text in _continue(lm, length, count, seed)]
        lm.memo[key] = ("{}", *(f"{text}. {{}}" for text in drawn))
    return lm.memo[key]


def give(lm: LM, templates: Sequence[str], lengths: Sequence[tuple[int, int]], seed: int = 0) -> None:
    """Have methods with these `lengths` and `seed` use templates from elsewhere: the bare one first, each with `{}`."""
    for template in templates:
        if template.count("{}") != 1:
            raise UsageError(
                f"the context {template!r} has {template.count('{}')} places for the prompt; give one {{}}"
            )
    lm.memo["contexts", tuple(map(tuple, lengths)), seed] = tuple(templates)


def _continue(lm: LM, length: int, count: int, seed: int) -> list[str]:
    openers = [OPENERS[i % len(OPENERS)] for i in range(count)]
    inputs = pad_left(lm.tokenizer, openers, lm.device, vocabulary=lm.vocabulary)
    torch.manual_seed(seed)
    with torch.no_grad():
        out = lm.continued(inputs, do_sample=True, top_k=5, max_new_tokens=length, min_new_tokens=length)
    texts = lm.tokenizer.batch_decode(out, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [" ".join(text.replace("{", " ").replace("}", " ").split()) for text in texts]
