"""Latent collaboration token by token: the logits that ``LatentModel`` gives for whole texts.

Each expert has a cache as a peer and one as a writer. Peers read their prompts first, then the
writer reads its own; after each of its tokens peers read what that completes, so that the next one
is drawn with them on the same text. What experts think is remembered as keys and values of the
interactions, and never computed again. A peer that fails is left out. Imports torch.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from experts.decoding import Prompt
from experts.errors import ExpertUnavailableError
from experts.latent.alignment import Follower, MemberTokenizer
from experts.latent.interaction import NEVER, Memory
from experts.passes import Lane, Logits, next_piece

if TYPE_CHECKING:
    from experts.decoding import Row
    from experts.latent.model import LatentModel
    from experts.latent.stacks import Between

__all__ = ["HeardPrompt", "LatentPasses", "LatentPrompt"]

logger = logging.getLogger("collegium.experts")

# Growing by blocks keeps reallocations rare; the unused part is masked.
_BLOCK = 256


@dataclass(frozen=True, slots=True)
class HeardPrompt:
    """A prompt as a peer reads it.

    Attributes:
        token_ids: Its tokens.
        seen_from: The writer's position from which each may be seen.
        gate: The peer's weight.
    """

    token_ids: Sequence[int]
    seen_from: Sequence[int]
    gate: float


@dataclass(slots=True, eq=False)
class LatentPrompt(Prompt):
    """A prompt as the writer reads it, and as its peers do.

    Attributes:
        writer: The expert that writes.
        gate: Its own weight.
        peers: What the others read, by name; none if nobody asked for peers.
        kept: The peers that were left once a row had read it.
        n_remembered: How many entries that row remembered then.
    """

    writer: str = ""
    gate: float = 1.0
    peers: Mapping[str, HeardPrompt] | None = None
    kept: frozenset[str] = frozenset()
    n_remembered: int = 0


@dataclass(slots=True)
class _Talk:
    """How far a row has come.

    Attributes:
        followers: Give each of its peers what it writes, by name; those left out are gone.
        n_remembered: Entries it remembers.
        listens: Whether its writer reads them.
    """

    followers: dict[str, Follower] = field(default_factory=dict)
    n_remembered: int = 0
    listens: bool = False


class LatentPasses:
    """Passes of experts that read each other's states; ``experts.passes.Passes``.

    Rows need a ``LatentPrompt``.

    Args:
        model: The experts, and what was learnt between them.
        tokenizers: Of each expert, by name.
        context_lengths: Of each expert, by name; a peer whose text grows longer is left out.
        max_rows: Rows there may be.
    """

    def __init__(
        self,
        model: LatentModel,
        tokenizers: Mapping[str, MemberTokenizer],
        context_lengths: Mapping[str, int],
        *,
        max_rows: int,
    ) -> None:
        self._model = model
        self._tokenizers = dict(tokenizers)
        self._context_lengths = context_lengths
        self._max_rows = max_rows
        self.reset()

    def reset(self) -> None:
        """Forget all rows."""
        self._talks: dict[Row, _Talk] = {}
        self._writers = {
            name: _WriterLane(self._model, name, self._max_rows) for name in self._model.members
        }
        self._readers = {
            name: Lane(member.reader.config, self._max_rows, member.device)
            for name, member in self._model.members.items()
            if member.starts
        }

    def fits(self, row: Row) -> bool:
        """Always."""
        return True

    def join(self, row: Row) -> None:
        """Give a row a place."""
        prompt = _prompt(row)
        talk = self._talks[row] = _Talk()
        if prompt.writer not in self._writers:
            return
        self._writers[prompt.writer].join(row)
        writer = self._tokenizers[prompt.writer]
        for name in prompt.peers or ():
            if name in self._readers:
                talk.followers[name] = Follower(writer, self._tokenizers[name])
                self._readers[name].join(row)

    def leave(self, rows: Sequence[Row]) -> None:
        """Free the places of rows."""
        for row in rows:
            for name in self._talks.pop(row).followers:
                self._readers[name].leave([row])
            lane = self._writers.get(_prompt(row).writer)
            if lane is not None:
                lane.leave([row])
                most = max((self._talks[r].n_remembered for r in lane.rows), default=0)
                lane.memory.shrink(most)

    def drop(self, name: str) -> None:
        """Take an expert out for good: answers it writes fail, others go on without it."""
        del self._model.members[name], self._tokenizers[name], self._writers[name]
        for row in list(self._talks):
            self._leave_out(row, name, "it was taken out")
        self._readers.pop(name, None)

    def read(self, row: Row, budget: int) -> tuple[int, Logits | Exception | None]:
        """Read a row's next prompt tokens, its peers' first; see ``Passes``."""
        prompt, talk = _prompt(row), self._talks[row]
        lane = self._writers.get(prompt.writer)
        if lane is None:
            return 0, _gone(prompt.writer)
        if prompt.logits is not None and self._copy_twin(lane, row):
            return 0, prompt.logits
        for name in talk.followers:
            heard, start = (prompt.peers or {})[name], self._readers[name].length(row)
            if start < len(heard.token_ids):
                piece = next_piece(heard.token_ids, start, budget)
                if piece:
                    seen_from = heard.seen_from[start : start + len(piece)]
                    self._hear_piece(row, name, piece, seen_from)
                return len(piece) or budget, None
        start = lane.length(row)
        if start == 0:
            talk.listens = bool(talk.followers) or talk.n_remembered > 0
        piece = next_piece(prompt.token_ids, start, budget)
        if not piece:
            return budget, None
        try:
            logits = self._write_piece(lane, row, piece)
        except Exception as error:  # whatever this model raises, the others may go on
            return len(piece), error
        if lane.length(row) < len(prompt.token_ids):
            return len(piece), None
        prompt.logits, prompt.kept = logits, frozenset(talk.followers)
        prompt.n_remembered = talk.n_remembered
        self._say(row)
        return len(piece), logits

    def decode(self, rows: Sequence[Row]) -> dict[Row, Logits | Exception]:
        """Have peers and writers read the last drawn tokens, return logits; see ``Passes``."""
        found: dict[Row, Logits | Exception] = {}
        going = defaultdict(list)
        for row in rows:
            if (writer := _prompt(row).writer) in self._writers:
                going[writer].append(row)
            else:
                found[row] = _gone(writer)
        self._follow([row for mine in going.values() for row in mine])
        for writer, mine in going.items():
            try:
                found |= self._write_tokens(self._writers[writer], mine)
            except Exception as error:  # as above
                found |= dict.fromkeys(mine, error)
        return found

    def _copy_twin(self, lane: _WriterLane, row: Row) -> bool:
        """Take the prompt over from another row that has read it, if there is one."""
        prompt, talk = _prompt(row), self._talks[row]
        twin = next(
            (
                other
                for other in lane.rows
                if other.prompt is prompt
                and other.decoding
                and self._talks[other].followers.keys() == prompt.kept
            ),
            None,
        )
        if twin is None or not prompt.kept <= talk.followers.keys():
            return False
        for name in list(talk.followers):
            if name in prompt.kept:
                heard = (prompt.peers or {})[name]
                self._readers[name].copy(twin, row, len(heard.token_ids))
            else:
                self._leave_out(row, name, "it failed on this prompt")
        lane.copy(twin, row, len(prompt.token_ids))
        lane.memory.copy(lane.rows.index(twin), lane.rows.index(row), prompt.n_remembered)
        talk.n_remembered = prompt.n_remembered
        talk.listens = self._talks[twin].listens
        self._say(row)
        return True

    # --- peers

    def _hear_piece(self, row: Row, name: str, piece: list[int], seen_from: Sequence[int]) -> None:
        """Have a peer read a piece of a row's prompt."""
        lane = self._readers[name]
        try:
            position_ids, mask = lane.for_prefill(row, len(piece))
            self._hear(name, [row], [piece], position_ids, mask, {row: seen_from})
        except Exception as error:  # whatever it raises, the writer may go on
            self._leave_out(row, name, repr(error))

    def _follow(self, rows: Sequence[Row]) -> None:
        """Have peers read what the rows' last drawn tokens complete."""
        new: dict[str, dict[Row, list[int]]] = defaultdict(dict)
        for row in rows:
            for name, follower in list(self._talks[row].followers.items()):
                try:
                    ids = follower.feed(row.last_id)
                except Exception as error:  # as above
                    self._leave_out(row, name, repr(error))
                    continue
                if self._readers[name].length(row) + len(ids) > self._context_lengths[name]:
                    self._leave_out(row, name, "its context is full")
                elif ids:
                    new[name][row] = ids
        for name, tokens in new.items():
            for number in range(max(map(len, tokens.values()))):
                step = {row: ids[number] for row, ids in tokens.items() if number < len(ids)}
                # Whoever was left out at the token before has no place any more.
                self._hear_tokens(
                    name, {row: i for row, i in step.items() if name in self._talks[row].followers}
                )

    def _hear_tokens(self, name: str, tokens: Mapping[Row, int]) -> None:
        """Have a peer read one token of each of these rows; others take part with a dummy."""
        if not tokens:
            return
        lane = self._readers[name]
        seen_from = {row: [self._writers[_prompt(row).writer].length(row)] for row in tokens}
        try:
            position_ids, mask = lane.for_decoding()
            token_ids = lane.padded([[tokens.get(row, 0)] for row in lane.rows], [0])
            self._hear(name, list(lane.rows), token_ids, position_ids, mask, seen_from)
        except Exception as error:  # as above
            for row in tokens:
                self._leave_out(row, name, repr(error))

    def _hear(
        self,
        name: str,
        batch: Sequence[Row],
        token_ids: list[list[int]],
        position_ids: torch.Tensor,
        mask: Any,
        seen_from: Mapping[Row, Sequence[int]],
    ) -> None:
        """A peer's pass: remember what it thinks for the rows that have ``seen_from``."""
        member, lane = self._model.members[name], self._readers[name]
        device = member.device
        states = member.read(
            input_ids=torch.tensor(token_ids, device=device),
            position_ids=position_ids,
            attention_mask=mask,
            past_key_values=lane.cache,
            use_cache=True,
        )
        finite = torch.stack([hidden.isfinite().flatten(1).all(1) for hidden in states])
        sound = finite.all(0).tolist()
        heard = [n for n, row in enumerate(batch) if row in seen_from and sound[n]]
        self._remember(name, states, {n: batch[n] for n in heard}, seen_from)
        for number in heard:
            lane.advance(batch[number], len(seen_from[batch[number]]))
            self._talks[batch[number]].n_remembered += len(seen_from[batch[number]])
        for number, row in enumerate(batch):
            if row in seen_from and not sound[number]:
                self._leave_out(row, name, "its states are not finite")

    def _remember(
        self,
        name: str,
        states: Sequence[torch.Tensor],
        rows: Mapping[int, Row],
        seen_from: Mapping[Row, Sequence[int]],
    ) -> None:
        """Keep what a peer thinks at each boundary, for some rows of a batch."""
        n_rows, n_tokens = states[0].shape[:2]
        device = states[0].device
        gates, views = [0.0] * n_rows, [[NEVER] * n_tokens] * n_rows
        by_writer: dict[str, list[int]] = defaultdict(list)
        for number, row in rows.items():
            prompt = _prompt(row)
            gates[number] = (prompt.peers or {})[name].gate
            views[number] = list(seen_from[row])
            by_writer[prompt.writer].append(number)
        weights, places = torch.tensor(gates, device=device), torch.tensor(views, device=device)
        for boundary, hidden in enumerate(states):
            noted = self._model.interaction(boundary).note(name, hidden, weights, places)
            for writer, numbers in by_writer.items():
                lane = self._writers[writer]
                slots = [lane.rows.index(rows[number]) for number in numbers]
                starts = [self._talks[rows[number]].n_remembered for number in numbers]
                lane.memory.put(boundary, slots, starts, _picked(noted, numbers))

    def _leave_out(self, row: Row, name: str, reason: str) -> None:
        """Go on without a peer; what it has said stays remembered."""
        talk, lane = self._talks[row], self._readers.get(name)
        if talk.followers.pop(name, None) is None or lane is None:
            return
        lane.leave([row])
        writer = _prompt(row).writer
        if (own := self._writers.get(writer)) is not None:
            # Who fails on the way leaves entries at some boundaries only.
            own.memory.forget(own.rows.index(row), talk.n_remembered)
        logger.warning("expert %r goes on without its peer %r: %s", writer, name, reason)
        if row.decoding:
            self._say(row)

    def _say(self, row: Row) -> None:
        """Tell a row's sink whom its writer listens to, if anyone asked."""
        prompt = _prompt(row)
        if prompt.peers is not None:
            followers = self._talks[row].followers
            row.sink.listens_to({name: prompt.peers[name].gate for name in followers})

    # --- writers

    def _write_piece(self, lane: _WriterLane, row: Row, piece: list[int]) -> Logits:
        """Have a writer read a piece of a row's prompt."""
        slot = lane.rows.index(row)
        position_ids, mask = lane.for_prefill(row, len(piece))
        logits = self._write(lane, slice(slot, slot + 1), [piece], position_ids, mask)
        self._advance(lane, row, len(piece))
        return logits[0]

    def _write_tokens(self, lane: _WriterLane, rows: Sequence[Row]) -> dict[Row, Logits]:
        """Have a writer read the last drawn token of each of these rows."""
        position_ids, mask = lane.for_decoding()
        token_ids = lane.padded([[row.last_id] for row in lane.rows], [0])
        logits = self._write(lane, slice(len(token_ids)), token_ids, position_ids, mask)
        for row in rows:
            self._advance(lane, row, 1)
        return {row: logits[lane.rows.index(row)] for row in rows}

    def _advance(self, lane: _WriterLane, row: Row, count: int) -> None:
        lane.advance(row, count)
        talk = self._talks[row]
        if talk.listens:
            talk.n_remembered += count

    def _write(
        self,
        lane: _WriterLane,
        slots: slice,
        token_ids: list[list[int]],
        position_ids: torch.Tensor,
        mask: Any,
    ) -> torch.Tensor:
        """A writer's pass; logits after each row's last token, as ``Logits`` in rows."""
        member, device = lane.member, lane.member.device
        between = self._between(lane, slots, position_ids)
        with member.listening(between) if between is not None else nullcontext():
            output = member.model(
                input_ids=torch.tensor(token_ids, device=device),
                position_ids=position_ids,
                attention_mask=mask,
                past_key_values=lane.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        logits: torch.Tensor = output.logits[:, -1]
        return logits.float().cpu()

    def _between(self, lane: _WriterLane, slots: slice, positions: torch.Tensor) -> Between | None:
        """What a writer does at each boundary; none if none of these rows listens."""
        batch, n_rows = lane.rows[slots], positions.shape[0]
        talks = [self._talks[row] for row in batch] + [_Talk()] * (n_rows - len(batch))
        if not any(talk.listens for talk in talks):
            return None
        device, name = positions.device, lane.member.name
        places = list(range(n_rows) if slots.start is None else range(slots.start, slots.stop))
        # Rows that read their prompt or listen to nobody take part with a dummy entry, which lands
        # where their next real one will overwrite it, or which nobody sees.
        starts = [talk.n_remembered for talk in talks]
        gates = torch.tensor(
            [_prompt(row).gate for row in batch] + [0.0] * (n_rows - len(batch)), device=device
        )
        listens = torch.tensor([talk.listens for talk in talks], device=device)[:, None, None]
        # A prompt is read alone. Decoding takes whole blocks, as the caches do: what neighbours
        # remember then rarely changes the order of summation.
        span = None if slots.start is None else starts[0] + positions.shape[1]

        def between(boundary: int, hidden: torch.Tensor) -> torch.Tensor:
            layer = self._model.interaction(boundary)
            lane.memory.put(boundary, places, starts, layer.note(name, hidden, gates, positions))
            memory = lane.memory.view(boundary, slots, span)
            message = layer(name, hidden, positions, memory)
            return torch.where(listens, hidden + message, hidden)

        return between


class _WriterLane(Lane):
    """The rows that one expert writes, and what they remember of all experts.

    Args:
        model: The experts, and what was learnt between them.
        name: The one that writes.
        max_rows: Rows there may be.

    Attributes:
        member: The one that writes.
        memory: What its rows remember, in their slots.
    """

    def __init__(self, model: LatentModel, name: str, max_rows: int) -> None:
        self.member = model.members[name]
        self._model = model
        super().__init__(self.member.model.config, max_rows, self.member.device)

    def reset(self) -> None:
        """Forget all rows."""
        super().reset()
        self.memory = _Memories(self._model, self._n_slots, self._device)

    def join(self, row: Row) -> None:
        """Give a row a slot."""
        super().join(row)
        self.memory.forget(len(self.rows) - 1, 0)

    def _move(self, source: int, target: int, length: int) -> None:
        super()._move(source, target, length)
        self.memory.copy(source, target, self.memory.capacity)


class _Memories:
    """What rows remember at each boundary, one slot per row.

    Attributes:
        capacity: Entries each slot has room for; grows by itself.
    """

    def __init__(self, model: LatentModel, n_slots: int, device: torch.device) -> None:
        self.capacity = 0
        heads, size = model.n_heads, model.width // model.n_heads
        dtype = next((p.dtype for p in model.parameters()), torch.float32)
        shape = (len(model.interactions), n_slots, heads, 0)
        self._keys = torch.zeros((*shape, size), dtype=dtype, device=device)
        self._values = torch.zeros((*shape, size + 1), dtype=dtype, device=device)
        self._seen_from = torch.zeros((n_slots, 0), dtype=torch.long, device=device)

    def put(self, boundary: int, slots: list[int], starts: list[int], new: Memory) -> None:
        """Write entries of some slots at a boundary, each slot's from its start on."""
        count = new.seen_from.shape[1]
        self._reserve(max(starts) + count)
        device = self._seen_from.device
        rows = torch.tensor(slots, device=device)[:, None]
        places = torch.tensor(starts, device=device)[:, None] + torch.arange(count, device=device)
        self._keys[boundary][rows, :, places] = new.keys.transpose(1, 2)
        self._values[boundary][rows, :, places] = new.values.transpose(1, 2)
        self._seen_from[rows, places] = new.seen_from

    def view(self, boundary: int, slots: slice, span: int | None) -> Memory:
        """What some slots remember at a boundary, or the first ``span`` entries of it."""
        return Memory(
            self._keys[boundary, slots, :, :span],
            self._values[boundary, slots, :, :span],
            self._seen_from[slots, :span],
        )

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy the first entries of one slot over those of another, which forgets the rest."""
        for buffer in (self._keys, self._values):
            buffer[:, target, :, :count] = buffer[:, source, :, :count]
        self._seen_from[target, :count] = self._seen_from[source, :count]
        self._seen_from[target, count:] = NEVER

    def forget(self, slot: int, start: int) -> None:
        """Forget a slot's entries from ``start`` on."""
        # As in the caches, NaN would count even where it is not seen.
        self._keys[:, slot, :, start:] = self._values[:, slot, :, start:] = 0
        self._seen_from[slot, start:] = NEVER

    def shrink(self, count: int) -> None:
        """Give back the memory beyond so many entries, if that is more than half of it."""
        wanted = -(-count // _BLOCK) * _BLOCK
        if wanted * 2 < self.capacity:
            self._keys = self._keys[:, :, :, :wanted].clone()
            self._values = self._values[:, :, :, :wanted].clone()
            self._seen_from = self._seen_from[:, :wanted].clone()
            self.capacity = wanted

    def _reserve(self, count: int) -> None:
        if count <= self.capacity:
            return
        grown = -(-count // _BLOCK) * _BLOCK
        more = grown - self.capacity
        self._keys, self._values = (
            functional.pad(buffer, (0, 0, 0, more)) for buffer in (self._keys, self._values)
        )
        self._seen_from = functional.pad(self._seen_from, (0, more), value=NEVER)
        self.capacity = grown


def _prompt(row: Row) -> LatentPrompt:
    assert isinstance(row.prompt, LatentPrompt)
    return row.prompt


def _gone(writer: str) -> ExpertUnavailableError:
    return ExpertUnavailableError(writer, "it was taken out")


def _picked(memory: Memory, rows: list[int]) -> Memory:
    """Some rows' entries."""
    return Memory(memory.keys[rows], memory.values[rows], memory.seen_from[rows])
