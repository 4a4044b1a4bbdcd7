"""A library made of one corpus: its prompts are clustered, and each cluster gets an adapter."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from experts.adapter_files import weights_hash
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

    Calling again goes on where it was interrupted.

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
        ExpertConfigError: There are fewer pairs than clusters, the folder has clusters of another
            corpus, or a training cannot be run.
    """
    pairs, _ = read_pairs(data)
    if len(pairs) < n_clusters:
        raise ExpertConfigError(f"{data} has {len(pairs)} pairs, fewer than {n_clusters} clusters")
    config = AdapterTrainingConfig.model_validate({**settings, "data": data})
    vectors = get_encoder(encoder).encode([pair.prompt for pair in pairs])
    centres, labels = cluster(vectors, n_clusters, seed)
    library = Library.at(folder)
    width = len(str(n_clusters - 1))
    clusters: dict[str, list[ChatPair]] = {}
    for number, centre in enumerate(centres):
        members = np.flatnonzero(labels == number)
        # The most typical ones first, which say what the cluster is about.
        members = members[np.argsort(-(vectors[members] @ centre), kind="stable")]
        if len(members):
            clusters[f"cluster-{number:0{width}}"] = [pairs[member] for member in members]
    files = {name: folder / "data" / f"{name}.jsonl" for name in clusters}
    for name, own in clusters.items():
        if not files[name].exists():
            library.check_free(name)
        elif files[name].read_text(encoding="utf-8") != _lines(own):
            raise ExpertConfigError(
                f"{files[name]} has other pairs than this cluster of {data}; choose another folder "
                "for another corpus, encoder, seed or number of clusters"
            )
    for name, own in clusters.items():
        progress(f"{name}: {len(own)} pairs, such as {own[0].prompt[:60]!r}")
        _write(files[name], own)
        adapter = folder / "adapters" / name
        train_adapter(config.model_copy(update={"data": files[name]}), adapter)
        if name in library.experts:
            continue
        chosen = np.random.default_rng(seed).permutation(len(own))[:SAMPLES]
        _write(folder / "samples" / f"{name}.jsonl", [own[place] for place in sorted(chosen)])
        origin = Provenance(
            source="collegium library build", trained_on=f"data/{name}.jsonl of {data.name}",
            added=datetime.now(UTC).date(), sha256=weights_hash(adapter),
        )  # fmt: skip
        library.put(
            LibraryExpert(
                name=name,
                base=config.base,
                path=f"adapters/{name}",
                samples=f"samples/{name}.jsonl",
                description=f"Texts like: {' '.join(own[0].prompt.split())[:80]}",
                provenance=origin,
            )
        )
    return library


def _lines(pairs: Sequence[ChatPair]) -> str:
    rows = [json.dumps({"prompt": pair.prompt, "answer": pair.answer}) for pair in pairs]
    return "".join(f"{row}\n" for row in rows)


def _write(file: Path, pairs: Sequence[ChatPair]) -> None:
    """Write pairs as a whole or not at all: half a file would be another corpus."""
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(".tmp")
    scratch.write_text(_lines(pairs), encoding="utf-8")
    os.replace(scratch, file)
