"""What a transformer block is made of, found by shape: where its MLP and its attention write to the residual stream.

Where shape leaves a choice, names help: what is called attention is none of the MLP, and a list of experts, of which
each token sees a few, holds nothing that all tokens go through.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map, also one whose weight is kept in a form of its own."""
    if isinstance(module, nn.Linear | Conv1D):
        return True
    sizes = (getattr(module, size, None) for size in ("in_features", "out_features"))
    return all(isinstance(size, int) for size in sizes) and not any(module.children())


def shape_of(module: Any) -> tuple[int, int]:
    """(d_out, d_in) of a linear map."""
    if isinstance(module, Conv1D):
        d_in, d_out = module.weight.shape
        return d_out, d_in
    return module.out_features, module.in_features


def linears(block: nn.Module) -> dict[str, nn.Module]:
    """The linear maps that every token goes through, by name; no adapters, which stand beside one."""
    apart = [*routed(block), *_adapters(block)]
    named = ((n, m) for n, m in block.named_modules() if is_linear(m))
    return {n: m for n, m in named if not any(f"{n}.".startswith(f"{one}.") for one in apart)}


def writers(block: nn.Module, d_model: int) -> dict[str, nn.Module]:
    """Those that end in the residual stream."""
    return {n: m for n, m in linears(block).items() if shape_of(m)[0] == d_model}


def mlp_writers(block: nn.Module, d_model: int) -> list[str]:
    """What may be the MLP's write matrix: outside attention, ending in the residual stream and starting elsewhere.

    Of several, those beside a convolution or a recurrence write what was mixed from other tokens, and one in a norm
    scales; and an MLP is wide.
    """
    outside = {n: m for n, m in writers(block, d_model).items() if not in_attention(block, n)}
    found = [n for n, m in outside.items() if shape_of(m)[1] != d_model]
    for better in (
        lambda n: not _mixes_tokens(block, n),
        lambda n: "norm" not in n,
        lambda n: shape_of(outside[n])[1] > d_model,
    ):
        if len(found) > 1:
            found = [n for n in found if better(n)] or found
    return found


def mlp_parts(block: nn.Module, write: str, d_model: int) -> list[str]:
    """The matrices of the MLP that writes by `write`: those between the residual stream and its inner width.

    Routers, gates of whole experts and adapters have other shapes. Attention's write matrix is alone.
    """
    if in_attention(block, write):
        return [write]
    inner = shape_of(block.get_submodule(write))[1]
    shapes = {n: shape_of(m) for n, m in linears(block).items() if not in_attention(block, n)}
    into = [n for n, (d_out, d_in) in shapes.items() if d_in == d_model and d_out in (inner, 2 * inner)]
    home = write.rpartition(".")[0] + "."
    near = [n for n in into if n.startswith(home)] or into
    return [n for n in shapes if n in near or n == write]


def in_attention(block: nn.Module, name: str) -> bool:
    """Whether a part of a block belongs to its attention: by its name, or by that of the class around it."""
    if "attn" in name or "attention" in name:
        return True
    around = block.get_submodule(name.rpartition(".")[0])
    return around is not block and "attention" in type(around).__name__.lower()


def routed(block: nn.Module) -> Iterator[str]:
    """Parts of a block that hold experts, of which every token sees some: a list of them, or one tensor for all."""
    for name, module in block.named_modules():
        fused = not isinstance(module, _ConvNd) and any(
            p.ndim > 2 and min(p.shape[-2:]) > 1 and "expert" in f"{name} {type(module).__name__}".lower()
            for p in module.parameters(recurse=False)
        )
        listed = isinstance(module, nn.ModuleList) and "expert" in name.rpartition(".")[2]
        if name and (fused or listed):
            yield name


def matching(block: nn.Module, pattern: str) -> list[str]:
    """The linear maps of a block whose names match: a name, or names with `*`, with `|` between several."""
    return [n for n in linears(block) if any(fnmatchcase(n, one.strip()) for one in pattern.split("|"))]


def _adapters(block: nn.Module) -> Iterator[str]:
    """What stands beside a wrapped layer (PEFT's)."""
    for name, module in block.named_modules():
        children = dict(module.named_children())
        if "base_layer" in children:
            yield from (f"{name}.{child}" for child in children if child != "base_layer")


def _mixes_tokens(block: nn.Module, name: str) -> bool:
    around = block.get_submodule(name.rpartition(".")[0])
    if around is block:
        return False
    recurrent = any(not is_linear(m) and p.ndim > 1 for m in around.modules() for p in m.parameters(recurse=False))
    return recurrent or any(isinstance(m, _ConvNd) for m in around.modules())
