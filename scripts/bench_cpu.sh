#!/usr/bin/env bash
# Every bench on a CPU, into a JSON file; about an hour and a half on one core (OMP_NUM_THREADS says how many are used); int8 needs `pip install -e ".[int8]"`: scripts/bench_cpu.sh bench/cpu.json
set -eu
out=${1:?usage: scripts/bench_cpu.sh FILE.json}
bench() { echo "== $*"; python -m halo.studies.bench "$@" --device cpu --out "$out"; }
bench salr --rounds 20
bench tick --preset small --ticks 24
bench share --preset small --rounds 20
bench peers --size third --rounds 20
bench tick --preset paper --layers 3 --ticks 20 --no-plain --name "tick, paper's widths"
bench tick --preset paper --layers 6 --ticks 20 --no-plain --name "tick, paper's widths, 6 layers"
bench denoise --preset small --rounds 20
bench cost --preset small --rounds 10
bench options --preset small --rounds 20 --checkpoint checkpoints/flash_place/full
bench prefill --preset small --ticks 24
