"""Kills ``collegium collect`` at random moments and resumes it, then compares with a clean run.

python -m benchmarks.collect_kills [--kills 20]
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from evals.collect import JOURNAL_FILE
from routers.outcomes import OutcomeTable

EXPERTS = ("one", "two", "three")


def command(config: Path, out: Path) -> list[str]:
    """The run that is killed: three scripted experts on a shipped task."""
    return [
        sys.executable, "-m", "orchestrator.cli", "collect", "--config", str(config),
        "--tasks", "maths", "--split", "test", "--concurrency", "3", "--out", str(out),
    ]  # fmt: skip


def size(file: Path) -> int:
    """Bytes of a file; 0 if there is none."""
    return file.stat().st_size if file.exists() else 0


def killed_and_resumed(folder: Path, kills: int, seed: int = 0) -> tuple[int, Path, Path]:
    """Run once cleanly and once with kills.

    Returns:
        How many runs were really killed, and the folders of the clean and of the other table.
    """
    rng = random.Random(seed)
    config = folder / "config.yaml"
    rules = [
        {"match": "[02468]", "answer": "42", "delay_s": 0.05},
        {"answer": "7", "delay_s": 0.05},
    ]
    entries = [{"name": name, "engine": "scripted", "rules": rules} for name in EXPERTS]
    config.write_text(json.dumps({"experts": entries}))  # JSON is YAML
    clean, killed = folder / "clean", folder / "killed"
    subprocess.run(command(config, clean), check=True, stderr=subprocess.DEVNULL)
    journal = killed / JOURNAL_FILE
    step = size(clean / JOURNAL_FILE) / (kills + 1)
    done = 0
    for number in range(kills):
        process = subprocess.Popen(command(config, killed), stderr=subprocess.DEVNULL)
        until = step * (number + rng.random())
        while process.poll() is None and size(journal) < until:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        done += process.poll() is None
        process.kill()
        process.wait()
    subprocess.run(command(config, killed), check=True, stderr=subprocess.DEVNULL)
    return done, clean, killed


def differences(clean: Path, killed: Path) -> list[str]:
    """What differs between two collected folders, but for times."""
    found = []
    one, other = OutcomeTable.load(clean), OutcomeTable.load(killed)
    if one.prompts != other.prompts:
        found.append("prompts")
    if one.models != other.models:
        found.append("models")
    elif not np.array_equal(one.scores("all"), other.scores("all"), equal_nan=True):
        found.append("scores")
    keys = [
        (answer["prompt_id"], answer["model"])
        for answer in map(json.loads, (killed / JOURNAL_FILE).read_text().splitlines())
    ]
    if len(keys) != len(set(keys)):
        found.append("an answer was asked for twice")
    if len(keys) != one.scores("all").size:
        found.append("answers are missing")
    return found


def main() -> None:
    """Print how many kills there were and what they changed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        done, clean, killed = killed_and_resumed(Path(folder), arguments.kills, arguments.seed)
        found = differences(clean, killed)
    print(f"{done} of {arguments.kills} runs killed on the way; differences: {found or 'none'}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
