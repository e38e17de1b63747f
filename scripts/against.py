"""Training and rollouts of the tiny policy on a CPU, this tree against another commit, in
turns: samples and ticks a second of both, and their ratio.

    scripts/env.sh python scripts/against.py 0ad1041 --out bench/against.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WARM, STEPS, ENVIRONMENTS = 2, 6, 10


def train_steps(data: Path) -> list[float]:
    "Samples a second in training steps as `halo.studies.demo` takes them."
    import torch
    from lerobot.configs import PreTrainedConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    from halo.studies.demo import TRAIN
    from halo.train import loop

    start = ROOT / 'checkpoints/flash_place/full'
    config = PreTrainedConfig.from_pretrained(start).model
    dataset = LeRobotDataset('halo/flash_place', root=data)
    made = loop._begin(dataset, None, TRAIN, start, {}, dict(model=config))
    torch.manual_seed(0)
    made.policy.train()
    took = []
    for _ in range(WARM + STEPS):
        began = time.perf_counter()
        loop.train_step(made.policy, made.batch(), made.optimizer, TRAIN.clip)
        took.append(time.perf_counter() - began)
    return [TRAIN.batch / s for s in took[WARM:]]


def rollouts() -> tuple[list[float], str]:
    "Ticks a second of ten environments side by side, and what came of the episodes."
    from lerobot.envs.factory import make_env_config

    from halo.sim.evaluate import evaluate, load_policy
    from halo.sim.flash_place import EVAL_SEED

    made = load_policy(ROOT / 'checkpoints/flash_place/full')
    env, rates, told = make_env_config('flash_place'), [], []
    for k in range(2):
        seeds = range(EVAL_SEED + 10 * k, EVAL_SEED + 10 * (k + 1))
        began = time.perf_counter()
        r = evaluate(*made, env, seeds, ENVIRONMENTS, progress=False)
        ticks = sum(e['ticks'] for e in r.episodes)
        rates.append(ticks / (time.perf_counter() - began))
        told += [(e['seed'], e['success'], e['ticks']) for e in r.episodes]
    return rates, json.dumps(told)


def child(tree: Path, data: Path) -> dict:
    "What one tree does, in a process of its own."
    env = os.environ | dict(PYTHONPATH=str(tree))
    ask = [sys.executable, __file__, '--child', str(data)]
    run = subprocess.run(ask, env=env, cwd=tree, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f'{tree.name}:\n{run.stderr[-2000:]}')
    return json.loads(run.stdout.splitlines()[-1])


def measure(commit: str, rounds: int) -> dict:
    "Both trees in turns, `rounds` times."
    rates = {w: dict(before=[], now=[]) for w in ('training', 'rollouts')}
    with tempfile.TemporaryDirectory() as folder:
        before, data = Path(folder) / 'before', Path(folder) / 'data'
        git = ['git', '-C', str(ROOT), 'worktree']
        made = subprocess.run([*git, 'add', '-q', '--detach', str(before), commit])
        if made.returncode:
            sys.exit(f'{commit} is no commit of a clone in {ROOT}; name one of git log')
        try:
            from halo.sim.flash_place import record_demonstrations

            record_demonstrations(data, 20, seed=0)
            for k in range(rounds):
                trees = dict(before=before, now=ROOT)
                said = {name: child(tree, data) for name, tree in trees.items()}
                if said['before']['told'] != said['now']['told']:
                    sys.exit('the episodes of the two trees differ')
                for name, one in said.items():
                    for what in rates:
                        rates[what][name] += one[what]
                print(f'round {k + 1} of {rounds}', flush=True)
        finally:
            subprocess.run([*git, 'remove', '--force', str(before)], check=True)
    return rates


def told(rates: dict) -> dict:
    "Medians and ratios; printed."
    out = {}
    for what, r in rates.items():
        before, now = (statistics.median(r[k]) for k in ('before', 'now'))
        unit = 'samples' if what == 'training' else 'ticks'
        print(
            f"{what}: {before:.1f} -> {now:.1f} {unit} a second, {now / before:.2f} times"
            f" (medians of {len(r['now'])})"
        )
        out[what] = dict(before=before, now=now, ratio=now / before, calls=len(r['now']))
    return out


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    p.add_argument('commit', nargs='?', help='the other tree')
    p.add_argument('--rounds', type=int, default=10)
    p.add_argument('--out', type=Path, help='JSON file to write')
    p.add_argument('--child', type=Path, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.child:
        rates, episodes = rollouts()
        said = dict(training=train_steps(a.child), rollouts=rates, told=episodes)
        print(json.dumps(said))
        return
    if not a.commit:
        p.error('name a commit, such as HEAD~10')
    out = told(measure(a.commit, a.rounds))
    if a.out:
        from halo.benchmarks.first_gate import processor
        from halo.data.files import write_whole
        from halo.studies.bench import machine

        where = machine('cpu') | dict(processor=processor())
        write_whole(a.out, json.dumps(out | dict(commit=a.commit, machine=where), indent=1))


if __name__ == '__main__':
    main()
