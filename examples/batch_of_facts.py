"""Correct many facts at once: python examples/batch_of_facts.py [N], by default 500 edits in one solve."""

import sys

import errata

n = int(sys.argv[1]) if len(sys.argv) > 1 else 500
lm = errata.load("almanac")
parts = [errata.data.load("counterfact-mini", part=part) for part in ("edit", "train")]
cases = [case for part in parts for case in part][:n]

# Each by itself is one question; whether hundreds get along is another. So they are judged when all are made.
report = errata.bench.run(errata.MEMIT.preset(lm), lm, cases, batch=len(cases))
print(report)
