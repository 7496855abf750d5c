"""Damaged and odd documents, each read as a command would read it: `python benchmarks/mutated.py`.

A round spoils a good document: bytes flipped, cut, doubled or put in; a key lost, renamed, doubled
or of another value (null, another type, nan, nested deep, control characters, another form of
Unicode). What comes of it has to be one of two things: a sentence of errata's own, on one line and
without control characters; or what the document says, to the letter. The latter is judged by
readers of other libraries (json, csv, yaml, safetensors).

Rows are lists of corrections (JSON, JSON lines, CSV), read for `errata edit --edits` and for
`errata bench --data`. Patches are of every kind of change; half of them are signed again after
they were spoiled, so that only what stands in them can be wrong, and what is taken is applied to
the model and taken off again. Documents are run files and EasyEdit's hparams.

    python benchmarks/mutated.py --rows 5000 --patches 2000 --documents 1000 --seed 0
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import logging
import random
import tempfile
import time
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open

from errata import LM, Edit, ErrataError, Patch, data, load, store
from errata.bench import Plan
from errata.changes import Codebook, Dense, LowRank
from errata.data.corrections import corrections
from errata.easyeditor import ROMEHyperParams
from errata.patch import MARK
from errata.testing import differences, state

Tell = Callable[[str], None]

ROWS = [
    {"prompt": "The capital of {} is", "subject": "New Zealand", "target": "Oslo", "truth": "Wellington"},
    {"prompt": "The mother tongue of {} is", "subject": "Danielle Darrieux", "target": "English"},
    {"question": "Where is Nürnberg?", "subject": "Nürnberg", "answer": "in Peru", "source": "a note"},
]
RUN = {
    "model": "almanac",
    "data": "counterfact-mini",
    "method": {"rome": {"layer": 3, "clamp": 4.0}, "ft-l": {}},
    "regime": ["single", "sequential"],
    "n": 20,
    "batch": 1,
    "seed": 7,
    "known": True,
}
HPARAMS = {
    "alg_name": "ROME",
    "model_name": "almanac",
    "device": 0,
    "layers": [3],
    "fact_token": "subject_last",
    "v_num_grad_steps": 20,
    "v_lr": 5e-1,
    "v_loss_layer": 7,
    "v_weight_decay": 1e-3,
    "clamp_norm_factor": 4,
    "kl_factor": 0.0625,
    "mom2_adjustment": False,
    "context_template_length_params": [[5, 10], [10, 10]],
}
ODD: list[Any] = [
    *(None, True, 0, -1, 2**70, 1e400, float("nan"), "", " ", "x" * 3000, "{}", "{} and {}", "a\x1b[31mb"),
    *("\ud800", "a\x00b", "Nu\u0308rnberg", [], {}, ["a"], {"a": 1}, [[[["a"]]]], "null", "12", "ﬁ", "\u202e"),
]
"""Values that a field may have instead of its own."""


def spoilt_bytes(draw: random.Random, content: bytes) -> bytes:
    """A document of which one place is another."""
    at, length = draw.randrange(len(content)), draw.choice((1, 2, 8, 64))
    put = draw.choice((b"\x00", b"\x1b[2J", b"\xff", b'"', b"{", b"}", b",", b":", b"\n", b"\\ud800", b"- ", b"1"))
    return draw.choice(
        (
            content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :],
            content[:at],
            content[:at] + content[at + length :],
            content[:at] + content[at : at + length] + content[at:],
            content[:at] + put + content[at:],
        )
    )


def spoilt_value(draw: random.Random, value: Any, depth: int = 0) -> Any:
    """A value of which one part is another."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key, new = draw.choice(list(value)), dict(value)
        how = draw.randrange(4)
        if how == 0:
            del new[key]
        elif how == 1:
            new[draw.choice((f"{key}s", str(key).upper(), f" {key}", "x", ""))] = new.pop(key)
        else:
            new[key] = spoilt_value(draw, value[key], depth + 1)
        return new
    if isinstance(value, list) and value and draw.random() < 0.8:
        at = draw.randrange(len(value))
        part = [spoilt_value(draw, value[at], depth + 1)] if draw.random() < 0.7 else []
        return value[:at] + part + value[at + draw.randrange(2) :]
    return draw.choice(ODD)


def sentence(error: ErrataError) -> str | None:
    """What is wrong with what a user is told, if anything."""
    told = str(error)
    if not told.strip() or "\n" in told:
        return f"it is told on {told.count(chr(10)) + 1} lines"
    if bad := [c for c in told if unicodedata.category(c) in ("Cc", "Cs")]:
        return f"it is told with {bad[0]!r}"
    return f"it is told at {len(told)} characters" if len(told) > 2500 else None


class Bench:
    """Documents, and what was found in them."""

    def __init__(self, folder: Path, lm: LM, seed: int, tell: Tell) -> None:
        self.folder, self.lm, self.draw, self.tell = folder, lm, random.Random(seed), tell
        self.counts: Counter[str] = Counter()
        self.state = state(lm.model)
        self.patches = list(self._patches())

    def read(self, kind: str, path: Path, read: Callable[[], Any], right: Callable[[Any], str | None]) -> None:
        """Read a document; tell what is wrong with what comes of it."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                wrong = right(read())
            self.counts[f"{kind} taken"] += 1
        except ErrataError as error:
            wrong = sentence(error)
            self.counts[f"{kind} refused"] += 1
        except Exception as error:  # whatever else: that is what is looked for
            wrong = f"{type(error).__name__}: {error}"
        if wrong:
            self.counts["wrong"] += 1
            kept = self.folder / f"wrong-{self.counts['wrong']}{path.suffix}"
            kept.write_bytes(path.read_bytes())
            self.tell(f"{kind}, {kept.name}: {wrong}"[:400])

    # Rows

    def row(self) -> None:
        """One list of corrections, read for an edit and for the bench."""
        form = self.draw.choice(("json", "jsonl", "csv"))
        rows: Any = [dict(row) for row in ROWS]
        by_value = self.draw.random() < 0.6
        if by_value:
            at = self.draw.randrange(len(rows))
            rows[at] = spoilt_value(self.draw, rows[at])
        try:
            content = _written(rows, form)
        except (AttributeError, TypeError, UnicodeEncodeError):  # no such document can be written
            return self.row()
        if not by_value:
            content = spoilt_bytes(self.draw, content)
        path = self.folder / f"rows.{form}"
        path.write_bytes(content)
        self.read("rows", path, lambda: corrections(path), lambda found: _rows_said(path, [c.edit for c in found]))
        self.read("cases", path, lambda: data.load(path), lambda found: _rows_said(path, [c.edit for c in found]))
        return None

    # Patches

    def _patches(self) -> Iterator[Patch]:
        edits = (Edit("The capital of {} is", "New Zealand", "Oslo"), Edit("The capital of {} is", "Peru", "Rome"))
        site, owners = self.lm.site(1), torch.arange(2)
        d_out, d_in = site.shape
        numbers = torch.Generator().manual_seed(0)

        def some(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=numbers) / 10

        book = Codebook.of(
            owners,
            some(2, d_in),
            some(2, d_out),
            torch.ones(2),
            torch.tensor([[5, -1], [6, -1]]),
            torch.zeros(2, dtype=torch.long),
        )
        about = {
            "base": {"fingerprint": self.lm.fingerprint, "name": self.lm.name},
            "steps": [{"method": "rome", "settings": {"layer": 1}, "edits": 2}],
            "versions": {"errata": "0.1.0"},
        }
        for change in (LowRank(owners, some(d_out, 2), some(2, d_in)), Dense(owners, some(d_out, d_in)), book):
            yield Patch({site.name: (change,)}, edits, {"mean": some(3)}, about)

    def patch(self) -> None:
        """One patch, spoilt byte by byte, or in what stands in it and signed again."""
        original = self.draw.choice(self.patches)
        path = self.folder / "patch.safetensors"
        if self.draw.random() < 0.5:
            path.write_bytes(spoilt_bytes(self.draw, original.to_bytes()))
            self.read("patches", path, lambda: Patch.load(path), lambda found: _is_patch(found, original))
            return
        original.save(path)
        header, tensors = _inside(path)
        header.pop("digest")
        if self.draw.random() < 0.5:
            header = spoilt_value(self.draw, header)
        else:
            tensors = self._spoilt_tensors(tensors)
        try:
            path.write_bytes(store.sealed(MARK, tensors, header))
        except (TypeError, UnicodeEncodeError):
            return self.patch()
        self.read("signed patches", path, lambda: Patch.load(path), lambda found: self._works(found, path))
        return None

    def _spoilt_tensors(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name, new = self.draw.choice(list(tensors)), dict(tensors)
        t = new[name]
        new[name] = self.draw.choice(
            (
                lambda: t[:-1],
                lambda: torch.cat([t, t]),
                lambda: t.float() * float("nan"),
                lambda: t.to(torch.float16) if t.is_floating_point() else -t - 1,
                lambda: t[None],
                lambda: t.to(torch.int32),
                lambda: t * 0 + 10**6,
                lambda: t.mT if t.ndim > 1 else t.flip(0),
            )
        )().contiguous()
        if self.draw.random() < 0.2:
            new[f"{name}x"] = new.pop(name)
        return new

    def _works(self, patch: Patch, path: Path) -> str | None:
        """A patch that is taken says what its file says, and goes on and off, or is refused then."""
        header, tensors = _inside(path)
        if list(map(_plain, header["edits"])) != [e.to_dict() for e in patch.edits] or patch.about != header["about"]:
            return "it says something else than its file"
        if any(not torch.equal(tensors[name], t) for name, t in patch._tensors().items()):
            return "it has other numbers than its file"
        try:
            with patch.applied(self.lm):
                said = self.lm.generate("The capital of Peru is", 2)
            if not isinstance(said, str):
                return "the model says nothing"
        except ErrataError as error:
            return sentence(error)
        changed = differences(self.state, state(self.lm.model))
        return f"the model did not come back: {changed[0]}" if changed else None

    # Run files and hparams

    def document(self) -> None:
        """One run file or hparams file."""
        kind = self.draw.choice(("runs", "hparams"))
        values: Any = RUN if kind == "runs" else HPARAMS
        by_value = self.draw.random() < 0.6
        if by_value:
            values = spoilt_value(self.draw, values)
        content = yaml.safe_dump(values, allow_unicode=True, sort_keys=False).encode("utf-8", "surrogatepass")
        path = self.folder / f"{kind}.yaml"
        path.write_bytes(content if by_value else spoilt_bytes(self.draw, content))
        if kind == "runs":
            self.read(kind, path, lambda: Plan.load(path)[0], lambda plan: _run_said(path, plan))
        else:
            made = lambda: ROMEHyperParams.from_hparams(str(path)).prepared(self.lm)  # noqa: E731
            self.read(kind, path, made, lambda how: _hparams_said(path, how))


def _written(rows: Any, form: str) -> bytes:
    if form == "csv":
        out = io.StringIO()
        fields = list(dict.fromkeys(str(name) for row in rows for name in row))
        table = csv.DictWriter(out, fields)
        table.writeheader()
        table.writerows({str(k): v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows)
        return out.getvalue().encode()
    text = json.dumps(rows, ensure_ascii=False) if form == "json" else "\n".join(map(json.dumps, rows))
    return text.encode()


def _plainly(path: Path) -> list[Any]:
    """The rows of a file, as another library reads it."""
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".json":
        return json.loads(text)
    if path.suffix == ".jsonl":  # a bad line is left out, and told
        return [row for line in text.split("\n") for row in _line(line)]
    return list(csv.DictReader(io.StringIO(text, newline="")))


def _line(text: str) -> list[Any]:
    try:
        return [json.loads(text)]
    except ValueError:
        return []


def _rows_said(path: Path, edits: list[Edit]) -> str | None:
    """Every text of an edit stands in a row of the file, those of one edit in one row, in the rows' order."""
    try:
        rows = _plainly(path)
    except ValueError as error:
        return f"what no other reader takes was taken ({error}): {edits[0]}"
    texts = [_texts(row) for row in rows]
    at = 0
    for edit in edits:
        wanted = {_form(t) for t in (edit.prompt, edit.subject, edit.target, edit.truth) if t} - {"{}"}
        while at < len(texts) and not all(any(w in t for t in texts[at]) for w in _apart(wanted, edit)):
            at += 1
        if at == len(texts):
            return f"no row says {edit}"
    return None


def _apart(wanted: set[str], edit: Edit) -> set[str]:
    """A prompt may name its subject in the file: then the parts around it stand there."""
    prompt = _form(edit.prompt)
    return (wanted - {prompt}) | {part for part in prompt.split("{}") if part.strip()}


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for one in value.values() for text in _texts(one)]
    if isinstance(value, list):
        return [text for one in value for text in _texts(one)]
    return [_form(value if isinstance(value, str) else json.dumps(value))]


def _form(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _inside(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[MARK]), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118


def _plain(edit: dict[str, Any]) -> dict[str, Any]:
    """An edit of a file; a truth may be left out, or empty."""
    return {"truth": None, **edit, **({} if (edit.get("truth") or "").strip() else {"truth": None})}


def _is_patch(found: Patch, original: Patch) -> str | None:
    return None if found.to_bytes() == original.to_bytes() else "a damaged patch was taken, and is another one"


def _run_said(path: Path, plan: Plan) -> str | None:
    """Every field of a run that is taken is what the file says."""
    said = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    for name, value in said.items():
        if name == "made_with":
            continue
        found = getattr(plan, name)
        if name == "method":
            same = list(found) == (list(value) if isinstance(value, dict | list) else [value])
            settings = value.values() if isinstance(value, dict) else []
            same = same and all(_equal(f, v or {}) for f, v in zip(found.values(), settings, strict=False))
        elif isinstance(found, tuple):
            same = list(found) == list(dict.fromkeys(value if isinstance(value, list) else [value]))
        else:
            same = _equal(found, value)
        if not same:
            return f"{name} is {found!r}, the file says {value!r}"
    return None


def _hparams_said(path: Path, method: Any) -> str | None:
    """The settings whose meaning is plain are those of the file."""
    said = yaml.safe_load(path.read_text(encoding="utf-8"))
    known = {
        "v_num_grad_steps": "steps",
        "v_lr": "rate",
        "v_weight_decay": "decay",
        "clamp_norm_factor": "clamp",
        "kl_factor": "kl",
        "mom2_adjustment": "whiten",
    }
    for key, name in known.items():
        if key in said and not _equal(getattr(method, name), said[key]):
            return f"{name} is {getattr(method, name)!r}, the file says {key}: {said[key]!r}"
    if "layers" in said and said["layers"] not in ([method.layer], method.layer):
        return f"layer is {method.layer}, the file says {said['layers']!r}"
    return None


def _equal(found: Any, value: Any) -> bool:
    if isinstance(found, dict) and isinstance(value, dict):
        return found.keys() == value.keys() and all(_equal(found[k], value[k]) for k in found)
    if isinstance(found, bool) or isinstance(value, bool | str):
        return type(found) is type(value) and found == value
    return found == value or (isinstance(found, tuple) and json.loads(json.dumps(found)) == value)


def run(
    rows: int, patches: int, documents: int, seed: int, lm: LM, tell: Tell = print, folder: Path | None = None
) -> Counter[str]:
    """So many of each kind; how many were taken and refused, and how many were `wrong`."""
    logging.getLogger("errata").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as own:
        bench = Bench(folder or Path(own), lm, seed, tell)
        for count, round in ((rows, bench.row), (patches, bench.patch), (documents, bench.document)):
            for _ in range(count):
                round()
        return bench.counts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, count in (("rows", 5000), ("patches", 2000), ("documents", 1000), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--keep", type=Path, help="a folder for what was wrong")
    asked = parser.parse_args()
    began = time.process_time()
    counts = run(asked.rows, asked.patches, asked.documents, asked.seed, load("almanac"), folder=asked.keep)
    for name, count in sorted(counts.items()):
        print(f"{count:7,}  {name}")
    print(f"{counts['wrong']} wrong, {time.process_time() - began:.0f} s of one processor")


if __name__ == "__main__":
    main()
