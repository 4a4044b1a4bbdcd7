"""The decode loop on its own, and what rows leave in the caches of a model."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from experts.decoding import Decoder, Prompt, Row
from experts.lora import AdapterSlots
from experts.passes import ModelPasses
from experts.sampling import Drawn, Sampler, SamplingOptions
from tests.experts.latent import tiny

WAIT_S = 60.0


class Sink:
    """Keeps what it gets."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.error: Exception | None = None
        self.first, self.done = threading.Event(), threading.Event()

    def token(self, drawn: Drawn, finish_reason: str | None) -> bool:
        self.ids.append(drawn.token_id)
        self.first.set()
        if finish_reason:
            self.done.set()
        return False

    def listens_to(self, peers: Mapping[str, float]) -> None:
        pass

    def fail(self, error: Exception) -> None:
        self.error = error
        self.done.set()


def _row(ids: Sequence[int] = (1, 2, 3), max_tokens: int = 4) -> Row:
    sampler = Sampler(SamplingOptions(temperature=0))
    return Row(Prompt(ids), sampler, max_tokens, frozenset(), Sink())


def _answer(decoder: Decoder, row: Row) -> Sink:
    decoder.submit([row])
    assert isinstance(row.sink, Sink)
    assert row.sink.done.wait(WAIT_S)
    return row.sink


class FailingPasses:
    """Says token 1 always; the methods named fail, once each.

    Args:
        failing: Names of methods.
    """

    def __init__(self, *failing: str) -> None:
        self._failing = set(failing)

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and name in self._failing:
            self._failing.remove(name)
            raise RuntimeError(f"{name} failed")
        return super().__getattribute__(name)

    def fits(self, row: Row) -> bool:
        return True

    def join(self, row: Row) -> Exception | None:
        return None

    def leave(self, rows: Sequence[Row]) -> None:
        pass

    def reset(self) -> None:
        pass

    def read(self, row: Row, budget: int) -> tuple[int, torch.Tensor]:
        return 1, torch.tensor([0.0, 1.0])

    def decode(self, rows: Sequence[Row]) -> dict[Row, torch.Tensor]:
        return dict.fromkeys(rows, torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("name", ["join", "leave", "read", "decode"])
def test_failure_of_any_method_fails_its_rows_and_later_ones_are_answered(name):
    """Fails where ``_admit`` stands outside the ``try`` of ``_run``: nobody hears of it."""
    decoder = Decoder(FailingPasses(name), max_rows=4)
    try:
        first = _answer(decoder, _row())
        assert (str(first.error) == f"{name} failed") or name == "leave"
        later = _answer(decoder, _row())
        assert later.error is None
        assert later.ids == [1] * 4
        assert decoder.call(lambda: 5).result(WAIT_S) == 5
    finally:
        decoder.close()


class RefusingPasses(FailingPasses):
    """Has no place for rows whose prompt is one token."""

    def join(self, row: Row) -> Exception | None:
        return ValueError("no place") if len(row.prompt.token_ids) == 1 else None


def test_a_row_that_gets_no_place_fails_alone():
    decoder = Decoder(RefusingPasses(), max_rows=4)
    try:
        rows = [_row(), _row([1]), _row()]
        decoder.submit(rows)
        sinks = [row.sink for row in rows if isinstance(row.sink, Sink)]
        assert all(sink.done.wait(WAIT_S) for sink in sinks)
        assert [str(sink.error) for sink in sinks] == ["None", "no place", "None"]
        assert [sink.ids for sink in sinks] == [[1] * 4, [], [1] * 4]
        assert decoder.load == 0
    finally:
        decoder.close()


def test_numbers_that_are_none_stay_with_the_row_that_has_them():
    """Fails without ``clear`` in ``Lane.join``: whoever gets its place would read them."""
    model = tiny.language_model("llama", 300).eval().requires_grad_(False)
    model.get_input_embeddings().weight[7] = float("nan")
    decoder = Decoder(ModelPasses(model, AdapterSlots(model, {}), max_rows=4), max_rows=4)
    try:
        expected = _answer(decoder, _row(max_tokens=20)).ids
        # While there is another row, no cache is made anew.
        other = _row(max_tokens=1500)
        decoder.submit([other])
        assert isinstance(other.sink, Sink)
        assert other.sink.first.wait(WAIT_S)
        broken = _answer(decoder, _row([5, 7, 9] + [11] * 30))
        assert isinstance(broken.error, ValueError)
        assert _answer(decoder, _row(max_tokens=20)).ids == expected
        assert not other.sink.done.is_set()
        other.cancelled = True
    finally:
        decoder.close()
