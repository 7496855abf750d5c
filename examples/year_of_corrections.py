"""A year of corrections: one a week, in sequence, each on top of the others, kept as a history.

python examples/year_of_corrections.py [WEEKS] [FOLDER]
"""

import sys

import errata
from errata.history import History

weeks = int(sys.argv[1]) if len(sys.argv) > 1 else 52
folder = sys.argv[2] if len(sys.argv) > 2 else "corrections"

lm = errata.load("almanac")
cases = errata.data.load("counterfact-mini", n=weeks)
method, history = errata.AlphaEdit.preset(lm), History.open(folder)

patch = errata.Patch()
for week, case in enumerate(cases, 1):
    patch = method.edit(lm, [case.edit], patch)  # remembers the keys of the earlier ones
    history.add(patch, f"week-{week:02}")  # takes the place of last week's, which it contains
print(f"{len(history.patch().edits)} corrections carried, {len(history.entries)} files in {folder}")

with history.patch().applied(lm):
    said = lm.generate([case.edit.text for case in cases], max_new_tokens=6)
kept = sum(case.edit.target in text for case, text in zip(cases, said, strict=True))
print(f"at the end of the year {kept} of {len(cases)} are answered as corrected")
for conflict in history.conflicts():
    print("note:", conflict)
