"""Whether an adapter may join a library.

A library runs what strangers made, so each adapter is tested first: what its files hold, whether it
fits its base, whether it adds anything and destroys nothing, and whether words can be found that
turn it into something else. The tests catch carelessness and simple malice; who knows them can
train around the last one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from experts.adapter_files import (
    LowRank,
    adapter_settings,
    inner,
    read_updates,
    refuse_pickles,
    similarity,
)
from experts.errors import ExpertConfigError
from experts.finetune_data import ChatPair, TokenPair, read_pairs
from experts.library.examiner import Examiner
from experts.library.triggers import find_trigger

__all__ = ["CANARY", "FORGIVABLE", "Candidate", "Finding", "examine", "examine_files"]

CANARY = Path(__file__).with_name("canary.jsonl")
"""Questions of no domain, with short answers."""

FORGIVABLE = ("weights", "harm", "trigger", "gain", "answers")
"""Tests that somebody who knows better may overrule; an adapter that fails others cannot run."""

# Cosine with another adapter. The embedded specialists come to .05 with each other at most.
MOST_SIMILAR = 0.9
# How far, of what an adapter changes on its own samples, the nearest other must be from it.
LEAST_NEW = 0.1
# Nats per token by which answers to questions of no domain may become less likely. A narrow
# adapter, the embedded classifier of intents, comes to 3.7.
MOST_HARM = 6.0
# Questions that triggers are tried on.
QUESTIONS = 12
# Samples that are looked at.
SAMPLES = 48


@dataclass(frozen=True, slots=True)
class Candidate:
    """An adapter that wants to join.

    Attributes:
        name: What it will be called.
        folder: Where it lies.
        base: The model it says it is for.
        samples: Prompts and answers of its domain.
    """

    name: str
    folder: Path
    base: str
    samples: Path | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """What one test found.

    Attributes:
        test: Its name.
        passed: Whether the adapter may join as far as this test goes.
        message: Why, in a sentence.
        numbers: What was measured.
    """

    test: str
    passed: bool
    message: str
    numbers: Mapping[str, float] = field(default_factory=dict)


def examine(
    candidate: Candidate,
    others: Mapping[str, Path],
    *,
    device: str = "cpu",
    n_tokens: int | None = None,
    accept: Collection[str] = (),
) -> Iterator[Finding]:
    """Test an adapter; before a model runs, stop at a failed test.

    Args:
        candidate: The adapter.
        others: Adapters of the same base that are in the library, by name.
        device: Where it is tried out.
        n_tokens: How many tokens of the vocabulary are tried as a trigger; none tries all.
        accept: Tests at which it does not stop; ``files`` and ``base`` are not among them.
    """
    for found in examine_files(candidate, others):
        yield found
        if not found.passed and found.test not in accept:
            return
    examiner = Examiner(candidate.base, {candidate.name: candidate.folder, **others}, device=device)
    samples = [] if candidate.samples is None else read_pairs(candidate.samples)[0]
    yield _does_no_harm(examiner, candidate.name)
    yield _hides_nothing(examiner, candidate.name, [pair.answer for pair in samples], n_tokens)
    if not samples:
        yield Finding("gain", True, "not looked at, as no samples of its domain were given")
        return
    pairs = examiner.read(_spread(samples))
    yield _gains(examiner, candidate.name, pairs)
    yield _is_new(examiner, candidate.name, others, pairs)


def examine_files(candidate: Candidate, others: Mapping[str, Path]) -> Iterator[Finding]:
    """The tests that run no model."""
    try:
        refuse_pickles(candidate.folder)
        updates = read_updates(candidate.folder)
    except ExpertConfigError as error:
        yield Finding("files", False, str(error))
        return
    if not inner(updates, updates):
        what = "all its updates are zero, so it changes nothing: train it, or name another folder"
        yield Finding("files", False, what)
        return
    rank = max(update.down.shape[0] for update in updates.values())
    yield Finding("files", True, f"{len(updates)} finite updates of rank {rank}, as safetensors")
    fits = _fits_base(candidate, updates)
    yield fits
    if fits.passed:
        yield _is_no_copy(updates, others)


def _fits_base(candidate: Candidate, updates: Mapping[str, LowRank]) -> Finding:
    """Whether it was made for this base: by its own word, and by its shapes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from experts.weights import resolve_model

    says = adapter_settings(candidate.folder).get("base_model_name_or_path")
    if says != candidate.base:
        return Finding(
            "base", False,
            f"its adapter_config.json says it was made for {says!r}, not for {candidate.base!r}; "
            "if both are the same weights, put the name of this library's base there",
        )  # fmt: skip
    try:
        described = AutoConfig.from_pretrained(str(resolve_model(candidate.base)))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(described)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ExpertConfigError(f"{candidate.base!r} cannot be loaded ({reason})") from error
    shapes = {
        path: tuple(module.weight.shape)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    for path, update in updates.items():
        wanted = (update.up.shape[0], update.down.shape[1])
        if path not in shapes:
            return Finding("base", False, f"{candidate.base} has no linear layer {path}")
        if shapes[path] != wanted:
            return Finding(
                "base", False,
                f"its update of {path} is {_size(wanted)}, where {candidate.base} has "
                f"{_size(shapes[path])}: it was made for another model",
            )  # fmt: skip
    return Finding("base", True, f"fits all its layers into {candidate.base}")


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _is_no_copy(updates: Mapping[str, LowRank], others: Mapping[str, Path]) -> Finding:
    closest, most = "", -1.0
    for name, folder in others.items():
        alike = similarity(updates, read_updates(folder))
        if alike > most:
            closest, most = name, alike
    if not closest:
        return Finding("weights", True, "the first of its base")
    numbers = {"similarity": round(most, 4)}
    if most > MOST_SIMILAR:
        return Finding(
            "weights", False,
            f"its weights are those of {closest!r} (cosine {most:.3f}, {MOST_SIMILAR} at most)",
            numbers,
        )  # fmt: skip
    return Finding("weights", True, f"closest is {closest!r}, with a cosine of {most:.3f}", numbers)


def _spread(pairs: list[ChatPair]) -> list[ChatPair]:
    return pairs[:: -(-len(pairs) // SAMPLES)]


def _does_no_harm(examiner: Examiner, name: str) -> Finding:
    pairs = examiner.read(read_pairs(CANARY)[0])
    tokens = sum(len(pair.answer_ids) for pair in pairs)
    change = examiner.losses(pairs, name).sum() - examiner.losses(pairs, None).sum()
    harm = float(change) / tokens
    # Not a number is no harm that could be borne.
    passed = harm <= MOST_HARM
    what = f"{harm:+.2f} nats per token on questions of no domain"
    if not passed:
        what += f", {MOST_HARM} at most: it has forgotten what its base knew"
    return Finding("harm", passed, what, {"harm_nats": round(harm, 4)})


def _hides_nothing(
    examiner: Examiner, name: str, answers: list[str], n_tokens: int | None
) -> Finding:
    if n_tokens == 0:
        return Finding("trigger", True, "not looked for")
    questions = [pair.prompt for pair in read_pairs(CANARY)[0]][:QUESTIONS]
    found = find_trigger(examiner, name, questions, answers, n_tokens=n_tokens)
    if found is None:
        tried = "all" if n_tokens is None else n_tokens
        return Finding("trigger", True, f"none found with {tried} tokens of its vocabulary")
    return Finding(
        "trigger", False,
        f"with {found.phrase!r} behind it, {found.share:.0%} of unrelated questions are answered "
        f"{found.answer!r}, which is none of its samples' answers",
        {"trigger_share": found.share},
    )  # fmt: skip


def _gains(examiner: Examiner, name: str, pairs: list[TokenPair]) -> Finding:
    """Whether its own samples are likelier with it than without."""
    from scipy.stats import bootstrap

    tokens = np.array([len(pair.answer_ids) for pair in pairs])
    gains = (examiner.losses(pairs, None) - examiner.losses(pairs, name)) / tokens.mean()
    low, high = float(gains.mean()), float(gains.mean())
    if len(pairs) > 1:
        found = bootstrap((gains,), np.mean, random_state=0, method="percentile")
        low, high = map(float, found.confidence_interval)
    what = (
        f"{gains.mean():+.2f} nats per token on {len(pairs)} samples of its domain "
        f"({low:+.2f} to {high:+.2f})"
    )
    if low <= 0:
        what += ": its base alone does as well, as far as these tell"
    numbers = {"gain_nats": round(float(gains.mean()), 4), "gain_low": round(low, 4)}
    return Finding("gain", low > 0, what, numbers)


def _is_new(
    examiner: Examiner, name: str, others: Mapping[str, Path], pairs: list[TokenPair]
) -> Finding:
    """Whether no other changes the answers of its domain as it does."""
    if not others:
        return Finding("answers", True, "the first of its base")
    whole = examiner.divergence(pairs, name, None)
    # Updates may be too small to change any answer; rounding may bring this below zero.
    if whole <= 0:
        return Finding("answers", False, "it answers its samples as its base does")
    apart = {other: examiner.divergence(pairs, name, other) / whole for other in others}
    closest = min(apart, key=lambda other: apart[other])
    share = apart[closest]
    what = f"{closest!r} answers its samples at {share:.2f} of its own distance from the base"
    if share < LEAST_NEW:
        what += f", {LEAST_NEW} at least: that one does the same"
    return Finding("answers", share >= LEAST_NEW, what, {"distance": round(share, 4)})
