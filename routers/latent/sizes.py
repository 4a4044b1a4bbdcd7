"""How many parameters a collaboration trains, and how large one without peers must be for that."""

from __future__ import annotations

from collections.abc import Collection, Mapping

__all__ = ["interaction_parameters", "width_for"]

# Width and heads go together; this far off the wanted number of parameters is near enough.
TOLERANCE = 0.01


def interaction_parameters(
    widths: Mapping[str, int], writers: Collection[str], *, width: int, n_heads: int, n_stacks: int
) -> int:
    """Parameters of the interactions that take part in training.

    Args:
        widths: Size of the hidden states of each expert that is ever active.
        writers: Those of them that write; others have no way back from the shared space.
        width: Size of the shared space.
        n_heads: Attention heads in it.
        n_stacks: Into how many stacks experts are cut.
    """
    ways_in = width * sum(widths.values())
    ways_out = sum(widths[name] * width + 1 for name in writers)
    return (n_stacks - 1) * (ways_in + ways_out + 4 * width**2 + n_heads)


def width_for(parameters: int, size: int, *, n_heads: int, n_stacks: int) -> tuple[int, int]:
    """Width and heads of an interaction without peers that has so many parameters, within 1 %.

    Args:
        parameters: How many there shall be.
        size: Of the hidden states of the one expert.
        n_heads: At most so many heads; as many as divide a width that fits are taken.
        n_stacks: Into how many stacks it is cut.

    Raises:
        ValueError: No width comes so near.

    Examples:
        >>> width_for(400_000, 576, n_heads=8, n_stacks=2)
        (203, 7)
    """

    def count(width: int, heads: int) -> int:
        return interaction_parameters(
            {"": size}, [""], width=width, n_heads=heads, n_stacks=n_stacks
        )

    widest = 1
    while n_stacks > 1 and count(widest, 1) <= (1 + TOLERANCE) * parameters:
        widest += 1
    fitting = [
        (-heads, abs(count(width, heads) - parameters), width)
        for width in range(1, widest)
        for heads in range(1, n_heads + 1)
        if width % heads == 0 and abs(count(width, heads) / parameters - 1) <= TOLERANCE
    ]
    if not fitting:
        raise ValueError(f"no width gives {parameters} parameters within {TOLERANCE:.0%}")
    heads, _, width = min(fitting)
    return width, -heads
