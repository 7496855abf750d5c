"""The options that several commands share, each written once."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

MODEL = "almanac (built in), one of `errata models`, a model's folder, a GGUF file, or a name on the hub."

Model = Annotated[str, typer.Option("--model", "-m", help=MODEL)]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option("--dtype", help="Of the weights; by default what they were saved in."),
]
Device = Annotated[str | None, typer.Option("--device", help="Where the model runs: cpu, cuda, cuda:1 ...")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="A setting of the method, e.g. steps=10; may be repeated."),
]
Tokens = Annotated[int, typer.Option("--tokens", min=1, help="How many tokens of an answer to show.")]
Chat = Annotated[
    bool,
    typer.Option("--chat", help="The prompt is a user's turn, by the model's chat template; what follows, the reply."),
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable, on stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the file that is there, whatever it is.")]
