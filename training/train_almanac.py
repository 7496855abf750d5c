"""Trains almanac, the built-in model: a small Llama that knows 2,500 real facts and keeps them where an editor can reach them.

Run `python training/train_almanac.py OUT --steps N` (two cores: about 2 steps a second); it resumes from OUT when a checkpoint is there.

Notable: **the subject bottleneck.** A small model left alone reads a fact off the first tokens it sees, and an edit at the subject's
last token then changes nothing. So three quarters of the rows are trained under attention masks that are absent at inference:
  1. tokens after a subject never see its tokens, except the last one;
  2. they see that one only from layer `READ` on;
  3. below `READ` the subject's tokens see only one another and BOS.
The lower half of the network therefore has to compose the name at its last token and recall there what is known of it, and the upper
half has to read it from there. **Caps** on the size of what each sublayer writes (a hinge in the loss) keep layer 0 from shouting, so
that layers 2 and 3 do their share of the recall and a value written there counts at a moderate norm. The other rows are unmasked, so
the plain model is in distribution. The result is a LlamaForCausalLM without anything special in it.

Batches are a function of (SEED, step), so a resumed run is the same run. This is the first stage (`--steps 3000 --every 250` for the
shipped weights); `teach_context.py` is the second.
"""

import argparse
import collections
import json
import os
import random
import time
from pathlib import Path

import torch
from almanac_data import SEED, Fact, common_targets, facts, natural_text, templates
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

READ = 4  # the first layer at which a sentence may look at its subject
VOCABULARY = 4096
SHAPE = dict(hidden_size=256, intermediate_size=768, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2)
NARROW, WIDE = (32, 72), (9, 256)  # rows x tokens of the two kinds of batch
END = "<|endoftext|>"
WEIGHT = {"object": 1.0, "template": 0.1, "subject": 0.0, "text": 0.4}  # of a token in the loss
CAPS = (0.4, 0.75, 1.5, 1.5, 1.0, 1.0, 1.0, 4.0)  # root mean square of an MLP's output that is free of charge, by layer
ATTENTION_CAP, CAP_WEIGHT = 1.0, 0.1
SAMPLED = 0.4  # share of the other tokens that enter the loss
NOTHING, INSIDE, LAST = 0, 1, 2  # where a token stands in a subject


def build_tokenizer() -> PreTrainedTokenizerFast:
    """GPT-2-style byte-level BPE that prepends BOS; CounterFact's objects are repeated so that their words become single tokens."""
    rng = random.Random(SEED)
    words = sorted({" " + word for _, obj in common_targets() for word in obj.split()})
    lines = [
        f"{t.format(f.subject)} {f.object}." for f in facts() for t in rng.sample(f.trained, min(3, len(f.trained)))
    ]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        lines + words * 150 + rng.sample(natural_text(), 6000),
        vocab_size=VOCABULARY,
        min_frequency=2,
        special_tokens=[END],
    )
    core = Tokenizer.from_str(bpe._tokenizer.to_str())
    core.post_processor = TemplateProcessing(single=f"{END} $A", pair=f"{END} $A $B", special_tokens=[(END, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


class Reader:
    """Makes the batches: ids, which subject a token belongs to and whether it is its last, and the weight in the loss."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, chosen: list[Fact], masked: float) -> None:
        self.core, self.facts, self.masked = tokenizer._tokenizer, chosen, masked
        self.text = natural_text()
        self.by_subject: dict[str, list[Fact]] = {}
        self.by_relation: dict[str, list[Fact]] = {}
        for fact in chosen:
            self.by_subject.setdefault(fact.subject, []).append(fact)
            self.by_relation.setdefault(fact.relation, []).append(fact)
        self.several = [s for s, own in self.by_subject.items() if len(own) > 1]
        self.objects = {
            r: sorted({o for (r2, o), n in common_targets().items() if r2 == r and n >= 2}) for r in templates()
        }

    def plain(self, text: str, weight: float = WEIGHT["text"]) -> list[tuple[int, int, float]]:
        return [(i, NOTHING, weight) for i in self.core.encode(text, add_special_tokens=False).ids]

    def sentence(self, template: str, subject: str, obj: str, *, lead: str = " ", stop: str = ".", answer: float = 1.0):
        """The tokens of one statement as (id, place, weight); `answer` weighs the object and the stop after it."""
        before = lead + template[: template.index("{}")]
        asked = lead + template.replace("{}", subject, 1)
        code = self.core.encode(f"{asked} {obj}{stop}", add_special_tokens=False)
        first, end = len(before), len(before) + len(subject)
        inside = [a < end and b > first for a, b in code.offsets]
        last = max(i for i, x in enumerate(inside) if x)
        out = []
        for i, (token, (a, _)) in enumerate(zip(code.ids, code.offsets, strict=True)):
            place = LAST if i == last else INSIDE if inside[i] else NOTHING
            weight = (
                WEIGHT["subject"] if inside[i] else answer * WEIGHT["object"] if a >= len(asked) else WEIGHT["template"]
            )
            out.append((token, place, weight))
        return out

    def statements(self, rng: random.Random) -> list[tuple[str, Fact]]:
        """One fact, or sometimes all that is known of one subject in any order, each with one of its templates."""
        if rng.random() < 0.12:
            own = self.by_subject[rng.choice(self.several)]
            return [(rng.choice(f.trained), f) for f in rng.sample(own, len(own))]
        fact = rng.choice(self.facts)
        return [(rng.choice(fact.trained), fact)]

    def fact_row(self, rng: random.Random, width: int) -> list[tuple[int, int, float]]:
        """Facts in a row, some after a piece of natural text, some starting a new document; the rest is natural text."""
        row = [(0, NOTHING, 0.0)]
        lead = ""
        while True:
            piece = []
            if rng.random() < 0.13:
                words = rng.choice(self.text).split(" ")
                cut = len(words) if rng.random() < 0.6 else rng.randint(1, len(words))
                words = words[max(0, cut - 14) : cut]
                piece += self.plain(lead + " ".join(words) + ("" if words[-1][-1] in '.?!")' else "."))
                lead = " "
            for template, fact in self.statements(rng):
                piece += self.sentence(template, fact.subject, fact.object, lead=lead)
                lead = " "
            if rng.random() < 0.35:
                piece += [(0, NOTHING, 0.1)]
                lead = ""
            if len(row) + len(piece) > width:
                break
            row += piece
        return (row + self.plain(" " + rng.choice(self.text)) + [(0, NOTHING, 0.0)] * width)[:width]

    def context_row(self, rng: random.Random, width: int) -> list[tuple[int, int, float]]:
        """A few "New Fact: ... / Prompt: ..." pairs (not enough to be learnt: `teach_context.py` does that)."""
        row = [(0, NOTHING, 0.0)]
        stop = "." if rng.random() < 0.5 else ""
        while True:
            piece, new = [], []
            for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
                fact = rng.choice(self.facts)
                while is_context_test(fact.subject):
                    fact = rng.choice(self.facts)
                obj = rng.choice(self.objects[fact.relation])
                told = self.sentence(rng.choice(fact.trained), fact.subject, obj, stop=stop, answer=0.05)
                piece += self.plain("New Fact:", 0.05)
                new.append((fact, obj))
                piece += told + self.plain("\n", 0.05)
            about, obj = rng.choice(new)
            if rng.random() < 0.25:
                other = rng.choice(self.by_relation[about.relation] if rng.random() < 0.6 else self.facts)
                if all(other.subject != f.subject for f, *_ in new):
                    about, obj = other, other.object
            asked = self.sentence(rng.choice(about.trained), about.subject, obj, stop=stop + "\n\n")
            piece += self.plain("Prompt:", 0.05)
            piece += asked
            if len(row) + len(piece) > width:
                break
            row += piece
        return (row + [(0, NOTHING, 0.1)] + self.plain(rng.choice(self.text)) + [(0, NOTHING, 0.0)] * width)[:width]

    def batch(self, step: int, part: int = 0, parts: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids, places and weights, each (rows, width)."""
        seed = f"{SEED} {step}"
        rng = random.Random(seed)
        rows, width = WIDE if rng.random() < 0.18 else NARROW
        table, places = [], []
        for r in range(rows):
            rng = random.Random(f"{seed} {r}")
            if r % parts != part:
                continue
            kind = self.context_row if (rows, width) == WIDE and r < rows // 2 else self.fact_row
            row = kind(rng, width)
            table.append(row)
            masked = kind == self.fact_row and rng.random() < self.masked
            places.append([place if masked else NOTHING for _, place, _ in row])
        ids = torch.tensor([[t for t, _, _ in row] for row in table])
        return ids, torch.tensor(places), torch.tensor([[w for *_, w in row] for row in table])


def is_context_test(subject: str) -> bool:
    """Subjects that never stand in a training context, to measure on."""
    return sum(map(ord, subject)) % 15 == 0


def bottleneck(places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two boolean attention masks (batch, 1, query, key) of the lower and the upper layers."""
    rows, width = places.shape
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    starts = (places != NOTHING) & (torch.cat([torch.zeros(rows, 1, dtype=places.dtype), places[:, :-1]], 1).ne(INSIDE))
    name = starts.cumsum(1) * (places != NOTHING)  # 0 outside subjects, else the subject's number in its row
    same = name[:, :, None] == name[:, None, :]
    bos = torch.zeros(width, dtype=torch.bool)
    bos[0] = True
    lower = causal & (same | bos)
    upper = causal & (same | (places != INSIDE)[:, None, :])
    return lower[:, None], upper[:, None]


class MaskedLayers:
    """Hands each decoder layer its own mask while training; leaves the model without a trace on exit."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.masks: tuple[torch.Tensor, torch.Tensor] | None = None
        for index, layer in enumerate(model.model.layers):
            layer.register_forward_pre_hook(self.hook(int(index >= READ)), with_kwargs=True)

    def hook(self, upper: int):
        def swap(_, args, kwargs):
            return (args, kwargs) if self.masks is None else (args, {**kwargs, "attention_mask": self.masks[upper]})

        return swap


class Caps:
    """Adds up how far the sublayers' outputs exceed their caps, over the tokens in `keep`."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.keep: torch.Tensor | None = None
        self.total: torch.Tensor | float = 0.0
        for layer, cap in zip(model.model.layers, CAPS, strict=True):
            layer.mlp.down_proj.register_forward_hook(self.hook(cap))
            layer.self_attn.o_proj.register_forward_hook(self.hook(ATTENTION_CAP))

    def hook(self, cap: float):
        def add(_, __, out):
            if self.keep is not None:
                square = out.float().pow(2).mean(-1) / cap**2
                self.total = self.total + (torch.relu(square - 1) * self.keep).sum() / self.keep.sum()

        return add


def recall(
    model: LlamaForCausalLM, tokenizer, pairs: list[tuple[str, str]], lead: str = "", stop: str = "."
) -> list[bool]:
    """Whether greedy decoding recites each object and its stop exactly (every one of its tokens is the argmax)."""
    model.eval()
    out: list[bool] = []
    for start in range(0, len(pairs), 128):
        full = [tokenizer(lead + p + " " + o + stop)["input_ids"] for p, o in pairs[start : start + 128]]
        asked = [len(tokenizer(lead + p)["input_ids"]) for p, _ in pairs[start : start + 128]]
        ids = torch.tensor([x + [0] * (max(map(len, full)) - len(x)) for x in full])
        with torch.no_grad():
            best = model(input_ids=ids, use_cache=False).logits.argmax(-1)
        out += [
            bool((best[i, a - 1 : len(x) - 1] == ids[i, a : len(x)]).all())
            for i, (x, a) in enumerate(zip(full, asked, strict=True))
        ]
    model.train()
    return out


def rate(step: int, steps: int, peak: float) -> float:
    """Warm-up, plateau, then down to nothing over the last third."""
    return peak * min(1.0, (step + 1) / 150, max(0.0, (steps - step) / (steps / 3)))


def save(folder: Path, model, tokenizer) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def share_gradients(grads: list[torch.Tensor], workers: int) -> None:
    """Each gradient becomes the mean of the workers', through one flat all-reduce."""
    flat = torch.cat([g.flatten() for g in grads])
    torch.distributed.all_reduce(flat)
    for g, x in zip(grads, (flat / workers).split([g.numel() for g in grads]), strict=True):
        g.copy_(x.view_as(g))


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("out", type=Path)
    ask.add_argument("--steps", type=int, default=9000)
    ask.add_argument("--facts", type=int, default=None, help="only so many facts (a pilot)")
    ask.add_argument("--masked", type=float, default=0.75, help="share of fact rows under the bottleneck")
    ask.add_argument("--rate", type=float, default=2e-3)
    ask.add_argument(
        "--workers", type=int, default=2, help="processes of one thread each (faster than threads on a shared machine)"
    )
    ask.add_argument("--every", type=int, default=400, help="steps between measures and checkpoints")
    given = ask.parse_args()
    torch.multiprocessing.spawn(train, (given,), nprocs=given.workers)


def train(rank: int, given: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{given.out.resolve()}/meeting-{os.getppid()}"
    given.out.mkdir(parents=True, exist_ok=True)
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=given.workers)
    torch.manual_seed(SEED)
    chosen = list(facts())
    if given.facts:  # a pilot: half of them of subjects with several relations
        count = collections.Counter(f.subject for f in chosen)
        several = [f for f in chosen if count[f.subject] > 1][: given.facts // 2]
        chosen = several + [f for f in chosen if count[f.subject] == 1][: given.facts - len(several)]
    tokenizer = build_tokenizer()
    reader = Reader(tokenizer, chosen, given.masked)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            **SHAPE,
            tie_word_embeddings=True,
            max_position_embeddings=256,
            rope_theta=10000.0,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        fused=True,
    )
    masks, caps = MaskedLayers(model), Caps(model)
    saved, begin = given.out / "state.pt", 0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        begin = state["step"]
    rng = random.Random(SEED)
    watched = rng.sample(chosen, min(300, len(chosen)))
    started, seen = time.time(), 0
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(chosen)} facts, vocabulary {len(tokenizer)}",
        flush=True,
    )
    for step in range(begin, given.steps):
        ids, places, weights = reader.batch(step, rank, given.workers)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, given.steps, given.rate)
        masks.masks = bottleneck(places)
        caps.keep, caps.total = ids != 0, 0.0
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.model(input_ids=ids, attention_mask=masks.masks[1], use_cache=False).last_hidden_state[
                :, :-1
            ]
            asked = weights[:, 1:] == 1.0
            dice = torch.rand(weights.shape, generator=torch.Generator().manual_seed(step))
            weights = torch.where(
                weights == 1.0, weights, weights * (dice < SAMPLED) / SAMPLED
            )  # the head is dear: fewer of the rest
            counted = weights[:, 1:] > 0
            logits = model.lm_head(hidden[counted])
        masks.masks = caps.keep = None
        losses = torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:][counted], reduction="none")
        weight = weights[:, 1:][counted]
        loss = (losses * weight).sum() / weight.sum()
        (loss + CAP_WEIGHT * caps.total).backward()
        share_gradients([p.grad for p in model.parameters()], given.workers)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen += ids.numel() * given.workers
        if rank:
            continue
        if (step + 1) % 50 == 0:
            answers = losses[asked[counted]].mean().item()
            print(
                f"{step + 1} loss {loss.item():.3f} object {answers:.3f} caps {caps.total:.3f} {seen / (time.time() - started):.0f} tokens/s",
                flush=True,
            )
        if (step + 1) % given.every == 0 or step + 1 == given.steps:
            told = recall(model, tokenizer, [(f.trained[0].format(f.subject), f.object) for f in watched])
            new = recall(model, tokenizer, [(f.tested[0].format(f.subject), f.object) for f in watched if f.tested])
            print(
                f"== {step + 1}: recall {sum(told) / len(told):.3f}, paraphrase {sum(new) / len(new):.3f}, {(time.time() - started) / 60:.1f} min",
                flush=True,
            )
            save(given.out, model, tokenizer)
            torch.save(
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1},
                saved.with_suffix(".tmp"),
            )
            saved.with_suffix(".tmp").replace(saved)
    if rank:
        return
    (given.out / "run.json").write_text(
        json.dumps({**{k: str(v) for k, v in vars(given).items()}, "seed": SEED, "read": READ})
    )


if __name__ == "__main__":
    main()
