"""What every encoder keeps to, and what they share: one text at a time, and two caches."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable
from weakref import WeakSet

from routers.encoders.vector_cache import VectorCache

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["MAX_CHARACTERS", "UNPINNED", "CachedEncoder", "Encoder", "forget_vectors", "unit"]

# 4096 vectors of 384 float32 are 6 MB; texts longer than this are not worth keeping.
CACHED_TEXTS = 4096
CACHED_TEXT_CHARACTERS = 8192
# Training and judging read many texts over and over; a request has one.
BULK_TEXTS = 32
# The revision of a model from the hub whose revision nobody named: it may change at any time.
UNPINNED = "unpinned"
# Far more characters than the 256 tokens that encoders read; spares them a pasted book.
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


class CachedEncoder:
    """One text at a time, the most recently used ones from memory, many at once from disk.

    Args:
        on_disk: Whether lists of ``BULK_TEXTS`` or more keep their vectors on disk.
    """

    def __init__(self, *, on_disk: bool = False) -> None:
        self._on_disk = on_disk
        self._lock = threading.Lock()
        self._vectors: OrderedDict[str, NDArray[np.float32]] = OrderedDict()
        _encoders.add(self)

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

    def forget(self) -> None:
        """Empty the cache in memory."""
        with self._lock:
            self._vectors.clear()


_encoders: WeakSet[CachedEncoder] = WeakSet()


def forget_vectors() -> None:
    """Empty the caches in memory of all encoders, for whoever measures how long they take."""
    for encoder in list(_encoders):
        encoder.forget()


def unit(vector: NDArray[np.float32]) -> NDArray[np.float32]:
    """The vector scaled to length 1."""
    import numpy as np

    length = np.sqrt(np.square(vector, dtype=np.float64).sum())
    return (vector / max(float(length), 1e-12)).astype(np.float32)
