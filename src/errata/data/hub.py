"""Data sets by name from the hub, through `huggingface_hub` (one file) or `datasets` (all rows of a split)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..errors import ErrataError, UsageError

KNOWEDIT = "zjunlp/KnowEdit:benchmark"
NAMES = {
    "counterfact": "azhx/counterfact",
    "knowedit-zsre": f"{KNOWEDIT}/ZsRE/ZsRE-test-all.json",
    "knowedit-recent": f"{KNOWEDIT}/wiki_recent/recent_test.json",
    "knowedit-counterfact": f"{KNOWEDIT}/wiki_counterfact/test_cf.json",
    "knowedit-wikibio": f"{KNOWEDIT}/WikiBio/wikibio-test-all.json",
}
"""Names for what is on the hub: `owner/name`, or `owner/name:file`."""
_PLACE = re.compile(r"[\w.-]+/[\w.-]+(:.+)?")


def place(name: str) -> str | None:
    """Where on the hub a name is, if it looks like one that is there."""
    found = NAMES.get(name, name)
    return found if _PLACE.fullmatch(found) else None


def file(where: str) -> Path:
    """One file of a data set, kept by the hub's own cache."""
    repo, _, path = where.partition(":")
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(repo, path, repo_type="dataset"))
    except Exception as error:  # the hub has many ways to say no
        raise _unreachable(where, error) from error


def rows(where: str, split: str) -> list[dict[str, Any]]:
    """All rows of a split."""
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports] - optional
    except ImportError:
        raise UsageError(
            f"there is no file {where!r}, and what is on the hub comes through `datasets`: "
            "pip install 'errata[data]', or give a file"
        ) from None
    try:
        return list(load_dataset(where, split=split))  # pyright: ignore[reportReturnType]
    except Exception as error:
        raise _unreachable(where, error) from error


def _unreachable(where: str, error: Exception) -> ErrataError:
    said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return ErrataError(f"the data set {where!r} can't be had from the hub ({said}); give its file instead")
