"""What experts say to each other: attention of the one that writes over the states of all.

Knows tensors only: neither models nor texts. Imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional

__all__ = ["NEVER", "Interaction", "Memory", "Scale"]

NEVER = torch.iinfo(torch.long).max // 2
"""A position of the writer that it never reaches: entries from there on are not there."""

# Powers of two that heads' slopes begin with, per token.
_STEEPEST, _FLATTEST = 3.0, 1.0

# Nobody counts less than this, so that something can be seen from everywhere.
_LEAST = 1e-6

# Tokens that look like no other say no more than others do.
_MOST = 8.0


class Memory:
    """What an interaction layer attends over.

    Attributes:
        keys: Shape (n_rows, n_heads, n_entries, head_size).
        values: Shape (n_rows, n_heads, n_entries, head_size + 1); the last number of each is its
            expert's gate.
        seen_from: The writer's position from which each entry may be seen, shape (n_rows,
            n_entries); ``NEVER`` where there is none.
    """

    __slots__ = ("keys", "seen_from", "values")

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, seen_from: torch.Tensor) -> None:
        self.keys, self.values, self.seen_from = keys, values, seen_from

    @property
    def gates(self) -> torch.Tensor:
        """How much the expert of each entry counts, shape (n_rows, n_entries)."""
        return self.values[:, 0, :, -1]

    def __add__(self, other: Memory) -> Memory:
        """Entries of both."""
        return Memory(
            torch.cat([self.keys, other.keys], 2),
            torch.cat([self.values, other.values], 2),
            torch.cat([self.seen_from, other.seen_from], 1),
        )


class Scale(nn.Module):
    """Puts one expert's states on the scale that all share, and what is said to it on its own.

    Hidden states are mostly constant: a few dimensions, the same for all tokens, hold nearly all of
    their length. What tells one text from another is read off the rest, so each dimension is taken
    relative to its mean and spread over real texts. These are measured, not learnt.

    References:
        Sun et al., "Massive Activations in Large Language Models" (arXiv:2402.17762).

    Args:
        width: Size of the expert's hidden states.
    """

    mean: torch.Tensor
    spread: torch.Tensor
    length: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))
        self.register_buffer("length", torch.ones(()))

    @torch.no_grad()
    def fit(self, states: torch.Tensor) -> None:
        """Measure on tokens of texts, shape (n_tokens, width).

        The first token of a text is better left out: many models park attention there, and it
        looks like no other.
        """
        states = states.to(self.mean.dtype)
        normed = functional.rms_norm(states, states.shape[-1:])
        self.mean.copy_(normed.mean(0))
        self.spread.copy_(normed.std(0).clamp(min=1e-4))
        self.length.copy_(states.square().mean(-1).sqrt().median())

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """States on the common scale, same shape."""
        states = states.to(self.mean.dtype)
        normed = functional.rms_norm(states, states.shape[-1:])
        return ((normed - self.mean) / self.spread).clamp(-_MOST, _MOST)

    def back(self, message: torch.Tensor) -> torch.Tensor:
        """A message on the expert's own scale; a message of zero stays zero."""
        return message * (self.spread * self.length)


class Interaction(nn.Module):
    """One boundary between stacks: the writer attends over what all active experts think.

    With states H_m of expert m, gates w_m and a writer p, in a space of ``width`` dimensions:

        P_m = In_m scaled_m(H_m)
        A   = softmax(W_q P_p (W_k P_m)^T / sqrt(d) - slope * distance + log w_m + mask)
              W_v (P_m - P_p)
        H_p <- H_p + unscaled_p((Out_p + gain_p In_p^T) W_o A)

    The softmax runs over the tokens of all experts together, the writer's own included, so gates
    say how attention is shared before anything is known of what is said. If all are zero nothing is
    said. The mask and the distance are in positions of the writer: an entry is seen from the
    position that ``seen_from`` says. What is passed on is how another thought differs from the
    writer's at the token that asks, so experts that agree say nothing. ``Out`` and ``gain`` begin
    as zero, so an untrained layer leaves H_p as it is, bit for bit.

    Experts whose states have one size begin with the same ``In``, which gain turns back: adapters
    of one base speak one language, and the first thing to be learnt is one number, how far to go
    over to the others.

    References:
        "Mixture of Thoughts" (arXiv:2509.21164). Departs from it in gating attention, in attending
        over peers' tokens at their own length, in the distance (Press et al., ALiBi,
        arXiv:2108.12409, with learned slopes), in passing on differences, in scaling states by
        measured moments instead of a learned LayerNorm, and in leaving peers' states as they are.

    Args:
        widths: Size of each expert's hidden states, by name.
        width: Size of the shared space.
        n_heads: Attention heads; a divisor of ``width``.
    """

    def __init__(self, widths: Mapping[str, int], width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        # Names may hold dots, which names of modules may not.
        self._places = {name: str(place) for place, name in enumerate(widths)}
        places = dict(zip(self._places.values(), widths.values(), strict=True))
        self.scale = nn.ModuleDict({p: Scale(size) for p, size in places.items()})
        into = {p: nn.Linear(size, width, bias=False) for p, size in places.items()}
        out = {p: nn.Linear(width, size, bias=False) for p, size in places.items()}
        self.into, self.out = nn.ModuleDict(into), nn.ModuleDict(out)
        self.query, self.key, self.value, self.mix = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.gain = nn.ParameterDict({p: nn.Parameter(torch.zeros(())) for p in places})
        # All look at what was said just now, some a little further back: what a peer read before,
        # it has told itself. Heads that look at all alike pass on noise until they have learnt.
        exponents = torch.linspace(_STEEPEST, _FLATTEST, n_heads)
        self.slope = nn.Parameter(exponents * math.log(2))
        alike: dict[int, torch.Tensor] = {}
        for linear in into.values():
            nn.init.orthogonal_(linear.weight)
            start = alike.setdefault(linear.in_features, linear.weight.detach())
            linear.weight.data.copy_(start)
        for linear in out.values():
            nn.init.zeros_(linear.weight)
        nn.init.zeros_(self.query.weight)  # distance alone decides
        nn.init.normal_(self.key.weight, std=width**-0.5)
        nn.init.eye_(self.value.weight)
        nn.init.eye_(self.mix.weight)

    def scale_of(self, name: str) -> Scale:
        """The scale of an expert's states."""
        scale = self.scale[self._places[name]]
        assert isinstance(scale, Scale)
        return scale

    def note(
        self, name: str, states: torch.Tensor, gate: torch.Tensor, seen_from: torch.Tensor
    ) -> Memory:
        """What an expert's states are to others.

        Args:
            name: The expert.
            states: Its hidden states, shape (n_rows, n_tokens, its width).
            gate: Its weight in each row, shape (n_rows,).
            seen_from: The writer's position from which each token may be seen, shape (n_rows,
                n_tokens).
        """
        shared = self._shared(name, states)
        values = self._heads(self.value(shared))
        gates = gate.to(shared)[:, None, None, None].expand(*values.shape[:-1], 1)
        return Memory(self._heads(self.key(shared)), torch.cat([values, gates], -1), seen_from)

    def forward(
        self, name: str, states: torch.Tensor, positions: torch.Tensor, memory: Memory
    ) -> torch.Tensor:
        """What the writer adds to its states, same shape and format as these.

        Args:
            name: The expert that writes.
            states: Its hidden states, shape (n_rows, n_tokens, its width).
            positions: Where these tokens stand, shape (n_rows, n_tokens).
            memory: What may be seen; holds these tokens too.
        """
        shared = self._shared(name, states)
        query, own = self._heads(self.query(shared)), self._heads(self.value(shared))
        distance = positions[:, :, None] - memory.seen_from[:, None, :]
        bias = -self.slope.exp()[:, None, None] * distance.clamp(min=0)[:, None].to(query)
        bias = bias + memory.gates.clamp(min=_LEAST).log()[:, None, None]
        bias = bias.masked_fill((distance < 0)[:, None], float("-inf"))
        attended = functional.scaled_dot_product_attention(
            query, memory.keys, memory.values, attn_mask=bias
        )
        said = (memory.gates > 0).any(1)[:, None, None, None]
        differing = (attended[..., :-1] - own) * said
        mixed = self.mix(differing.transpose(1, 2).flatten(2))
        place = self._places[name]
        message = self.out[place](mixed) + self.gain[place] * (mixed @ self.into[place].weight)
        return self.scale_of(name).back(message).to(states.dtype)

    def _shared(self, name: str, states: torch.Tensor) -> torch.Tensor:
        shared: torch.Tensor = self.into[self._places[name]](self.scale_of(name)(states))
        return shared

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        heads: torch.Tensor = states.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        return heads
