"""Loading a transformers model with its adapters. torch and transformers are imported on use."""

from __future__ import annotations

from typing import Any

from experts.config import TransformersExpertConfig
from experts.errors import ExpertConfigError

__all__ = ["context_length_of", "end_ids_of", "load_model"]


def load_model(config: TransformersExpertConfig, adapter_rows: Any) -> tuple[Any, Any]:
    """The tokenizer and the model with all its adapters, ready for inference.

    Args:
        config: What to load.
        adapter_rows: An ``experts.lora.AdapterRows``; tells which adapter each row uses.

    Raises:
        ExpertConfigError: Something is missing or does not fit.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

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
    if config.adapters:
        from experts.lora import load_adapters

        folders = {a.name: str(resolve_model(a.path)) for a in config.adapters}
        model = load_adapters(model, folders, adapter_rows)
    try:
        return tokenizer, model.to(config.device).eval().requires_grad_(False)
    except RuntimeError as exc:
        raise ExpertConfigError(
            f"expert {config.name!r}: device {config.device!r} cannot be used ({exc})"
        ) from exc


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
