"""How long encoders take for one query, on one thread, interleaved in one run.

    python -m benchmarks.encoders [ENCODER ...]

Compare rows; absolute times belong to the machine.
"""

from __future__ import annotations

import sys
import time

import numpy as np

from benchmarks.overhead import prompts
from routers.encoders import get_encoder

ENCODERS = (
    "hashing", "minilm-l1-int8", "minilm-l2-int8", "minilm-l3-int8", "minilm-int8", "minilm-fp32"
)  # fmt: skip
ROUNDS = 5


def measure(names: list[str], texts: list[str]) -> dict[str, list[float]]:
    """Milliseconds per text, each text new to the encoder's cache."""
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(ROUNDS + 1):
        for name in names:
            encoder = get_encoder(name)
            for text in texts:
                query = f"{text} ({number})"
                started = time.perf_counter()
                encoder.encode([query])
                if number:  # the first round loads and warms up
                    times[name].append((time.perf_counter() - started) * 1000)
    return times


def main() -> None:
    """Print a table."""
    names = sys.argv[1:] or list(ENCODERS)
    times = measure(names, prompts(100))
    print("| encoder | mean ms | median ms | 95th percentile ms |\n|---|--:|--:|--:|")
    for name in names:
        median, high = np.percentile(times[name], [50, 95])
        print(f"| {name} | {np.mean(times[name]):.2f} | {median:.2f} | {high:.2f} |")


if __name__ == "__main__":
    main()
