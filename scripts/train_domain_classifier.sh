#!/usr/bin/env bash
# Trains the domain classifier from the table in the tree, and judges it on its test prompts. Needs
# a minute; writes routers/embedded/domains with its card. scripts/build_domains.py makes the table.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PWD/.venv/bin:$PATH
source scripts/same_bits.sh

# Without shrinkage and fallback the quality of a domain is the probability of that domain.
collegium train coe \
  --table evals/data/domains \
  --out routers/embedded/domains \
  --set shrinkage=0 --set fallback=false

collegium evaluate routers/embedded/domains --table evals/data/domains \
  --card routers/embedded/domains/README.md "$@"
