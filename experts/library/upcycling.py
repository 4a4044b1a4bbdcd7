"""Fine-tunes of one dense model made into one mixture-of-experts checkpoint. Imports torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experts.errors import ExpertConfigError
from experts.finetune_data import ChatPair, pack, tokenize
from experts.library.gates import solve_ridge

__all__ = ["dense", "upcycle"]

# What both architectures' configs say in the same words.
_SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps",
    "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_parameters",
)  # fmt: skip
ROW = 8


def dense(base: str, adapter: Path | None) -> Any:
    """A model in float32, with an adapter merged into its weights or without.

    Raises:
        ExpertConfigError: It cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    from experts.weights import resolve_model

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(resolve_model(base)), dtype=torch.float32
        )
    except (OSError, ValueError) as error:
        raise ExpertConfigError(f"the model {base!r} cannot be loaded: {error}") from error
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model.eval().requires_grad_(False)


def upcycle(
    load: Mapping[str, Callable[[], Any]],
    tokenizer: Any,
    samples: Mapping[str, Sequence[ChatPair]],
    out: Path,
    *,
    top_k: int = 1,
    temperature: float = 1.0,
) -> None:
    """Write a Mixtral checkpoint whose experts are the fine-tunes' MLPs.

    What is no MLP is the mean of the fine-tunes. Each layer's router is a ridge regression of the
    domain on what its MLP reads in the mean model, columns divided by their lengths; no training.

    Args:
        load: Gives each fine-tune, a Llama or Mistral model in float32; one is held at a time.
        tokenizer: Of all of them; written beside the weights.
        samples: Of the domain of each fine-tune.
        out: The folder; ``transformers`` and vLLM load it.
        top_k: Experts that a token goes through.
        temperature: What the router's scores are divided by before the softmax.

    References:
        DUME (arXiv:2603.29765). Departs from it in the intercept, which Mixtral's routers have not,
        and in taking all tokens of samples that are of the domains' own.

    Raises:
        ExpertConfigError: A fine-tune is of another architecture or size.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    names = [*load]
    first = _checked(load[names[0]](), names[0])
    config = MixtralConfig(
        **{name: getattr(first.config, name) for name in _SHARED},
        num_local_experts=len(names), num_experts_per_tok=top_k, sliding_window=None,
    )  # fmt: skip
    mixture: Any = MixtralForCausalLM(config).float().eval().requires_grad_(False)
    mean = first
    sums = {name: torch.zeros_like(value) for name, value in first.state_dict().items()}
    for place, name in enumerate(names):
        model = first if place == 0 else _checked(load[name](), name)
        state = model.state_dict()
        if {n: v.shape for n, v in state.items()} != {n: v.shape for n, v in sums.items()}:
            raise ExpertConfigError(f"{name!r} has other sizes than {names[0]!r}")
        for part, value in state.items():
            sums[part] += value / len(names)
        for one, block in zip(model.model.layers, mixture.model.layers, strict=True):
            up = torch.cat([one.mlp.gate_proj.weight, one.mlp.up_proj.weight])
            block.mlp.experts.gate_up_proj[place] = up
            block.mlp.experts.down_proj[place] = one.mlp.down_proj.weight
    mean.load_state_dict(sums)
    mixture.load_state_dict(
        {part: value for part, value in sums.items() if ".mlp." not in part}, strict=False
    )
    found = _statistics(mean, tokenizer, [samples[name] for name in names])
    for (square, targets), block in zip(found, mixture.model.layers, strict=True):
        solved = solve_ridge(square, targets)
        solved = solved / solved.norm(dim=0)
        block.mlp.gate.weight.copy_(solved.T / temperature)
    mixture.generation_config = mean.generation_config
    mixture.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _checked(model: Any, name: str) -> Any:
    config = model.config
    biased = getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)
    if config.model_type not in ("llama", "mistral") or biased:
        raise ExpertConfigError(
            f"{name!r} is a {config.model_type}{' with biases' if biased else ''}; only Llama and "
            "Mistral models without biases can become experts of a Mixtral"
        )
    return model


def _statistics(
    model: Any, tokenizer: Any, samples: Sequence[Sequence[ChatPair]]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """``X'X`` and ``X'Y`` of what each layer's MLP reads, float64; Y says whose sample it is."""
    size = model.config.hidden_size
    found = [
        (torch.zeros(size, size).double(), torch.zeros(size, len(samples)).double())
        for _ in model.model.layers
    ]

    def listen(layer: int, domain: int) -> Callable[..., None]:
        square, targets = found[layer]

        def add(module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
            rows = inputs[0][0].double()
            square.add_(rows.T @ rows)
            targets[:, domain] += rows.sum(0)

        return add

    for domain, pairs in enumerate(samples):
        hooks = [
            layer.mlp.register_forward_pre_hook(listen(place, domain))
            for place, layer in enumerate(model.model.layers)
        ]
        read = tokenize(pairs, tokenizer)
        for start in range(0, len(read), ROW):
            batch = pack(read[start : start + ROW])
            model.model(
                input_ids=batch.input_ids, position_ids=batch.position_ids,
                attention_mask=batch.attention_mask, use_cache=False,
            )  # fmt: skip
        for hook in hooks:
            hook.remove()
    return found
