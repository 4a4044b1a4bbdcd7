"""Loading a transformers model with its adapters. torch and transformers are imported on use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from experts.config import TransformersExpertConfig
from experts.errors import ExpertConfigError

if TYPE_CHECKING:
    from experts.lora import AdapterSlots

__all__ = ["context_length_of", "end_ids_of", "load_model"]


def load_model(config: TransformersExpertConfig) -> tuple[Any, Any, AdapterSlots]:
    """The tokenizer, the model and its adapters, ready for inference.

    Args:
        config: What to load.

    Raises:
        ExpertConfigError: Something is missing or does not fit.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from experts.adapter_files import adapter_folder
    from experts.lora import AdapterSlots
    from experts.token_routing import read_token_router
    from experts.weights import resolve_model

    source = str(resolve_model(config.model))
    model: Any
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=getattr(torch, config.dtype), attn_implementation="sdpa"
        )
    except (OSError, ValueError) as exc:
        reason = (str(exc).strip().splitlines() or ["no reason given"])[0]
        raise ExpertConfigError(
            f"expert {config.name!r}: model {config.model!r} cannot be loaded ({reason}); expected "
            "a folder with config.json, tokenizer and safetensors, a Hugging Face name, or "
            "package:NAME/FILE"
        ) from exc
    try:
        model = model.to(config.device).eval().requires_grad_(False)
    except RuntimeError as exc:
        raise ExpertConfigError(
            f"expert {config.name!r}: device {config.device!r} cannot be used ({exc})"
        ) from exc
    folders = {adapter.name: adapter_folder(adapter.path) for adapter in config.adapters}
    routers = {one.name: read_token_router(one, folders) for one in config.token_routers}
    slots = AdapterSlots(model, folders, n_slots=config.max_loaded_adapters, routers=routers)
    return tokenizer, model, slots


def context_length_of(config: TransformersExpertConfig, model_config: Any) -> int:
    """Longest prompt plus answer in tokens: the config's, else the model's.

    Raises:
        ExpertConfigError: The config asks for more than the model has.
    """
    longest: int | None = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    wanted = config.context_length or longest
    if wanted is None:
        raise ExpertConfigError(f"expert {config.name!r}: give its context_length")
    if longest is not None and wanted > longest:
        raise ExpertConfigError(
            f"expert {config.name!r}: context_length {wanted} exceeds the model's own {longest}"
        )
    return wanted


def end_ids_of(tokenizer: Any, generation: Any) -> frozenset[int]:
    """Tokens that end an answer."""
    ends = generation.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    if tokenizer.eos_token_id is not None:
        ends.append(tokenizer.eos_token_id)
    return frozenset(ends)
