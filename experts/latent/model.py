"""Frozen experts and what is learnt between them, over whole texts: for training and for checks.

Serving goes token by token (``experts.latent.passes``) and gives the same logits. Imports torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from experts.latent.alignment import AlignedTokens
from experts.latent.interaction import NEVER, Interaction, Memory
from experts.latent.stacks import StackedModel

__all__ = ["LatentModel", "LatentText"]


@dataclass(slots=True)
class LatentText:
    """A text, who writes it, and who is listened to.

    Attributes:
        writer: The expert that writes.
        tokens: What each active expert reads, the writer among them.
        gates: Weight of each active expert, scalars; they may carry gradient.
        states: Hidden states at each boundary that are known already, by expert: shape
            (n_boundaries, n_tokens, width).
    """

    writer: str
    tokens: Mapping[str, AlignedTokens]
    gates: Mapping[str, torch.Tensor]
    states: Mapping[str, torch.Tensor] | None = None

    @property
    def route(self) -> tuple[str, frozenset[str]]:
        """Texts of one route can be computed together."""
        return self.writer, frozenset(self.gates)


class LatentModel(nn.Module):
    """Experts cut into stacks, with an interaction at each boundary.

    Only the interactions are parameters; experts stay as they are.

    Args:
        members: The experts by name, cut into equally many stacks.
        width: Size of the space they share.
        n_heads: Attention heads in it.

    Attributes:
        members: The experts.
        width: Size of the space they share.
        n_heads: Attention heads in it.
        interactions: One per boundary.
    """

    def __init__(self, members: Mapping[str, StackedModel], width: int, n_heads: int) -> None:
        super().__init__()
        self.members = dict(members)
        self.width, self.n_heads = width, n_heads
        widths = {name: member.width for name, member in members.items()}
        boundaries = {len(member.starts) for member in members.values()}
        assert len(boundaries) == 1, "members are cut into different numbers of stacks"
        self.interactions = nn.ModuleList(
            Interaction(widths, width, n_heads) for _ in range(*boundaries)
        )

    def interaction(self, boundary: int) -> Interaction:
        """The learned layer at a boundary."""
        layer = self.interactions[boundary]
        assert isinstance(layer, Interaction)
        return layer

    def fit_scales(self, name: str, states: Sequence[torch.Tensor]) -> None:
        """Measure what an expert's states look like, before anything is learnt.

        Args:
            name: The expert.
            states: Of some texts, shape (n_boundaries, n_tokens, width) each.
        """
        for boundary in range(len(self.interactions)):
            tokens = torch.cat([text[boundary, 1:] for text in states])
            self.interaction(boundary).scale_of(name).fit(tokens)

    @torch.no_grad()
    def read(self, name: str, texts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Hidden states of an expert, one tensor per text: (n_boundaries, n_tokens, width)."""
        member = self.members[name]
        ids = pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
        states = torch.stack(member.read(input_ids=ids.to(member.device), use_cache=False), 1)
        return [found[:, : len(text)] for found, text in zip(states, texts, strict=True)]

    def forward(
        self, texts: Sequence[LatentText], *, last: Sequence[int] | None = None
    ) -> list[torch.Tensor]:
        """Logits of the writers' tokens.

        Texts are computed in groups of one route; what a text gets does not depend on the others.

        Args:
            texts: What to compute.
            last: How many tokens at the end of each text to give logits for; none gives all.

        Returns:
            In the order of the texts, shape (n_tokens, vocabulary) each.
        """
        groups = defaultdict(list)
        for number, text in enumerate(texts):
            groups[text.route].append(number)
        logits: dict[int, torch.Tensor] = {}
        for (writer, _), numbers in groups.items():
            states = self._group(writer, [texts[number] for number in numbers])
            for number, found in zip(numbers, states, strict=True):
                kept = found if last is None else found[-last[number] :]
                logits[number] = self.members[writer].head(kept)
        return [logits[number] for number in range(len(texts))]

    def _group(self, writer: str, texts: Sequence[LatentText]) -> list[torch.Tensor]:
        """Final states of texts of one route, shape (n_tokens, width) each."""
        member = self.members[writer]
        gates = {name: torch.stack([t.gates[name] for t in texts]) for name in texts[0].gates}
        views = {name: self._views(name, texts) for name in gates}
        peers = [name for name in gates if name != writer and len(self.interactions)]
        heard = {name: self._heard(name, texts) for name in peers}
        positions = views[writer]

        def between(boundary: int, hidden: torch.Tensor) -> torch.Tensor:
            layer = self.interaction(boundary)
            memory: Memory = layer.note(writer, hidden, gates[writer], positions)
            for name, states in heard.items():
                memory = memory + layer.note(
                    name, states[boundary].to(hidden.device), gates[name], views[name]
                )
            message: torch.Tensor = layer(writer, hidden, positions, memory)
            return hidden + message

        first = [t.states[writer][0] for t in texts if t.states is not None]
        if first and len(first) == len(texts):
            hidden = pad_sequence(first, batch_first=True).to(member.device, member.dtype)
            states = member.finish(between, hidden)
        else:
            ids = pad_sequence(
                [torch.tensor(t.tokens[writer].ids) for t in texts], batch_first=True
            )
            states = member.states(between, input_ids=ids.to(member.device), use_cache=False)
        return [s[: len(t.tokens[writer].ids)] for s, t in zip(states, texts, strict=True)]

    def _views(self, name: str, texts: Sequence[LatentText]) -> torch.Tensor:
        """Where the tokens of an expert are seen from, shape (n_texts, n_tokens)."""
        writer = texts[0].writer
        device = self.members[writer].device
        if name == writer:
            longest = max(len(t.tokens[name].ids) for t in texts)
            # Padding counts on, so that it sees something; nobody sees it, or reads what it gets.
            return torch.arange(longest, device=device).expand(len(texts), -1)
        rows = [torch.tensor(t.tokens[name].seen_from, dtype=torch.long) for t in texts]
        return pad_sequence(rows, batch_first=True, padding_value=NEVER).to(device)

    def _heard(self, name: str, texts: Sequence[LatentText]) -> torch.Tensor:
        """States of a peer, shape (n_boundaries, n_texts, n_tokens, width)."""
        known = [t.states[name] for t in texts if t.states is not None]
        if len(known) < len(texts):
            known = self.read(name, [t.tokens[name].ids for t in texts])
        padded = pad_sequence([states.transpose(0, 1) for states in known], batch_first=True)
        return padded.permute(2, 0, 1, 3)
