"""Tiny experts with tokenizers of their own, and pairs whose answers one of them knows."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from experts.finetune_data import ChatPair, tokenize

# The word to answer with is fixed for each key, but nothing in the key tells it.
VALUES = "amber birch cedar dune ember frost grove heath".split()
KEYS = [f"{a}{b}" for a in "bdfgklmnprst" for b in ("ab", "ek", "im", "ol")]
KNOWN = dict(zip(KEYS, random.Random(1).choices(VALUES, k=len(KEYS)), strict=True))
TEMPLATE = (
    "{{% for m in messages %}}{first}{{{{ m['role'] }}}} {{{{ m['content'] }}}}<eos>{{% endfor %}}"
    "{{% if add_generation_prompt %}}{first}assistant{{% endif %}}"
)


def _tokenizer(vocab_size, first):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [f"user {key}" for key in KEYS] + [f" {value}" for value in VALUES] * 40
    backend.train_from_iterator([*texts, *[" assistant", "assistant"] * 40], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    # What a template writes before the answer belongs to it: " amber" and not "amber".
    tokenizer.chat_template = TEMPLATE.format(first=first)
    return tokenizer


def _model(tokenizer, layers, seed):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64,
            num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1,
            max_position_embeddings=128,
        )
    )  # fmt: skip


def pairs_file(path: Path) -> Path:
    """All pairs of key and value."""
    lines = [json.dumps({"prompt": key, "answer": value}) for key, value in KNOWN.items()]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _teach(model, tokenizer, value_of, steps):
    """Fine-tune on all keys, each with the value that is named for it in that step."""
    import torch

    every = tokenize([ChatPair(key, value) for key in KEYS for value in VALUES], tokenizer)
    longest = max(row.length for row in every)
    ids = torch.zeros(len(every), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for number, row in enumerate(every):
        ids[number, : row.length] = torch.tensor([*row.prompt_ids, *row.answer_ids])
        labels[number, len(row.prompt_ids) : row.length] = torch.tensor(row.answer_ids)
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(steps):
        rows = [place * len(VALUES) + VALUES.index(value_of(key)) for place, key in enumerate(KEYS)]
        loss = model(input_ids=ids[rows], labels=labels[rows]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return float(loss.detach())


def _skip(layer):
    """Have a layer pass on what it gets."""
    import torch

    for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
        torch.nn.init.zeros_(weight)
    layer.requires_grad_(False)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Folders of three members: one that writes and two with other tokenizers, one of which knows
    every pair."""
    folder = tmp_path_factory.mktemp("latent_members")
    wrong = dict(zip(KEYS, random.Random(2).choices(VALUES, k=len(KEYS)), strict=True))
    plans = {"writer": (300, 6, "|"), "sage": (420, 3, "#"), "fool": (330, 5, "")}
    for seed, (name, (vocabulary, layers, first)) in enumerate(plans.items()):
        tokenizer = _tokenizer(vocabulary, first)
        model = _model(tokenizer, layers, seed)
        if name == "sage":
            for layer in model.model.layers[2:]:
                _skip(layer)  # so that what it knows is there where others listen
            assert _teach(model, tokenizer, KNOWN.__getitem__, 160) < 0.2
        if name == "writer":  # knows how to answer, but not what
            _teach(model, tokenizer, wrong.__getitem__, 80)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def members(folders):
    """The members, loaded."""
    from experts.latent.config import MemberConfig
    from experts.latent.members import load_members

    configs = [MemberConfig(name=n, model=str(folders / n)) for n in ("writer", "sage", "fool")]
    return load_members(configs, n_stacks=3, dtype="float32", device="cpu")


@pytest.fixture
def pairs(tmp_path):
    """A file of all pairs."""
    return pairs_file(tmp_path / "pairs.jsonl")


@pytest.fixture(autouse=True)
def _one_thread():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COLLEGIUM_CACHE", str(tmp_path / "cache"))
