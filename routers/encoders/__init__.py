"""Texts to unit vectors. Knows nothing of routing.

Every encoder here keeps one contract: a text's vector depends on that text alone, so encoding a
list equals encoding its texts one by one, bit for bit. ``design/encoder.md`` has the measurements
behind the default.
"""

from __future__ import annotations

import re
from functools import lru_cache

from routers.base import RouterError
from routers.encoders.base import Encoder, forget_vectors
from routers.encoders.concatenated import SEPARATOR, ConcatenatedEncoder
from routers.encoders.lexical import CharacterEncoder, HashingEncoder, SurfaceEncoder
from routers.encoders.minilm import MiniLMEncoder
from routers.encoders.minilm_export import LAYERS
from routers.encoders.multilingual import MultilingualEncoder
from routers.encoders.sentence_transformer import (
    SENTENCE_TRANSFORMER_PREFIX,
    SentenceTransformerEncoder,
)
from routers.encoders.static import StaticEncoder

__all__ = [
    "DEFAULT_ENCODER",
    "CharacterEncoder",
    "ConcatenatedEncoder",
    "Encoder",
    "HashingEncoder",
    "MiniLMEncoder",
    "MultilingualEncoder",
    "SentenceTransformerEncoder",
    "StaticEncoder",
    "SurfaceEncoder",
    "forget_vectors",
    "get_encoder",
]

DEFAULT_ENCODER = "minilm-l2-int8"


def get_encoder(name: str = DEFAULT_ENCODER) -> Encoder:
    """The process-wide encoder of that name, so routers share one model and one cache.

    It keeps the vectors of many texts at once in ``$COLLEGIUM_CACHE/vectors``, by the texts' hash.

    Args:
        name: ``minilm-int8``, ``minilm-fp32``, with fewer layers ``minilm-l1-int8`` and so on,
            ``multilingual``, ``static``, ``characters``, ``hashing``, ``surface``,
            ``sentence-transformers:PATH`` or ``:NAME@REVISION``, or several of them with ``+``
            between.

    Raises:
        RouterError: Nothing is known under that name.
    """
    return _encoder(name)


@lru_cache(maxsize=32)
def _encoder(name: str) -> Encoder:
    if minilm := re.fullmatch(rf"minilm-(?:l([1-{LAYERS - 1}])-)?(int8|fp32)", name):
        layers, precision = minilm.groups()
        return MiniLMEncoder(
            "int8" if precision == "int8" else "fp32",
            int(layers) if layers else LAYERS,
            on_disk=True,
        )
    if name == "multilingual":
        return MultilingualEncoder(on_disk=True)
    if name == "characters":
        return CharacterEncoder()
    if name == "hashing":
        return HashingEncoder()
    if name == "surface":
        return SurfaceEncoder()
    if name == "static":
        return StaticEncoder()
    # Paths may hold a plus sign; a sentence-transformers model can only come last.
    first, plus, rest = name.partition(SEPARATOR)
    if plus and not first.startswith(SENTENCE_TRANSFORMER_PREFIX):
        others = get_encoder(rest)
        parts = others.parts if isinstance(others, ConcatenatedEncoder) else (others,)
        return ConcatenatedEncoder([get_encoder(first), *parts])
    if name.startswith(SENTENCE_TRANSFORMER_PREFIX):
        return SentenceTransformerEncoder(
            name.removeprefix(SENTENCE_TRANSFORMER_PREFIX), on_disk=True
        )
    raise RouterError(
        f"unknown encoder {name!r}; known: 'minilm-int8', 'minilm-fp32', "
        f"'minilm-l1-int8' (one layer) to 'minilm-l{LAYERS - 1}-int8', 'multilingual', 'static', "
        "'characters', 'hashing', 'surface', "
        f"'{SENTENCE_TRANSFORMER_PREFIX}NAME_OR_PATH', or several with '+' between them"
    )
