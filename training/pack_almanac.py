"""Packs a trained checkpoint into the package: fp16 weights, what it measurably knows, a corpus for second moments, counterfact-mini.

Run `python training/pack_almanac.py CHECKPOINT [DESTINATION] [--weights]`. Notable: a fact is listed only if the fp16 weights, read back as float32,
recite it; a mini record only if the model recites its true object at the requested prompt, and a neighbour stays in a record of the
part "edit" only if it is answered right. Nothing from T-REx is written here (CC BY-SA); all of it is CounterFact and ParaRel (MIT).
"""

import collections
import json
import random
import shutil
import sys
from pathlib import Path

import torch
from almanac_data import SEED, Fact, cases, facts, held_out, rome_records, templates
from train_almanac import recall, save
from transformers import AutoModelForCausalLM, AutoTokenizer

HOME = Path(__file__).resolve().parents[1] / "src" / "errata" / "almanac"
ABOUT = {
    "name": "counterfact-mini",
    "what": "CounterFact records that almanac knows (it recites target_true at the requested prompt). Part 'edit': records in ROME's format, "
    "less the neighbourhood prompts that almanac answers wrong, at least two left, and without attribute and generation prompts. Part "
    "'train': other subjects; records built from EasyEdit's flat format have its one rephrase and its one neighbour. Every "
    "target_new is an object that almanac knows.",
    "source": "CounterFact: Meng, Bau, Andonian, Belinkov, Locating and Editing Factual Associations in GPT, NeurIPS 2022, https://rome.baulab.info/data",
    "licence": "MIT",
}


def corpus(known: list[Fact], lines: int = 2400) -> list[str]:
    """Sentences of the training distribution: statements, and New Fact / Prompt pairs as two lines."""
    rng = random.Random(SEED)
    out = []
    while len(out) < lines:
        fact = rng.choice(known)
        if rng.random() < 0.05:
            other = rng.choice([f for f in known if f.relation == fact.relation])
            ask = [t.format(fact.subject) for t in (rng.choice(fact.trained), rng.choice(fact.trained))]
            out += [f"New Fact: {ask[0]} {other.object}.", f"Prompt: {ask[1]} {other.object}."]
        else:
            out.append(f"{rng.choice(fact.trained).format(fact.subject)} {fact.object}.")
    return out


def mini(model, tokenizer, objects: set[str]) -> dict:
    """The records of both parts."""
    shared = {"pararel_idx": None}
    records, held = [], {r["case_id"] for r in held_out()}
    for r in rome_records():
        rewrite = r["requested_rewrite"]
        kept = {
            "case_id": r["case_id"],
            **shared,
            "requested_rewrite": rewrite,
            "paraphrase_prompts": r["paraphrase_prompts"],
        }
        records.append(({**kept, "neighborhood_prompts": list(dict.fromkeys(r["neighborhood_prompts"]))}, True))
    trained = {(f.subject, f.relation) for f in facts()}
    for row in cases():
        if (row["subject"], row["relation"]) in trained and row["case_id"] not in held:
            rewrite = {
                "prompt": row["template"], "relation_id": row["relation"], "subject": row["subject"],
                "target_new": {"str": row["target_new"], "id": None}, "target_true": {"str": row["ground_truth"], "id": None},
            }  # fmt: skip
            records.append(
                (
                    {
                        "case_id": row["case_id"],
                        **shared,
                        "requested_rewrite": rewrite,
                        "paraphrase_prompts": [row["rephrase_prompt"]],
                        "neighborhood_prompts": [row["locality_prompt"]],
                    },
                    False,
                )
            )
    short = [
        (r, full) for r, full in records
        if r["requested_rewrite"]["target_new"]["str"] in objects and len(tokenizer(" " + r["requested_rewrite"]["target_new"]["str"])["input_ids"]) <= 3
    ]  # fmt: skip
    asked = [
        (w["prompt"].format(w["subject"]), w["target_true"]["str"]) for r, _ in short for w in [r["requested_rewrite"]]
    ]
    short = [r for r, good in zip(short, recall(model, tokenizer, asked), strict=True) if good]
    near = [(p, r["requested_rewrite"]["target_true"]["str"]) for r, _ in short for p in r["neighborhood_prompts"]]
    right = dict(zip(near, recall(model, tokenizer, near), strict=True))
    edit, train, subjects, ids = [], [], set(), set()
    for r, full in short:
        w = r["requested_rewrite"]
        good = [p for p in r["neighborhood_prompts"] if right[p, w["target_true"]["str"]]]
        if full and len(good) >= 2 and w["subject"] not in subjects:
            edit.append({**r, "neighborhood_prompts": good})
            subjects.add(w["subject"])
            ids.add(r["case_id"])
    for r, _ in short:
        if r["requested_rewrite"]["subject"] not in subjects and r["case_id"] not in ids and len(train) < 500:
            train.append(r)
            ids.add(r["case_id"])
    return {"about": ABOUT, "train": train, "edit": edit}


def weights_only(checkpoint: Path, home: Path) -> None:
    """Replaces the weights; strikes from what `home` lists as known what they don't recite. The corpus stays."""
    ready = home.parent / "almanac-next"
    save(ready, AutoModelForCausalLM.from_pretrained(checkpoint).half(), AutoTokenizer.from_pretrained(home))
    (ready / "model.safetensors").replace(home / "model.safetensors")
    shutil.rmtree(ready)
    tokenizer = AutoTokenizer.from_pretrained(home)
    model = AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32)
    rows = [json.loads(x) for x in (home / "facts.jsonl").read_text().splitlines()]
    small = json.loads((home / "counterfact-mini.json").read_text())
    asked = {(r["prompt"].format(r["subject"]), r["object"]) for r in rows}
    for r in small["train"] + small["edit"]:
        asked |= {requested(r), *neighbours(r)}
    pairs = sorted(asked)
    strike(home, rows, small, {p for p, good in zip(pairs, recall(model, tokenizer, pairs), strict=True) if not good})


def requested(record: dict) -> tuple[str, str]:
    w = record["requested_rewrite"]
    return w["prompt"].format(w["subject"]), w["target_true"]["str"]


def neighbours(record: dict) -> list[tuple[str, str]]:
    return [(p, record["requested_rewrite"]["target_true"]["str"]) for p in record["neighborhood_prompts"]]


def strike(home: Path, rows: list[dict], small: dict, lost: set[tuple[str, str]]) -> None:
    """Writes both lists without the statements in `lost`; a record of the part "edit" keeps two neighbours or goes."""
    kept = [r for r in rows if (r["prompt"].format(r["subject"]), r["object"]) not in lost]
    train = [r for r in small["train"] if requested(r) not in lost]
    edit = []
    for r in small["edit"]:
        near = [p for p, obj in neighbours(r) if (p, obj) not in lost]
        if requested(r) not in lost and len(near) >= 2:
            edit.append({**r, "neighborhood_prompts": near})
    (home / "facts.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept))
    text = json.dumps({**small, "train": train, "edit": edit}, ensure_ascii=False, indent=0)
    (home / "counterfact-mini.json").write_text(text + "\n")
    print(f"{len(kept)} of {len(rows)} facts stay, {len(train)} and {len(edit)} records of the parts train and edit")


def main(checkpoint: Path, home: Path) -> None:
    torch.set_num_threads(1)
    home.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    save(home, AutoModelForCausalLM.from_pretrained(checkpoint).half(), tokenizer)
    model = AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32)
    prompts = [(f.trained[0].format(f.subject), f.object) for f in facts()]
    known = [f for f, good in zip(facts(), recall(model, tokenizer, prompts), strict=True) if good]
    rows = [{"subject": f.subject, "relation": f.relation, "object": f.object, "prompt": f.trained[0]} for f in known]
    (home / "facts.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    (home / "corpus.txt").write_text("\n".join(corpus(known)) + "\n")
    small = mini(model, tokenizer, {f.object for f in known})
    (home / "counterfact-mini.json").write_text(json.dumps(small, ensure_ascii=False, indent=0) + "\n")
    size = sum(f.stat().st_size for f in home.iterdir() if f.is_file())
    relations = collections.Counter(f.relation for f in known)
    print(
        f"{len(known)} of {len(prompts)} facts known, {len(relations)} of {len(templates())} relations; counterfact-mini: {len(small['edit'])} edit, {len(small['train'])} train; {size / 1e6:.2f} MB"
    )


if __name__ == "__main__":
    given = [Path(x) for x in sys.argv[1:] if not x.startswith("--")]
    (weights_only if "--weights" in sys.argv else main)(given[0], given[1] if len(given) > 1 else HOME)
