#!/bin/bash
# Everything that needs a GPU, in one call: the GPU tests, the quickstart, and with DATA=FOLDER the experiments on the sets in
# it (pbc, chest_xray, nuclei, bccd), each for at most MINUTES (default 3); the same call goes on where it was. Results go to $1
# (default gpu-results). Needs the project's dependencies installed. Not run yet: no figure of it is published.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu-results}
python=${PYTHON:-python3}
mkdir -p "$out"

evidence() { # EXPERIMENT [ARGUMENT …]
    "$python" -m benchmarks.evidence "$@" --out "$out/$1.md" --minutes "${MINUTES:-3}" --store "$out/store" --runs "$out/runs" \
        --set resources.pretrain.device=cuda --set resources.finetune.device=cuda 2>&1 | tee "$out/$1.txt"
}

{ git rev-parse HEAD; nvidia-smi --query-gpu=name,driver_version --format=csv,noheader; "$python" -c 'import torch; print(torch.__version__)'; } > "$out/hardware.txt" 2>&1
"$python" -m pytest -m gpu -q tests/gpu 2>&1 | tee "$out/tests.txt"
evidence quickstart
if [ -n "${DATA:-}" ]; then
    for pair in pbc:pbc chest_xray:chest_xray nuclei:nuclei_seg bccd:bccd_det; do
        [ -d "$DATA/${pair%%:*}" ] && evidence "${pair##*:}" --set "dataset.root=$DATA/${pair%%:*}"
    done
fi
