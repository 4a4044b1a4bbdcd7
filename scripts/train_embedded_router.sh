#!/usr/bin/env bash
# Trains the router of the embedded experts from the table in the tree, and judges it on its test
# prompts. Needs a minute; writes routers/embedded/auto with its card, what it found, and the tables
# of the docs.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PWD/.venv/bin:$PATH
source scripts/same_bits.sh

general=general_texts=evals/tasks/data/general_texts.jsonl
collegium train blend \
  --table evals/data/embedded_table \
  --out routers/embedded/auto \
  --set "members=[\"coe ngrams=false $general\", \"coe $general\", \"kmeans\"]"

collegium evaluate routers/embedded/auto --table evals/data/embedded_table \
  --json docs/results/embedded_router.json --card routers/embedded/auto/README.md "$@"
python scripts/docs
