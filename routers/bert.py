"""A BERT-type classifier, fine-tuned end to end, that names the category or rates the experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from routers.artefact import Artefact, Manifest
from routers.base import Explanation, Query, RouterError
from routers.calibration import best_temperature, sigmoid
from routers.category_classifier import expected_calibration_error, log_loss, softmax
from routers.fitted import FittedRouter, TrainingRows
from routers.params import check_count, check_number, check_one_of, check_text
from routers.training import shrunken_means

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from routers.text_classifier import TextClassifier

__all__ = ["BertRouter"]

HELD_OUT_SHARE = 0.1
WEIGHTS, TOKENIZER = "weights.", "tokenizer"


class BertRouter(FittedRouter):
    """A text encoder with a linear layer, all of whose parameters are trained on the prompts.

    With ``target=category`` it names the category, and the predicted quality is the mean of the
    categories' rows of mean training scores, weighted by their probabilities. With
    ``target=expert`` it has one output per model, its probability to be right.

    The best epoch and the temperature of the probabilities are chosen on the split ``validation``,
    else on a tenth of the training rows that it does not learn from.

    MiniLM learns from about ten prompts of 100 tokens a second on one CPU core. A prediction is one
    unpadded pass in single precision: with MiniLM, 17 ms of one core for 20 tokens and 60 ms for
    128; half of that with three layers. It needs torch and transformers to serve, too. The artefact
    holds encoder and tokenizer (90 MB with MiniLM), so the checkpoint is not needed again. On a
    GPU, two trainings with the same seed may differ in the last bits.

    A training that was interrupted goes on when the same is asked for again, and comes to the same:
    after each epoch and every five minutes its state is kept in ``$COLLEGIUM_CACHE/trainings``
    (360 MB with MiniLM) until it has ended. What abandoned trainings left there may be deleted.

    Args:
        model: The pretrained encoder: ``minilm`` (all-MiniLM-L6-v2 from its package), or the folder
            or the name, in the local hub cache, of one that transformers' ``AutoModel`` reads, such
            as ``microsoft/deberta-v3-large``. Nothing is downloaded.
        target: What it learns to name: ``category`` or ``expert``.
        layers: How many of the encoder's layers to keep, from the first; all by default.
        max_tokens: Longer queries are cut.
        epochs: Number of passes.
        learning_rate: The highest of AdamW's; larger encoders want 1e-5 to 3e-5.
        batch_size: Prompts per step.
        shrinkage: Number of prompts with the model's mean score that each category mean is mixed
            with; not used with ``target=expert``.
        device: Where it trains and predicts: ``cpu``, ``cuda``, or ``auto``, the GPU if there is
            one.
        random_state: Seed of initial values, dropout, order and held-out rows.

    Attributes:
        classifier_: Encoder, linear layer and tokenizer.
        quality_: Mean scores, shape (n_categories, n_models); no rows with ``target=expert``.
        temperature_: Logits are divided by it.

    References:
        Simonds et al., "MoDEM: Mixture of Domain Expert Models" (arXiv:2410.07490): a fine-tuned
        DeBERTa-v3-large names the domain, whose expert answers. Departs from it in mean pooling, in
        weighting all categories instead of taking the likeliest, in the table of measured scores
        instead of one expert per domain, and in the default encoder, which suits a CPU.
    """

    method = "bert"
    arrays: ClassVar = {"quality": ("categories", "models")}
    numbers = ("temperature",)
    classifier_: TextClassifier

    def __init__(
        self,
        *,
        model: str = "minilm",
        target: str = "category",
        layers: int | None = None,
        max_tokens: int = 128,
        epochs: int = 3,
        learning_rate: float = 2e-4,
        batch_size: int = 16,
        shrinkage: float = 10.0,
        device: str = "auto",
        random_state: int = 0,
    ) -> None:
        self.model = model
        self.target = target
        self.layers = layers
        self.max_tokens = max_tokens
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.shrinkage = shrinkage
        self.device = device
        self.random_state = random_state

    def _check_params(self) -> None:
        check_text(self, "model", self.model)
        check_one_of(self, "target", self.target, ("category", "expert"))
        if self.layers is not None:
            check_count(self, "layers", self.layers, 1)
        check_count(self, "max_tokens", self.max_tokens, 3)
        check_count(self, "epochs", self.epochs, 1)
        check_number(self, "learning_rate", self.learning_rate, 0, low_open=True)
        check_count(self, "batch_size", self.batch_size, 1)
        check_number(self, "shrinkage", self.shrinkage, 0)
        check_one_of(self, "device", self.device, ("auto", "cpu", "cuda"))
        check_count(self, "random_state", self.random_state, 0)

    def _learn(self, rows: TrainingRows) -> None:
        import numpy as np

        torch = _torch()
        from routers.text_classifier import TextClassifier, fine_tune, pick_device
        from routers.torch_training import masked_bce

        by_category = self.target == "category"
        if by_category and rows.categories is None:
            raise RouterError(
                "the method 'bert' with target=category needs a column 'category' in "
                "prompts.parquet; add it, or set target=expert"
            )
        validation = rows.validation
        parts = [rows] if validation is None else [rows, validation]
        texts = [text for part in parts for text in part.texts]
        scores = np.concatenate([part.scores for part in parts])
        categories = sorted(set(rows.categories or ())) if by_category else []
        labels = _labels(parts, categories)
        usable = labels >= 0 if by_category else ~np.isnan(scores).all(axis=1)
        learnt, checked = _split(len(rows), len(texts), usable, self.random_state)

        torch.manual_seed(self.random_state)
        classifier = TextClassifier.from_checkpoint(
            self.model,
            layers=self.layers,
            n_outputs=len(categories) if by_category else len(rows.models),
            max_tokens=self.max_tokens,
        ).to(pick_device(self.device))
        logits, self.metrics_ = fine_tune(
            classifier,
            [classifier.tokens(text) for text in texts],
            labels if by_category else scores.astype(np.float32),
            torch.nn.functional.cross_entropy if by_category else masked_bce,
            learnt,
            checked,
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            random_state=self.random_state,
            name=self.method,
        )
        self.classifier_ = classifier
        self.temperature_ = 1.0
        if not by_category:
            self.quality_ = np.zeros((0, len(rows.models)))
            self.temperature_ = best_temperature(
                lambda t: _binary_log_loss(logits / t, scores[checked])
            )
            return
        self.categories_ = categories
        self.quality_ = shrunken_means(
            rows.scores, labels[: len(rows)], len(categories), self.shrinkage
        )[:-1]
        if len(categories) > 1:
            self.temperature_ = best_temperature(lambda t: log_loss(logits / t, labels[checked]))
        posterior = softmax(logits / self.temperature_)
        correct = posterior.argmax(axis=1) == labels[checked]
        self.metrics_ |= {
            "held_out_accuracy": float(correct.mean()),
            "held_out_ece": expected_calibration_error(posterior.max(axis=1), correct),
        }

    def _predict_one(self, given: Query) -> tuple[NDArray[np.floating], Explanation]:
        logits = self.classifier_.logits(self.classifier_.tokens(given.text)) / self.temperature_
        if self.categories_ is None:
            return sigmoid(logits), Explanation()
        posterior = softmax(logits)
        best = int(posterior.argmax())
        return (self.quality_ * posterior[:, None]).sum(axis=0), Explanation(
            category=self.categories_[best],
            confidence=float(posterior[best]),
            detail={"probabilities": dict(zip(self.categories_, posterior.tolist(), strict=True))},
        )

    def _manifest(self) -> Manifest:
        found = super()._manifest()
        return found.model_copy(update={"state": found.state | {"config": self.classifier_.config}})

    def _arrays(self) -> dict[str, NDArray[Any]]:
        import numpy as np

        weights = self.classifier_.state_dict()
        tokenizer = self.classifier_.tokenizer.to_str().encode()
        return {
            **super()._arrays(),
            TOKENIZER: np.frombuffer(tokenizer, np.uint8),
            **{WEIGHTS + name: tensor.cpu().numpy() for name, tensor in weights.items()},
        }

    def _restore(self, artefact: Artefact, lengths: dict[str, int]) -> None:
        torch = _torch()
        from routers.text_classifier import TextClassifier, pick_device

        self._check_params()
        config, tokenizer = artefact.manifest.state.get("config"), artefact.arrays.get(TOKENIZER)
        if not isinstance(config, dict) or tokenizer is None:
            what = "state 'config'" if tokenizer is not None else f"array {TOKENIZER!r}"
            raise RouterError(f"artefact {artefact.path}: {what} is missing")
        manifest = artefact.manifest
        weights = {}
        for name, found in artefact.arrays.items():
            if name.startswith(WEIGHTS):
                found = artefact.array(name, found.shape)
                weights[name.removeprefix(WEIGHTS)] = torch.from_numpy(found)
        try:
            classifier = TextClassifier.from_config(
                config,
                tokenizer.tobytes(),
                n_outputs=len(
                    manifest.models if manifest.categories is None else manifest.categories
                ),
                max_tokens=self.max_tokens,
            )
            classifier.load_state_dict(weights)
        except (RuntimeError, ValueError) as exc:
            first = " ".join(str(exc).split())
            raise RouterError(
                f"artefact {artefact.path}: config and weights do not fit: {first}"
            ) from exc
        self.classifier_ = classifier.to(pick_device(self.device)).eval()
        super()._restore(artefact, lengths)


def _torch() -> Any:
    try:
        import torch
        import transformers  # noqa: F401  missing is better said here than halfway
    except ImportError as exc:
        raise RouterError(
            f"the router 'bert' needs the package {exc.name!r}: pip install 'collegium[torch]'"
        ) from exc
    return torch


def _labels(parts: list[TrainingRows], categories: list[str]) -> NDArray[np.intp]:
    """The category of each row as a position; -1 where it is unknown."""
    import numpy as np

    position = {name: number for number, name in enumerate(categories)}
    return np.array(
        [position.get(name, -1) for part in parts for name in part.categories or [""] * len(part)],
        np.intp,
    )


def _split(
    n_rows: int, n_all: int, usable: NDArray[np.bool_], random_state: int
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Positions to learn from and to check on; rows from ``n_rows`` on are for checking."""
    import numpy as np

    from routers.torch_training import held_out_share

    inside = np.arange(n_all) >= n_rows
    if not (inside & usable).any():
        inside[:n_rows] = held_out_share(n_rows, random_state, HELD_OUT_SHARE).numpy()
    learnt, checked = np.flatnonzero(usable & ~inside), np.flatnonzero(usable & inside)
    if not len(learnt) or not len(checked):
        learnt = checked = np.flatnonzero(usable)
    return learnt, checked


def _binary_log_loss(logits: NDArray[np.float64], scores: NDArray[np.float64]) -> float:
    """Mean cross-entropy of the cells that were run, with Platt's smoothed targets."""
    import numpy as np

    present = ~np.isnan(scores)
    rest = 1 / (present.sum() + 2)
    found, targets = logits[present], scores[present].clip(rest, 1 - rest)
    return float((np.logaddexp(0.0, found) - targets * found).mean())
