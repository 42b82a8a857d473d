#!/bin/bash
# Everything that needs a GPU, in one call: the GPU tests, then the quickstart on it. Results go to $1 (default gpu-results).
# Needs the project's dependencies installed. Not run yet: no figure of it is published.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu-results}
python=${PYTHON:-python3}
mkdir -p "$out"

{ git rev-parse HEAD; nvidia-smi --query-gpu=name,driver_version --format=csv,noheader; "$python" -c 'import torch; print(torch.__version__)'; } > "$out/hardware.txt" 2>&1
"$python" -m pytest -m gpu -q tests/gpu 2>&1 | tee "$out/tests.txt"
"$python" -m pipeline.launch all quickstart --cluster local --store "$out/store" --runs "$out/runs" \
    --set resources.pretrain.device=cuda --set resources.finetune.device=cuda 2>&1 | tee "$out/quickstart.txt"
