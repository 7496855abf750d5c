"""Another model's opinion of generated answers, from any endpoint that speaks OpenAI's chat API. Off unless asked for.

Answers leave this machine for that endpoint. Opinions are kept in the journal: a run that goes on does not ask again.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ErrataError, UsageError
from .journal import Journal
from .metrics import mean

QUESTION = """Question: {prompt}
Right answer: {answer}
Given answer: {text}
Does the given answer say the same as the right answer? Reply with one word, yes or no."""
JUDGED = {"efficacy": "reliability", "paraphrase": "generalization"}
PROTOCOL = "judged"


@dataclass(frozen=True)
class Judge:
    """An endpoint and the model there."""

    url: str
    """Up to and with `/v1`."""
    model: str
    key_variable: str = "OPENAI_API_KEY"
    """The environment variable that holds the key, if the endpoint wants one."""

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Judge:
        """From plain values.

        Raises:
            UsageError: url or model is missing, or there is something else.
        """
        try:
            judge = cls(**found)
        except TypeError as error:
            raise UsageError(f"a judge is a url and a model, and perhaps a key_variable, not {dict(found)}") from error
        if not judge.url.startswith(("http://", "https://")):
            raise UsageError(f"the judge's url is {judge.url!r}; give one like http://localhost:8000/v1")
        return judge

    def opinion(self, prompt: str, answer: str, text: str) -> float:
        """1 for yes, 0 for no.

        Raises:
            ErrataError: the endpoint can't be reached or says something else.
        """
        asked = QUESTION.format(prompt=prompt, answer=answer, text=text)
        body = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": asked}]}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                said = json.load(reply)["choices"][0]["message"]["content"]
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise ErrataError(f"the judge at {self.url} gave no answer ({error}); the same command goes on") from error
        word = said.strip().lower().strip("\"'*. ")[:3]
        if word not in ("yes", "no") and not word.startswith("no"):
            raise ErrataError(f"the judge {self.model} said {said[:60]!r} where yes or no was asked for")
        return float(word == "yes")


def judged(judge: Judge, rows: list[dict[str, Any]], journal: Journal) -> None:
    """Add the score `judged` to the rows' reliability and generalization. Equal answers are asked about once."""
    known = {tuple(r["about"]): r["opinion"] for r in journal.of("opinion")}
    for row in rows:
        scores: dict[str, list[float]] = {}
        for probe in row["probes"]:
            if probe["kind"] in JUDGED and probe["after"] and probe["after"]["text"] is not None:
                about = (probe["prompt"], probe["answer"], probe["after"]["text"])
                if about not in known:
                    known[about] = judge.opinion(*about)
                    journal.add({"kind": "opinion", "about": list(about), "opinion": known[about]})
                scores.setdefault(JUDGED[probe["kind"]], []).append(known[about])
        for metric in row["metrics"]:
            if metric in JUDGED.values():
                failed = 0.0 if row["error"] else None
                row["metrics"][metric][PROTOCOL] = mean(scores[metric]) if metric in scores else failed
