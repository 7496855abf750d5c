"""What an export says of itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ReadBack:
    """How an export answered when it was read back, on the edits' own prompts."""

    by: str | None
    """What read it, with its version; None where it was not read back."""
    why: str = ""
    """Why it was not."""
    off: float | None = None
    """The largest difference of a logit from the patched model's."""
    moved: float | None = None
    """The largest difference of the patched model's from the unedited one's."""
    telling: bool | None = None
    """Whether that is more than rounding does, so that a lost change would show."""

    def __str__(self) -> str:
        if self.by is None:
            return f"not read back: {self.why}"
        return (
            f"read back by {self.by}: on the edits' own prompts its logits are within {self.off:.2g} of the patched "
            f"model's, which the patch moves by up to {self.moved:.3g}"
            + ("" if self.telling else "; that is no more than rounding does, so a lost change would not show")
        )


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    form: str
    """`peft` or `checkpoint`."""
    base: str | None
    """What to call the model where others can find it; None where its name is a local folder's."""
    sites: tuple[dict[str, Any], ...]
    """For each weight: its `module`, `rank`, `error` (the share of the change, by Frobenius norm, that the rank leaves
    out) and `moved` (the norm of the change over that of the weight)."""
    asked: tuple[dict[str, Any], ...]
    """For each edit: what the model says `before` and `after`, and the target's probability at both times."""
    read_back: ReadBack

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"folder": str(self.folder)}
