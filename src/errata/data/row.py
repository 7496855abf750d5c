"""A row of a file, read field by field, so that what is wrong with it can be said by the field's name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .. import text as texts
from ..documents import said
from ..edit import Edit
from ..errors import ErrataError, UsageError


class BadRow(ErrataError):
    """A row has no case in it; says which field is why."""


@dataclass(frozen=True)
class Row:
    """The fields of one row. A field inside another is written with a dot: `requested_rewrite.subject`."""

    fields: Mapping[str, Any]
    file: str
    number: int
    """Which row of its file it is, from 1; in JSON lines, which line."""
    within: str = ""
    """The name of the field that it is in, with a dot."""
    used: set[str] = field(default_factory=set, compare=False, repr=False)
    """The fields that were asked for so far."""

    @property
    def place(self) -> str:
        """Where to look for it."""
        return f"{self.file}, row {self.number}"

    @property
    def rest(self) -> dict[str, Any]:
        """The fields that nobody asked for."""
        return {name: value for name, value in self.fields.items() if name not in self.used}

    @property
    def id(self) -> int | str:
        """The row's `case_id` or `id`, or its number."""
        self.used.update(("case_id", "id"))
        given = [self.fields[name] for name in ("case_id", "id") if self.fields.get(name) not in (None, "")]
        found = given[0] if given else self.number
        if (
            isinstance(found, bool)
            or not isinstance(found, int | str)
            or (isinstance(found, str) and texts.HALF.search(found))
        ):
            raise BadRow(f"field 'case_id': expected a number or a text, found {said(found)}")
        return found

    def edit(self, prompt: str, subject: str, target: str, truth: str | None) -> Edit:
        """The edit in the fields of these names; `truth` is the text itself."""
        return self.made(self.text(prompt), self.text(subject), self.text(target), truth, prompt)

    def made(self, prompt: str, subject: str, target: str, truth: str | None, field: str) -> Edit:
        """The edit of these texts; `field` is named where they don't make one. The subject may be in other letters
        (`rick mahler`), and is then written as in the prompt."""
        if "{}" not in prompt and texts.find(prompt, subject) is None:
            at = texts.find(prompt.lower(), subject.lower()) if len(prompt.lower()) == len(prompt) else None
            subject = prompt[slice(*at)] if at else subject
        try:
            return Edit(prompt, subject, target, truth)
        except UsageError as error:
            raise BadRow(f"field {self._named(field)!r}: {error}") from error

    def inside(self, name: str, fields: Any) -> Row:
        """What is in the field of this name, as a row whose fields are named in full."""
        if not isinstance(fields, Mapping):
            raise BadRow(f"field {self._named(name)!r}: expected fields by name, found {said(fields)}")
        return Row(fields, self.file, self.number, f"{self.within}{name}.")

    def _named(self, name: str) -> str:
        return f"{self.within}{name}"

    def get(self, name: str) -> Any:
        """A field's value as it is; None where it is missing."""
        self.used.add(name.partition(".")[0])
        value: Any = self.fields
        for part in name.split("."):
            if not isinstance(value, Mapping):
                return None
            value = value.get(part)
        return value

    def has(self, name: str) -> bool:
        """Whether there is such a field, whatever it holds."""
        value: Any = self.fields
        for part in name.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return False
            value = value[part]
        return True

    def text(self, name: str) -> str:
        """A text that must be there."""
        return self.as_text(name, self.get(name))

    def maybe(self, name: str) -> str | None:
        """A text that may be missing."""
        return None if self.get(name) in (None, "") else self.text(name)

    def texts(self, name: str) -> list[str]:
        """A list of texts; a missing one is empty."""
        found = self._list(name, "a list of texts")
        return [self.as_text(name, one, "a list of texts", found) for one in found]

    def rows(self, name: str) -> list[Row]:
        """A list of what has fields of its own; a missing one is empty."""
        return [self.inside(f"{name}.{i}", one) for i, one in enumerate(self._list(name, "a list of fields by name"))]

    def _list(self, name: str, wanted: str) -> list[Any]:
        found = self.get(name)
        if found is None:
            return []
        if not isinstance(found, list):
            raise BadRow(f"field {self._named(name)!r}: expected {wanted}, found {said(found)}")
        return found

    def as_text(self, name: str, value: Any, wanted: str = "a text", found: Any = None) -> str:
        """A value as a text; what is none is an error that names the field, what was wanted, and what was found."""
        if not isinstance(value, str) or not value.strip():
            quoted = " (in quotes it is a text)" if isinstance(value, int | float) else ""
            shown = said(value if found is None else found)
            raise BadRow(f"field {self._named(name)!r}: expected {wanted}, found {shown}{quoted}")
        if half := texts.HALF.search(value):
            raise BadRow(f"field {self._named(name)!r}: there is half a character, {half[0]!r}, in it")
        return value
