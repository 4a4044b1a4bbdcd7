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

__all__ = ["CharacterEncoder", "HashingEncoder", "SurfaceEncoder", "hash_ngrams"]

LONGEST_RUN = 3
# As much as the encoders with a model read.
READ_CHARACTERS = 1536


def hash_ngrams(text: str, shortest: int, longest: int) -> NDArray[np.uint32]:
    """A number for each character n-gram of a text's beginning, shortest n-grams first.

    Case and the kind of white space make no difference, and spaces around the text are part of it.
    All places are hashed at once: that takes 0.1 ms for a long text, a tenth of what a loop over
    n-grams does (scikit-learn's ``HashingVectorizer``).

    Args:
        text: Any text.
        shortest: Characters of the shortest n-grams.
        longest: Characters of the longest ones.

    Returns:
        Shape (n_grams,). All bits are fit for use.

    References:
        Karp and Rabin, "Efficient randomized pattern-matching algorithms" (1987): the hash of an
        n-gram follows from that of a shorter one. Weinberger et al., "Feature Hashing for Large
        Scale Multitask Learning" (arXiv:0902.2206), for what is done with the numbers.
    """
    import numpy as np

    plain = f" {' '.join(text[:READ_CHARACTERS].lower().split())} "
    # As numbers; lone surrogates are legal in JSON strings.
    letters = np.frombuffer(plain.encode("utf-32-le", "surrogatepass"), "<u4")
    hashed, found = letters, [letters]
    for length in range(2, longest + 1):
        hashed = hashed[:-1] * np.uint32(0x01000193) ^ letters[length - 1 :]
        found.append(hashed)
    mixed = np.concatenate(found[shortest - 1 :])
    # Murmur3's last step: spreads every bit over all others.
    mixed = (mixed ^ (mixed >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return np.asarray(mixed ^ (mixed >> np.uint32(16)), np.uint32)


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

    About 0.05 ms for a short query. Knows spelling, not meaning, in any script; a word's endings
    and misspellings change little.
    """

    @property
    def name(self) -> str:
        """``characters``."""
        return "characters"

    @property
    def revision(self) -> str:
        """Changes with the way features are hashed."""
        return "2"

    @property
    def width(self) -> int:
        """1024."""
        return 1024

    def _encode_one(self, text: str) -> NDArray[np.float32]:
        import numpy as np

        codes = hash_ngrams(text, 1, LONGEST_RUN)
        # The highest bits name the place, the lowest the sign: together each is fair.
        counts = np.bincount(codes >> np.uint32(22), 1.0 - 2.0 * (codes & 1), self.width)
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
