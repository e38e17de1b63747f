#!/usr/bin/env python3
"""The benches at the paper's size on one GPU with 80 GB or more, in one process, into a
JSON file; about a quarter of an hour: python scripts/bench_gpu.py bench/gpu.json [bench
...]

`--try` runs tiny sizes on a CPU instead: does every bench still run?
"""

import argparse
import gc
import shlex
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
PAPER = '--preset paper --dtype bfloat16'
RUNS = {
    'tick': f'tick {PAPER} --graph --compile --no-eager --ticks 34',
    'eager': f'tick {PAPER} --ticks 34 --name "tick, eager"',
    'peers': 'peers --size full --dtype bfloat16 --graph --compile --rounds 20',
    'base': 'peers --size base --dtype bfloat16 --graph --compile --name base',
    'salr': 'salr --rounds 20',
    'options': f'options {PAPER} --graph --compile --no-int8 --rounds 20',
    'denoise': f'denoise {PAPER} --rounds 20',
    'share': f'share {PAPER} --graph --compile --no-eager --rounds 20',
    'cost': f'cost {PAPER} --graph --rounds 20',
    'exact': 'tick --preset paper --no-plain --ticks 18 --name exact',
    'prefill': f'prefill {PAPER} --ticks 24 --every 8',
    'train': 'train --preset small --dtype bfloat16 --batch 32 --rounds 20',
    'train_base': 'train --preset base --dtype bfloat16 --checkpointing --batch 8'
    ' --rounds 20 --name "train, base"',
    'train_paper': f'train {PAPER} --trainings lora --checkpointing --batch 4 --rounds 20'
    ' --name "train, paper"',
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('file', type=Path)
    parser.add_argument('names', nargs='*', help=', '.join(RUNS))
    parser.add_argument('--more', default='', help='further arguments for every bench')
    parser.add_argument('--try', dest='small', action='store_true')
    args = parser.parse_args()
    if unknown := set(args.names) - set(RUNS):
        parser.error(f"{', '.join(unknown)}: choose from {', '.join(RUNS)}")
    import torch

    from halo.studies import bench

    failed = []
    for name in args.names or RUNS:
        command = shlex.split(f'{RUNS[name]} --device cuda {args.more}') + [
            '--out',
            str(args.file),
        ]
        if args.small:
            command += '--preset tiny --dtype float32 --device cpu --history 8'.split()
            command += '--hop 4 --ticks 6 --rounds 2 --batch 2'.split()
        print('==', *command, flush=True)
        began = time.monotonic()
        try:
            bench.main(command)
        except Exception:
            traceback.print_exc()
            failed.append(name)
        gc.collect()
        torch.cuda.empty_cache() if torch.cuda.is_available() else None
        print(f'-- {time.monotonic() - began:.0f} s', flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == '__main__':
    main()
