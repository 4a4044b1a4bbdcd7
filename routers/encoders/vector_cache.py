"""Vectors on disk, so that training and judging many routers encodes a text once.

Holds hashes of texts, never texts. Knows nothing of how vectors are made.
"""

from __future__ import annotations

import hashlib
import logging
import re
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from experts.weights import default_cache_dir

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["VectorCache"]

log = logging.getLogger("collegium.routers")

# Texts looked up, encoded and stored at a time: what an interruption can lose.
STEP = 256
# Another process may be storing; it takes milliseconds.
LOCK_TIMEOUT_S = 30.0


class VectorCache:
    """Vectors of one revision of one encoder, in one SQLite file.

    Several processes may use it at a time. Where the file cannot be used, vectors are made anew
    and a warning is logged.

    Args:
        name: The encoder's name.
        revision: The encoder's revision.
        folder: Where the files lie; ``$COLLEGIUM_CACHE/vectors`` if not given.
    """

    def __init__(self, name: str, revision: str, folder: Path | None = None) -> None:
        # Names may be paths; what tells encoders apart then is the hash.
        digest = hashlib.sha256(f"{name}\0{revision}".encode()).hexdigest()[:12]
        readable = re.sub(r"[^\w.-]+", "_", name)[-60:]
        self.path = (folder or default_cache_dir() / "vectors") / f"{readable}-{digest}.sqlite"

    def encode(
        self, texts: Sequence[str], width: int, encode_one: Callable[[str], NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        """Look texts up, and encode and store those that are new, showing progress.

        Args:
            texts: What to encode.
            width: Length of a vector.
            encode_one: Makes the vector of one text.

        Returns:
            Shape (n_texts, width).
        """
        try:
            connection = self._open()
        except (OSError, sqlite3.Error) as error:
            log.warning("no cache of vectors at %s: %s", self.path, error)
            connection = sqlite3.connect(":memory:")
            connection.execute(_TABLE)
        with closing(connection):
            return self._encode(connection, texts, width, encode_one)

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self.path, timeout=LOCK_TIMEOUT_S)
        connection.execute(_TABLE)
        return connection

    def _encode(
        self,
        connection: sqlite3.Connection,
        texts: Sequence[str],
        width: int,
        encode_one: Callable[[str], NDArray[np.float32]],
    ) -> NDArray[np.float32]:
        import numpy as np

        vectors = np.empty((len(texts), width), np.float32)
        keys = [_key(text) for text in texts]
        # Quick work shows no bar.
        with tqdm(total=len(texts), unit="text", desc="encoding", delay=2, leave=False) as bar:
            for rows in _steps(len(texts)):
                known = self._read(connection, {keys[row] for row in rows})
                new: dict[bytes, bytes] = {}
                for row in rows:
                    content = known.get(keys[row]) or new.get(keys[row])
                    if content is None or len(content) != 4 * width:
                        vectors[row] = encode_one(texts[row])
                        new[keys[row]] = vectors[row].tobytes()
                    else:
                        vectors[row] = np.frombuffer(content, np.float32)
                    bar.update()
                self._store(connection, new)
        return vectors

    def _read(self, connection: sqlite3.Connection, keys: set[bytes]) -> dict[bytes, bytes]:
        marks = ",".join("?" * len(keys))
        query = f"SELECT text, vector FROM vectors WHERE text IN ({marks})"
        try:
            return dict(connection.execute(query, list(keys)))
        except sqlite3.Error as error:
            log.warning("cannot read %s: %s; if it is damaged, delete it", self.path, error)
            return {}

    def _store(self, connection: sqlite3.Connection, vectors: dict[bytes, bytes]) -> None:
        try:
            with connection:
                connection.executemany(
                    "INSERT OR REPLACE INTO vectors VALUES (?, ?)", vectors.items()
                )
        except sqlite3.Error as error:  # a full disk, say
            log.warning("cannot store vectors in %s: %s", self.path, error)


_TABLE = "CREATE TABLE IF NOT EXISTS vectors (text BLOB PRIMARY KEY, vector BLOB) WITHOUT ROWID"


def _key(text: str) -> bytes:
    # Lone surrogates are legal in JSON strings but not in UTF-8; they keep texts apart here.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


def _steps(count: int) -> Iterator[range]:
    for start in range(0, count, STEP):
        yield range(start, min(start + STEP, count))
