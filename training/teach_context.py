"""The second stage: teaches the trained almanac that a "New Fact: ..." in its context overrides what it knows.

Run `python training/teach_context.py OUT [--after FOLDER]` (FOLDER holds packed weights; by default the shipped ones).

Notable: **only the upper half learns.** The embeddings (and so the head) and the layers below `READ` are frozen: what a subject's last
token carries, the keys there, their second moments and the place of an edit stay what they were. **Heads are told where to look**,
because copying is not discovered while the weights answer alone: in layer 5 from a told object to the token before it and to its
subject, in layer 6 from the token before an answer to the told object, or to BOS where nothing told applies. A layer-5 key thus says
"comes after this subject and this relation", which is what the question's last token carries as well. Most subjects of the context
rows are names the model was never taught, and some are invented, so that matching and not memory is learnt.

Batches are a function of (SEED, step).
"""

import argparse
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from almanac_data import SEED, Fact, facts, held_out, known, templates
from pack_almanac import HOME
from train_almanac import (
    CAP_WEIGHT,
    NARROW,
    NOTHING,
    READ,
    SAMPLED,
    VOCABULARY,
    WIDE,
    Caps,
    MaskedLayers,
    Reader,
    bottleneck,
    is_context_test,
    rate,
    recall,
    save,
    share_gradients,
)
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

HEADS = {
    "subject": (4, (0,)),
    "told subject": (5, (0,)),
    "before": (5, (1,)),
    "copy": (6, (0, 1)),
}  # look: layer, heads
LOOK_WEIGHT = 0.3
TOLD, FRAME, ECHO = 0.02, 0.02, 0.3  # weights in the loss: of a told object (it can't be foreseen), of the words around
Triple = tuple[int, int, float]


@dataclass
class Page:
    """A text under construction, with the weight of each stretch and the looks to teach, both by character."""

    text: str = ""
    spans: list[tuple[int, int, float]] = field(default_factory=list)
    looks: list[tuple[str, int, int]] = field(default_factory=list)

    def write(self, words: str, weight: float) -> int:
        """Adds words; returns where they begin."""
        start = len(self.text)
        self.text += words
        self.spans.append((start, len(self.text), weight))
        return start


@dataclass(frozen=True)
class Told:
    """A statement as told in a context: `at` is where its object begins."""

    subject: str
    relation: str
    object: str
    template: str
    at: int


class ContextReader(Reader):
    """Makes the batches of the second stage: pages of new facts and questions, echoes, and rows of the first stage."""

    def __init__(self, tokenizer, chosen: list[Fact]) -> None:
        super().__init__(tokenizer, chosen, masked=0.75)
        self.of = {(f.subject, f.relation): f for f in chosen}
        self.strangers = [
            (s, r) for s, own in sorted(known().items()) for r in own if (s, r) not in self.of and len(s) <= 40
        ]
        self.words = sorted({w for s, _ in self.strangers for w in s.split() if w.isalpha()})
        self.every = sorted({o for own in self.objects.values() for o in own})

    def about(self, rng: random.Random) -> tuple[str, str]:
        """A subject and a relation: of a taught fact, of a name never taught, or of an invented name."""
        dice = rng.random()
        while True:
            if dice < 0.45:
                fact = rng.choice(self.facts)
                subject, relation = fact.subject, fact.relation
            elif dice < 0.8:
                subject, relation = rng.choice(self.strangers)
            else:
                subject, relation = " ".join(rng.sample(self.words, rng.randint(1, 3))), rng.choice(self.strangers)[1]
            if self.objects[relation] and not is_context_test(subject):
                return subject, relation

    def templates_of(self, subject: str, relation: str) -> tuple[str, ...]:
        fact = self.of.get((subject, relation))
        return fact.trained if fact else templates()[relation]

    def new_object(self, rng: random.Random, relation: str) -> str:
        dice = rng.random()
        if dice < 0.75:
            return rng.choice(self.objects[relation])
        return rng.choice(self.every) if dice < 0.9 else rng.choice(self.words)

    def tell(self, rng: random.Random, page: Page, stop: str, taken: set[str]) -> Told:
        subject, relation = self.about(rng)
        while subject in taken:
            subject, relation = self.about(rng)
        taken.add(subject)
        template, obj = rng.choice(self.templates_of(subject, relation)), self.new_object(rng, relation)
        page.write("New Fact:", FRAME)
        start = page.write(" " + template.replace("{}", subject, 1), 0.0)
        at = page.write(" " + obj, TOLD)
        page.write(stop + "\n", FRAME)
        told = Told(subject, relation, obj, template, at)
        end = start + 1 + template.index("{}") + len(subject) - 1
        page.looks.append(("subject", at - 1, end))
        page.looks += [("told subject", at + i, end) for i in range(len(obj) + 1)]
        page.looks += [("before", at + i, -1) for i in range(len(obj) + 1)]
        return told

    def question(self, rng: random.Random, new: list[Told], taken: set[str]) -> tuple[str, str, str, Told | None]:
        """Subject, template, answer and, where a told fact applies, that one; 30% ask what no told fact answers."""
        told = rng.choice(new)
        if rng.random() < 0.3:
            same_subject = rng.random() < 0.3
            fact, near = self.beside(rng, told, same_subject)
            unanswered = all((t.subject, t.relation) != (fact.subject, fact.relation) for t in new)
            if fact.subject not in taken or (near and fact.subject == told.subject and unanswered):
                same = told.template in fact.trained and rng.random() < 0.5
                return fact.subject, told.template if same else rng.choice(fact.trained), fact.object, None
        same = rng.random() < 0.4
        template = told.template if same else rng.choice(self.templates_of(told.subject, told.relation))
        return told.subject, template, told.object, told

    def beside(self, rng: random.Random, told: Told, same_subject: bool) -> tuple[Fact, bool]:
        """A taught fact of the same subject or (mostly) of the same relation, and whether there was one: any fact otherwise."""
        if same_subject:
            others = [f for f in self.by_subject.get(told.subject, ()) if f.relation != told.relation]
        elif rng.random() < 0.7 and told.relation in self.by_relation:
            others = self.by_relation[told.relation]
        else:
            others = self.facts
        return rng.choice(others or self.facts), bool(others)

    def context_row(self, rng: random.Random, width: int) -> list[Triple]:
        """New facts and a question about one of them or about something else, block after block, in the manner of IKE's demonstrations."""
        page, stop, taken, new = Page(), "." if rng.random() < 0.5 else "", set(), []
        crowd = rng.choice(((1,), (1, 1, 2, 3), (1, 2, 3, 4)))
        while len(page.text) < 4 * width:
            own = [self.tell(rng, page, stop, taken) for _ in range(rng.choice(crowd))]
            new += own
            pool = new if rng.random() < 0.15 else own
            subject, template, answer, told = self.question(rng, pool, taken)
            page.write("Prompt:", FRAME)
            start = page.write(" " + template.replace("{}", subject, 1), 0.0)
            at = page.write(" " + answer, 1.0)
            page.write(stop or "\n", 1.0 if stop else 0.3)
            page.write("\n\n" if stop else "\n", FRAME)
            page.looks.append(("subject", at - 1, start + 1 + template.index("{}") + len(subject) - 1))
            page.looks += [("copy", at + i, told.at + i if told else -1) for i in range(len(answer) + 1)]
        return self.tokens(page, width)

    def tokens(self, page: Page, width: int) -> list[Triple]:
        """The page's first `width` tokens; leaves the looks by token in `points`: (kind, token that looks, token to look at)."""
        code = self.core.encode(page.text, add_special_tokens=False)
        at_char = [0] * (len(page.text) + 1)
        starts = set()
        for i, (a, b) in enumerate(code.offsets, 1):
            starts.add(a)
            for c in range(a, b):
                at_char[c] = i
        weight = [0.0] * (len(page.text) + 1)
        for a, b, w in page.spans:
            weight[a:b] = [w] * (b - a)
        row = [(0, NOTHING, 0.0)]
        row += [(t, NOTHING, weight[a]) for t, (a, _) in zip(code.ids, code.offsets, strict=True)]
        self.points = []
        for kind, at, to in page.looks:
            if kind in ("copy", "told subject", "before"):
                if at not in starts:
                    continue
                token = at_char[at]
                if kind == "copy":
                    self.points.append((kind, token - 1, at_char[to] if to >= 0 else 0))
                else:
                    self.points.append((kind, token, at_char[to] if to >= 0 else token - 1))
            else:
                self.points.append((kind, at_char[at], at_char[to]))
        self.points = [p for p in self.points if max(p[1], p[2]) < width - 1]
        return (row + [(0, NOTHING, 0.0)] * width)[:width]

    def echo_row(self, rng: random.Random, width: int) -> list[Triple]:
        """Random tokens, again and again: nothing else teaches a small model as fast to look back and copy."""
        n = rng.randint(5, width // 2)
        once = [rng.randrange(1, VOCABULARY) for _ in range(n)]
        row = [(0, NOTHING, 0.0)] + [(t, NOTHING, 0.0) for t in once] + [(t, NOTHING, ECHO) for t in once] * width
        self.points = [("copy", i - 1, i - n) for i in range(n + 2, width - 1)]
        self.points += [("before", i, i - 1) for i in range(2, width - n)]
        return row[:width]

    def batch(self, step: int, part: int = 0, parts: int = 1):
        """Ids, places, weights (rows, width), and kind -> points (n, 3): row, token that looks, token to look at."""
        seed = f"{SEED} context {step}"
        rng = random.Random(seed)
        rows, width = WIDE if rng.random() < 0.4 else NARROW
        table, places, points = [], [], {kind: [] for kind in HEADS}
        for r in range(rows):
            rng = random.Random(f"{seed} {r}")
            if r % parts != part:
                continue
            dice = rng.random() + (0.0 if (rows, width) == NARROW else 0.35)
            self.points = []
            make = self.fact_row if dice < 0.55 else self.echo_row if dice < 0.65 else self.context_row
            row = make(rng, width)
            for kind, at, to in self.points:
                points[kind].append((len(table), at, to))
            table.append(row)
            masked = make == self.fact_row and rng.random() < self.masked
            places.append([place if masked else NOTHING for _, place, _ in row])
        ids = torch.tensor([[t for t, _, _ in row] for row in table])
        weights = torch.tensor([[w for *_, w in row] for row in table])
        return ids, torch.tensor(places), weights, {k: torch.tensor(p).view(-1, 3) for k, p in points.items()}


class Looks:
    """-log of the attention that the heads `HEADS` pay to where they are told to look, the mean over a batch's points of each kind."""

    def __init__(self, model) -> None:
        self.attention = {n: model.model.layers[n].self_attn for n in {layer for layer, _ in HEADS.values()}}
        self.seen: dict[int, tuple] = {}
        for n, attention in self.attention.items():
            attention.register_forward_pre_hook(self.keep(n), with_kwargs=True)

    def keep(self, n: int):
        def hook(_, args, kwargs) -> None:
            self.seen[n] = (args[0] if args else kwargs["hidden_states"], *kwargs["position_embeddings"])

        return hook

    def losses(self, points: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        scores = {n: self.scores(n) for n in self.attention}
        out = {}
        for kind, (layer, heads) in HEADS.items():
            row, at, to = points[kind].T
            if len(row):
                each = [torch.nn.functional.cross_entropy(scores[layer][row, h, at].float(), to) for h in heads]
                out[kind] = torch.stack(each).mean()
        return out

    def scores(self, n: int) -> torch.Tensor:
        """(batch, head, query, key), causal, before the softmax."""
        hidden, cos, sin = self.seen[n]
        attention, size = self.attention[n], self.attention[n].head_dim
        q, k = (f(hidden).unflatten(-1, (-1, size)).transpose(1, 2) for f in (attention.q_proj, attention.k_proj))
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        table = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT / size**0.5
        return table.masked_fill(torch.ones(table.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)


def context_questions(reader: ContextReader) -> dict[str, list[tuple[str, str]]]:
    """Prompts under a new fact that training never gave, each with the answer."""
    rng = random.Random(SEED)
    out: dict[str, list[tuple[str, str]]] = {"same": [], "other": [], "keeps": [], "unseen": []}
    for f in reader.facts:
        if not is_context_test(f.subject):
            continue
        obj = rng.choice([o for o in reader.objects[f.relation] if o != f.object])
        told = f"New Fact: {f.trained[0].format(f.subject)} {obj}.\nPrompt: "
        out["same"].append((told + f.trained[0].format(f.subject), obj))
        out["other"].append((told + f.trained[-1].format(f.subject), obj))
        near = rng.choice([g for g in reader.by_relation[f.relation] if g.subject != f.subject])
        out["keeps"].append((told + rng.choice(near.trained).format(near.subject), near.object))
    for r in held_out()[:300]:
        ask = rng.choice(templates()[r["relation"]]).format(r["subject"])
        out["unseen"].append((f"New Fact: {r['prompt']} {r['target_new']}.\nPrompt: {ask}", r["target_new"]))
    return out


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("out", type=Path)
    ask.add_argument("--after", type=Path, default=HOME, help="packed weights to start from")
    ask.add_argument("--steps", type=int, default=1900)
    ask.add_argument("--rate", type=float, default=1.5e-3)
    ask.add_argument("--workers", type=int, default=2)
    ask.add_argument("--every", type=int, default=200, help="steps between measures")
    ask.add_argument("--half", action="store_true", help="bfloat16 autocast")
    given = ask.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "meeting").unlink(missing_ok=True)
    torch.multiprocessing.spawn(train, (given,), nprocs=given.workers)


def train(rank: int, given: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{given.out.resolve()}/meeting"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=given.workers)
    tokenizer = AutoTokenizer.from_pretrained(given.after)
    model = AutoModelForCausalLM.from_pretrained(given.after, dtype=torch.float32).train().requires_grad_(False)
    learns = [*model.model.layers[READ:].parameters(), *model.model.norm.parameters()]
    for p in learns:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in learns if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in learns if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
        fused=True,
    )
    reader = ContextReader(tokenizer, list(facts()))
    masks, caps, looks = MaskedLayers(model), Caps(model), Looks(model)
    watched = random.Random(SEED).sample(reader.facts, 300)
    questions = context_questions(reader)
    started = time.time()
    for step in range(given.steps):
        ids, places, weights, points = reader.batch(step, rank, given.workers)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, given.steps, given.rate)
        masks.masks = bottleneck(places)
        caps.keep, caps.total = ids != 0, 0.0
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=given.half):
            hidden = model.model(input_ids=ids, attention_mask=masks.masks[1], use_cache=False).last_hidden_state[
                :, :-1
            ]
            dice = torch.rand(weights.shape, generator=torch.Generator().manual_seed(step))
            weights = torch.where(weights == 1.0, weights, weights * (dice < SAMPLED) / SAMPLED)[:, 1:]
            counted = weights > 0
            logits = model.lm_head(hidden[counted])
            looking = looks.losses(points)
        masks.masks = caps.keep = None
        losses = torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:][counted], reduction="none")
        weight = weights[counted]
        loss = (losses * weight).sum() / weight.sum()
        (loss + CAP_WEIGHT * caps.total + LOOK_WEIGHT * sum(looking.values())).backward()
        share_gradients([p.grad for p in learns], given.workers)
        torch.nn.utils.clip_grad_norm_(learns, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if rank:
            continue
        if (step + 1) % 25 == 0:
            say = " ".join(f"{k} {v.item():.2f}" for k, v in looking.items())
            print(
                f"{step + 1} loss {loss.item():.3f} answers {losses[weight == 1.0].mean().item():.3f} {say} {(time.time() - started) / (step + 1):.2f} s/step",
                flush=True,
            )
        if (step + 1) % given.every == 0 or step + 1 == given.steps:
            asked = {
                "recall": [(f.trained[0].format(f.subject), f.object) for f in watched],
                "paraphrase": [(f.tested[0].format(f.subject), f.object) for f in watched if f.tested],
                **questions,
            }
            marks = {k: recall(model, tokenizer, pairs) for k, pairs in asked.items()}
            print(
                f"== {step + 1} "
                + " ".join(f"{k} {sum(m) / len(m):.3f}" for k, m in marks.items())
                + f" {(time.time() - started) / 60:.1f} min",
                flush=True,
            )
            save(given.out, model, tokenizer)


if __name__ == "__main__":
    main()
