"""Whether a model is what it was: a digest of every bit an edit could have changed."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from ..lm import LM


def imprint(lm: LM) -> dict[str, str]:
    """SHA-256 of every parameter and buffer, and the hooks of every module, by name: equal for equal models."""
    tensors = {f"parameter {n}": p for n, p in lm.model.named_parameters()}
    tensors |= {f"buffer {n}": b for n, b in lm.model.named_buffers()}
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        found = dict(zip(tensors, pool.map(_digest, tensors.values()), strict=True))
    hooks = {f"hooks {n}": len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in lm.model.named_modules()}
    return found | {name: str(count) for name, count in hooks.items() if count}


def _digest(t: Tensor) -> str:
    flat = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(f"{t.dtype}{tuple(t.shape)}".encode() + flat.numpy().tobytes()).hexdigest()
