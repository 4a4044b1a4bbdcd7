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
        tiny.latent_model(members), tokenizers, dict.fromkeys(members, 2048), max_rows=8
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


def test_prompts_longer_than_a_piece_are_read_like_in_one(passes, model, tokenizers):
    gates, text = {"gemma3": 0.3, "qwen3": 0.3}, QUESTION * 25
    ids = _ids(tokenizers, "llama")[:8]
    prompt = _prompt(tokenizers, "llama", gates, text)
    assert min(len(prompt.token_ids), len(prompt.peers["gemma3"].token_ids)) > PREFILL_TOKENS
    row = _row(prompt)
    found = _write(passes, {row: ids})[row]
    expected = _whole(model, tokenizers, "llama", gates, ids, text)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_rows_get_what_they_get_alone(passes, tokenizers):
    """Writers, peers and lengths of all kinds; fails without ``MIN_ROWS`` or ``torch.where``."""
    routes: list[tuple[str, dict[str, float]]] = [
        ("llama", {"qwen3": 0.4}),
        ("llama", {}),
        ("qwen3", {"llama": 0.2, "gemma3": 0.6}),
        ("llama", {"qwen3": 0.1, "gemma3": 0.2}),
        ("gemma3", {}),
        ("llama", {"qwen3": 0.4}),
    ]
    texts = [ANSWER[:25], " hello fox", " 🎉 world", ANSWER[:9], ANSWER[15:25], " café"]
    asked = [
        (
            _prompt(tokenizers, writer, gates, QUESTION * (number + 1)),
            _ids(tokenizers, writer, text),
        )
        for number, ((writer, gates), text) in enumerate(zip(routes, texts, strict=True))
    ]
    alone = [_write(passes, {_row(prompt): ids}) for prompt, ids in asked]
    for prompt, _ in asked:
        prompt.logits = None
    together = _write(passes, {_row(prompt): ids for prompt, ids in asked})
    for one, found in zip(alone, together.values(), strict=True):
        torch.testing.assert_close(next(iter(one.values())), found, atol=1e-5, rtol=1e-4)
    assert not passes._talks
    assert all(not lane.rows for lane in [*passes._writers.values(), *passes._readers.values()])


def test_rows_that_come_and_go_leave_nothing_behind(passes, model, tokenizers):
    """Fails without ``forget`` in ``join``, without ``memory.copy`` in ``_move``, or where a row
    that reads its peers' prompts takes part in decoding with an entry at 0."""
    gates, ids = {"gemma3": 0.3, "qwen3": 0.4}, _ids(tokenizers, "llama")[:8]
    first, second = (_row(_prompt(tokenizers, "llama", gates, QUESTION * n)) for n in (3, 2))
    third = _row(_prompt(tokenizers, "llama", gates))
    logits: dict[Row, list[Any]] = {first: [], second: [], third: []}

    def step(*rows: Row) -> None:
        for row in rows:
            _feed(passes, row, ids[len(logits[row]) - 1])
        for row, found in passes.decode(rows).items():
            logits[row].append(found)

    with torch.inference_mode():
        for row in (first, second):
            passes.join(row)
            logits[row].append(_prefill(passes, row))
        step(first, second)
        passes.leave([first])
        passes.join(third)
        step(second)
        assert passes.read(third, PREFILL_TOKENS)[1] is None
        step(second)
        logits[third].append(_prefill(passes, third))
        for _ in range(4):
            step(second, third)
    for row, text in ((second, QUESTION * 2), (third, QUESTION)):
        written = ids[: len(logits[row]) - 1]
        expected = _whole(model, tokenizers, "llama", gates, written, text)
        torch.testing.assert_close(torch.stack(logits[row]), expected, atol=1e-4, rtol=1e-4)


def test_answers_to_one_prompt_share_what_was_read(passes, tokenizers, monkeypatch):
    gates = {"gemma3": 0.4, "qwen3": 0.4}
    prompt, other = (_prompt(tokenizers, "llama", gates) for _ in range(2))
    texts = [_ids(tokenizers, "llama", text) for text in (ANSWER, " hello", " café 🎉")]
    single = _row(other)
    alone = _write(passes, {single: texts[2]})[single]
    read = []
    whole = LatentPasses._hear_piece

    def hear(self: LatentPasses, *args: Any) -> None:
        read.append(args)
        whole(self, *args)

    monkeypatch.setattr(LatentPasses, "_hear_piece", hear)
    # Rows that join while their twin writes.
    first, second, third = (_row(prompt) for _ in range(3))
    with torch.inference_mode():
        passes.join(first)
        _prefill(passes, first)
        _feed(passes, first, texts[0][0])
        passes.decode([first])
    found = _write(passes, {second: texts[1], third: texts[2]})
    assert len(read) == 2
    torch.testing.assert_close(found[third], alone, atol=1e-5, rtol=1e-4)
    assert _heard(third) == [gates]


def _break(monkeypatch, model, name: str, what: str) -> None:
    """Have an expert fail from now on."""
    if what == "raises":

        def read(**inputs: Any) -> Any:
            raise RuntimeError("out of order")
    else:
        whole = model.members[name].read

        def read(**inputs: Any) -> Any:
            return [states * float("nan") for states in whole(**inputs)]

    monkeypatch.setattr(model.members[name], "read", read)


def _without(model, tokenizers, gates, ids, lost: str, after: int) -> torch.Tensor:
    """Logits where a peer has been heard up to some token of the answer, then no more."""
    read = _read(tokenizers, ["llama", *gates])
    tokens = align(read, tokenizers, "llama", ids)
    last = len(read["llama"].ids) + after
    kept = sum(position < last for position in tokens[lost].seen_from)
    del tokens[lost].ids[kept:], tokens[lost].seen_from[kept:]
    weights = {"llama": 1.0 - sum(gates.values()), **gates}
    if not tokens[lost].ids:
        del tokens[lost], weights[lost]
    text = LatentText("llama", tokens, {name: torch.tensor(w) for name, w in weights.items()})
    with torch.inference_mode():
        logits: torch.Tensor = model([text], last=[len(ids) + 1])[0]
    return logits


@pytest.mark.parametrize("what", ["raises", "nan", "dropped"])
@pytest.mark.parametrize("lost", ["qwen3", "gemma3"])
def test_peer_that_fails_is_left_out_and_what_it_said_stays(
    passes, model, tokenizers, monkeypatch, caplog, lost, what
):
    """Fails if ``_leave_out`` lets the exception through, or forgets what is remembered."""
    gates = {"gemma3": 0.4, "qwen3": 0.4}
    ids, after = _ids(tokenizers, "llama")[:14], 6
    row = _row(_prompt(tokenizers, "llama", gates))
    with torch.inference_mode():
        passes.join(row)
        logits = [_prefill(passes, row)]
        for number, token in enumerate(ids):
            if number == after:
                if what == "dropped":
                    passes.drop(lost)
                else:
                    _break(monkeypatch, passes._model, lost, what)
            _feed(passes, row, token)
            logits.append(passes.decode([row])[row])
    monkeypatch.undo()
    expected = _without(model, tokenizers, gates, ids, lost, after)
    torch.testing.assert_close(torch.stack(logits), expected, atol=1e-4, rtol=1e-4)
    remaining = {name: gate for name, gate in gates.items() if name != lost}
    assert _heard(row) == [gates, remaining]
    assert f"goes on without its peer {lost!r}" in caplog.text
    passes.leave([row])


@pytest.mark.parametrize("what", ["raises", "nan"])
def test_peer_that_fails_on_the_prompt_is_left_out(
    passes, model, tokenizers, monkeypatch, caplog, what
):
    gates = {"gemma3": 0.4, "qwen3": 0.4}
    ids = _ids(tokenizers, "llama")[:5]
    with monkeypatch.context() as patch:
        _break(patch, passes._model, "qwen3", what)
        prompt = _prompt(tokenizers, "llama", gates)
        first, second = _row(prompt), _row(prompt)
        found = _write(passes, {first: ids, second: ids})
    expected = _without(model, tokenizers, gates, ids, "qwen3", -(10**6))
    for row in (first, second):
        torch.testing.assert_close(found[row], expected, atol=1e-4, rtol=1e-4)
        assert _heard(row) == [{"gemma3": 0.4}]
    # Whoever gets its place later is not harmed.
    later = _row(_prompt(tokenizers, "llama", gates))
    torch.testing.assert_close(
        _write(passes, {later: ids})[later],
        _whole(model, tokenizers, "llama", gates, ids),
        atol=1e-4,
        rtol=1e-4,
    )


def test_place_of_a_row_with_broken_states_is_clean_for_the_next(
    passes, model, tokenizers, monkeypatch
):
    """Fails without ``clear`` in ``Lane.join``: what is masked counts zero times, and zero times
    no number is no number."""
    gates, ids = {"qwen3": 0.5}, _ids(tokenizers, "llama")
    stays, leaves = (_row(_prompt(tokenizers, "llama", gates)) for _ in range(2))
    whole = passes._model.members["qwen3"].read

    def read(**inputs: Any) -> Any:
        # Keys and values in the last slot are broken, as if its states were.
        found = whole(**inputs)
        for layer in inputs["past_key_values"]._slots:
            for buffer in layer.buffers():
                buffer[1, :, -1] = float("nan")
        return [states.index_fill(0, torch.tensor([1]), float("nan")) for states in found]

    with torch.inference_mode():
        for row in (stays, leaves):
            passes.join(row)
            _prefill(passes, row)
            _feed(passes, row, ids[0])
        with monkeypatch.context() as patch:
            patch.setattr(passes._model.members["qwen3"], "read", read)
            passes.decode([stays, leaves])
        assert _heard(leaves) == [gates, {}]
        assert _heard(stays) == [gates]
        later = _row(_prompt(tokenizers, "llama", gates, "hello"))
    found = _write(passes, {later: ids[:3]})[later]
    expected = _whole(model, tokenizers, "llama", gates, ids[:3], "hello")
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_peer_that_fails_between_boundaries_says_nothing(passes, model, tokenizers, monkeypatch):
    """Fails without ``forget`` in ``_leave_out``: half of what it says would be seen."""
    # The last one: it reads more tokens than the writer, who writes over the first of them.
    gates, ids = {"qwen3": 0.4, "gemma3": 0.4}, _ids(tokenizers, "llama")[:4]
    layer = passes._model.interaction(1)
    whole = layer.note

    def note(name: str, *args: Any) -> Any:
        if name == "gemma3":
            raise RuntimeError("out of memory")
        return whole(name, *args)

    monkeypatch.setattr(layer, "note", note)
    row = _row(_prompt(tokenizers, "llama", gates))
    found = _write(passes, {row: ids})[row]
    expected = _without(model, tokenizers, gates, ids, "gemma3", -(10**6))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert _heard(row) == [{"qwen3": 0.4}]


@pytest.mark.parametrize("moved", [False, True])
def test_place_of_a_writer_with_broken_states_is_clean_for_the_next(
    passes, model, tokenizers, moved
):
    """Fails without ``clear`` in ``Lane.join`` and zeros in ``forget``, or, where a row moves to
    the place, in ``SlotCache.copy``."""
    gates, ids = {"qwen3": 0.5}, _ids(tokenizers, "llama")
    # The middle one is the longest, so that nobody writes over all it leaves.
    rows = [_row(_prompt(tokenizers, "llama", gates, QUESTION * n)) for n in (1, 2, 1)]
    embed = passes._model.members["llama"].model.get_input_embeddings()

    def broken(module: Any, args: Any, found: torch.Tensor) -> torch.Tensor:
        return found.index_fill(0, torch.tensor([1]), float("nan"))

    with torch.inference_mode():
        for row in rows:
            passes.join(row)
            _prefill(passes, row)
            _feed(passes, row, ids[0])
        handle = embed.register_forward_hook(broken)
        found = passes.decode(rows)
        handle.remove()
        assert [bool(found[row].isnan().any()) for row in rows] == [False, True, False]
        passes.leave(rows[1:2] if moved else rows[:0:-1])
        later = rows[2] if moved else _row(_prompt(tokenizers, "llama", gates))
        if not moved:
            passes.join(later)
            _prefill(passes, later)
        _feed(passes, later, ids[1 if moved else 0])
        logits = passes.decode([later])[later]
    expected = _whole(model, tokenizers, "llama", gates, ids[: 2 if moved else 1])[-1]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_writer_that_fails_fails_its_own_rows_alone(passes, model, tokenizers, monkeypatch):
    gates, ids = {"llama": 0.5}, _ids(tokenizers, "qwen3")
    own, other = (
        _row(_prompt(tokenizers, "llama", {"qwen3": 0.5})),
        _row(_prompt(tokenizers, "qwen3", gates)),
    )

    def forward(**inputs: Any) -> Any:
        raise RuntimeError("out of order")

    with torch.inference_mode():
        for row in (own, other):
            passes.join(row)
            _prefill(passes, row)
            _feed(passes, row, ids[0])
        monkeypatch.setattr(passes._model.members["llama"].model, "forward", forward)
        found = passes.decode([own, other])
        assert isinstance(found[own], RuntimeError)
        expected = _whole(model, tokenizers, "qwen3", gates, ids[:1])[-1]
        torch.testing.assert_close(found[other], expected, atol=1e-4, rtol=1e-4)


def test_peer_whose_context_is_full_is_left_out(members, tokenizers):
    prompt = _prompt(tokenizers, "llama", {"gemma3": 0.5})
    limits = {**dict.fromkeys(members, 512), "gemma3": len(prompt.peers["gemma3"].token_ids) + 5}
    passes = LatentPasses(tiny.latent_model(members), tokenizers, limits, max_rows=4)
    row = _row(prompt)
    _write(passes, {row: _ids(tokenizers, "llama")})
    assert _heard(row) == [{"gemma3": 0.5}, {}]
