"""A frozen decoder as a sequence of stacks of layers, with its hidden states in between reachable.

Any Hugging Face decoder whose layers lie in one list works: its own ``forward`` runs, with masks,
positions and caches of its own making, and a hook before the first layer of each stack passes the
hidden states to whoever listens. Knows nothing of routes, peers or learning. Imports torch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from experts.errors import ExpertConfigError

__all__ = ["Between", "StackedModel", "stack_starts"]

Between = Callable[[int, torch.Tensor], torch.Tensor]
"""Gets the number of a boundary, from 0, and the hidden states there, shape (n_rows, n_tokens,
width); returns those to go on with."""

# Two ways to compute the same in float32 may differ by the order of additions.
_TOLERANCE = 1e-3


def stack_starts(n_layers: int, n_stacks: int) -> list[int]:
    """The first layer of each stack after the first: where experts meet.

    Stacks are of one size, but for a smaller last one.

    Raises:
        ValueError: There are more stacks than layers to fill them.

    Examples:
        >>> stack_starts(30, 4)
        [8, 16, 24]
        >>> stack_starts(18, 1)
        []
    """
    size = -(-n_layers // n_stacks)
    starts = [number * size for number in range(1, n_stacks)]
    if starts and starts[-1] >= n_layers:
        raise ValueError(f"{n_layers} layers cannot be cut into {n_stacks} stacks")
    return starts


class StackedModel:
    """A causal language model cut into stacks of layers.

    Args:
        name: Of the expert, for error messages.
        model: A transformers causal language model, frozen.
        n_stacks: Into how many stacks its layers are cut.

    Attributes:
        model: The model, as it is.
        reader: The same without the last stack and without a head: all that peers run.
        width: Size of its hidden states.
        starts: The first layer of each stack after the first.

    Raises:
        ExpertConfigError: Its layers cannot be found, or are fewer than the stacks.
    """

    def __init__(self, name: str, model: Any, n_stacks: int) -> None:
        self.name = name
        self.model = model
        self._decoder = model.get_decoder()
        layers = getattr(self._decoder, "layers", None)
        if not isinstance(layers, nn.ModuleList) or not hasattr(self._decoder, "norm"):
            raise ExpertConfigError(
                f"expert {name!r}: the layers of a {type(model).__name__} cannot be reached; "
                "latent collaboration needs a decoder with a list 'layers' and a final 'norm'"
            )
        try:
            self.starts = stack_starts(len(layers), n_stacks)
        except ValueError as error:
            raise ExpertConfigError(f"expert {name!r}: {error}") from error
        self.width: int = model.config.get_text_config().hidden_size
        self._between: Between | None = None
        for boundary, start in enumerate(self.starts):
            layers[start].register_forward_pre_hook(self._hook(boundary), with_kwargs=True)
        self.reader = _part(self._decoder, 0, self.starts[-1]) if self.starts else self._decoder
        self._tail: Any = None

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return torch.device(self.model.device)

    @property
    def dtype(self) -> torch.dtype:
        """Number format of its hidden states."""
        dtype: torch.dtype = self.model.get_input_embeddings().weight.dtype
        return dtype

    @contextmanager
    def listening(self, between: Between) -> Iterator[None]:
        """Have ``between`` called at each boundary of passes inside the block."""
        self._between = between
        try:
            yield
        finally:
            self._between = None

    def read(self, **inputs: Any) -> list[torch.Tensor]:
        """Hidden states at each boundary, shape (n_rows, n_tokens, width) each.

        The last stack does not run, since nobody listens after it.

        Args:
            inputs: What the model's own decoder takes: ``input_ids`` and the like.
        """
        found: list[torch.Tensor] = []

        def keep(boundary: int, hidden: torch.Tensor) -> torch.Tensor:
            found.append(hidden)
            return hidden

        with self.listening(keep):
            # The last boundary lies behind the reader's last layer, where no hook is.
            last = self.reader(**inputs).last_hidden_state
        return [*found, last] if self.starts else []

    def states(self, between: Between, **inputs: Any) -> torch.Tensor:
        """States after the final norm of a pass that listens, shape (n_rows, n_tokens, width)."""
        with self.listening(between):
            states: torch.Tensor = self._decoder(**inputs).last_hidden_state
        return states

    def finish(self, between: Between, hidden: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """As ``states`` without a cache, from the states at the first boundary on.

        Training computes the frozen first stack once and then starts here.

        Args:
            between: Called at each boundary, the first one too.
            hidden: States at the first boundary, shape (n_rows, n_tokens, width).
            inputs: What the decoder takes besides.

        Returns:
            States after the final norm, shape as ``hidden``; ``head`` makes logits of them.
        """
        if self._tail is None:
            self._tail = _part(self._decoder, self.starts[0], len(self._decoder.layers))
            self._tail.norm = self._decoder.norm
        with self.listening(between):
            states: torch.Tensor = self._tail(
                inputs_embeds=hidden, use_cache=False, **inputs
            ).last_hidden_state
        return states

    def head(self, states: torch.Tensor) -> torch.Tensor:
        """Logits of states after the final norm; shape (..., vocabulary)."""
        logits: torch.Tensor = self.model.get_output_embeddings()(states)
        cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def check(self) -> None:
        """Make sure that its parts compute what the whole does.

        Raises:
            ExpertConfigError: They do not: the architecture does more than run layer after layer.
        """
        ids = (
            torch.arange(8, device=self.device)[None]
            % self.model.config.get_text_config().vocab_size
        )

        def pass_on(boundary: int, hidden: torch.Tensor) -> torch.Tensor:
            return hidden

        with torch.no_grad():
            whole = self.model(input_ids=ids, use_cache=False).logits
            states = self.read(input_ids=ids, use_cache=False)
            found = self.head(self.finish(pass_on, states[0])) if states else whole
        limit = _TOLERANCE if self.dtype == torch.float32 else 0.1
        if (found - whole).abs().max() > limit * whole.abs().max().clamp(min=1.0):
            raise ExpertConfigError(
                f"expert {self.name!r}: a {type(self.model).__name__} cannot be cut into stacks; "
                "its layers take more than the hidden states of the layer before"
            )

    def _hook(self, boundary: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if self._between is None:
                return None
            if args:
                return (self._between(boundary, args[0]), *args[1:]), kwargs
            hidden = self._between(boundary, kwargs["hidden_states"])
            return args, {**kwargs, "hidden_states": hidden}

        return hook


def _part(decoder: Any, first: int, end: int) -> Any:
    """The same decoder with some of its layers only, sharing all weights, without its norm."""
    part = copy.copy(decoder)
    # nn.Module keeps its children in a dictionary, which a shallow copy shares.
    part._modules = dict(decoder._modules)
    part.layers = decoder.layers[first:end]
    part.norm = nn.Identity()
    part.config = copy.deepcopy(decoder.config)
    part.config.num_hidden_layers = end - first
    if kinds := getattr(decoder.config, "layer_types", None):
        part.config.layer_types = list(kinds)[first:end]
    return part
