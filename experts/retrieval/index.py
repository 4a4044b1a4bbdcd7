"""An index on disk: passages and their vectors. Knows encoders as a protocol, nothing of experts.

A folder:

* ``manifest.json``: format, encoders with their revisions, documents with their hashes, hashes of
  the other two files
* ``passages.jsonl``: one passage a line
* ``vectors.safetensors``: by encoder, shape (n_passages, width), each row of length 1

The search is exact: one product of all vectors with the query's. For 100,000 passages that takes
tens of milliseconds on one core, which an approximate index would bring below one, at the price of
passages it misses, of another dependency, and of minutes to build; ``docs/retrieval.md`` has the
numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from experts.errors import ExpertConfigError
from experts.retrieval.passages import DEFAULT_CHARACTERS, Passage, split_document

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "EncoderSource",
    "Found",
    "IndexManifest",
    "IndexedEncoder",
    "PassageIndex",
    "TextEncoder",
    "build_index",
    "check_target",
]

FORMAT_VERSION = 1
MANIFEST, PASSAGES, VECTORS = "manifest.json", "passages.jsonl", "vectors.safetensors"


class TextEncoder(Protocol):
    """Turns texts into unit vectors; may be called from several threads at a time."""

    @property
    def name(self) -> str:
        """The name it is found by."""
        ...

    @property
    def revision(self) -> str:
        """Changes whenever vectors may change."""
        ...

    @property
    def width(self) -> int:
        """Length of a vector."""
        ...

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return shape (n_texts, width), each row of length 1."""
        ...


EncoderSource = Callable[[str], TextEncoder]
"""Finds an encoder by its name."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class IndexedEncoder(_Entry):
    """An encoder of an index."""

    name: str
    revision: str
    width: int = Field(ge=1)


class IndexedDocument(_Entry):
    """A document of an index."""

    path: str
    sha256: str
    passages: int = Field(ge=0)


class IndexManifest(_Entry):
    """What an index says of itself."""

    format_version: int = FORMAT_VERSION
    characters: int = Field(ge=1)
    encoders: list[IndexedEncoder] = Field(min_length=1)
    documents: list[IndexedDocument]
    passages_sha256: str
    vectors_sha256: str


@dataclass(frozen=True, slots=True)
class Found:
    """A passage that a search found.

    Attributes:
        passage: The passage.
        score: Cosine of its vector with the query's, in the encoder that found it.
    """

    passage: Passage
    score: float


class PassageIndex:
    """Passages and their vectors in memory. Searching is safe from several threads.

    Args:
        manifest: What the index says of itself.
        passages: The passages.
        vectors: By encoder's name, shape (n_passages, width).
        encoders: In the order of the manifest.
    """

    def __init__(
        self,
        manifest: IndexManifest,
        passages: Sequence[Passage],
        vectors: Mapping[str, NDArray[np.float32]],
        encoders: Sequence[TextEncoder],
    ) -> None:
        self.manifest = manifest
        self.passages = list(passages)
        self.vectors = dict(vectors)
        self._encoders = list(encoders)

    @classmethod
    def load(cls, folder: Path, encoders: EncoderSource) -> PassageIndex:
        """Read an index.

        Raises:
            ExpertConfigError: It is missing or damaged, or its vectors are of another revision of
                an encoder.
        """
        manifest, passages, vectors = _read(folder)
        found = []
        for entry in manifest.encoders:
            encoder = encoders(entry.name)
            if encoder.revision != entry.revision:
                raise ExpertConfigError(
                    f"the index {folder} was made with revision {entry.revision!r} of encoder "
                    f"{entry.name!r}, here is {encoder.revision!r}; run 'collegium index' again"
                )
            found.append(encoder)
        return cls(manifest, passages, vectors, found)

    def search(self, query: str, top_k: int, *, also: Sequence[str] = ()) -> list[Found]:
        """The best passages for a query, or for other wordings of it, best first.

        With several wordings or encoders, cosines are standardised over all passages, and each
        passage counts by its best wording and encoder: cosines of different encoders are no common
        scale, and an encoder that does not know the query's language finds no passage far above
        the others.
        """
        import numpy as np

        if not self.passages:
            return []
        cosines = np.array(
            [
                self.vectors[e.name] @ e.encode([text])[0]
                for e in self._encoders
                for text in (query, *also)
            ],
            np.float32,
        )
        spread = cosines.std(axis=1, keepdims=True)
        standard = (cosines - cosines.mean(axis=1, keepdims=True)) / np.maximum(spread, 1e-9)
        best = standard.argmax(axis=0)
        worth = standard.max(axis=0)
        count = min(top_k, len(worth))
        # Sorting a hundred thousand numbers takes as long as making them.
        top = np.argpartition(-worth, count - 1)[:count]
        order = top[np.lexsort((top, -worth[top]))]
        return [Found(self.passages[j], float(cosines[best[j], j])) for j in order.tolist()]


def build_index(
    documents: Iterable[tuple[str, str]],
    encoders: Sequence[TextEncoder],
    out: Path,
    *,
    characters: int = DEFAULT_CHARACTERS,
) -> tuple[IndexManifest, int]:
    """Write an index; it appears whole or not at all. An older index there is replaced.

    Vectors of passages that the older index has from the same revision are taken from there.

    Args:
        documents: Path and text of each.
        encoders: Whose vectors it shall hold.
        out: The folder.
        characters: Longest passage.

    Returns:
        The manifest, and the number of passages that had to be encoded.

    Raises:
        ExpertConfigError: There is nothing to index, or something else than an index at ``out``.
    """
    import numpy as np
    from safetensors.numpy import save

    check_target(out)
    passages: list[Passage] = []
    listed: list[IndexedDocument] = []
    for path, text in documents:
        found = split_document(path, text, characters)
        listed.append(IndexedDocument(path=path, sha256=_sha256(text), passages=len(found)))
        passages += found
    if not passages:
        raise ExpertConfigError("there is no text to index: no .md, .markdown or .txt file has any")
    texts = [passage.full_text for passage in passages]
    vectors: dict[str, NDArray[np.float32]] = {}
    encoded: set[str] = set()
    for encoder in encoders:
        known = _known_vectors(out, encoder)
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if new:
            known.update(zip(new, encoder.encode(new), strict=True))
        encoded.update(new)
        vectors[encoder.name] = np.array([known[text] for text in texts], np.float32)
    lines = "".join(json.dumps(asdict(passage), ensure_ascii=False) + "\n" for passage in passages)
    # A lone surrogate cannot come out of a UTF-8 file, so this always encodes.
    files = {PASSAGES: lines.encode(), VECTORS: save(vectors)}
    manifest = IndexManifest(
        characters=characters,
        encoders=[
            IndexedEncoder(name=e.name, revision=e.revision, width=e.width) for e in encoders
        ],
        documents=listed,
        passages_sha256=_sha256(files[PASSAGES]),
        vectors_sha256=_sha256(files[VECTORS]),
    )
    text = json.dumps(manifest.model_dump(), indent=1, ensure_ascii=False) + "\n"
    _replace(out, {**files, MANIFEST: text.encode()})
    return manifest, len(encoded)


def check_target(out: Path) -> None:
    """Refuse a place where an index could not be written.

    Raises:
        ExpertConfigError: There is something else than an index.
    """
    if out.exists() and not (out / MANIFEST).is_file():
        if not out.is_dir() or any(out.iterdir()):
            raise ExpertConfigError(f"{out} exists and is no index; choose another --out")


def _known_vectors(folder: Path, encoder: TextEncoder) -> dict[str, NDArray[np.float32]]:
    """Vectors of this encoder's revision by text, from the index that is there."""
    if not folder.is_dir() or not (folder / MANIFEST).is_file():
        return {}
    try:
        manifest, passages, vectors = _read(folder)
    except ExpertConfigError:
        return {}
    same = [
        e for e in manifest.encoders if (e.name, e.revision) == (encoder.name, encoder.revision)
    ]
    if not same:
        return {}
    return dict(zip((p.full_text for p in passages), vectors[encoder.name], strict=True))


def _read(folder: Path) -> tuple[IndexManifest, list[Passage], dict[str, Any]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    again = "run 'collegium index' again"
    try:
        manifest = IndexManifest.model_validate_json((folder / MANIFEST).read_bytes())
        content = {name: (folder / name).read_bytes() for name in (PASSAGES, VECTORS)}
    except OSError as error:
        raise ExpertConfigError(
            f"no index at {folder}: {error.strerror}; 'collegium index' makes one"
        ) from error
    except ValidationError as error:
        raise ExpertConfigError(
            f"the manifest of the index {folder} is damaged; {again}"
        ) from error
    if manifest.format_version != FORMAT_VERSION:
        raise ExpertConfigError(
            f"the index {folder} has format {manifest.format_version}, expected {FORMAT_VERSION}; "
            f"{again}"
        )
    stated = (manifest.passages_sha256, manifest.vectors_sha256)
    if stated != (_sha256(content[PASSAGES]), _sha256(content[VECTORS])):
        raise ExpertConfigError(f"files of the index {folder} do not match its manifest; {again}")
    try:
        # Not splitlines(), which also breaks at separators that stand within JSON texts.
        lines = content[PASSAGES].decode().split("\n")
        passages = [Passage(**json.loads(line)) for line in lines if line]
        vectors = load(content[VECTORS])
        shapes = {name: array.shape for name, array in vectors.items()}
    except (ValueError, TypeError, SafetensorError) as error:
        raise ExpertConfigError(f"the index {folder} is damaged; {again}") from error
    if shapes != {e.name: (len(passages), e.width) for e in manifest.encoders}:
        raise ExpertConfigError(f"the vectors of the index {folder} have wrong shapes; {again}")
    return manifest, passages, vectors


def _replace(out: Path, files: Mapping[str, bytes]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        folder = Path(scratch) / "index"
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        old = Path(scratch) / "old"
        if out.exists():
            os.replace(out, old)
        try:
            os.replace(folder, out)
        except BaseException:
            # Leaving the block deletes what is still in it.
            if old.exists():
                os.replace(old, out)
            raise


def _sha256(content: bytes | str) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()
