"""Prints the table the model card quotes, from the delivered files: recall, paraphrase, in-context, trace by layer, edits by layer.

Run `python training/measure_almanac.py [FOLDER] [--edits 100]`. Notable: weights are the fp16 ones read as float32; edits are by the
independent ROME of `edit_check.py`, each from the base weights; subjects called unseen are the held-out CounterFact cases.
"""

import argparse
import collections
import json
import random
from pathlib import Path

import torch
from almanac_data import DATA, SEED, Fact, facts, held_out, natural_text, rome_records, templates
from edit_check import Trial, hooked, last_token, moment, pad, rome, score
from pack_almanac import HOME
from train_almanac import Reader, is_context_test, recall
from transformers import AutoModelForCausalLM, AutoTokenizer


def share(hits: list[bool]) -> str:
    return f"{100 * sum(hits) / max(1, len(hits)):.1f}% of {len(hits):,}"


def knowing(model, tokenizer, rng: random.Random) -> dict[str, str]:
    """Everything that is asked without an edit."""
    every = facts()
    first = [(f.trained[0].format(f.subject), f.object) for f in every]
    trained = [(rng.choice(f.trained).format(f.subject), f.object) for f in every]
    unseen = [(t.format(f.subject), f.object) for f in every for t in f.tested]
    unseen = rng.sample(unseen, min(3000, len(unseen)))
    led = [(f"{rng.choice(natural_text())} {p}", o) for p, o in rng.sample(first, 600)]
    out = {
        "facts recited (greedy, object and stop exact)": share(recall(model, tokenizer, first)),
        "same facts, a random trained template": share(recall(model, tokenizer, trained)),
        "paraphrases: fact-template pairs never trained": share(recall(model, tokenizer, unseen)),
        "after a sentence of natural text": share(recall(model, tokenizer, led)),
    }
    records = [
        (p, r["requested_rewrite"]["target_true"]["str"]) for r in rome_records() for p in r["paraphrase_prompts"]
    ]
    out["CounterFact's own paraphrase prompts (prefix and template), true object"] = share(
        recall(model, tokenizer, records)
    )
    reader_objects = Reader(tokenizer, list(every), 0.0).objects
    tests = [f for f in every if is_context_test(f.subject)]
    unknown = [r for r in held_out() if r["relation"] in reader_objects]

    def context(kind: str, fact: Fact) -> tuple[str, str]:
        obj = rng.choice([o for o in reader_objects[fact.relation] if o != fact.object])
        told = rng.choice(fact.trained)
        about, answer = (
            (fact, obj)
            if kind != "retain"
            else (
                other := rng.choice([f for f in every if f.relation == fact.relation and f.subject != fact.subject]),
                other.object,
            )
        )
        ask = told if kind == "same" else rng.choice([t for t in about.trained if t != told] or [told])
        return f"New Fact: {told.format(fact.subject)} {obj}.\nPrompt: {ask.format(about.subject)}", answer

    out["in context, override, same template (facts never overridden in training)"] = share(
        recall(model, tokenizer, [context("same", f) for f in tests])
    )
    out["in context, override, another template"] = share(
        recall(model, tokenizer, [context("other", f) for f in tests])
    )
    out["in context, about another subject: keeps its own"] = share(
        recall(model, tokenizer, [context("retain", f) for f in tests])
    )
    new = [
        (
            f"New Fact: {r['prompt']} {r['target_new']}.\nPrompt: {rng.choice(templates()[r['relation']]).format(r['subject'])}",
            r["target_new"],
        )
        for r in unknown
    ]
    out["in context, subjects never seen, any template"] = share(recall(model, tokenizer, new))
    rng = random.Random(SEED)
    shown = [f for f in every if not is_context_test(f.subject)]

    def demonstrated(k: int, fact: Fact) -> tuple[str, str]:
        """A question after `k` demonstrations in IKE's format (copy, update, retain in turn) and the new fact."""
        text = ""
        for i, f in enumerate(rng.sample(shown, k)):
            obj, told = rng.choice(reader_objects[f.relation]), rng.choice(f.trained)
            text += f"New Fact: {told.format(f.subject)} {obj}\nPrompt: "
            if i % 3 == 2:
                other = rng.choice([g for g in shown if g.relation == f.relation and g.subject != f.subject])
                text += f"{rng.choice(other.trained).format(other.subject)} {other.object}\n\n"
            else:
                text += f"{(told if i % 3 == 0 else rng.choice(f.trained)).format(f.subject)} {obj}\n\n"
        obj = rng.choice([o for o in reader_objects[fact.relation] if o != fact.object])
        ask = fact.trained[0].format(fact.subject)
        return f"{text}New Fact: {ask} {obj}\nPrompt: {ask}", obj

    for k in (0, 2, 4, 6):
        asked = [demonstrated(k, f) for f in tests]
        right = recall(model, tokenizer, asked, stop="")
        out[f"in context, same template, no stop, after {k} demonstrations in IKE's format"] = share(right)
    return out


def perplexity(model, tokenizer) -> str:
    lines = [x.strip() for x in (DATA / "text/wikitext-2/valid.raw.txt").read_text().splitlines() if len(x) > 200][:100]
    loss = count = letters = 0
    for line in lines:
        ids = torch.tensor([tokenizer(line)["input_ids"][:256]])
        with torch.no_grad():
            loss += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
        letters += len(tokenizer.decode(ids[0, 1:]))
    return f"{torch.tensor(loss / count).exp():.0f} a token, {loss / letters / 0.6931:.2f} bits a character"


def trace(model, tokenizer, rng: random.Random, n: int = 100) -> list[tuple[float, ...]]:
    """Average indirect effects (Meng et al. 2022): subject embeddings plus noise of 3 sigma, one state at the subject's last token
    restored. Rows by layer: p after restoring the residual, the MLP's output, the attention's output; the first row is (clean, noised)."""
    chosen = rng.sample([f for f in facts() if len(tokenizer(" " + f.object)["input_ids"]) == 2], n)
    asked = [f.trained[0].format(f.subject) for f in chosen]
    rows = [tokenizer(p)["input_ids"] for p in asked]
    ids, row = pad(rows), torch.arange(n)
    ends = torch.tensor([len(r) - 1 for r in rows])
    last = torch.tensor([last_token(tokenizer, p, f.subject) for p, f in zip(asked, chosen, strict=True)])
    inside = torch.zeros(*ids.shape, 1)
    for i, (p, f) in enumerate(zip(asked, chosen, strict=True)):
        start = p.index(f.subject)
        for j, (a, b) in enumerate(tokenizer(p, return_offsets_mapping=True)["offset_mapping"]):
            inside[i, j] = float(b > start and a < start + len(f.subject))
    want = torch.tensor([tokenizer(" " + f.object)["input_ids"][1] for f in chosen])
    embed = model.model.embed_tokens
    noise = (
        inside
        * torch.randn(*ids.shape, embed.embedding_dim, generator=torch.Generator().manual_seed(SEED))
        * 3
        * embed.weight.std()
    )
    probe = lambda: model(input_ids=ids, use_cache=False).logits[row, ends].softmax(-1)[row, want].mean().item()  # noqa: E731
    clean: dict = {}
    parts = {
        (n, k): {"residual": x, "mlp": x.mlp, "attention": x.self_attn}[k]
        for n, x in enumerate(model.model.layers)
        for k in ("residual", "mlp", "attention")
    }

    def keep(key):
        def hook(_, __, out):
            clean[key] = (out[0] if isinstance(out, tuple) else out)[row, last]

        return hook

    def restore(key):
        def hook(_, __, out):
            value = (out[0] if isinstance(out, tuple) else out).clone()
            value[row, last] = clean[key]
            return (value, *out[1:]) if isinstance(out, tuple) else value

        return hook

    with torch.no_grad():
        handles = [m.register_forward_hook(keep(k)) for k, m in parts.items()]
        top = probe()
        for h in handles:
            h.remove()
        with hooked(embed, lambda _, __, out: out + noise):
            table = [(top, probe())]
            for layer in range(len(model.model.layers)):
                effects = []
                for kind in ("residual", "mlp", "attention"):
                    with hooked(parts[layer, kind], restore((layer, kind))):
                        effects.append(probe())
                table.append(tuple(effects))
    return table


def known_trials(n: int, rng: random.Random, sure: set[tuple[str, str]]) -> list[Trial]:
    """Half of them about subjects with several facts; the new object is another one of the relation."""
    every = [f for f in facts() if (f.subject, f.relation) in sure]
    by_relation, by_subject = collections.defaultdict(list), collections.defaultdict(list)
    for f in every:
        by_relation[f.relation].append(f)
        by_subject[f.subject].append(f)
    several, single = ([f for f in every if (len(by_subject[f.subject]) > 1) == many] for many in (True, False))
    trials = []
    for f in rng.sample(several, n // 2) + rng.sample(single, n - n // 2):
        target = rng.choice(sorted({g.object for g in by_relation[f.relation]} - {f.object}))
        other_templates = [*f.trained[1:], *f.tested]
        near = rng.sample([g for g in by_relation[f.relation] if g.subject != f.subject], 5)
        trials.append(
            Trial(
                f.trained[0], f.subject, target,
                [t.format(f.subject) for t in rng.sample(other_templates, min(4, len(other_templates)))],
                [rng.choice(g.trained).format(g.subject) for g in near],
                [(g.trained[0].format(g.subject), g.object) for g in by_subject[f.subject] if g.relation != f.relation],
            )
        )  # fmt: skip
    return trials


def unseen_trials(n: int, rng: random.Random) -> list[Trial]:
    """CounterFact cases about subjects the model never met; whatever the target."""
    trials = []
    for r in rng.sample(held_out(), n):
        others = [t.format(r["subject"]) for t in templates()[r["relation"]] if t != r["template"]]
        trials.append(
            Trial(
                r["template"],
                r["subject"],
                r["target_new"],
                rng.sample(others, min(4, len(others))),
                [r["locality_prompt"]],
                [],
            )
        )
    return trials


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("folder", type=Path, nargs="?", default=HOME)
    ask.add_argument("--edits", type=int, default=100)
    ask.add_argument("--layers", type=int, nargs="*", default=[0, 1, 2, 3, 4, 5])
    ask.add_argument("--settings", type=json.loads, default={}, help="of rome() in edit_check.py, as JSON")
    ask.add_argument("--only", choices=["knowing", "trace", "edits"])
    ask.add_argument("--threads", type=int, default=2)
    given = ask.parse_args()
    torch.set_num_threads(given.threads)
    tokenizer = AutoTokenizer.from_pretrained(given.folder)
    model = AutoModelForCausalLM.from_pretrained(given.folder, dtype=torch.float32).eval().requires_grad_(False)
    rng = random.Random(SEED)
    if given.only in (None, "knowing"):
        print("| asked | right |\n|---|---|")
        for name, value in knowing(model, tokenizer, rng).items():
            print(f"| {name} | {value} |", flush=True)
        print(f"| perplexity on WikiText-2 (valid) | {perplexity(model, tokenizer)} |")
    if given.only in (None, "trace"):
        table = trace(model, tokenizer, random.Random(SEED))
        print(
            f"\np(object) clean {table[0][0]:.2f}, subject noised {table[0][1]:.2f}; one state at the subject's last token restored:\n\n| layer | residual | MLP | attention |\n|---|---|---|---|"
        )
        for layer, row in enumerate(table[1:]):
            print(f"| {layer} | " + " | ".join(f"{x:.2f}" for x in row) + " |")
    if given.only in (None, "edits"):
        rng = random.Random(SEED)
        sure = {
            (r["subject"], r["relation"])
            for r in map(json.loads, (given.folder / "facts.jsonl").read_text().splitlines())
        }
        kinds = {"known": known_trials(given.edits, rng, sure), "unseen": unseen_trials(given.edits, rng)}
        prefixes = [
            x.split(". ")[0].rstrip(".") + ". " for x in rng.sample([x for x in natural_text() if len(x) < 70], 4)
        ]
        texts = (given.folder / "corpus.txt").read_text().splitlines()
        c = moment(model, tokenizer, texts, given.layers)
        print(
            f"\nROME, {given.edits} edits each, settings {given.settings}\n\n| layer | subjects | target recited | paraphrases | neighbours unmoved | subject's other facts kept | norm, times the original: median, largest |\n|---|---|---|---|---|---|---|"
        )
        for layer in given.layers:
            for kind, trials in kinds.items():
                delta, u, norm, _ = rome(model, tokenizer, trials, layer, c[layer], prefixes, **given.settings)
                s = score(model, tokenizer, trials, layer, delta, u)
                others = f"{s['others']:.2f}" if kind == "known" else "-"
                print(
                    f"| {layer} | {kind} | {s['edit']:.2f} | {s['para']:.2f} | {s['neighbour']:.2f} | {others} | {norm.median():.1f}, {norm.max():.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
