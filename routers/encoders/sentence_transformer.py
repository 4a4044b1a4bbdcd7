"""Any model of the package sentence-transformers."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from routers.base import RouterError
from routers.encoders.base import UNPINNED, CachedEncoder, unit

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["SENTENCE_TRANSFORMER_PREFIX", "SentenceTransformerEncoder"]

SENTENCE_TRANSFORMER_PREFIX = "sentence-transformers:"


class SentenceTransformerEncoder(CachedEncoder):
    """Any model that the package sentence-transformers can load, on torch.

    Loads on first use; each text is run alone, since padding moves the last bits. The last 4,096
    texts are kept in memory.

    Args:
        name_or_path: A folder, whose files are hashed, or a model's name on the hub, best with the
            revision that artefacts shall be bound to: ``NAME@REVISION``. Without one, vectors are
            not kept on disk, and an artefact takes whatever the hub has.
        device: ``cpu``, ``cuda``, ...; other devices than that of training may move last bits.
        on_disk: Whether vectors of many texts at once are kept on disk.
    """

    def __init__(
        self,
        name_or_path: str,
        *,
        device: str = "cpu",
        on_disk: bool = False,
    ) -> None:
        super().__init__(on_disk=on_disk)
        self.name_or_path = name_or_path
        self._model_name: str = name_or_path
        self._revision: str | None = None
        if not Path(name_or_path).is_dir():
            self._model_name, _, revision = name_or_path.partition("@")
            self._revision = revision or None
        self._folder_hash: str | None = None
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
        if self._folder_hash is None and Path(self.name_or_path).is_dir():
            self._folder_hash = _folder_sha256(Path(self.name_or_path))[:16]
        return self._folder_hash or self._revision or UNPINNED

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
                        self._model_name, revision=self._revision, device=self._device
                    )
                except (OSError, ValueError) as exc:
                    raise RouterError(
                        f"cannot load the encoder {self.name!r}: {str(exc).splitlines()[0]}"
                    ) from exc
            return self._loaded

    def _encode_one(self, text: str) -> NDArray[np.float32]:
        return unit(self._model.encode([text], show_progress_bar=False)[0])


def _folder_sha256(folder: Path) -> str:
    import hashlib

    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".md"):
        digest.update(str(path.relative_to(folder)).encode() + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
