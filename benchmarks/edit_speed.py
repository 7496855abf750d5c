"""What an edit costs, in errata and in a textbook loop (`textbook.py`), on the same model with the same settings.

    python benchmarks/edit_speed.py [--quick] [--threads 1] [--out edit_speed.json]

Prints a table and writes JSON. FLOPs are counted (`FlopCounterMode`), in a pass of its own, so they are the same on
every machine. Beside wall time stands the processor's: on a machine with other work it is what can be compared. Memory
is what the process holds beyond what it held before, at its most as a thread sees it that looks every few milliseconds;
pages of files (the code of libraries), which the system loads and drops as it likes, don't count. Every measurement is
a process of its own, so that none finds another's memory. With a GPU, the same on random weights of Llama-2-7B's size
in bfloat16 (not run so far: no GPU was at hand).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import textbook
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

import errata
from errata import LM, MEMIT, ROME, Case, Edit
from errata.bench import run
from errata.lm import ALMANAC
from errata.parts import contexts, corpus, moments
from errata.parts.moments import Moment

LONG = {"lengths": ((5, 10), (10, 10)), "steps": 25}
"""ROME's published search: v* over 21 contexts, 25 steps."""
TINY = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
SMALL = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
LARGER = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16}
BARS = {"flops of an edit": 0.30, "flops of moments": 0.25, "memory of an edit": 0.25}
"""The most that errata allows itself of the loop's, and beside the weights."""
H100 = 989e12
"""Dense bfloat16 FLOP/s of an H100 SXM, by its data sheet; `--peak` gives another GPU's."""


# The measurements, each a function of its settings that returns plain values


def rome(who: str, n: int, flops: bool) -> dict[str, Any]:
    """n single edits on almanac with its preset, edited and evaluated (before and after)."""
    lm, cases = errata.load("almanac"), errata.data.load(ALMANAC / "counterfact-mini.json", n=n)
    method = ROME.preset(lm)
    method.edit(lm, [cases[-1].edit])  # contexts, moments and the check of replay are made once for a model
    out = _timed(lambda: _answers(who, lm, method, cases))
    if flops:
        out["flops"] = _flops(lambda: _edits(who, lm, method, [c.edit for c in cases])) / n
    return out


def flops_of_an_edit(n: int) -> dict[str, Any]:
    """21 contexts, all 25 steps (no early stop), edits alone: errata's FLOPs over the loop's, edit by edit."""
    lm, cases = errata.load("almanac"), errata.data.load(ALMANAC / "counterfact-mini.json", n=n)
    method = ROME.preset(lm, stop=0.0, **LONG)
    method.edit(lm, [cases[-1].edit])
    found = []
    for case in cases:
        mine, loop = (_flops(partial(_edits, who, lm, method, [case.edit])) for who in ("errata", "loop"))
        found.append(mine / loop)
    return {"ratio": sum(found) / n, "least": min(found), "most": max(found), "edits": n}


def flops_of_moments(texts: int) -> dict[str, Any]:
    """Moments of five layers in one pass, over five full passes that take one layer's each."""
    lm = errata.load("almanac")
    source, names = list(corpus.texts(corpus.BUILT_IN))[:texts], [lm.mlp_out(i).name for i in range(5)]
    mine = _flops(lambda: moments.second_moments(lm, names, corpus.tokenized(lm, source)))
    loop = sum(_flops(lambda name=name: _full_pass(lm, name, source)) for name in names)
    return {"ratio": mine / loop, "texts": len(source)}


@torch.no_grad()
def _full_pass(lm: LM, name: str, source: list[str]) -> None:
    """One layer's second moment, the textbook's way: the whole model on one text after another."""
    site = lm.site(name)
    total = torch.zeros(site.shape[1], site.shape[1])

    def add(_module: Any, args: Any, _output: Any) -> None:
        total.add_(args[0][0].T @ args[0][0])

    handle = site.module.register_forward_hook(add)
    for text in source:
        lm.model(torch.tensor([lm.tokenizer(text)["input_ids"]]))
    handle.remove()


def memory_of_an_edit(**shape: int) -> dict[str, Any]:
    """A ROME edit (21 contexts) of a random Llama, its moment given: the peak over the weights, by the weights."""
    small, method = errata.load("almanac"), ROME(layer=2, stop=0.0, **{**LONG, "steps": 4})
    replace(method, whiten=False).edit(small, [_fact()])  # what torch itself loads at its first edit is no edit's
    lm = _random(**shape)
    _give(lm, [2], method.lengths)
    found = _timed(lambda: method.edit(lm, [_fact()]))
    weights = sum(p.numel() * p.element_size() for p in lm.model.parameters())
    parameters = sum(p.numel() for p in lm.model.parameters())
    return {"parameters": parameters, "over_weights": 1e6 * found["peak_mb"] / weights}


def memit(n: int) -> dict[str, Any]:
    """n edits in one batch of a small random Llama, its moments given; a search of five steps in one context more."""
    lm, method = _random(**TINY), MEMIT(layers=(0, 1, 2), lengths=((10, 1),), steps=5, stop=0.0)
    _give(lm, method.layers, method.lengths)
    method.edit(lm, [_fact()])  # what is made once: the factors, the check of replay
    out = _timed(lambda: method.edit(lm, [_fact(i) for i in range(n)]))
    each = {f"{name}_per_edit": out[name] / n for name in ("seconds", "processor_seconds")}
    return {**out, **each, "mb_per_edit": out["peak_mb"] / n}


def on_gpu(n: int, peak: float) -> dict[str, Any]:
    """ROME and MEMIT on random weights of Llama-2-7B's size in bfloat16: edits a second, memory, share of the peak."""
    lm = _random(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        dtype=torch.bfloat16,
        device="cuda",
    )
    weights, out = sum(p.numel() * p.element_size() for p in lm.model.parameters()), {}
    facts = [_fact(i) for i in range(n)]
    for method in (ROME.preset("llama-2-7b", whiten=True, stop=0.0), MEMIT.preset("llama-2-7b", stop=0.0)):
        layers = method.layers if isinstance(method, MEMIT) else (method.layer,)
        _give(lm, layers, method.lengths)
        do = method.each if isinstance(method, ROME) else method.edit
        do(lm, facts[:1])
        torch.cuda.reset_peak_memory_stats()
        found = _timed(lambda do=do: do(lm, facts))
        flops = _flops(lambda do=do: do(lm, facts[: min(n, 4)])) / min(n, 4)
        out[method.name] = {
            "edits_per_second": n / found["seconds"],
            "over_weights": torch.cuda.max_memory_allocated() / weights - 1,
            "roofline": flops * n / found["seconds"] / peak,
            "flops": flops,
        }
    return {"device": torch.cuda.get_device_name(), "peak": peak, "edits": n, **out}


# What they are made of


def _edits(who: str, lm: LM, method: ROME, facts: list[Edit]) -> list[Any]:
    if who == "errata":
        return method.each(lm, facts)
    with lm.frozen():
        return [textbook.edit(lm, method, fact) for fact in facts]


def _answers(who: str, lm: LM, method: ROME, cases: list[Case]) -> Any:
    if who == "errata":
        return run(method, lm, cases)
    with lm.frozen():
        return textbook.answers(lm, cases, method)


def _fact(number: int = 0) -> Edit:
    """A fact in words that almanac's tokenizer has, with a subject of its own."""
    return Edit("The mother tongue of {} is", f"Danielle Darrieux {number}", "English")


def _random(*, dtype: torch.dtype = torch.float32, device: str = "cpu", **shape: Any) -> LM:
    """A Llama of random weights with almanac's tokenizer and, unless another is given, Llama-2's vocabulary."""
    config = transformers.LlamaConfig(**{"vocab_size": 32000, "max_position_embeddings": 512} | shape)
    torch.manual_seed(0)
    with torch.device(device):
        kept = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        model = transformers.LlamaForCausalLM(config).eval()
        torch.set_default_dtype(kept)
    return LM(model, transformers.AutoTokenizer.from_pretrained(ALMANAC), name="random llama")


def _give(lm: LM, layers: Any, lengths: Any) -> None:
    """Contexts of almanac, and second moments of random keys: numbers that take the time and memory of real ones."""
    contexts.give(lm, contexts.sample(errata.load("almanac", device="cpu"), lengths, 0), lengths)
    for layer in layers:
        site = lm.site(layer)
        keys = torch.randn(2048, site.shape[1], device=lm.device)
        C = (keys.T @ keys / len(keys)).cpu()
        moments.give(lm, site, Moment(C + 0.1 * torch.eye(len(C)), len(keys), float("nan")))


def _timed(do: Callable[[], Any]) -> dict[str, Any]:
    before, seen, over = _held(), [0], threading.Event()

    def look() -> None:
        while not over.wait(0.005):
            seen.append(_held() - before)

    watcher = threading.Thread(target=look)
    watcher.start()
    wall, processor = time.perf_counter(), time.process_time()
    do()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    spent = {"seconds": time.perf_counter() - wall, "processor_seconds": time.process_time() - processor}
    over.set()
    watcher.join()
    return {**spent, "peak_mb": max(seen) / 1e6}


def _flops(do: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        do()
    return counter.get_total_flops()


def _held() -> int:
    """Bytes of this process' own memory."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024


# The whole


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    if options.one:
        name, given = json.loads(options.one)
        warnings.simplefilter("ignore")
        print(json.dumps(globals()[name](**given)))
        return
    out: dict[str, Any] = {"about": _about(options.threads), "rome": {}, "memit": {}}
    for n in (1, 10) if options.quick else (1, 10, 100):
        out["rome"][n] = {who: _one("rome", who=who, n=n, flops=n <= 10) for who in ("loop", "errata")}
        _tell_rome(n, out["rome"][n])
    for n in (100,) if options.quick else (100, 1000, 10000):
        out["memit"][n] = _one("memit", n=n)
        _tell(f"memit, {n} edits in one batch", out["memit"][n])
    out["flops of an edit"] = _one("flops_of_an_edit", n=1 if options.quick else 4)
    out["flops of moments"] = _one("flops_of_moments", texts=64)
    out["memory of an edit"] = _one("memory_of_an_edit", **SMALL)
    if not options.quick:
        out["memory of an edit, a larger model"] = _one("memory_of_an_edit", **LARGER)
    if torch.cuda.is_available():
        out["gpu"] = _one("on_gpu", n=32, peak=options.peak)
    for name, found in out.items():
        if name not in ("about", "rome", "memit"):
            _tell(f"{name} (at most {BARS[name]})" if name in BARS else name, found)
    options.out.write_text(json.dumps(out, indent=1) + "\n")
    print(f"written to {options.out}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few edits, short searches: a minute")
    parser.add_argument("--threads", type=int, default=1, help="torch's (one is fastest on small models)")
    parser.add_argument("--peak", type=float, default=H100, help="the GPU's dense bfloat16 FLOP/s")
    parser.add_argument("--out", type=Path, default=Path("edit_speed.json"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


def _one(name: str, **given: Any) -> dict[str, Any]:
    """One measurement, in a process of its own."""
    command = [sys.executable, __file__, "--threads", str(torch.get_num_threads()), "--one", json.dumps([name, given])]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(found.stdout.splitlines()[-1])


def _about(threads: int) -> dict[str, Any]:
    versions = {"errata": errata.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "versions": {**versions, "python": platform.python_version()},
        "threads": threads,
        "device": device,
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
    }


def _tell_rome(n: int, found: dict[str, dict[str, Any]]) -> None:
    loop, mine = found["loop"], found["errata"]
    for who, one in found.items():
        _tell(f"rome, {n} edits, {who}", one)
    ratios = {k: round(loop[k] / mine[k], 2) for k in ("seconds", "processor_seconds", "flops") if k in loop}
    _tell(f"rome, {n} edits, loop / errata", ratios)


def _tell(what: str, found: dict[str, Any]) -> None:
    print(f"{what:40s}", "  ".join(f"{k} {_short(v)}" for k, v in found.items()), flush=True)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
