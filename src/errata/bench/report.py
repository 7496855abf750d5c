"""What a run found: its numbers, each with metric, protocol and interval, and every answer they were taken from."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.table import Table

from .. import store
from ..documents import is_file, parsed_json
from ..errors import ErrataError, UsageError
from ..escape import markup, markup_lines
from . import words

FORMAT = 1


@dataclass(frozen=True, eq=False)
class Report:
    """A run of one method in one regime. As JSON, an object of three parts:

    about:
        `format` (of the file), `method`, `settings`, `source` (where they are from, if they are the model's preset),
        `batched`, `regime` (`single`, `batch=N`, `sequential`), `batch`, `evaluated` (when), `n` (cases), `failed`
        (cases whose edit could not be made), `unasked` (probes of which something could not be asked), `seed` (of the
        intervals), `model` (`name`, `fingerprint`, `dtype`), `new_tokens` (limit of generated answers), `chat` (whether
        edits were made and questions asked as a user's turn), `metrics`
        (their version), `versions` (of libraries), `efficiency`
        (seconds: `preparing`, `editing`, `processor` (of the processor, while editing), `evaluating`; `bytes` of all
        patches; what an edit took: `editing_per_edit`, `processor_per_edit`, `bytes_per_edit`, `flops_per_edit`; and
        `peak_memory`).
    summary:
        {metric: {protocol: {`mean`, `low`, `high`, `n`}}}: the mean over cases, its 95% interval (bootstrap; exact
        where all cases agree; null below ten cases), and how many cases have the score. Metrics and protocols are those
        of `errata.bench.metrics`.
    rows:
        One for each case, in order: `case_id`, `relation`, `method`, `regime`, `edit` (its fields), `error` (why it
        could not be made, or null), `metrics` ({metric: {protocol: value}}, null where not asked), `before` and `after`
        (what the model says to the edit's prompt; `after` is null if the edit could not be made), and `probes`: the
        fields of each, its `scores` by protocol, and the raw answers `before` and `after`: `text` (generated), `answer`
        and `other` (`ids`, `argmax`, `logprob`), `unasked` (why something is missing).

    A number that is not finite is null.
    """

    about: dict[str, Any]
    rows: list[dict[str, Any]]
    summary: dict[str, dict[str, dict[str, Any]]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return plain({"about": self.about, "summary": self.summary, "rows": self.rows})

    def save(self, path: str | Path) -> None:
        """Write the report as JSON, whole or not at all."""
        store.write(path, json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a report.

        Raises:
            UsageError: there is no such file.
            ErrataError: it is damaged, or no report.
        """
        if not is_file(path):
            raise UsageError(f"there is no file {str(path)!r}; give a report that `errata bench` wrote")
        try:
            found = parsed_json(Path(path).read_text(encoding="utf-8"))
            version = found["about"]["format"]
            if version > FORMAT:
                raise ErrataError(f"{str(path)!r} was written by a newer errata (format {version}); upgrade")
            return cls(found["about"], found["rows"], found["summary"])
        except (LookupError, TypeError, ValueError, OSError) as error:
            raise ErrataError(f"{str(path)!r} is damaged or no report; get a whole copy") from error

    def table(self) -> Table:
        """Metric by protocol, with intervals."""
        a = self.about
        batch = f" (batch={a['batch']})" if a["regime"] == "sequential" and a["batch"] > 1 else ""
        table = Table(
            title=markup(
                f"{a['method']} on {a['model']['name']}, {a['regime']}{batch}{', in chat' * a.get('chat', False)}"
            ),
            caption=markup_lines(_caption(a)),
            caption_justify="left",
        )
        table.add_column("metric")
        table.add_column("protocol")
        for column in ("mean", "95% interval", "cases"):
            table.add_column(column, justify="right")
        for metric, protocols in self.summary.items():
            for i, (protocol, found) in enumerate(protocols.items()):
                table.add_row(
                    "" if i else markup(metric), markup(protocol), *_cells(found), end_section=i == len(protocols) - 1
                )
        return table

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=100, color_system=None, emoji=False)
        console.print(self.table())
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue().rstrip()


def _cells(found: Mapping[str, Any]) -> tuple[str, str, str]:
    if found["mean"] is None:
        return "–", "–", "0"
    return f"{found['mean']:.3f}", words.spread(found), str(found["n"])


def _caption(about: Mapping[str, Any]) -> list[str]:
    seconds = about["efficiency"]
    lines = [
        f"{about['n']} cases, evaluated {about['evaluated']}",
        f"{seconds['editing_per_edit']:.2f} s an edit, {seconds['evaluating']:.1f} s evaluating",
    ]
    lines += [words.ability(about["ability"])] if about.get("ability") else []
    return lines + [f"{about[what]} {text}" for what, text in words.FAULTS.items() if about[what]]


def plain(value: Any) -> Any:
    """The value as JSON can hold it: no tuples, and null for a number that is not finite."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
