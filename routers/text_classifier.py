"""BERT-type encoders with a linear layer, trained end to end. Imports torch, so import it late.

Knows nothing of categories, models or scores: a caller gives texts, targets and a loss.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from routers.base import RouterError
from routers.checkpoints import Checkpoint
from routers.encoders.base import MAX_CHARACTERS
from routers.encoders.minilm_export import model_folder

__all__ = ["MINILM", "Loss", "TextClassifier", "fine_tune", "pick_device"]

MINILM = "minilm"
DROPOUT = 0.1
WARM_UP_SHARE = 0.1
WEIGHT_DECAY = 0.01
MAX_GRADIENT_NORM = 1.0
# Batches are filled with texts of like length out of so many batches' worth of shuffled texts.
SORTED_BATCHES = 16
# Part of a checkpoint's name: raise it whenever the same training may come to something else.
TRAINING_VERSION = 1
# The held-out logits in a checkpoint, beside parameters; no parameter's name has a space.
LOGITS = "held-out logits"
# Of a checkpoint's config: where it came from, and what could make a reader fetch or run code.
DROPPED_CONFIG = ("_name_or_path", "auto_map", "architectures", "dtype", "transformers_version")

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class TextClassifier(torch.nn.Module):
    """Mean of the last layer's token vectors, dropout, linear layer.

    There is no pooler that could stay as it was initialised, and padding is masked in the encoder
    and in the mean.

    Args:
        body: An encoder of transformers.
        tokenizer: Its tokenizer.
        n_outputs: Number of logits.
        max_tokens: Longer texts are cut.
    """

    def __init__(self, body: Any, tokenizer: Tokenizer, *, n_outputs: int, max_tokens: int) -> None:
        super().__init__()
        if getattr(body, "pooler", None) is not None:
            body.pooler = None
        self.body = body
        self.dropout = torch.nn.Dropout(DROPOUT)
        self.head = torch.nn.Linear(body.config.hidden_size, n_outputs)
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_tokens)
        self.tokenizer = tokenizer

    @classmethod
    def from_checkpoint(
        cls, model: str, *, layers: int | None, n_outputs: int, max_tokens: int
    ) -> Self:
        """Start from pretrained weights on this machine; nothing is downloaded.

        Args:
            model: ``minilm``, a folder, or the name of a model in the local hub cache.
            layers: How many layers to keep, from the first; all if None.
            n_outputs: Number of logits.
            max_tokens: Longer texts are cut.

        Raises:
            RouterError: There is no such checkpoint, or it has fewer layers or positions.
        """
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        source = str(model_folder()) if model == MINILM else model
        try:
            # Said, since transformers would otherwise ask whether to run a checkpoint's code.
            local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
            config = AutoConfig.from_pretrained(source, **local)
            _check_size(model, config, layers, max_tokens)
            if layers is not None:
                config.num_hidden_layers = layers
            with _quietly():
                body, info = AutoModel.from_pretrained(
                    source,
                    config=config,
                    dtype=torch.float32,
                    attn_implementation="eager",
                    output_loading_info=True,
                    **local,
                )
            if lacking := [key for key in info["missing_keys"] if "pooler" not in key]:
                raise ValueError(f"it lacks the weights {lacking[0]!r}")
            tokenizer = AutoTokenizer.from_pretrained(source, **local)
            backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        except (OSError, ValueError, AttributeError) as exc:
            where = "" if model == MINILM or Path(model).is_dir() else " in the local hub cache"
            raise RouterError(
                f"cannot load the checkpoint {model!r}{where}: {str(exc).splitlines()[0]}; give "
                f"{MINILM!r}, the folder of a Hugging Face encoder, or the name of a downloaded one"
            ) from exc
        return cls(body, backend, n_outputs=n_outputs, max_tokens=max_tokens)

    @classmethod
    def from_config(
        cls, config: dict[str, Any], tokenizer: bytes, *, n_outputs: int, max_tokens: int
    ) -> Self:
        """The same module without its weights.

        Raises:
            ValueError: The config or the tokenizer is not what ``config`` and ``tokenizer`` give.
        """
        from transformers import AutoConfig, AutoModel

        known = {key: value for key, value in config.items() if key not in DROPPED_CONFIG}
        try:
            found = AutoConfig.for_model(**known)
            # Named, since a config could otherwise ask for kernels from the hub.
            body = AutoModel.from_config(
                found, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
            )
            backend = Tokenizer.from_buffer(tokenizer)
        except Exception as exc:  # tokenizers raises nothing narrower
            raise ValueError(f"config or tokenizer cannot be used: {exc}") from exc
        return cls(body, backend, n_outputs=n_outputs, max_tokens=max_tokens)

    @property
    def config(self) -> dict[str, Any]:
        """The encoder's config, for JSON."""
        found: dict[str, Any] = self.body.config.to_dict()
        return {key: value for key, value in found.items() if key not in DROPPED_CONFIG}

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Logits, shape (batch, n_outputs); both arguments have shape (batch, tokens)."""
        hidden = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask[:, :, None].to(hidden.dtype)
        mean = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
        logits: torch.Tensor = self.head(self.dropout(mean))
        return logits

    def tokens(self, text: str) -> list[int]:
        """A text's token ids, with the special ones."""
        # Lone surrogates are legal in JSON strings but not in UTF-8.
        clean = text[:MAX_CHARACTERS].encode("utf-8", "replace").decode("utf-8")
        ids: list[int] = self.tokenizer.encode(clean).ids
        return ids or [self._padding]

    @property
    def _padding(self) -> int:
        return int(self.body.config.pad_token_id or 0)

    def padded(self, texts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """``forward``'s arguments for tokenized texts, padded to the longest of them."""
        width = max(map(len, texts))
        ids = [[*text, *[self._padding] * (width - len(text))] for text in texts]
        mask = [[1] * len(text) + [0] * (width - len(text)) for text in texts]
        device = self.head.weight.device
        return {
            "input_ids": torch.tensor(ids, device=device),
            "attention_mask": torch.tensor(mask, device=device),
        }

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> NDArray[np.float64]:
        """Logits of one tokenized text, alone and without padding; shape (n_outputs,)."""
        found: NDArray[np.float64] = self(**self.padded([tokens]))[0].double().cpu().numpy()
        return found


def _check_size(model: str, config: Any, layers: int | None, max_tokens: int) -> None:
    if layers is not None and layers > config.num_hidden_layers:
        raise RouterError(
            f"the checkpoint {model!r} has {config.num_hidden_layers} layers, not {layers}"
        )
    # RoBERTa's kin count positions from the padding token's on.
    first = config.pad_token_id + 1 if "roberta" in config.model_type else 0
    if max_tokens > config.max_position_embeddings - first:
        raise RouterError(
            f"the checkpoint {model!r} reads up to {config.max_position_embeddings - first} "
            f"tokens: lower max_tokens={max_tokens}"
        )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep notes on weights that are not used (a pooler, later layers) off the terminal."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()


def pick_device(name: str) -> torch.device:
    """``auto`` is the GPU if there is one.

    Raises:
        RouterError: The named device cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise RouterError("device is 'cuda', but torch finds no GPU here: set device=auto")
    return torch.device(name)


def fine_tune(
    classifier: TextClassifier,
    texts: Sequence[Sequence[int]],
    targets: NDArray[Any],
    loss: Loss,
    learnt: NDArray[np.intp],
    checked: NDArray[np.intp],
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    random_state: int,
    name: str,
) -> tuple[NDArray[np.float64], dict[str, float]]:
    """Train all parameters; keep those of the epoch with the least held-out loss.

    AdamW with linear warm-up over the first tenth of the steps, then cosine to zero; gradients
    are clipped. Products are in bfloat16 where the device multiplies it natively.

    An interrupted training, called again with the same arguments, goes on from where it was after
    its last epoch, or minutes before its end, and comes to the same bits.

    Args:
        classifier: What is trained, on the device to train on.
        texts: Tokenized texts.
        targets: What the loss compares their logits with, shape (n_texts, ...).
        loss: Logits and targets to the mean loss.
        learnt: Positions of the texts to learn from.
        checked: Positions of the held-out texts.
        epochs: Number of passes.
        learning_rate: The highest.
        batch_size: Texts per step.
        random_state: Seed of the order; dropout follows torch's own.
        name: What progress bar and checkpoint call it.

    Returns:
        Logits of the held-out texts, shape (n_checked, n_outputs), and facts for the manifest.
    """
    from tqdm import tqdm
    from transformers import get_cosine_schedule_with_warmup

    rng = np.random.default_rng(random_state)
    device = classifier.head.weight.device
    goals = torch.from_numpy(targets)
    # Fused: on CPUs the loop over tensors costs more than a small encoder's gradients.
    optimiser = torch.optim.AdamW(
        classifier.parameters(), lr=learning_rate, weight_decay=WEIGHT_DECAY, fused=True
    )
    lengths = [len(texts[row]) for row in learnt]
    plan = [part for _ in range(epochs) for part in _batches(lengths, batch_size, rng)]
    steps, per_epoch = len(plan), len(plan) // epochs
    schedule = get_cosine_schedule_with_warmup(optimiser, int(steps * WARM_UP_SHARE), steps)
    settings = (epochs, learning_rate, batch_size, random_state, str(targets.dtype), device.type)
    decides = _decides(classifier, (targets, learnt, checked, *map(np.array, texts)), settings)
    checkpoint = Checkpoint(name, decides, classifier, optimiser, schedule)
    kept = checkpoint.restore()
    best, facts = kept or ({}, {"steps": 0, "held_out_loss": float("inf"), "best_epoch": 0})
    if kept:
        where = f"epoch {facts['steps'] // per_epoch + 1} of {epochs}"
        tqdm.write(f"{name}: going on from {where} ({checkpoint.path})", file=sys.stderr)
    with tqdm(
        total=steps, initial=facts["steps"], desc=name, unit="step", delay=2, file=sys.stderr
    ) as bar:
        for number, part in enumerate(plan[facts["steps"] :], facts["steps"] + 1):
            rows = learnt[part]
            classifier.train()
            inputs = classifier.padded([texts[row] for row in rows])
            with torch.autocast(device.type, torch.bfloat16, enabled=_has_bfloat16(device)):
                logits = classifier(**inputs)
            optimiser.zero_grad()
            loss(logits.float(), goals[rows].to(device)).backward()
            torch.nn.utils.clip_grad_norm_(classifier.parameters(), MAX_GRADIENT_NORM)
            optimiser.step()
            schedule.step()
            bar.update()
            facts["steps"] = number
            ended = number % per_epoch == 0
            if ended:
                classifier.eval()
                found = np.stack([classifier.logits(texts[row]) for row in checked])
                now = float(loss(torch.from_numpy(found).float().to(device), goals[checked]))
                # A refresh would show the bar at once, whatever its delay.
                bar.set_postfix(held_out=f"{now:.4f}", refresh=False)
                if now < facts["held_out_loss"] or not best:
                    best = {LOGITS: torch.from_numpy(found), **_copy(classifier)}
                    facts |= {"held_out_loss": now, "best_epoch": number // per_epoch}
            if number < steps and (ended or checkpoint.due):
                checkpoint.save(best, facts)
    checkpoint.remove()
    best_logits: NDArray[np.float64] = best.pop(LOGITS).numpy()
    classifier.load_state_dict(best)
    classifier.zero_grad()  # gradients take as much memory as the parameters
    return best_logits, {
        "held_out_rows": len(checked),
        "held_out_loss": facts["held_out_loss"],
        "best_epoch": facts["best_epoch"],
    }


def _decides(
    classifier: TextClassifier, arrays: Iterable[NDArray[Any]], settings: Sequence[Any]
) -> Iterator[bytes]:
    """All that decides what a training comes to: code, settings, data, initial parameters."""
    import transformers

    code = (TRAINING_VERSION, torch.__version__, transformers.__version__)
    yield json.dumps([code, settings, classifier.config], sort_keys=True, default=str).encode()
    for array in arrays:
        yield array.tobytes()
    for tensor in classifier.state_dict().values():
        yield tensor.cpu().numpy().tobytes()


def _batches(
    lengths: Sequence[int], batch_size: int, rng: np.random.Generator
) -> list[NDArray[np.intp]]:
    """All positions in random order, but texts of like length together, to pad little."""
    order = rng.permutation(len(lengths))
    found = []
    for start in range(0, len(order), batch_size * SORTED_BATCHES):
        pool = order[start : start + batch_size * SORTED_BATCHES]
        pool = pool[np.argsort([lengths[row] for row in pool], kind="stable")]
        found += [pool[first : first + batch_size] for first in range(0, len(pool), batch_size)]
    return [found[number] for number in rng.permutation(len(found))]


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def _copy(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}
