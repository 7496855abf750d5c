"""What an edit is about, at a matrix: inputs that are in its scope, and how near the nearest input outside is.

No number says for every model how far a memory may reach. So it is measured: in scope is the subject's last token,
wherever the subject stands; out of scope are the tokens of texts that don't name it, and the same question about other
names that end as the subject does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from ..edit import Edit
from ..lm import LM, Site
from ..tokens import Passage, Tokens, batches, passage
from ..trace import read
from . import corpus as sources

BEGINNING = 200
"""Characters of a text of the corpus that are read."""
SPARE = 8
"""Tokens that a tokenizer adds to a text at most."""
TOKENS = 2048
"""Tokens in one pass, padding included. Changes the memory, not the result."""
EXACT = "donot_use_mm_for_euclid_dist"
"""Distances by differences: a product cancels digits, and other ones in another batch."""


@dataclass(frozen=True, eq=False)
class Texts:
    """What a matrix is given at the tokens of some texts."""

    texts: list[str]
    line: Tensor
    """(m,) int64: the text of each token."""
    inputs: Tensor
    """(m, d_in) float32."""

    def naming(self, subjects: Sequence[str]) -> Tensor:
        """(m,) bool: tokens of texts that name one of these subjects."""
        named = [any(subject in text for subject in subjects) for text in self.texts]
        return torch.tensor(named, device=self.line.device)[self.line]


def ordinary(lm: LM, site: Site, corpus: str, most: int) -> Texts:
    """The beginnings of a corpus' first texts, read by the unedited model; kept in `lm.memo`."""
    key = "ordinary", site.name, corpus, most
    if key not in lm.memo:
        texts = [_beginning(lm, text) for text in islice(sources.texts(corpus), most)]
        with lm.unedited():
            lm.memo[key] = _texts(lm, site, texts)
    return lm.memo[key]


def _beginning(lm: LM, text: str) -> str:
    if lm.context is None:
        return text[:BEGINNING]
    return text[:BEGINNING].encode()[: lm.context - SPARE].decode(errors="ignore")  # a token has a byte at least


def _texts(lm: LM, site: Site, texts: list[str]) -> Texts:
    tokens = lm.encode([Passage(text) for text in texts])
    lines, inputs = [], []
    for numbers in batches(tokens.mask.sum(1).tolist(), TOKENS):
        some = torch.tensor(numbers, device=lm.device)
        batch = tokens[some].until(tokens[some].last)
        rows, cols = batch.mask.bool().nonzero(as_tuple=True)
        lines.append(some[rows])
        inputs.append(read(lm, [site.name], batch, rows, cols)[site.name][0].float())
    return Texts(texts, torch.cat(lines), torch.cat(inputs))


def lessons(
    edits: Sequence[Edit], texts: Sequence[str], ending: str, known: Sequence[Edit] = ()
) -> tuple[list[Passage], Tensor]:
    """What the memory of each edit learns: its target after its prompt, behind each of some texts.

    Args:
        edits: what is learned.
        texts: what stands before the prompt.
        ending: what follows the target.
        known: edits of which those of the same subject, by other prompts, are learned along, so that a later edit of a
            subject keeps an earlier one.

    Returns:
        The passages, an edit's own prompt first, and (passages,) int64 whose each is.
    """
    found = []
    for i, edit in enumerate(edits):
        found += [(passage(edit, text, edit.target + ending), i) for text in texts]
        others = {e.prompt: e for e in known if e.subject == edit.subject and e.prompt != edit.prompt}
        found += [(passage(e, answer=e.target + ending), i) for e in others.values()]
    return [p for p, _ in found], torch.tensor([i for _, i in found])


def firsts(owner: Tensor) -> Tensor:
    """The places at which a run of equal numbers begins."""
    return (owner.diff(prepend=owner[:1] - 1) != 0).nonzero()[:, 0]


def inside(edits: Sequence[Edit], texts: Sequence[str]) -> tuple[list[Passage], Tensor]:
    """Where each subject is recognised: in its prompt, and right after each of some texts. Returned as by `lessons`."""
    found = [p for e in edits for p in (passage(e), *(passage(replace(e, prompt="{}"), text) for text in texts))]
    return found, torch.arange(len(edits)).repeat_interleave(1 + len(texts))


def at_subjects(lm: LM, names: Sequence[str], tokens: Tokens) -> dict[str, Tensor]:
    """What matrices are given at the subject's last token of each row, (rows, d_in) float32."""
    seen = read(lm, names, tokens, torch.arange(len(tokens), device=lm.device), tokens.subject)
    return {name: given.float() for name, (given, _) in seen.items()}


def reach(lm: LM, site: Site, edits: Sequence[Edit], owners: Tensor, keys: Tensor, ordinary: Texts) -> Tensor:
    """(keys,) how far from each of the edits' keys (keys, d_in) the nearest input outside the edit's scope is."""
    found = []
    for i, edit in enumerate(edits):
        away = ordinary.inputs[~ordinary.naming([edit.subject])]
        away = torch.cat([away, namesakes(lm, site, edit)])
        found.append(torch.cdist(keys[owners == i], away, compute_mode=EXACT).amin(1))
    return torch.cat(found)


def namesakes(lm: LM, site: Site, edit: Edit) -> Tensor:
    """What the matrix is given at tokens of the edit's prompt with other names in it that end as the subject does: the
    subject without its first words; (m, d_in) float32, none of a single word."""
    words = edit.subject.split()
    names = [" ".join(words[n:]) for n in range(1, len(words))]
    if not names:
        return torch.empty(0, site.shape[1], device=lm.device)
    return _texts(lm, site, [passage(replace(edit, subject=name)).text for name in names]).inputs
