"""Encoders without a model: what the words are, and what the text looks like."""

from __future__ import annotations

import itertools
import re
import zlib
from typing import TYPE_CHECKING

from routers.encoders.base import MAX_CHARACTERS, CachedEncoder, unit
from routers.encoders.surface import SURFACE_FEATURES, surface_features

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["CharacterEncoder", "HashingEncoder", "SurfaceEncoder"]

# Longest runs of characters that are hashed.
CHARACTERS = 3
# As much as the encoders with a model read.
READ_CHARACTERS = 1536
# 2**64 divided by the golden ratio spreads numbers that are near each other.
_MIX = 0x9E3779B97F4A7C15


class HashingEncoder(CachedEncoder):
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
        return unit(vector)


class CharacterEncoder(CachedEncoder):
    """Hashed runs of one to three characters, no model at all: for languages without spaces.

    About 0.1 ms for a short query. Knows spelling, not meaning, in any script; a word's endings
    and misspellings change little.
    """

    @property
    def name(self) -> str:
        """``characters``."""
        return "characters"

    @property
    def revision(self) -> str:
        """Changes with the way features are hashed."""
        return "1"

    @property
    def width(self) -> int:
        """1024."""
        return 1024

    def _encode_one(self, text: str) -> NDArray[np.float32]:
        import numpy as np

        clean = f" {' '.join(text[:READ_CHARACTERS].lower().split())} "
        # Lone surrogates are legal in JSON strings.
        points = np.frombuffer(clean.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
        codes = []
        for length in range(1, min(CHARACTERS, len(points)) + 1):
            code = np.full(len(points) - length + 1, length, np.uint64)
            for place in range(length):
                code = (code + points[place : place + len(code)]) * np.uint64(_MIX)
                code ^= code >> np.uint64(29)
            codes.append(code)
        code = np.concatenate(codes)
        counts = np.bincount(
            (code % np.uint64(self.width)).astype(np.intp),
            np.where(code >> np.uint64(63), 1.0, -1.0),
            self.width,
        )
        # What is said ten times is not ten times as telling.
        return unit((np.sign(counts) * np.sqrt(np.abs(counts))).astype(np.float32))


class SurfaceEncoder(CachedEncoder):
    """What a text looks like: length, script, language, code, maths, options, kind of question.

    About 0.1 ms for a short query. ``SURFACE_FEATURES`` names the dimensions; the last one is a
    constant, so that the others keep their size when the vector is scaled to length 1.
    """

    @property
    def name(self) -> str:
        """``surface``."""
        return "surface"

    @property
    def revision(self) -> str:
        """Changes with the features."""
        return "1"

    @property
    def width(self) -> int:
        """One for each feature, and one."""
        return len(SURFACE_FEATURES) + 1

    def _encode_one(self, text: str) -> NDArray[np.float32]:
        import numpy as np

        return unit(np.array([*surface_features(text), 1.0], np.float32))
