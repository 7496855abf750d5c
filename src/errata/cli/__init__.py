"""The shell: `errata demo | edit | show | apply | export | bench | trace | methods ...`; `errata --help` lists all.

A command loads, does, and shows. How commands speak (tables or JSON, warnings, errors, exit codes) is in `shell.py`,
and PyTorch is imported inside the commands only, so that `errata --help` is there at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from .. import __version__
from . import shell
from .correct import apply, edit, show
from .demo import demo
from .export import export
from .history import diff, log, merge, revert
from .look import anatomy, methods
from .measure import bench
from .models import models
from .stats import stats
from .trace import trace
from .train import train
from .tune import tune

app = typer.Typer(
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def errata(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Say which version this is.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Log every step, and show the traceback of an error.")] = False,
) -> None:
    """Correct what a language model knows: one fact, a thousand, or one after another, each as a reversible patch."""
    if version:
        shell.out.print(f"errata {__version__}", highlight=False)
    elif context.invoked_subcommand is None:
        print(context.get_help(), end="")


for command, examples in {
    demo: ["errata demo", "errata demo --model smollm2-135m"],
    edit: [
        'errata edit "The mother tongue of {} is" --subject "Danielle Darrieux" --to English --save p.safetensors',
        "errata edit --edits facts.jsonl --model ./my-model --method ft-l --set steps=10 --save p.safetensors",
    ],
    show: ["errata show p.safetensors"],
    apply: ['errata apply p.safetensors --prompt "The mother tongue of Danielle Darrieux is"'],
    export: [
        "errata export p.safetensors adapter --to peft",
        "errata export p.safetensors corrected --to checkpoint --model ./my-model",
    ],
    log: ["errata log corrections"],
    diff: ["errata diff a.safetensors b.safetensors", "errata diff corrections p.safetensors"],
    merge: ["errata merge corrections p.safetensors q.safetensors", "errata merge corrections --out all.safetensors"],
    revert: ["errata revert corrections p", 'errata revert corrections q --edit "Danielle Darrieux" --dry-run'],
    bench: [
        "errata bench --method rome,ft-l,grace --n 20",
        "errata bench --regime single,sequential --n 200 --out runs/x",
        "errata bench runs/x/run.yaml --out runs/y",
        "errata bench --compare runs/x runs/y",
        "errata bench --method rome --known --chat --n 40 --model HuggingFaceTB/SmolLM2-135M-Instruct",
        "errata bench recipe easyedit-zsre --model almanac --data counterfact-mini --n 50",
    ],
    trace: [
        'errata trace "The mother tongue of {} is" --subject "Danielle Darrieux" --plot map.png',
        "errata trace --data counterfact-mini --n 50 --model openai-community/gpt2",
    ],
    stats: ["errata stats --model ./my-model --text corpus.txt --layers 4-8"],
    tune: [
        "errata tune ./my-model --method memit",
        "errata tune smollm2-135m --method rome,memit --budget 20",
    ],
    train: [
        "errata train mend --data counterfact-mini --out mend.safetensors",
        "errata train mend --model ./my-model --data train.json --set at=29,30,31 --out mend.safetensors",
    ],
    methods: ["errata methods", "errata methods rome"],
    models: ["errata models", "errata models smollm2-135m"],
    anatomy: ["errata anatomy almanac", "errata anatomy openai-community/gpt2"],
}.items():
    app.command(epilog="\n\n".join(["Example:", *(f"  {example}" for example in examples)]))(command)


def main(args: Sequence[str] | None = None) -> None:
    """The entry point of `errata`."""
    sys.exit(shell.run(app, sys.argv[1:] if args is None else args))
