"""Experts of a few thousand random weights, with tokenizers that cut texts differently."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    OlmoeConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from experts.latent.members import Member, wrap
from experts.latent.model import LatentModel

# Characters of one to four bytes, and words that whole texts cut otherwise than their pieces.
CORPUS = [
    "the quick brown fox jumps over the lazy dog and says hello to the world",
    "naïve café 日本語 🎉🎉 Ωμέγα, one two three four five; user assistant system",
    "Count from one to one hundred in words, and name each number. Name two colours.",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WIDTH, HEADS, STACKS = 16, 4, 3

_SIZE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
ARCHITECTURES: dict[str, Any] = {
    "llama": lambda n: LlamaConfig(vocab_size=n, **_SIZE),
    "gemma3": lambda n: Gemma3TextConfig(
        vocab_size=n,
        sliding_window=8,
        layer_types=(["sliding_attention"] * 2 + ["full_attention"]) * 2,
        **_SIZE,
    ),
    "qwen2": lambda n: Qwen2Config(vocab_size=n, **{**_SIZE, "hidden_size": 48, "head_dim": 12}),
    "qwen3": lambda n: Qwen3Config(vocab_size=n, **_SIZE),
    "qwen3moe": lambda n: Qwen3MoeConfig(
        vocab_size=n, moe_intermediate_size=16, **_EXPERTS, **_SIZE
    ),
    "olmoe": lambda n: OlmoeConfig(vocab_size=n, **_EXPERTS, **_SIZE),
}


@cache
def tokenizer(vocab_size: int) -> Any:
    """A byte-level tokenizer; larger ones cut into longer pieces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    # Without splitting at words, what a token ends with depends on what follows.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", chat_template=CHAT_TEMPLATE
    )


def language_model(architecture: str, vocab_size: int, seed: int = 0) -> Any:
    """A model with random weights."""
    torch.manual_seed(seed)
    config = ARCHITECTURES[architecture](vocab_size)
    config.eos_token_id = config.bos_token_id = config.pad_token_id = 0
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        # Freshly made models are sure of nothing; these say something.
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
    return model


def member(architecture: str, vocab_size: int = 300, seed: int = 0) -> Member:
    """An expert in memory."""
    found = tokenizer(vocab_size)
    model = language_model(architecture, len(found), seed)
    return wrap(architecture, model, found, n_stacks=STACKS, revision=f"{architecture}-{seed}")


def latent_model(members: dict[str, Member], *, trained: bool = True) -> LatentModel:
    """Interactions between experts, new or with random weights as if learnt."""
    torch.manual_seed(1)
    stacked = {name: one.stacked for name, one in members.items()}
    model = LatentModel(stacked, WIDTH, HEADS).eval().requires_grad_(False)
    if trained:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def save(folder: Path, architecture: str, vocab_size: int = 300, seed: int = 0) -> str:
    """An expert on disk; returns its path."""
    found = tokenizer(vocab_size)
    language_model(architecture, len(found), seed).save_pretrained(folder)
    found.save_pretrained(folder)
    return str(folder)
