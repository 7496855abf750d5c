"""Patches applied and undone in any order, Ctrl-C at any line: `python benchmarks/undo.py`.

A round is one of: blocks in each other, of which one may raise; generators that are closed in any
order, or dropped; `apply` and `undo` in any order; three threads, of which two ask the model under
a patch of their own. In half of the rounds but those of threads a KeyboardInterrupt comes before a
line, at a call or at a return in the code of errata, contextlib or torch's modules, wherever the
draw falls; what is then raised is kept, as a session at the keyboard keeps it. After every round
the model has to be the base and what is still applied, to the bit: weights, hooks, modes, what
takes gradients, the generation config; and nobody may have a turn.

    python benchmarks/undo.py --rounds 20000 --seed 0
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import closing, nullcontext
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from errata import LM, Edit, Patch
from errata.changes import Change, Codebook, Dense, LowRank

PLACES = ("transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_fc", "lm_head")
"""Two of Conv1D, and one that is tied to the embeddings."""
CODE = ("/errata/", "contextlib.py", "nn/modules/module.py")
IDS = torch.tensor([[5, 6, 7, 8]])


def tiny(seed: int = 0) -> LM:
    """A GPT-2 of two blocks, in training mode, that reads letters."""
    letters = {letter: number for number, letter in enumerate("?abcdefghijklmno")}
    split = Tokenizer(models.WordLevel(letters, unk_token="?"))
    split.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    shape = dict(vocab_size=16, n_embd=8, n_layer=2, n_head=2, n_positions=16)
    config = transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.GPT2LMHeadModel(config).train()
    return LM(model, transformers.PreTrainedTokenizerFast(tokenizer_object=split), "tiny")


class State(NamedTuple):
    """All that a patch could leave behind."""

    weights: dict[str, Tensor]
    others: dict[str, Any]

    @classmethod
    def of(cls, lm: LM) -> State:
        weights = {n: p.detach().clone() for n, p in lm.model.named_parameters(remove_duplicate=False)}
        modules = dict(lm.model.named_modules())
        return cls(
            weights,
            {
                "modes": {n: m.training for n, m in modules.items()},
                "wanting": [n for n, p in lm.model.named_parameters(remove_duplicate=False) if not p.requires_grad],
                "hooks": {n: sum(len(v) for k, v in vars(m).items() if "_hooks" in k) for n, m in modules.items()},
                "settings": id(lm.model.generation_config),
                "gradients": torch.is_grad_enabled(),
            },
        )


class Bench:
    """A model, patches to it, and what is still applied."""

    def __init__(self, seed: int) -> None:
        self.draw, self.lm = random.Random(seed), tiny()
        self.base, self.parameters = State.of(self.lm), dict(self.lm.model.named_parameters())
        self.patches = [self._patch(i) for i in range(6)]
        self.alone = [self._answer(p) for p in self.patches]
        self.on: list[Patch] = []
        """What `apply` left on."""
        self.unsure: list[Patch] = []
        """Where Ctrl-C came during `undo`: off, or on as a whole."""
        self.kept: list[Any] = []
        self.counts: Counter[str] = Counter()

    def _patch(self, seed: int) -> Patch:
        draw = torch.Generator().manual_seed(seed)
        names = PLACES if seed == 0 else random.Random(seed).sample(PLACES, 2)
        kinds = [(LowRank, Dense, Codebook)[(seed + i) % 3] for i in range(len(names))]
        changes = {n: (self._change(n, kind, draw),) for n, kind in zip(names, kinds, strict=True)}
        return Patch(changes, (Edit("{} is", f"s{seed}", "t"),))

    def _change(self, name: str, kind: type[Change], draw: torch.Generator) -> Change:
        d_out, d_in = self.lm.site(name).shape
        one, normal = torch.tensor([0]), lambda *shape: torch.randn(*shape, generator=draw)
        if kind is LowRank:
            return LowRank(one, normal(d_out, 1), normal(1, d_in))
        if kind is Dense:
            return Dense(one, normal(d_out, d_in))
        return Codebook.of(one, normal(1, d_in), normal(1, d_out), torch.tensor([2.0]), one[None], one * 0)

    def _answer(self, patch: Patch) -> Tensor:
        with patch.applied(self.lm):
            return self._asked()

    def _asked(self) -> Tensor:
        with self.lm.asked():
            return self.lm.logits(torch.tensor([0, 0]), torch.tensor([1, 3]), input_ids=IDS)

    # Rounds

    def round(self) -> None:
        kind = self.draw.choice((self.nested, self.generators, self.left_on, self.threads))
        self.counts[kind.__name__] += 1
        if kind != self.threads and self.draw.random() < 0.5:
            with interrupting(self.draw) as tripped:
                try:
                    kind()
                except KeyboardInterrupt as error:
                    self.kept = [*self.kept[-5:], error]
            self.counts["interrupted"] += tripped[0]
        else:
            kind()
        if self.unsure:
            on = [entry.patch for entry in self.lm.ledger.live("patch")]
            self.on, self.unsure = [p for p in on if p in self.on or p in self.unsure], []
        if self.draw.random() < 0.02:
            self.kept = []
            gc.collect()

    def nested(self) -> None:
        """Blocks in each other."""
        raised = self.draw.random() < 0.3
        try:
            with self.draw.choice(self.patches).applied(self.lm):
                self._inside(self.draw.randint(0, 2), raised)
        except ZeroDivisionError:
            pass

    def _inside(self, depth: int, raised: bool) -> None:
        with self.draw.choice((self.lm.frozen, self.lm.unedited, self.lm.asked))():
            if self.draw.random() < 0.3:
                self._asked()
            if not depth:
                if raised:
                    raise ZeroDivisionError
                return
            with self.draw.choice(self.patches).applied(self.lm):
                self._inside(depth - 1, raised)

    def generators(self) -> None:
        """Suspended inside `applied`, then closed in any order, or dropped."""

        def suspended(patch: Patch) -> Generator[None]:
            with patch.applied(self.lm):
                while True:
                    self._asked()
                    yield

        some = [suspended(self.draw.choice(self.patches)) for _ in range(self.draw.randint(2, 3))]
        try:
            for one in some:
                next(one)
        finally:
            self.draw.shuffle(some)
            while some:
                with closing(some.pop()) if self.draw.random() < 0.7 else nullcontext():
                    pass

    def left_on(self) -> None:
        """`apply` or `undo`, a few times."""
        for _ in range(self.draw.randint(1, 3)):
            off = [p for p in self.patches if p not in self.on]
            if self.on and (not off or self.draw.random() < 0.6):
                patch = self.on.pop(self.draw.randrange(len(self.on)))
                try:
                    patch.undo(self.lm)
                except KeyboardInterrupt:
                    self.unsure.append(patch)
                    raise
            else:
                patch = self.draw.choice(off)
                patch.apply(self.lm)
                self.on.append(patch)  # where Ctrl-C came it is not on

    def threads(self) -> None:
        """Two at a time, each under its own patch; a third one asks the model without any."""
        if self.on:
            return
        wrong = []
        with self.lm.unedited():
            bare = self._asked()

        def ask(number: int, times: int) -> None:
            for _ in range(times):
                with self.patches[number].applied(self.lm):
                    time.sleep(self.draw.random() * 1e-4)
                    if not torch.equal(self._asked(), self.alone[number]):
                        wrong.append(number)

        def ask_bare(times: int) -> None:
            for _ in range(times):
                if not torch.equal(self._asked(), bare):
                    wrong.append("bare")

        a, b = self.draw.sample(range(len(self.patches)), 2)
        work = [threading.Thread(target=ask, args=(n, self.draw.randint(1, 3))) for n in (a, b)]
        work.append(threading.Thread(target=ask_bare, args=(3,)))
        for thread in work:
            thread.start()
        for thread in work:
            thread.join()
        self.counts["wrong answers"] += len(wrong)

    # What has to be

    def differences(self) -> list[str]:
        """Names of what is not the base and what is still applied."""
        found, now = [], State.of(self.lm)
        for name, value in self._expected().items():
            if not torch.equal(now.weights[name], value):
                found.append(name)
        hooks = Counter(n for p in self.on for n, cs in p.changes.items() for c in cs if isinstance(c, Codebook))
        others = {**self.base.others, "hooks": {n: hooks[n] for n in self.base.others["hooks"]}}
        found += [k for k, v in others.items() if now.others[k] != v]
        if not self.on:
            own = dict(self.lm.model.named_parameters())
            found += [n for n, p in self.parameters.items() if own.get(n) is not p]
        open_ = [entry for entry in self.lm.ledger.entries if not entry.left]
        return [
            *found,
            *(f"an open {entry.kind}" for entry in open_),
            *["patched"][: self.lm.patched != len(self.on)],
        ]

    def _expected(self) -> dict[str, Tensor]:
        weights = dict(self.base.weights)
        for patch in self.on:
            for name, changes in patch.changes.items():
                for change in changes:
                    if isinstance(change, LowRank | Dense):
                        turned = self.lm.site(name).module is not self.lm.model.lm_head
                        key = f"{name}.weight"
                        weights[key] = weights[key] + (change.delta.T if turned else change.delta)
        return weights


class interrupting:
    """Ctrl-C somewhere in the code that is run inside: before a line, at a call, or at a return."""

    def __init__(self, draw: random.Random) -> None:
        self.left = int(2 ** draw.uniform(0, 12))
        self.profile = draw.random() < 0.3
        self.tripped = [False]

    def __enter__(self) -> list[bool]:
        (sys.setprofile if self.profile else sys.settrace)(self._see)
        return self.tripped

    def __exit__(self, *_: Any) -> None:
        sys.setprofile(None)
        sys.settrace(None)

    def _see(self, frame: Any, event: str, _arg: Any) -> Any:
        code = frame.f_code
        if not any(part in code.co_filename for part in CODE):
            return None
        if event in ("line", "call", "return") and not (event == "return" and code.co_name == "apply"):
            self.left -= 1
            if self.left == 0:
                sys.setprofile(None)
                sys.settrace(None)
                self.tripped[0] = True
                raise KeyboardInterrupt
        return self._see


def run(rounds: int, seed: int, tell: Callable[[str], None] = lambda _: None) -> Counter[str]:
    """So many rounds; how many there were of each kind, and how many differed."""
    bench = Bench(seed)
    for number in range(rounds):
        bench.round()
        found = bench.differences()
        if found:
            bench.counts["different"] += 1
            tell(f"round {number}: {found}")
            bench = _anew(bench, seed + number)
    return bench.counts


def _anew(old: Bench, seed: int) -> Bench:
    fresh = Bench(seed)
    fresh.counts = old.counts
    return fresh


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    start = time.process_time()
    counts = run(asked.rounds, asked.seed, print)
    print(f"{asked.rounds} rounds, seed {asked.seed}, {time.process_time() - start:.0f} s of the processor")
    for name in (
        "nested",
        "generators",
        "left_on",
        "threads",
        "interrupted",
        "wrong answers",
        "different",
    ):
        print(f"{name:>14} {counts[name]:>6}")


if __name__ == "__main__":
    main()
