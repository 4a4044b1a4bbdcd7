"""Several adapters of a library made into one, once and for all queries. Imports torch.

PEFT merges; what is new here is the search for weights from few examples.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from experts.adapter_files import read_shapes
from experts.finetune_data import TokenPair
from experts.library.examiner import Examiner
from experts.library.upcycling import dense
from experts.lora import AdapterUse

__all__ = ["Merging", "lorahub_weights", "merge_adapters"]

Merging = Literal["cat", "linear", "ties", "dare_linear", "dare_ties"]

# As in the papers: TIES keeps the largest fifth; DARE drops half of what is left in its gentler
# setting. LoraHub: bounds, regularisation and evaluations of its code.
DENSITY = {"ties": 0.2, "dare_linear": 0.5, "dare_ties": 0.5}
BOUND, REGULARISATION, EVALUATIONS = 1.5, 0.05, 40


def merge_adapters(
    base: str,
    folders: Mapping[str, Path],
    weights: Mapping[str, float],
    merging: Merging,
    out: Path,
    *,
    density: float | None = None,
    seed: int = 0,
) -> None:
    """Make one adapter of several and write it to a folder in PEFT's format.

    Args:
        base: Their base model, as in an expert's config.
        folders: Of the adapters, by name.
        weights: Of the adapters, by name.
        merging: ``cat`` adds up their updates exactly, in an adapter of all their ranks together;
            the others add up their matrices. Where ranks differ, whole updates are merged and cut
            to the largest rank by a singular value decomposition.
        out: The folder.
        density: Share of each adapter's numbers that ``ties`` and ``dare_*`` keep.
        seed: Of what ``dare_*`` drops.

    References:
        TIES (arXiv:2306.01708), DARE (arXiv:2311.03099), both as PEFT has them.

    Raises:
        ExpertConfigError: The base cannot be loaded.
    """
    from peft import PeftModel

    names = [*weights]
    # PEFT's names become module names, where dots separate.
    inner = {name: f"adapter_{place}" for place, name in enumerate(names)}
    wrapped: Any = PeftModel.from_pretrained(dense(base, None), folders[names[0]], inner[names[0]])
    for name in names[1:]:
        wrapped.load_adapter(folders[name], adapter_name=inner[name])
    ranks = {shape[0] for name in names for shape in read_shapes(folders[name]).values()}
    kind: str = merging
    if len(ranks) > 1 and merging != "cat":
        kind = "svd" if merging == "linear" else f"{merging}_svd"
    torch.manual_seed(seed)
    options: dict[str, Any] = {"svd_rank": max(ranks)} if kind.endswith("svd") else {}
    if merging in DENSITY:
        options["density"] = density if density is not None else DENSITY[merging]
    wrapped.add_weighted_adapter(
        [inner[name] for name in names], [*weights.values()], "merged", combination_type=kind,
        **options,
    )  # fmt: skip
    wrapped.set_adapter("merged")
    for name in names:
        wrapped.delete_adapter(inner[name])
    wrapped.peft_config["merged"].base_model_name_or_path = base
    with tempfile.TemporaryDirectory() as scratch:
        wrapped.save_pretrained(scratch)
        out.mkdir(parents=True, exist_ok=True)
        for file in (Path(scratch) / "merged").iterdir():
            if file.name.startswith("adapter_"):
                (out / file.name).write_bytes(file.read_bytes())


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
