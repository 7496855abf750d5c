"""Files that are never half-written, and a cache for what is dear to compute, kept by content.

A key names everything a result depends on (the model's fingerprint, the corpus' digest, the layer ...), never a file
name alone, so one model's statistics can't be taken for another's.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

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
    temporary = None
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)
            return
        handle, temporary = tempfile.mkstemp(dir=path.resolve().parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path.resolve())
    except OSError as error:
        raise ErrataError(f"{str(path)!r} can't be written: {error.strerror or error}; nothing was changed") from error
    finally:
        if temporary is not None:
            with suppress(FileNotFoundError):
                os.unlink(temporary)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def digest(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """Of a file's whole content: two that differ in a bit have different ones."""
    found = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        t = tensors[name]
        found.update(f"{name}{t.dtype}{tuple(t.shape)}".encode())
        found.update(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def seal(path: str | Path, mark: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a JSON header, kept under `mark`, to one safetensors file with a digest of both."""
    kept = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
    signed = {**header, "digest": digest(kept, header)}
    write(path, save(kept, metadata={mark: json.dumps(signed, sort_keys=True)}))


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
    if not Path(path).is_file():
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
        if header["format"] > newest:
            raise ErrataError(f"{str(path)!r} was written by a newer errata (format {header['format']}); upgrade")
        if header.pop("digest") != digest(tensors, header):
            raise ValueError("it is not what was saved")
        return make(header, tensors)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ErrataError(f"{str(path)!r} is damaged: {error}; get a whole copy") from error


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
