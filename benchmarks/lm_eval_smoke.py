"""Run lm-eval (EleutherAI, ``local-chat-completions``) on a small local task against a service.

    python -m benchmarks.lm_eval_smoke [--url http://127.0.0.1:8000] [--limit 40]

The task is made from the general questions that ship with Collegium, so nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from evals.tasks import get_task

TASK = {
    "task": "collegium_facts",
    "dataset_path": "json",
    "output_type": "generate_until",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 32, "do_sample": False},
    "filter_list": [
        {
            "name": "none",
            "filter": [{"function": "take_first"}],
        }
    ],
    "metric_list": [
        {
            "metric": "exact_match",
            "aggregation": "mean",
            "higher_is_better": True,
            "ignore_case": True,
            "ignore_punctuation": True,
        }
    ],
    "metadata": {"version": 1},
}


def main() -> None:
    """Write the task, run lm-eval, pass on its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("out/lm_eval"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            {"question": sample.text, "answer": sample.answer}
            for sample in get_task("general").samples("test")
        ]
        data = Path(folder) / "facts.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = {**TASK, "dataset_kwargs": {"data_files": {"test": str(data)}}}
        (Path(folder) / "facts.yaml").write_text(yaml.safe_dump(task))
        model = (
            f"model=auto,base_url={arguments.url}/v1/chat/completions,num_concurrent=4,"
            "tokenizer_backend=none,max_length=2048"
        )
        command = [
            sys.executable, "-m", "lm_eval", "run", "--model", "local-chat-completions",
            "--model_args", model, "--tasks", "collegium_facts", "--include_path", folder,
            "--apply_chat_template", "--limit", str(arguments.limit),
            "--output_path", str(arguments.out), "--log_samples",
        ]  # fmt: skip
        sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
