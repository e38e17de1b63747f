#!/usr/bin/env bash
# Every bench at the paper's size on one GPU, into a JSON file: scripts/bench_gpu.sh bench/h200.json
set -u
out=${1:?usage: scripts/bench_gpu.sh FILE.json}
bench() { echo "== $*"; timeout "${LIMIT:-170}" python3 -m halo.bench "$@" --device cuda --out "$out" || echo "FAILED ($?): $*"; }
paper="--preset paper --dtype bfloat16"
bench tick $paper --graph --ticks 40
bench salr --dtype float32 --rounds 30
bench peers --size full --dtype bfloat16 --graph --rounds 20
bench share $paper --graph --rounds 10
bench denoise $paper --rounds 20
bench cost $paper --graph --rounds 20
bench options $paper --graph --rounds 20
