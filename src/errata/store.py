"""Files that are never half-written, and a cache for what is dear to compute, kept by content.

A key names everything a result depends on (the model's fingerprint, the corpus' digest, the layer ...), never a file
name alone, so one model's statistics can't be taken for another's.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from .documents import is_file, said
from .errors import ErrataError, UsageError

log = logging.getLogger(__name__)

T = TypeVar("T")


def write(path: str | Path, content: bytes | str) -> None:
    """Write a file whole or not at all: to a temporary name beside it, then renamed.

    A device or a pipe (`/dev/stdout`) is written to as it is, and a link stays one.

    Raises:
        ErrataError: the file can't be written (no such folder, no room, no permission).
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    place = None
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)
            return
        place = temporary(path.resolve().parent)
        with place.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(place, path.resolve())
    except OSError as error:
        raise ErrataError(f"{str(path)!r} can't be written: {error.strerror or error}; nothing was changed") from error
    finally:
        if place is not None:
            with suppress(OSError):
                place.unlink()


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder beside, that gets this name when the block is done; nothing stays of it otherwise.

    Raises:
        UsageError: there is something of that name, other than an empty folder, or it can't be made.
        ErrataError: what is written in the block can't be.
    """
    folder = Path(folder)
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(f"{str(folder)!r} exists and is not an empty folder; give a new name")
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        place = temporary(folder.absolute().parent)
        place.mkdir()
    except OSError as error:
        raise UsageError(f"{str(folder)!r} can't be written: {error.strerror or error}; give another place") from error
    try:
        yield place
        for file in filter(Path.is_file, place.iterdir()):
            file.chmod(0o666 & place.stat().st_mode)
        os.replace(place, folder)
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        why = error.strerror if isinstance(error, OSError) else error
        raise ErrataError(f"{str(folder)!r} can't be written: {why or error}; nothing was left") from error
    finally:
        shutil.rmtree(place, ignore_errors=True)


TEMPORARY = ".errata"
"""How the names of what is not yet whole begin."""


def temporary(folder: Path) -> Path:
    """A new name in a folder for what is not yet whole. What killed processes left there is swept away first."""
    start = f"{TEMPORARY}-{_here()}-"
    for left in folder.glob(f"{start}*"):
        process = left.name.removeprefix(start).partition("-")[0]
        if process.isdecimal() and not _alive(int(process)):
            with suppress(OSError):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    return folder / f"{start}{os.getpid()}-{secrets.token_hex(4)}"


@cache
def _here() -> str:
    """Where the numbers of processes are ours: this machine, and this container of it."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return hashlib.sha256(f"{platform.node()}{space}".encode()).hexdigest()[:8]


def _alive(process: int) -> bool:
    if os.name != "posix":  # there, signal 0 would end it
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def locked(path: Path, doing: str) -> Iterator[None]:
    """While inside, no other process is in a block of the same lock file. A process that dies lets go of it.

    A file that was made here goes with the lock; one that was there stays.

    Args:
        path: the lock file.
        doing: what those inside do, as in "writing to 'folder'".

    Raises:
        ErrataError: another process is inside.
        OSError: the file can't be made.
    """
    handle, made = _lock(path, doing)
    try:
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()} {_here()}\n".encode())
        yield
    finally:
        if made:
            with suppress(OSError):
                path.unlink()
        os.close(handle)


def _lock(path: Path, doing: str) -> tuple[int, bool]:
    """An open and locked file, and whether it was made for that."""
    while True:
        made = not path.exists()
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        who, *here = os.pread(handle, 60, 0).decode(errors="replace").split() or "?"
        try:
            hold(handle)
            if who.isdecimal() and not here and _alive(int(who)):  # an errata before 0.2 held a lock by its number
                raise BlockingIOError
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle, made
        except FileNotFoundError:  # who had the lock has deleted the file in between
            pass
        except BlockingIOError:
            os.close(handle)
            raise ErrataError(
                f"process {who} is {doing}; wait for it, or, if there is no such process any more, delete {str(path)!r}"
            ) from None
        os.close(handle)


def hold(handle: int) -> None:
    """Hold an open file for this process alone, until it is closed or the process dies.

    Raises:
        BlockingIOError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows: two that write at a time are not stopped
        return
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def digest(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """Of a file's whole content: two that differ in a bit have different ones."""
    found = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        t = tensors[name]
        found.update(f"{name}{t.dtype}{tuple(t.shape)}".encode())
        found.update(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def is_sealed(path: str | Path, mark: str) -> bool:
    """Whether a file is one that `seal` wrote under that mark."""
    try:
        with safe_open(path, "pt") as file:
            return mark in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def sealed(mark: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> bytes:
    """A safetensors file of tensors and a JSON header, kept under `mark`, with a digest of both."""
    kept = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
    signed = {**header, "digest": digest(kept, header)}
    return save(kept, metadata={mark: json.dumps(signed, sort_keys=True)})


def unseal(
    path: str | Path, mark: str, newest: int, wanted: str, foreign: str, make: Callable[[Any, dict[str, Tensor]], T]
) -> T:
    """What `make` makes of the header and the tensors of a sealed file.

    Args:
        path: the file.
        mark: where its header is kept.
        newest: the latest `format` of the header that can be read.
        wanted: what to give where there is no file.
        foreign: what a file without the mark is, and what to give.
        make: of header and tensors; what is missing or wrong in them may raise as it comes.

    Raises:
        UsageError: there is no such file.
        ErrataError: it is damaged, foreign, or of a newer format.
    """
    if not is_file(path):
        raise UsageError(f"there is no file {str(path)!r}; give {wanted}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise ErrataError(f"{str(path)!r} is damaged or no safetensors file ({error}); get a whole copy") from error
    if mark not in metadata:
        raise ErrataError(f"{str(path)!r} {foreign}")
    try:
        header = json.loads(metadata[mark])
        version = header["format"]
        if not isinstance(version, int) or isinstance(version, bool):
            raise ValueError(f"its format is {said(version)}")
        if version > newest:
            raise ErrataError(f"{str(path)!r} was written by a newer errata (format {version}); upgrade")
        if header.pop("digest") != digest(tensors, header):
            raise ValueError("it is not what was saved")
        return make(header, tensors)
    except RecursionError as error:
        raise ErrataError(f"{str(path)!r} is damaged: its header is nested too deep; get a whole copy") from error
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ErrataError(f"{str(path)!r} is damaged: {_why(error)}; get a whole copy") from error


def _why(error: Exception) -> str:
    """What was wrong with a header, where an error only names what was not there."""
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)


def kept() -> Path:
    """The folder of what is kept between sessions: `$ERRATA_STORE`, or `errata` in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("ERRATA_STORE") or cache / "errata")


class Store:
    """Tensors on disk under a digest of what they were computed from."""

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = Path(folder or kept())

    def load(self, key: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """What is kept under `key`; None if nothing is, or it is damaged."""
        path = self._path(key)
        if not path.exists():
            return None
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            log.warning("%s is damaged (%s) and is made again", path, error)
            return None

    def keep(self, key: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under `key`. A full or read-only disk is no failure: they are computed again the next time."""
        content = {name: t.cpu().contiguous() for name, t in tensors.items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write(self._path(key), save(content, metadata={"key": json.dumps(key, sort_keys=True)}))
        except (ErrataError, OSError) as error:
            log.warning("not kept for the next time: %s", error)

    def drop(self, key: Mapping[str, Any]) -> None:
        """Forget what is kept under `key`."""
        self._path(key).unlink(missing_ok=True)

    def get(self, key: Mapping[str, Any], compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What is kept under `key`, computed and kept first if it isn't there."""
        found = self.load(key)
        if found is None:
            found = compute()
            self.keep(key, found)
        return found

    def _path(self, key: Mapping[str, Any]) -> Path:
        text = json.dumps(key, sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:40]}.safetensors"
