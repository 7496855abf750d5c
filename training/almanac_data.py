"""What almanac reads: which facts, in which templates, and what it must never see.

Notable: facts come from CounterFact and ParaRel (both MIT), joined on the relation ids; a fact owns a random 72% of its relation's
templates, and the rest measure paraphrases, so no fact-template pair of the test was ever trained. The subjects of 1,000 CounterFact
cases are held out of everything (facts, in-context pairs, natural text, by string match), because an editor must also work on
subjects the model has never met. Everything is a function of `SEED` and the files of `DATA`.
"""

import collections
import functools
import json
import os
import random
import re
from dataclasses import dataclass
from pathlib import Path

SEED = 20
DATA = Path(os.environ.get("ERRATA_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
HERE = Path(__file__).resolve().parent
LEFT_OUT = {"P190", "P264", "P463", "P138", "P36"}  # few cases, or templates that do not ask for the object
SPORT = "P641"  # the 158 cases without a relation id are all "{} is a professional"
TRAINED_SHARE = 0.72
MADE_BY = (
    "P176",
    "P178",
)  # "Porsche 911 is produced by Porsche": the only relations in which the subject may hold the object

# Rephrases of CounterFact that ask for something else than the object (they were made to prompt long generations).
NOT_ASKING = {
    "*": r"greatest weakness|restaurants (?:including|around)|lunchtime|aired alongside|held a$|has to$|greatest accomplishment",
    "P103": r"was born in",
    "P1412": r"was born in|lives in",
    "P19": r"speak|currently lives",
    "P20": r"speak",
    "P30": r"speak|surroundings|navigating",
    "P27": r"currently lives",
    "P101": r"works as",
    "P39": r"works as|known for",
    "P108": r"known for",
    "P140": r"local$",
    "P407": r"author",
    "P495": r"speak",
    "P740": r"inspiration",
    "P937": r"surrounded",
    "P127": r"is sold by",
    "P136": r"incredible|extraordinarily|greatest strength",
    "P413": r"greatest strength",
}


@dataclass(frozen=True)
class Fact:
    """One true statement; `trained` and `tested` are disjoint templates, `trained[0]` is CounterFact's own prompt where there is one."""

    subject: str
    relation: str
    object: str
    trained: tuple[str, ...]
    tested: tuple[str, ...]


def read_json(path: str) -> list | dict:
    return json.loads((DATA / path).read_text())


@functools.cache
def cases() -> list[dict]:
    """Every CounterFact case in EasyEdit's format, with its relation and its prompt as a template; malformed prompts are left out."""
    relation = read_json("counterfact/relation_of_case.json")
    rows = [row for part in ("edit", "train") for row in read_json(f"counterfact/easyedit_format_{part}.json")]
    for row in rows:
        row["relation"] = relation.get(str(row["case_id"])) or SPORT
        row["template"] = row["prompt"].replace(row["subject"], "{}", 1)
    return [row for row in rows if row["template"].count("{}") == 1]


@functools.cache
def rome_records() -> list[dict]:
    return [
        r
        for r in read_json("counterfact/rome_format_500.json")
        if r["requested_rewrite"]["relation_id"] not in LEFT_OUT
    ]


def last_sentence(text: str, subject: str) -> str:
    """The sentence of a rephrase that holds the subject, without the unrelated text before it."""
    place = text.rfind(subject)
    return text[max(text.rfind(stop, 0, place) for stop in (". ", "? ", "\n")) + 1 :].strip()


@functools.cache
def templates() -> dict[str, tuple[str, ...]]:
    """relation -> its templates, all with the subject as {} and the object next: prompts, sensible rephrases, ParaRel's patterns."""
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for row in cases():
        counts[row["relation"]][row["template"]] += 8  # a prompt always counts
        rephrase = last_sentence(row["rephrase_prompt"], row["subject"]).replace(row["subject"], "{}", 1)
        banned = "|".join(filter(None, (NOT_ASKING["*"], NOT_ASKING.get(row["relation"]))))
        if not re.search(banned, rephrase):
            counts[row["relation"]][rephrase] += 1
    out = {}
    for relation, c in counts.items():
        if relation in LEFT_OUT:
            continue
        found = (
            {t for t, n in c.items() if n >= 16 or (n >= 8 and n % 8)}
            if relation not in ("P407", SPORT)
            else {t for t, n in c.items() if n >= 6}
        )
        patterns = DATA / f"pararel/patterns/{relation}.jsonl"
        for line in patterns.read_text().splitlines() if patterns.exists() else ():
            text = json.loads(line)["pattern"].rstrip(" .")
            if text.endswith("[Y]") and "[X]" in text:
                found.add(text.removesuffix("[Y]").strip().replace("[X]", "{}"))
        found = {t[0].upper() + t[1:] for t in found if t.count("{}") == 1 and len(t) > 3}
        out[relation] = tuple(sorted(found))
    return out


def parse(prompt: str, relation: str) -> tuple[str, str] | None:
    """The subject and the template of a neighbourhood prompt."""
    for template in sorted(templates()[relation], key=len, reverse=True):
        before, after = template.split("{}")
        if prompt.startswith(before) and prompt.endswith(after) and len(prompt) > len(before) + len(after):
            return prompt[len(before) : len(prompt) - len(after)], template
    return None


@functools.cache
def held_out() -> list[dict]:
    """1,000 CounterFact cases whose subjects the model never meets; none is a subject or a neighbour of the 500 ROME records."""
    kept = " | ".join(
        r["requested_rewrite"]["subject"] + " | " + " | ".join(r["neighborhood_prompts"]) for r in rome_records()
    )
    rows = [r for r in read_json("counterfact/easyedit_format_edit.json") if r["subject"] not in kept]
    ids = {r["case_id"] for r in random.Random(SEED).sample(rows, 1100)}
    return [r for r in cases() if r["case_id"] in ids and r["relation"] not in LEFT_OUT][:1000]


@functools.cache
def forbidden() -> re.Pattern:
    return re.compile("|".join(rf"\b{re.escape(r['subject'])}(?!\w)" for r in held_out()))


def known() -> dict[str, dict[str, str]]:
    """subject -> relation -> object, of both sources, without the held-out subjects; CounterFact wins where they differ."""
    out: dict[str, dict[str, str]] = collections.defaultdict(dict)
    held = {r["subject"] for r in held_out()}
    for row in cases():
        if row["relation"] not in LEFT_OUT and row["subject"] not in held:
            out[row["subject"]].setdefault(row["relation"], row["ground_truth"])
    for file in sorted((DATA / "pararel/facts").glob("P*.jsonl")):
        if file.stem in templates():
            for line in file.read_text().splitlines():
                row = json.loads(line)
                if row["sub_label"] not in held:
                    out[row["sub_label"]].setdefault(file.stem, row["obj_label"])
    return out


def common_targets() -> collections.Counter:
    """How often CounterFact uses each (relation, object), as the truth or as the counterfactual."""
    pairs = [
        (r["relation"], r[k]) for r in cases() for k in ("ground_truth", "target_new") if r["relation"] not in LEFT_OUT
    ]
    return collections.Counter(pairs)


@functools.cache
def facts(limit: int = 2500) -> tuple[Fact, ...]:
    """The facts almanac learns: the ROME records, their neighbours, other relations of the same subjects, and cover for the objects."""
    rng = random.Random(SEED)
    table, own = known(), {(r["subject"], r["relation"]): r["template"] for r in cases()}
    chosen: dict[tuple[str, str], str] = {}
    objects = common_targets()
    frequent = {o for (_, o), n in objects.items() if n >= 2}

    def take(subject: str, relation: str, obj: str) -> None:
        fits = (
            len(obj.split()) <= 3
            and len(subject) <= 40
            and (obj not in subject or relation in MADE_BY)
            and not forbidden().search(subject)
        )
        if fits and obj in frequent:
            chosen.setdefault((subject, relation), obj)

    for record in rome_records():  # 1. the records themselves
        rewrite = record["requested_rewrite"]
        chosen[rewrite["subject"], rewrite["relation_id"]] = rewrite["target_true"]["str"]
        own[rewrite["subject"], rewrite["relation_id"]] = rewrite["prompt"]
    for place, record in enumerate(
        rome_records()
    ):  # 2. their neighbours: most of the first records', some of the others'
        share = 45 if place < 220 else 0
        rewrite = record["requested_rewrite"]
        for prompt in dict.fromkeys(record["neighborhood_prompts"]):
            found = parse(prompt, rewrite["relation_id"])
            if found and sum(map(ord, found[0])) % 100 < share:
                take(found[0], rewrite["relation_id"], rewrite["target_true"]["str"])
    for subject in sorted({s for s, _ in chosen}):  # 3. what else is known of them
        for relation, obj in table.get(subject, {}).items():
            take(subject, relation, obj)
    several = sorted(s for s in table if len(table[s]) >= 2 and 2 <= len(s.split()) <= 4)
    rng.shuffle(several)
    for subject in several[:150]:
        for relation, obj in table[subject].items():
            take(subject, relation, obj)
    cover = collections.Counter((relation, obj) for (_, relation), obj in chosen.items())  # 4. objects of CounterFact
    names = sorted(table)
    rng.shuffle(names)
    for wanted in (1, 2, 4):
        for subject, relation, obj in ((s, *item) for s in names for item in table[s].items()):
            enough = cover[relation, obj] >= min(wanted, objects[relation, obj] - 1)
            if len(chosen) < limit and not enough and len(subject.split()) <= 5 and (subject, relation) not in chosen:
                take(subject, relation, obj)
                cover[relation, obj] += (subject, relation) in chosen
    of_subject: dict[str, list[str]] = collections.defaultdict(list)
    for subject, relation in chosen:
        of_subject[subject].append(relation)
    out = []
    for (subject, relation), obj in chosen.items():
        first = own.get((subject, relation))
        others = {t for r in of_subject[subject] if r != relation for t in templates()[r]}
        if first is None and set(templates()[relation]) <= others:
            continue
        usable = [t for t in templates()[relation] if t not in others and t != first]
        rng.shuffle(usable)
        usable = ([first] if first else []) + usable
        n = max(1, round(TRAINED_SHARE * len(usable)))
        out.append(Fact(subject, relation, obj, tuple(usable[:n]), tuple(usable[n:])))
    return tuple(out)


@functools.cache
def natural_text() -> list[str]:
    """T-REx sentences of 30 to 240 characters that name no held-out subject."""
    lines = [
        x for f in sorted((DATA / "text/trex").glob("*.txt")) for x in f.read_text().splitlines() if 30 <= len(x) <= 240
    ]
    subjects = sorted({r["subject"] for r in held_out()})
    return [x for x in lines if not any(s in x for s in subjects)]


if __name__ == "__main__":
    ids = [r["case_id"] for r in held_out()]
    (HERE / "held_out.json").write_text(json.dumps(ids))
    all_facts = facts()
    per = collections.Counter(f.subject for f in all_facts)
    pairs = collections.Counter((f.relation, f.object) for f in all_facts)
    objs = collections.Counter(f.object for f in all_facts)
    want = common_targets()
    print(
        len(ids),
        "held out;",
        len(all_facts),
        "facts,",
        len(per),
        "subjects,",
        sum(n > 1 for n in per.values()),
        "with two or more relations",
    )
    print("templates", {r: len(t) for r, t in templates().items()})
    single = collections.Counter()
    for (_, o), n in want.items():
        single[o] += n
    print(
        len(objs),
        "objects; CounterFact's with >= 5 uses:",
        sum(n >= 5 for n in single.values()),
        "of them known:",
        sum(objs[o] > 0 for o, n in single.items() if n >= 5),
        ">=3:",
        sum(objs[o] > 2 for o, n in single.items() if n >= 5),
    )
    print("missing", [o for o, n in single.items() if n >= 5 and not objs[o]])
    total = sum(want.values())
    print(
        "share of uses covered by a known (relation, object):",
        sum(n for k, n in want.items() if pairs[k]) / total,
        ">=3:",
        sum(n for k, n in want.items() if pairs[k] >= 3) / total,
    )
    print("relations", collections.Counter(f.relation for f in all_facts))
    print(len(natural_text()), "sentences of text")
    key = {(f.subject, f.relation) for f in all_facts}
    n = [
        sum(
            bool(
                (p := parse(x, r["requested_rewrite"]["relation_id"]))
                and (p[0], r["requested_rewrite"]["relation_id"]) in key
            )
            for x in r["neighborhood_prompts"]
        )
        for r in rome_records()
    ]
    print(len(rome_records()), "rome records; neighbours known:", collections.Counter(n))
