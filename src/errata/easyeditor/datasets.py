"""EasyEdit's dataset classes: rows in its names, read by `errata.data`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from .. import data
from ..data import Case, Probe


class Dataset(Sequence[dict[str, Any]]):
    """Rows of a file.

    Args:
        data_dir: the file.
        size: only the first so many.
        config: taken and not needed: nothing is tokenized here.
    """

    def __init__(self, data_dir: str | Path, size: int | None = None, config: Any = None, **_: Any) -> None:
        self.path, self.config = Path(data_dir), config
        self.cases: list[Case] = data.load(self.path, size)
        self.rows = [self._row(case) for case in self.cases]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: Any) -> Any:
        return self.rows[item]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def _row(self, case: Case) -> dict[str, Any]:
        row = {
            "case_id": case.id,
            "prompt": case.edit.text,
            "subject": case.edit.subject,
            "target_new": case.edit.target,
            "ground_truth": case.edit.truth,
            "rephrase_prompt": None,
            "locality_prompt": None,
            "locality_ground_truth": None,
        }
        for probe in reversed(case.probes):  # where there are several, the first of a kind
            if probe.kind == "paraphrase":
                row["rephrase_prompt"] = probe.prompt
            elif probe.kind == "neighbourhood":
                row |= {"locality_prompt": probe.prompt, "locality_ground_truth": probe.answer}
            elif probe.kind == "portability":
                row |= {"portability_prompt": probe.prompt, "portability_ground_truth": probe.answer}
        return row


class ZsreDataset(Dataset):
    """ZsRE in MEND's form."""


class CounterFactDataset(Dataset):
    """CounterFact, in ROME's form or EasyEdit's."""


class KnowEditDataset(Dataset):
    """KnowEdit's tasks that edit a fact: probes in lists, one for each aspect; None where a row has none of it."""

    ASPECTS: ClassVar[dict[str, str]] = {
        "portability_r": "Reasoning",
        "portability_s": "Subject_Aliasing",
        "portability_l": "Logical_Generalization",
        "locality_rs": "Relation_Specificity",
        "locality_f": "Forgetfulness",
    }

    def _row(self, case: Case) -> dict[str, Any]:
        groups = {key: [_asked(p) for p in case.probes if p.aspect == a] for key, a in self.ASPECTS.items()}
        return super()._row(case) | {key: found or None for key, found in groups.items()}


class WikiRecentDataset(KnowEditDataset):
    """KnowEdit's wiki_recent."""


def _asked(probe: Probe) -> dict[str, Any]:
    return {"prompt": probe.prompt, "ground_truth": [probe.answer, *probe.aliases]}
