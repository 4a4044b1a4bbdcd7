"""Several adapters of a library made into one, once and for all queries. Imports torch.

PEFT's formulas for merging numbers, put to whole updates: PEFT itself puts them to ``A`` and ``B``
each, whose product is none of the papers' merges, and whose size grows with the number of adapters.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from experts.adapter_files import LowRank, fuse, read_updates
from experts.finetune_data import TokenPair
from experts.library.examiner import Examiner
from experts.lora import AdapterUse

__all__ = ["Merging", "best_scale", "lorahub_weights", "merge_adapters", "scaled"]

Merging = Literal["cat", "linear", "ties", "dare_linear", "dare_ties"]

# As in the papers: TIES keeps the largest fifth; DARE drops half of what is left in its gentler
# setting. LoraHub: bounds, regularisation and evaluations of its code.
DENSITY = {"ties": 0.2, "dare_linear": 0.5, "dare_ties": 0.5}
BOUND, REGULARISATION, EVALUATIONS = 1.5, 0.05, 40
# What a merge may be multiplied by. TIES recommends 1 where there is nothing to choose by, and
# finds less to be better of many tasks; a mean of many wants more.
SCALES = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0)


def merge_adapters(
    folders: Mapping[str, Path], merging: Merging, *, density: float | None = None, seed: int = 0
) -> dict[str, LowRank]:
    """The updates of one adapter that is made of several, all of which count alike.

    Args:
        folders: Of the adapters, by name.
        merging: ``cat`` is the mean of their updates, exactly, in a rank as large as all of theirs
            together; ``linear`` the product of the means of their matrices; the others merge each
            layer's updates number by number and keep as large a rank as ``cat``.
        density: Share of each update's numbers that ``ties`` and ``dare_*`` keep.
        seed: Of what ``dare_*`` drops.

    Returns:
        Updates by the path of the layer. A layer that an adapter leaves as it is counts as zeros.

    References:
        TIES (arXiv:2306.01708), DARE (arXiv:2311.03099), in the formulas of
        ``peft.utils.merge_utils``, which trim each layer by itself. What is merged has any rank, so
        its smallest singular values are cut off.

    Raises:
        ExpertConfigError: An adapter cannot be read.
    """
    if merging == "linear":
        return fuse(folders, dict.fromkeys(folders, 1 / len(folders)))
    read = [read_updates(folder) for folder in folders.values()]
    if density is None:
        density = DENSITY.get(merging, 1.0)
    merged = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for path in dict.fromkeys(path for updates in read for path in updates):
            there = [updates[path] for updates in read if path in updates]
            down = torch.cat([update.down for update in there])
            if merging == "cat":
                up = torch.cat([update.up for update in there], dim=1) / len(read)
                merged[path] = LowRank(down, up)
                continue
            wholes = [update.up @ update.down for update in there]
            wholes += [torch.zeros_like(wholes[0])] * (len(read) - len(wholes))
            merged[path] = _cut(_merged(wholes, merging, density), len(down))
    return merged


def best_scale(examiner: Examiner, name: str, pairs: Sequence[TokenPair]) -> float:
    """What an adapter's update is best multiplied by: of ``SCALES``, what makes texts likeliest.

    Args:
        examiner: Of the base with the adapter.
        name: Of the adapter.
        pairs: The texts.

    References:
        The coefficient that task arithmetic (arXiv:2212.04089), TIES and DARE choose on held-out
        texts of all tasks.
    """
    adapter = examiner.adapters.adapter(name)
    losses = {
        scale: examiner.losses(pairs, AdapterUse(((adapter, scale),))).sum() for scale in SCALES
    }
    return min(SCALES, key=lambda scale: losses[scale])


def scaled(updates: Mapping[str, LowRank], scale: float) -> dict[str, LowRank]:
    """Updates multiplied by a number."""
    return {path: LowRank(update.down, update.up * scale) for path, update in updates.items()}


def _merged(wholes: list[torch.Tensor], merging: Merging, density: float) -> torch.Tensor:
    """Updates merged number by number; each of shape (out_features, in_features)."""
    from peft.utils.merge_utils import dare_linear, dare_ties, ties

    if merging == "dare_linear":
        return dare_linear(wholes, torch.full((len(wholes),), 1 / len(wholes)), density)
    # These two divide by how many agree.
    merge = ties if merging == "ties" else dare_ties
    return merge(wholes, torch.ones(len(wholes)), density)


def _cut(whole: torch.Tensor, rank: int) -> LowRank:
    """The nearest update of a rank."""
    left, lengths, right = torch.linalg.svd(whole, full_matrices=False)
    return LowRank(right[:rank].contiguous(), left[:, :rank] * lengths[:rank])


def lorahub_weights(
    examiner: Examiner,
    names: Sequence[str],
    pairs: Sequence[TokenPair],
    *,
    evaluations: int = EVALUATIONS,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> dict[str, float]:
    """Weights of adapters that suit few examples, found without gradients.

    Sums of the adapters' ``A`` and of their ``B`` with these weights are to make the examples
    likely: loss per token plus .05 of the weights' mean absolute value, weights in [-1.5, 1.5] from
    zero on, by nevergrad's NGOpt.

    Args:
        examiner: Of the base with the adapters.
        names: Of the adapters.
        pairs: The examples.
        evaluations: Weights that are tried.
        seed: Of the search.
        on_step: Called with the number of the evaluation and its loss.

    References:
        LoraHub (arXiv:2307.13269) and its code. Adapters' scales are part of ``B`` here.
    """
    import nevergrad

    space = nevergrad.p.Array(init=np.zeros(len(names))).set_bounds(-BOUND, BOUND)
    space.random_state.seed(seed)
    search = nevergrad.optimizers.NGOpt(parametrization=space, budget=evaluations)
    tokens = sum(len(pair.answer_ids) for pair in pairs)
    with warnings.catch_warnings():
        # What it chooses among sets its own tolerances, and warns of them.
        warnings.simplefilter("ignore")
        for step in range(evaluations):
            tried = search.ask()
            weights = dict(zip(names, map(float, tried.value), strict=True))
            use = AdapterUse(((examiner.adapters.fused(weights), 1.0),))
            loss = float(examiner.losses(pairs, use).sum()) / tokens
            loss += REGULARISATION * float(np.abs(tried.value).mean())
            search.tell(tried, loss)
            if on_step:
                on_step(step + 1, loss)
    best = search.provide_recommendation().value
    return dict(zip(names, map(float, best), strict=True))
