from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from experts.decoding import Row
from experts.latent.alignment import PromptTokens, align, first_views
from experts.latent.model import LatentText
from experts.latent.passes import HeardPrompt, LatentPasses, LatentPrompt
from experts.passes import PREFILL_TOKENS
from experts.types import Message
from tests.experts.latent import tiny

# Same tokenizers, and others: one that knows bytes alone, one that knows whole phrases.
SIZES = {"llama": 300, "qwen3": 300, "gemma3": 258, "olmoe": 420}
QUESTION = "hello 🎉, the naïve fox says 日本語?"
ANSWER = " the lazy dog 🎉🎉 café Ωμέγα over the world, one two</s> three"


@pytest.fixture(scope="module")
def members():
    return {name: tiny.member(name, size, n) for n, (name, size) in enumerate(SIZES.items())}


@pytest.fixture(scope="module")
def model(members):
    return tiny.latent_model(members)


@pytest.fixture(scope="module")
def tokenizers(members):
    return {name: one.tokenizer for name, one in members.items()}


class Sink:
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.heard: list[dict[str, float]] = []

    def token(self, drawn: Any, finish_reason: str | None) -> bool:
        return False

    def listens_to(self, peers: Mapping[str, float]) -> None:
        self.heard.append(dict(peers))

    def fail(self, error: Exception) -> None:
        raise AssertionError(error)


@pytest.fixture
def passes(members, tokenizers):
    # A model of its own, since experts may be taken out.
    return LatentPasses(
        tiny.latent_model(members), tokenizers, dict.fromkeys(members, 512), max_rows=8
    )


def _read(tokenizers, names: Sequence[str], text: str = QUESTION) -> dict[str, PromptTokens]:
    return {name: tokenizers[name].chat([Message(role="user", content=text)]) for name in names}


def _prompt(tokenizers, writer: str, gates: Mapping[str, float], text: str = QUESTION) -> Any:
    read = _read(tokenizers, [writer, *gates], text)
    own = read[writer]
    peers = {
        name: HeardPrompt(read[name].ids, first_views(own, read[name]), gate)
        for name, gate in gates.items()
    }
    return LatentPrompt(own.ids, writer=writer, gate=1.0 - sum(gates.values()), peers=peers or None)


def _row(prompt: Any) -> Row:
    return Row(prompt, None, 99, frozenset(), Sink())  # type: ignore[arg-type]


def _feed(passes: LatentPasses, row: Row, token_id: int) -> None:
    row.drawn += 1
    row.last_id = token_id


def _prefill(passes: LatentPasses, row: Row) -> torch.Tensor:
    found = None
    while found is None:
        _, found = passes.read(row, PREFILL_TOKENS)
    assert isinstance(found, torch.Tensor)
    return found


@torch.inference_mode()
def _write(passes: LatentPasses, rows: Mapping[Row, Sequence[int]]) -> dict[Row, torch.Tensor]:
    """Have rows write given answers; the logits of each, shape (n_tokens + 1, vocabulary)."""
    for row in rows:
        passes.join(row)
    logits = {row: [_prefill(passes, row)] for row in rows}
    for step in range(max(map(len, rows.values()))):
        writing = [row for row, ids in rows.items() if step < len(ids)]
        for row in writing:
            _feed(passes, row, rows[row][step])
        for row, found in passes.decode(writing).items():
            assert isinstance(found, torch.Tensor)
            logits[row].append(found)
        passes.leave([row for row in writing if step == len(rows[row]) - 1])
    return {row: torch.stack(found) for row, found in logits.items()}


def _whole(model, tokenizers, writer, gates, ids, text=QUESTION) -> torch.Tensor:
    """The same logits from the whole text at once."""
    read = _read(tokenizers, [writer, *gates], text)
    weights = {writer: 1.0 - sum(gates.values()), **gates}
    given = LatentText(
        writer,
        align(read, tokenizers, writer, ids),
        {name: torch.tensor(gate) for name, gate in weights.items()},
    )
    with torch.inference_mode():
        logits: torch.Tensor = model([given], last=[len(ids) + 1])[0]
    return logits


def _ids(tokenizers, name: str, text: str = ANSWER) -> list[int]:
    ids: list[int] = tokenizers[name].piece(text)
    return ids


def _heard(row: Row) -> list[dict[str, float]]:
    assert isinstance(row.sink, Sink)
    return row.sink.heard


@pytest.mark.parametrize(
    ("writer", "gates"),
    [
        ("llama", {"qwen3": 0.4}),
        ("llama", {"gemma3": 0.4, "olmoe": 0.3}),
        ("gemma3", {"llama": 0.5, "olmoe": 0.5}),
        ("olmoe", {"llama": 0.1, "qwen3": 0.2, "gemma3": 0.3}),
    ],
)
def test_incremental_logits_are_those_of_the_whole_text(passes, model, tokenizers, writer, gates):
    """Fails if ``_between`` returns ``hidden``, or ``_hear_tokens`` views from one token later."""
    ids = _ids(tokenizers, writer)
    row = _row(_prompt(tokenizers, writer, gates))
    found = _write(passes, {row: ids})[row]
    torch.testing.assert_close(
        found, _whole(model, tokenizers, writer, gates, ids), atol=1e-4, rtol=1e-4
    )
    alone = _row(_prompt(tokenizers, writer, {}))
    assert (_write(passes, {alone: ids})[alone] - found).abs().max() > 0.01
    assert _heard(row) == [gates]
    assert _heard(alone) == []
