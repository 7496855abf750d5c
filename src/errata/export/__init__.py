"""A patch as what other programs read: a PEFT adapter, or a merged checkpoint, each with a card that lists the edits.

A low-rank change is a LoRA as it stands. A dense one is factored to a rank, and what that loses is said. A change that
decides by its input whether to answer is neither, and is refused. A folder is written whole or not at all, and is read
back before: it is there only if it answers the edits' own prompts as the patched model does.
"""

from .checkpoint import merge
from .peft import to_peft
from .written import Exported

__all__ = ["Exported", "merge", "to_peft"]
