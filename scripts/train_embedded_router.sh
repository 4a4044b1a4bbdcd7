#!/usr/bin/env bash
# Trains the router of the embedded experts from the table in the tree, and judges it on its test
# prompts. Needs seconds; writes routers/embedded/coe with its card, what it found, and the tables
# of the docs.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PWD/.venv/bin:$PATH
source scripts/same_bits.sh

collegium train coe \
  --table evals/data/embedded_table \
  --out routers/embedded/coe \
  --set general_texts=evals/tasks/data/general_texts.jsonl

collegium evaluate routers/embedded/coe --table evals/data/embedded_table \
  --json docs/results/embedded_router.json --card routers/embedded/coe/README.md "$@"
python scripts/docs
