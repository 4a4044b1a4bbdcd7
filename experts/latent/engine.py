"""Hosts experts that read each other's states, all in this process; gives one expert for each.

Knows nothing of Ray or HTTP. torch and transformers are imported when an engine is built.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from experts.answer_writer import Piece
from experts.base import AnyRequest
from experts.config import LatentExpertConfig, cards_of
from experts.errors import ExpertConfigError, ExpertUnavailableError, InvalidRequestError
from experts.in_process import InProcessEngine, InProcessExpert, RowMaker, extra_field
from experts.latent.alignment import first_views

if TYPE_CHECKING:
    from experts.decoding import Row
    from experts.latent.passes import HeardPrompt, LatentPrompt

__all__ = ["LatentEngine", "LatentExpert"]

# Gates come from a softmax; their sum may miss 1 by a rounding error.
_ROUNDING = 1e-6


class LatentExpert(InProcessExpert):
    """One expert of a latent engine.

    It answers alone, or, where a request has the field ``peers``, ``{name: gate}``, reads the
    states of these experts while it writes.
    """

    engine: LatentEngine

    async def check_health(self) -> None:
        """Return if it can answer now."""
        await super().check_health()
        self.engine.check_hosted(self.card.name)


class LatentEngine(InProcessEngine[LatentExpert]):
    """Hosts the experts of a latent collaboration.

    Args:
        config: What to host.

    Raises:
        ExpertConfigError: Weights or the artefact are missing, do not fit each other, or do not fit
            into memory.
    """

    def __init__(self, config: LatentExpertConfig) -> None:
        from experts.decoding import Decoder
        from experts.latent.artefact import load_latent, read_latent
        from experts.latent.members import load_members
        from experts.latent.passes import LatentPasses
        from experts.paths import resolve_path

        self.config = config
        folder = resolve_path(config.artefact)
        manifest = read_latent(folder, [member.name for member in config.members])
        members = load_members(
            config.members,
            n_stacks=manifest.n_stacks,
            dtype=config.dtype,
            device=config.device,
            cached_tokens=config.max_batch_size * config.default_max_tokens,
            noted_bytes=manifest.noted_bytes,
        )
        model = load_latent(folder, members).to(config.device)
        self._tokenizers = {name: member.tokenizer for name, member in members.items()}
        self._makers = {
            name: RowMaker(
                name,
                member.tokenizer.tokenizer,
                member.stacked.model,
                context_length=_context_length(config, name, member.stacked.model.config),
                default_max_tokens=config.default_max_tokens,
            )
            for name, member in members.items()
        }
        self._passes = LatentPasses(
            model,
            self._tokenizers,
            {name: maker.context_length for name, maker in self._makers.items()},
            max_rows=config.max_batch_size,
        )
        decoder = Decoder(self._passes, max_rows=config.max_batch_size, threads=config.threads)
        super().__init__(config.name, decoder)
        self._experts = {
            card.name: LatentExpert(self, self._makers[card.name].complete(card))
            for card in cards_of(config)
        }

    def drop(self, name: str) -> None:
        """Free an expert's memory for good.

        Answers it writes fail and others go on without it. Waits for the running decode step.
        Blocks: from a coroutine call it by ``asyncio.to_thread``.

        Raises:
            ExpertUnavailableError: There is no such expert any more.
        """
        self.check_hosted(name)
        del self._makers[name]
        self._decoder.call(lambda: self._passes.drop(name)).result()
        # A model and the hooks on it hold each other.
        gc.collect()
        if self.config.device != "cpu":
            import torch

            torch.cuda.empty_cache()

    def check_hosted(self, name: str) -> None:
        """Return if an expert has not been dropped, raise an ExpertUnavailableError if it has."""
        if name not in self._makers:
            raise ExpertUnavailableError(name, "it was taken out")

    async def rows(
        self, request: AnyRequest, expert: LatentExpert, pieces: asyncio.Queue[Piece]
    ) -> tuple[list[Row], int]:
        """Check a request and turn it into rows; also return its number of prompt tokens."""
        from experts.latent.passes import LatentPrompt

        name = expert.card.name
        self.check_hosted(name)
        maker, gates = self._makers[name], self._gates(name, request)
        id_lists = maker.read(expert.card, request)
        if gates:
            prompts = self._heard(name, request, gates)
        else:
            nobody: dict[str, HeardPrompt] | None = None if gates is None else {}
            prompts = [LatentPrompt(ids, writer=name, peers=nobody) for ids in id_lists]
        rows = await maker.rows(expert.card, request, prompts, pieces)
        return rows, sum(map(len, id_lists))

    def _gates(self, writer: str, request: AnyRequest) -> dict[str, float] | None:
        """The field ``peers`` of a request, checked; none if it is not there."""
        peers = extra_field(request, "peers")
        if peers is None:
            return None
        if not isinstance(peers, Mapping) or not all(map(_is_gate, peers.values())):
            raise InvalidRequestError(
                "peers must map names of experts to gates above 0 and at most 1", "peers"
            )
        for name in peers:
            if name == writer or name not in self._experts:
                others = ", ".join(repr(other) for other in self._experts if other != writer)
                raise InvalidRequestError(
                    f"peers names {name!r}, but expert {writer!r} can listen to {others or 'none'}",
                    "peers",
                )
        if sum(peers.values()) > 1 + _ROUNDING:
            raise InvalidRequestError(
                f"the gates in peers sum to {sum(peers.values()):g}; what is left to 1 is the "
                "writer's own, so expected at most 1",
                "peers",
            )
        return {name: float(gate) for name, gate in peers.items()}

    def _heard(
        self, writer: str, request: AnyRequest, gates: Mapping[str, float]
    ) -> list[LatentPrompt]:
        """The prompts of a request with what peers read of them, as far as they can."""
        from experts.latent.passes import HeardPrompt, LatentPrompt

        own = self._tokenizers[writer].read(request)
        peers: list[dict[str, HeardPrompt]] = [{} for _ in own]
        for name, gate in gates.items():
            maker = self._makers.get(name)
            try:
                theirs = self._tokenizers[name].read(request)
            except InvalidRequestError:  # its chat template refuses what the writer's takes
                continue
            for heard, mine, its in zip(peers, own, theirs, strict=True):
                if maker is not None and 0 < len(its.ids) <= maker.context_length:
                    heard[name] = HeardPrompt(its.ids, first_views(mine, its), gate)
        left = max(0.0, 1.0 - sum(gates.values()))
        return [
            LatentPrompt(mine.ids, writer=writer, gate=left, peers=heard)
            for mine, heard in zip(own, peers, strict=True)
        ]


def _is_gate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def _context_length(config: LatentExpertConfig, name: str, model_config: Any) -> int:
    """Longest prompt plus answer in tokens: the model's, or the config's if that is less."""
    longest: int | None = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    found = min((n for n in (config.context_length, longest) if n is not None), default=None)
    if found is None:
        raise ExpertConfigError(f"expert {name!r}: give {config.name!r} a context_length")
    return found
