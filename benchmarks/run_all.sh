#!/usr/bin/env bash
# Run every benchmark, one after the other: two at once would time each other.
set -euo pipefail
cd "$(dirname "$0")/.."
for question in precision memory checkpoint_memory checkpoint_gradients layer_speed commit_speed commit_scaling \
  lockstep_speed lookahead_cost training; do
  python -m "benchmarks.$question"
done
SYNCACCUM_NATIVE=0 python -m benchmarks.layer_speed
