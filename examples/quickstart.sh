#!/usr/bin/env bash
# From nothing to a trained adapter: environment, real model, plan, rewritten graph, training.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source .ci/environment.sh
environment examples

model=$(python examples/prepare_smollm2.py)
spec=examples/quickstart.lora

set -x
lora-fx plan "$spec" --model "$model"
lora-fx show "$spec" --model "$model" --stage lowered --layer 0
python examples/quickstart.py "$@"
