"""How every command speaks: tables or JSON on stdout; progress, warnings and errors on stderr; 0, 1 or 2 at the end.

An error is one line that says what was found, what was wanted, and what to do. 2 means that the command was used
wrongly, 1 that it failed.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table

from ..errors import ErrataError, UsageError
from ..escape import in_json, markup, visible

if TYPE_CHECKING:
    from ..lm import LM


class Terminal(Console):
    """A console that sends no control character but its own: those of what it is given are shown."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """As rich does; texts of unknown content are made visible before, so that columns are as wide as they look."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text, keep="\n"))


out = Terminal(highlight=False, emoji=False)
err = Terminal(stderr=True, highlight=False, emoji=False)

INTERRUPTED = 130
"""What typer returns after Ctrl-C."""

SMALL = 50e6
"""Parameters below which a model runs on one thread: more are slower on a busy machine, and change the last bits."""

written: list[str] = []
"""What the command has written, each as half a sentence, for whoever interrupts it."""


# What a command gives


def give(found: Any, views: Callable[[], Sequence[RenderableType]], as_json: bool) -> None:
    """Show the result of a command: as JSON with nothing beside it, or as the views of it."""
    if as_json:
        utf8 = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "") == "utf8"
        print(in_json(json.dumps(found, indent=2, ensure_ascii=not utf8)))
        return
    for view in views():
        out.print(view)


@contextmanager
def working(on: str) -> Iterator[None]:
    """While inside, a terminal shows what takes the time; a pipe or a file gets nothing."""
    if not err.is_terminal:
        yield
        return
    with err.status(markup(on)):
        yield


def load(model: str, dtype: str | None, device: str | None) -> LM:
    """The model that the options name."""
    import torch
    from transformers.utils import logging as transformers_logging

    from ..loading import load, located

    try:
        known = torch.device(device).type if device else "cpu"
    except RuntimeError:
        raise UsageError(f"there is no device {device!r}; give cpu, cuda or cuda:N") from None
    if known == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"there is no {device!r} here: PyTorch sees no GPU; leave --device out, or give cpu")
    here = isinstance(located(model), Path)
    if here or not err.is_terminal:  # downloads show bars of their own
        transformers_logging.disable_progress_bar()
    with working(f"loading {model}") if here else nullcontext():
        lm = load(model, dtype=dtype, device=device)
    if lm.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ and lm.model.num_parameters() < SMALL:
        torch.set_num_threads(1)
    return lm


def interactive() -> bool:
    """Whether a person sits at the terminal."""
    return sys.stdin.isatty() and out.is_terminal


def asked(who: str) -> str | None:
    """A line from the terminal; None at its end."""
    try:
        return out.input(f"[bold]{who}[/] ")
    except EOFError:
        return None


# What a command writes


def check_writable(path: Path | None) -> None:
    """Find out before the long work, not after it, whether a file can be written.

    Raises:
        UsageError: it can't.
    """
    if path is None:
        return
    try:
        if path.is_dir():
            raise UsageError(f"{str(path)!r} is a folder; give the name of a file")
        device = path.exists() and not path.is_file()
        with path.open("wb") if device else tempfile.TemporaryFile(dir=path.resolve().parent):
            pass
    except OSError as error:
        why = error.strerror or error
        raise UsageError(f"{str(path)!r} can't be written: {why}; give another place") from error


def check_replaceable(path: Path | None, what: str, is_one: Callable[[Path], bool], force: bool) -> None:
    """Find out before the long work whether a file can be written, and whether that loses anything.

    Args:
        path: the file to be.
        what: the only thing that may be replaced, in words.
        is_one: whether a file is such a thing.
        force: replace whatever is there.

    Raises:
        UsageError: it can't be written, or would replace something else.
    """
    check_writable(path)
    if path is not None and not force and path.is_file() and path.stat().st_size and not is_one(path):
        raise UsageError(
            f"{str(path)!r} is there already and is no {what}; give another name, or --force to replace it"
        )


def check_patch_file(path: Path | None, force: bool) -> None:
    """Find out before the long work whether a patch can be written to a file, and whether that loses anything."""
    from ..patch import is_patch

    check_replaceable(path, "patch", is_patch, force)
    if path is not None and path.suffix not in ("", ".safetensors"):
        _line("warning", "yellow", f"{str(path)!r} will be a safetensors file, whatever its name says")


def wrote(path: Path) -> str:
    """Remember that a file was written; its name for the result."""
    written.append(f"{path} was written")
    return str(path)


@contextmanager
def resumable(place: Path | None, what: str = "the same command") -> Iterator[None]:
    """While inside, whoever interrupts is told what goes on from a file or folder, if it is there."""
    try:
        yield
    except KeyboardInterrupt:
        if place is not None and place.exists():
            written.append(f"{what} goes on from {place}")
        raise


# How a command ends


def run(app: Any, args: Sequence[str]) -> int:
    """Run the shell; the exit code.

    Args:
        app: the typer application.
        args: as from the command line; `--debug` may stand anywhere.
    """
    debug = "--debug" in args or os.environ.get("ERRATA_DEBUG", "0") not in ("", "0")
    written.clear()
    _fill_closed()
    try:
        with _voices(debug):
            code = app([a for a in args if a != "--debug"], prog_name="errata", standalone_mode=False)
            if sys.stdout is not None:  # None: it was closed (`>&-`)
                sys.stdout.flush()
        return _interrupted() if code == INTERRUPTED else int(code or 0)
    except BaseException as error:
        if debug and not _is_interrupt(error):
            traceback.print_exception(error)
        return _ended(error)


def _fill_closed() -> None:
    """Give what stands in for closed standard streams their numbers, so that no file gets one of them."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)


@contextmanager
def _voices(debug: bool) -> Iterator[None]:
    """Libraries say only what is an error; what errata warns of and logs is one line each."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    log, handler = logging.getLogger("errata"), _Line()
    log.addHandler(handler)
    log.setLevel(logging.DEBUG if debug else logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", category=UserWarning)
        warnings.filterwarnings("ignore", module="torch|transformers|huggingface_hub|tokenizers|safetensors")
        warnings.showwarning = lambda message, *_, **__: _line("warning", "yellow", str(message))
        try:
            yield
        finally:
            log.removeHandler(handler)


class _Line(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        doubtful = record.levelno >= logging.WARNING
        _line("warning" if doubtful else "debug", "yellow" if doubtful else "dim", record.getMessage())


def _line(what: str, style: str, text: str) -> None:
    joined = " ".join(part.strip() for part in text.splitlines())
    err.print(f"[{style}]{what}:[/] {markup(joined)}", soft_wrap=True)


def _is_interrupt(error: BaseException) -> bool:
    return isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort"


def _interrupted() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    err.print(f"interrupted; {' and '.join(written) or 'nothing was written'}", markup=False, soft_wrap=True)
    return 1


def _ended(error: BaseException) -> int:
    """Say why the command ended; the exit code."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if _is_interrupt(error):
        return _interrupted()
    if isinstance(error, BrokenPipeError):  # the reader has had enough: `errata methods | head -3`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    _line("error", "bold red", _reason(error))
    with suppress(OSError, ValueError, AttributeError):  # what can't be written now shall not be tried again at the end
        sys.stdout.flush()
    if isinstance(error, UsageError):
        return 2
    return getattr(error, "exit_code", 1)


def _reason(error: BaseException) -> str:
    if isinstance(error, ErrataError):
        return str(error)
    if (said := getattr(error, "format_message", None)) is not None:  # typer can't read the command line
        why = said().rstrip(".").replace("Value error, ", "")
        quotes = " (a text with spaces goes in quotes)" if "extra argument" in why else ""
        return f"{why}{quotes}; see {_help(error)}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'the output'} can't be written or read: {error.strerror}"
    what = str(error).strip().splitlines()
    return (
        f"{type(error).__name__}: {what[0].rstrip('.') if what else 'no more is known'}; this should not happen: "
        "run it again with --debug and report what it prints"
    )


def _help(error: BaseException) -> str:
    context = getattr(error, "ctx", None)
    return f"{context.command_path if context else 'errata'} --help"


# How tables look


def table(*columns: str, right: Collection[str] = ()) -> Table:
    """An empty table with these columns; those named in `right` hold numbers."""
    made = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1))
    for name in columns:
        made.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return made


def grid(*rows: tuple[str, str]) -> Table:
    """Names and what they stand for, one a line."""
    made = Table.grid(padding=(0, 2))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for name, text in rows:
        made.add_row(name, markup(text))
    return made


def tick(good: bool, text: str) -> str:
    """A line that says whether something is as it should be."""
    return f"[{'green' if good else 'red'}]{'✓' if good else '✗'}[/] {markup(text)}"


def styled(text: str, style: str) -> str:
    """A text of unknown content in a style."""
    return f"[{style}]{markup(text)}[/]" if style else markup(text)


def short(text: str, most: int = 40) -> str:
    """The beginning of a text that goes on."""
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def probability(p: float | None) -> str:
    """A probability with three digits after the point."""
    if p is None:
        return "–"
    return "<0.001" if p < 0.0005 else f"{p:.3f}"


def size(count: int) -> str:
    """Bytes for people."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
