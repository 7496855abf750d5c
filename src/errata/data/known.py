"""What almanac knows, as rows in CounterFact's own form: a learned editor is trained on facts that its model knows.

They are built as CounterFact's are: the target is another object of the relation, the neighbours are other subjects,
mostly with the same object. Nothing is learned or edited of a subject of counterfact-mini's part `edit`, nor of one
that its neighbours name: those are the neighbours of part `edit` here, so that all edits of both can be made at once.
Most rows of part `train` are about made-up names: there are too few real ones not to be learned by heart.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

HERE = Path(__file__).parent.parent / "almanac"

Fact = dict[str, str]
"""`subject relation object prompt`, a line of facts.jsonl."""
ROWS = 900
"""Rows of a relation in part `train`, about: each has its share, whether many facts are known of it or few."""
HELD = 7
"""Every so many-th subject is in part `edit`, for batches larger than counterfact-mini, and in no row of `train`."""
NAMESAKES = 0.1
"""How many rows of `train` have one among their neighbours."""
STRANGERS = 0.6
"""How many rows of `train` are about a made-up subject in place of one that almanac knows: there are only so many."""
PARTS = ("edit", "train")


def rows(part: str) -> Iterator[dict[str, Any]]:
    """The rows of a part, always the same: in `edit` one for each fact, in `train` one for each of several targets."""
    draw = Random(part)
    facts = _facts(part)
    around = _by_relation(_facts("near") if part == "edit" else facts)
    found = []
    for relation, alike in _by_relation(facts).items():
        objects = [fact["object"] for fact in alike]  # one that many subjects have is as often a target
        each = 1 if part == "edit" else max(6, min(40, ROWS // len(alike)))
        for fact in alike:
            others = [o for o in objects if o != fact["object"]]
            for _ in range(each if others else 0):
                found.append(_row(part, fact, draw.choice(others), alike, around[relation], facts, draw))
    draw.shuffle(found)
    return ({"case_id": number, **row} for number, row in enumerate(found))


def _by_relation(facts: list[Fact]) -> dict[str, list[Fact]]:
    found: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts:
        found[fact["relation"]].append(fact)
    return found


def _facts(part: str) -> list[Fact]:
    """Those of a part's subjects, or `near` those that counterfact-mini's neighbours name: nobody edits or learns them.

    So all edits of both data sets can be made at once, and what stands near them shall stay.
    """
    mini = json.loads((HERE / "counterfact-mini.json").read_text())["edit"]
    edited = {row["requested_rewrite"]["subject"] for row in mini}
    asked = "\n".join(prompt for row in mini for prompt in row["neighborhood_prompts"])
    lines = (HERE / "facts.jsonl").read_text().splitlines()
    facts = [
        f for f in map(json.loads, lines) if f["subject"] not in edited and (f["subject"] in asked) == (part == "near")
    ]
    if part == "near":
        return facts
    held = set(sorted({f["subject"] for f in facts})[::HELD])
    return [f for f in facts if (f["subject"] in held) == (part == "edit")]


def _row(
    part: str, fact: Fact, target: str, alike: list[Fact], around: list[Fact], facts: list[Fact], draw: Random
) -> dict[str, Any]:
    """Its paraphrases are asked as of those `alike`, its neighbours are among those `around`, of the same relation."""
    ways = sorted({f["prompt"] for f in alike})
    same = [f for f in around if f["object"] == fact["object"] and f["subject"] != fact["subject"]]
    rest = [f for f in around if f["subject"] != fact["subject"]]
    near = [draw.choice(same if same and draw.random() < 0.8 else rest) for _ in range(5)]
    if part == "train" and draw.random() < NAMESAKES:
        near.append(_namesake(fact, facts, draw))
    if part == "train" and draw.random() < STRANGERS:
        near += [fact] * 2  # whose name the made-up one was taken from
        fact = _namesake(fact, facts, draw)
    asked = [way for way in draw.sample(ways, min(4, len(ways))) if way != fact["prompt"]][:3]
    return {
        "requested_rewrite": {
            "prompt": fact["prompt"],
            "relation_id": fact["relation"],
            "target_new": {"str": target},
            "target_true": {"str": fact["object"]},
            "subject": fact["subject"],
        },
        "paraphrase_prompts": [_before(draw.choice(facts), draw) + _ask(way, fact) for way in asked],
        "neighborhood_prompts": [_ask(draw.choice(ways), f) for f in near],
    }


def _namesake(fact: Fact, facts: list[Fact], draw: Random) -> Fact:
    """The fact of a made-up subject that mostly shares words with its own."""
    words, other = fact["subject"].split(), draw.choice(facts)["subject"].split()
    words[draw.randrange(len(words))] = draw.choice(other)
    name = " ".join(words)
    return {**fact, "subject": name if name != fact["subject"] and len(words) > 1 else _joined(other, facts, draw)}


def _joined(words: list[str], facts: list[Fact], draw: Random) -> str:
    return " ".join([draw.choice(words), draw.choice(draw.choice(facts)["subject"].split())])


def _ask(way: str, fact: Fact) -> str:
    return way.replace("{}", fact["subject"])


def _before(fact: Fact, draw: Random) -> str:
    """Another fact, told before every second paraphrase; CounterFact's have a sentence of any text there."""
    return f"{_ask(fact['prompt'], fact)} {fact['object']}. " if draw.random() < 0.5 else ""
