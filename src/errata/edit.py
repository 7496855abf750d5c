"""What an edit is: a prompt about a subject, and what should follow it. Nothing here knows a model."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from .errors import UsageError


@dataclass(frozen=True)
class Edit:
    """Make `prompt`, whose `{}` stands for `subject`, continue with `target`.

    A prompt that contains the subject itself is turned into a template at the subject's last occurrence, so both ways
    of writing the same edit are equal. Spaces around the parts carry no meaning and are dropped.

    Raises:
        UsageError: a part is empty, or the subject is not in the prompt.
    """

    prompt: str
    subject: str
    target: str
    truth: str | None = None
    """What the model said before, where it is known; only scored against, never trained on."""

    def __post_init__(self) -> None:
        for part in ("subject", "target"):
            if not getattr(self, part).strip():
                raise UsageError(f"the {part} of an edit is empty; give the words it stands for")
            object.__setattr__(self, part, getattr(self, part).strip())
        if self.truth is not None:
            object.__setattr__(self, "truth", self.truth.strip() or None)
        object.__setattr__(self, "prompt", self._template().strip(" "))

    def _template(self) -> str:
        holes = self.prompt.count("{}")
        if holes == 1:
            return self.prompt
        if holes > 1:
            raise UsageError(f"the prompt {self.prompt!r} has {holes} places {{}}; it takes one")
        before, found, after = self.prompt.rpartition(self.subject)
        if not found:
            raise UsageError(
                f"the subject {self.subject!r} is not in the prompt {self.prompt!r}; "
                "write {} where the subject stands"
            )
        return before + "{}" + after

    @property
    def text(self) -> str:
        """The prompt with the subject in its place."""
        return self.prompt.replace("{}", self.subject)

    def to_dict(self) -> dict[str, str | None]:
        """The edit as plain values, for JSON; `Edit(**values)` reads it back."""
        return asdict(self)
