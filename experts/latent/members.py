"""Loading the experts of a latent collaboration. torch and transformers are imported on use."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from experts.errors import ExpertConfigError
from experts.latent.alignment import MemberTokenizer
from experts.latent.config import MemberConfig
from experts.memory import available_bytes

if TYPE_CHECKING:
    from experts.latent.stacks import StackedModel

__all__ = ["GIB", "Member", "load_members", "member_revision", "needed_bytes", "wrap"]

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Member:
    """A loaded expert.

    Attributes:
        stacked: Its model, cut into stacks.
        tokenizer: Its tokenizer.
        revision: Tells its weights from others.
    """

    stacked: StackedModel
    tokenizer: MemberTokenizer
    revision: str


def member_revision(config: MemberConfig) -> str:
    """What tells an expert's weights, its adapter's included, from others."""
    from experts.weights import model_revision, resolve_model

    base = model_revision(resolve_model(config.model))
    if config.adapter is None:
        return base
    digest = hashlib.sha256()
    # The description says how much the weights count.
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        file = _adapter_folder(config) / name
        if not file.is_file():
            raise ExpertConfigError(f"expert {config.name!r}: {config.adapter!r} holds no {name}")
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return f"{base}+{digest.hexdigest()}"


def needed_bytes(
    configs: Sequence[MemberConfig], dtype: str, cached_tokens: int = 0, noted_bytes: int = 0
) -> dict[str, int]:
    """Memory that each expert's weights and caches take, by name, found without loading them.

    Each has a cache as the one that writes and one as a peer.

    Args:
        configs: The experts.
        dtype: Number format of weights and caches.
        cached_tokens: Tokens that each cache holds.
        noted_bytes: What interactions keep of each of these tokens.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from experts.weights import resolve_model

    size = getattr(torch, dtype).itemsize
    found = {}
    for config in configs:
        try:
            described = AutoConfig.from_pretrained(str(resolve_model(config.model)))
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(described)
            per_token = _cached_numbers(described)
        except (OSError, ValueError, AttributeError) as error:
            raise _cannot_load(config, error) from error
        weights = sum(p.numel() for p in model.parameters())
        cached = cached_tokens * (2 * size * per_token + noted_bytes)
        found[config.name] = size * weights + cached
    return found


def _cached_numbers(described: Any) -> int:
    """How many numbers a model's cache holds per token."""
    config = described.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None)
    head_size = head_size or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * head_size)


def load_members(
    configs: Sequence[MemberConfig],
    *,
    n_stacks: int,
    dtype: str,
    device: str,
    cached_tokens: int = 0,
    noted_bytes: int = 0,
) -> dict[str, Member]:
    """Load experts, frozen, by name; each with weights of its own.

    Args:
        configs: The experts.
        n_stacks: Into how many stacks each is cut.
        dtype: Number format of weights and activations.
        device: Where they compute.
        cached_tokens: Tokens that each cache will hold, for the memory check.
        noted_bytes: What interactions will keep of each of these tokens.

    Raises:
        ExpertConfigError: One is missing, cannot be cut, or all together do not fit into memory.
    """
    _check_memory(needed_bytes(configs, dtype, cached_tokens, noted_bytes), device)
    return {config.name: _load(config, n_stacks, dtype, device) for config in configs}


def wrap(name: str, model: Any, tokenizer: Any, *, n_stacks: int, revision: str = "") -> Member:
    """A member of a model that is loaded already.

    Raises:
        ExpertConfigError: The model cannot be cut into stacks, or the tokenizer is too simple.
    """
    from experts.latent.stacks import StackedModel

    if not getattr(tokenizer, "is_fast", False):
        raise ExpertConfigError(
            f"expert {name!r}: its tokenizer does not say where tokens end; latent collaboration "
            "needs one with a tokenizer.json"
        )
    stacked = StackedModel(name, model.eval().requires_grad_(False), n_stacks)
    stacked.check()
    return Member(stacked, MemberTokenizer(name, tokenizer), revision)


def _load(config: MemberConfig, n_stacks: int, dtype: str, device: str) -> Member:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from experts.weights import resolve_model

    source = str(resolve_model(config.model))
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
        if config.adapter is not None:
            from peft import PeftModel

            adapted: Any = PeftModel.from_pretrained(model, str(_adapter_folder(config)))
            model = adapted.merge_and_unload()
        model = model.to(device)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise _cannot_load(config, error) from error
    revision = member_revision(config)
    return wrap(config.name, model, tokenizer, n_stacks=n_stacks, revision=revision)


def _adapter_folder(config: MemberConfig) -> Any:
    from experts.paths import resolve_path

    assert config.adapter is not None
    return resolve_path(config.adapter)


def _cannot_load(config: MemberConfig, error: Exception) -> ExpertConfigError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    what = config.model if config.adapter is None else f"{config.model} with {config.adapter}"
    return ExpertConfigError(f"expert {config.name!r}: {what} cannot be loaded ({reason})")


def _check_memory(needed: Mapping[str, int], device: str) -> None:
    free = _free_bytes(device)
    total = sum(needed.values())
    if total > free:
        each = ", ".join(f"{name} {size / GIB:.2f}" for name, size in needed.items())
        raise ExpertConfigError(
            f"{len(needed)} experts take {total / GIB:.2f} GiB ({each}), but only "
            f"{free / GIB:.2f} GiB of {device} are free; host fewer or smaller experts together, "
            "with a smaller dtype, max_batch_size or default_max_tokens"
        )


def _free_bytes(device: str) -> int:
    import torch

    try:
        if torch.device(device).type == "cuda":
            return int(torch.cuda.mem_get_info(torch.device(device))[0])
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ExpertConfigError(f"device {device!r} cannot be used ({reason})") from error

    return available_bytes()
