#!/bin/bash
# Everything that needs a GPU, in one call: the GPU tests, the benchmarks, the quickstart, and with DATA=FOLDER the experiments
# on the sets in it (pbc, chest_xray, nuclei, bccd), each for at most MINUTES (default 2); the same call goes on where it was.
# PARTS="tests eager compiled evidence" is the default; some of it may be left out.
# Results go to $1 (default gpu-results). Needs the project's dependencies installed, and for the peers the `bench` extra.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu-results}
python=${PYTHON:-python3}
parts=" ${PARTS:-tests eager compiled evidence} "
mkdir -p "$out"

evidence() { # EXPERIMENT [ARGUMENT …]
    "$python" -m benchmarks evidence "$@" --out "$out/$1.md" --minutes "${MINUTES:-2}" --store "$out/store" --runs "$out/runs" \
        --set resources.pretrain.device=cuda --set resources.finetune.device=cuda 2>&1 | tee "$out/$1.txt"
}

measure() { # SECONDS BENCHMARK [ARGUMENT …]
    echo "== ${*:2}"
    timeout "$1" "$python" -m benchmarks "${@:2}" 2>&1 | tee -a "$out/benchmarks.txt"
    echo "== $SECONDS s"
}

{ git rev-parse HEAD; nvidia-smi --query-gpu=name,driver_version --format=csv,noheader; "$python" -c 'import torch; print(torch.__version__)'; } > "$out/hardware.txt" 2>&1
if [[ $parts = *" tests "* ]]; then
    "$python" -m pytest -m gpu -q tests/gpu tests/integration 2>&1 | tee "$out/tests.txt"
fi
if [[ $parts = *" eager "* ]]; then
    measure 60 augment --device cuda
    measure 60 end_to_end --nets large --batch 64
    measure 60 steps cass
    measure 60 steps cass --size 384 --batch 32
    measure 60 steps dino
    measure 60 steps simclr
    measure 60 roofline
    measure 60 scattering --device cuda
    measure 60 selfpatch --batch 64
fi
if [[ $parts = *" compiled "* ]]; then
    measure 150 steps cass --compile
    measure 240 end_to_end --nets large --batch 64 --graphs --rounds 1
    measure 150 steps cass --compile --size 384 --batch 32
    measure 120 steps dino --compile
    measure 120 steps simclr --compile
    measure 120 roofline --compile
fi
cp benchmarks/results.csv "$out/"
if [[ $parts = *" evidence "* ]]; then
    evidence quickstart
    if [ -n "${DATA:-}" ]; then
        for pair in pbc:pbc chest_xray:chest_xray nuclei:nuclei_seg bccd:bccd_det; do
            [ -d "$DATA/${pair%%:*}" ] && evidence "${pair##*:}" --set "dataset.root=$DATA/${pair%%:*}"
        done
    fi
fi
