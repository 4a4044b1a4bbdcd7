"""A library made of one corpus: its prompts are clustered, and each cluster gets an adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experts.errors import ExpertConfigError
from experts.finetune import AdapterTrainingConfig, train_adapter
from experts.finetune_data import ChatPair, read_pairs
from experts.library.manifest import Library, LibraryExpert, Provenance
from routers.clusters import cluster
from routers.encoders import get_encoder

__all__ = ["build_library"]

# Kept of each cluster, for routers and gates.
SAMPLES = 60


def build_library(
    folder: Path,
    data: Path,
    n_clusters: int,
    settings: dict[str, Any],
    *,
    encoder: str,
    seed: int = 0,
    progress: Callable[[str], None],
) -> Library:
    """Cluster pairs by the vectors of their prompts and train an adapter on each cluster.

    Calling again goes on where it was interrupted; the corpus must be the same.

    Args:
        folder: Of the library, which may hold others already.
        data: JSONL file of {"prompt", "answer"} objects.
        n_clusters: Number of clusters, and of adapters.
        settings: Of each training but its data; see ``AdapterTrainingConfig``.
        encoder: Name of an encoder of the routers.
        seed: Of the clusters and of what is held as samples.
        progress: Told which cluster is next.

    References:
        TTMM (arXiv:2505.14136): k-means of unit vectors of texts, a LoRA per cluster. MBC
        (arXiv:2405.11157) clusters tasks by their LoRAs instead.

    Raises:
        ExpertConfigError: There are fewer pairs than clusters, or a training cannot be run.
    """
    pairs, _ = read_pairs(data)
    if len(pairs) < n_clusters:
        raise ExpertConfigError(f"{data} has {len(pairs)} pairs, fewer than {n_clusters} clusters")
    vectors = get_encoder(encoder).encode([pair.prompt for pair in pairs])
    centres, labels = cluster(vectors, n_clusters, seed)
    library = Library.at(folder)
    width = len(str(n_clusters - 1))
    for number, centre in enumerate(centres):
        members = np.flatnonzero(labels == number)
        if not len(members):
            continue
        # The most typical ones first, which say what the cluster is about.
        members = members[np.argsort(-(vectors[members] @ centre), kind="stable")]
        name = f"cluster-{number:0{width}}"
        own = [pairs[member] for member in members]
        progress(f"{name}: {len(own)} pairs, such as {own[0].prompt[:60]!r}")
        texts = _write(folder / "data" / f"{name}.jsonl", own)
        config = AdapterTrainingConfig.model_validate({**settings, "data": texts})
        train_adapter(config, folder / "adapters" / name)
        chosen = np.random.default_rng(seed).permutation(len(own))[:SAMPLES]
        _write(folder / "samples" / f"{name}.jsonl", [own[place] for place in sorted(chosen)])
        library.experts[name] = LibraryExpert(
            name=name,
            base=config.base,
            path=f"adapters/{name}",
            samples=f"samples/{name}.jsonl",
            description=f"Texts like: {' '.join(own[0].prompt.split())[:80]}",
            provenance=Provenance(
                source="collegium library build", trained_on=f"data/{name}.jsonl of {data.name}"
            ),
        )
        library.save()
    return library


def _write(file: Path, pairs: list[ChatPair]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"prompt": pair.prompt, "answer": pair.answer}) for pair in pairs]
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file
