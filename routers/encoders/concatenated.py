"""Several encoders side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from routers.encoders.base import Encoder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["SEPARATOR", "ConcatenatedEncoder"]

SEPARATOR = "+"


class ConcatenatedEncoder:
    """The vectors of several encoders, one after the other, each with the same share of length.

    Args:
        parts: At least two encoders.
    """

    def __init__(self, parts: Sequence[Encoder]) -> None:
        self.parts = tuple(parts)

    @property
    def name(self) -> str:
        """The parts' names with ``+`` between them."""
        return SEPARATOR.join(part.name for part in self.parts)

    @property
    def revision(self) -> str:
        """The parts' revisions with ``+`` between them."""
        return SEPARATOR.join(part.revision for part in self.parts)

    @property
    def width(self) -> int:
        """The sum of the parts' widths."""
        return sum(part.width for part in self.parts)

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return shape (n_texts, width), each row of length 1."""
        import numpy as np

        vectors = np.concatenate([part.encode(texts) for part in self.parts], axis=1)
        return (vectors / np.float32(len(self.parts) ** 0.5)).astype(np.float32)
