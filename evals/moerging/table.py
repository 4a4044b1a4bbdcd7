"""An outcome table of a library: how likely each adapter, and the base, find each domain's answers.

With it every router of the project chooses among adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from evals.moerging.setting import BASE_NAME
from experts.finetune_data import ChatPair
from experts.library.examiner import Examiner
from routers.outcomes import OutcomeTable, Prompts

__all__ = ["library_table"]


def library_table(
    examiner: Examiner,
    adapters: Sequence[str],
    samples: Mapping[str, Sequence[ChatPair]],
    *,
    base_name: str = BASE_NAME,
    progress: Callable[[str], None],
) -> OutcomeTable:
    """The geometric mean probability of each sample's answer tokens, with each adapter and without.

    Unlike grades of written answers it needs no grader, says how near an answer was, and costs one
    reading.

    Args:
        examiner: Of the base with its adapters.
        adapters: Their names.
        samples: Of each domain; names that are no adapter's are of texts that the base is for.
        base_name: What the base is called in the table.
        progress: Told whose samples are being read.
    """
    names = [base_name, *adapters]
    ids, texts, domains = [], [], []
    scores = []
    for domain, pairs in samples.items():
        progress(domain)
        read = examiner.read(pairs)
        tokens = np.array([len(pair.answer_ids) for pair in read])
        losses = [examiner.losses(read, None if name == base_name else name) for name in names]
        scores.append(np.exp(-np.array(losses) / tokens).T)
        ids += [f"{domain}-{number:04d}" for number in range(len(pairs))]
        texts += [pair.prompt for pair in pairs]
        domains += [domain] * len(pairs)
    prompts = Prompts(ids, texts, domains, ["train"] * len(ids))
    return OutcomeTable(prompts, models=names, numbers={"score": np.vstack(scores)})
