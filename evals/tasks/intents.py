"""Which intent an assistant request has, over forty intents of CLINC150.

The data is a subset of the public benchmark (`data/README.md` names the licence);
its own splits are kept, so no utterance is in two of them.
"""

from __future__ import annotations

import random

from evals.tasks.base import Sample, Split, Wordings, normalise
from evals.tasks.data import read_samples

_WORDINGS = Wordings(
    shared=(
        'Which intent is this assistant request: "{u}"',
        "What is the intent of: {u}",
        "Classify this request: {u}",
        'A customer says "{u}". Which intent is it?',
        "{u}\nintent?",
        "Intent label for: {u}",
        "user: {u}\nWhat does the user want? Give the intent.",
        'Label the intent of this message: "{u}"',
        'Which category of request is "{u}"?',
        "name the intent - {u}",
        "Tell me the intent of this utterance: {u}",
        "We received: '{u}'. Which intent should we file it under?",
    ),
    validation=(
        'Someone told the assistant "{u}". What intent is that?',
        "{u}\n\nPick the intent for the line above.",
    ),
    test=(
        "Route this to an intent: {u}",
        'Our bot heard "{u}" - which intent did it hear?',
        "Intent detection, please: {u}",
        "What is the person asking for here, as an intent name? {u}",
    ),
)


class IntentsTask:
    """Name the intent of a request in words, such as "credit limit change"."""

    name = "intents"
    max_tokens = 12

    def samples(self, split: Split) -> list[Sample]:
        """Return the samples of one split."""
        return list(read_samples(self.name, _pair)[split])

    def grade(self, answer_text: str, sample: Sample) -> float:
        """Return 1 if the answer is the expected label after normalisation, else 0."""
        return float(normalise(answer_text) == sample.answer)


def _pair(row: dict[str, str], rng: random.Random, split: Split) -> tuple[str, str]:
    return _WORDINGS.pick(rng, split).format(u=row["text"]), normalise(row["intent"])
