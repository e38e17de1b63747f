"""Play a simulator that lives in an environment of its own through the policy server, with
an untrained HALO of that robot's shapes: a check of the machinery, never a result.

Two processes: `python -m halo.deploy.serve --untrained`, and the simulator's client under
the
interpreter of its own environment (configs/requirements/). What follows `--` goes to the
client.
Exit status 1 unless the client ends well, plays every episode, and names the random weights
in its result. `--keep` puts the episodes and conventions of a run that ended well into one
small file for all simulators, without the rates, which mean nothing here.

    python scripts/sim_check.py maniskill --python /path/to/python --keep bench/sims.json
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

from openpi_check import clean, root, served

# cameras (height = width), state, action, control rate: what each client sends and executes
# the published ManiSkill's wrist camera has 128; the server resizes
SHAPES = {
    'maniskill': dict(cameras=dict(primary=128, wrist=128), state=7, action=7, hz=20),
    'calvin': dict(cameras=dict(primary=200, wrist=84), state=15, action=7, hz=30),
    'robomme': dict(cameras=dict(primary=256, wrist=256), state=8, action=8, hz=10),
}


def make_policy(folder, client, preset):
    "Write an untrained HALO with a client's shapes to `folder`, as training would."
    from halo.benchmarks.suite import random_policy

    s = SHAPES[client]
    robot = SimpleNamespace(
        protocol=dict(control_hz=s['hz']),
        conventions=dict(
            cameras={k: [n, n, 3] for k, n in s['cameras'].items()},
            primary='primary',
            state_size=s['state'],
            action_size=s['action'],
        ),
    )
    for part in random_policy(robot, preset):
        part.save_pretrained(folder)
    return folder


def judge(out, episodes):
    "What is wrong with the client's result file, or ''."
    if not out.exists():
        return f'the client wrote no {out}'
    d = json.loads(out.read_text())
    if len(d['episodes']) != episodes:
        return f"{len(d['episodes'])} of {episodes} episodes in {out}"
    return (
        ''
        if d['conventions']['server'].get('weights') == 'random'
        else f'{out} does not say that the weights are random'
    )


def keep(path, client, out):
    """Put episodes and conventions of a client's result file into the file `path` of all
    simulators, under the client's name.
    """
    from halo.data.files import write_whole

    kept, d = (
        json.loads(path.read_text()) if path.exists() else {},
        json.loads(out.read_text()),
    )
    kept[client] = {k: d[k] for k in ('benchmark', 'seconds', 'conventions', 'episodes')}
    write_whole(path, json.dumps(kept, indent=1, sort_keys=True) + '\n')


def main():
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog='What follows -- goes to the client.'
    )
    p.add_argument('client', choices=SHAPES)
    p.add_argument(
        '--python', required=True, help="interpreter of the simulator's environment"
    )
    p.add_argument('--preset', default='small')
    p.add_argument('--episodes', type=int, default=1)
    p.add_argument(
        '--out',
        type=Path,
        default=Path('outputs/sim_check.json'),
        help="the client's result file; made anew",
    )
    p.add_argument(
        '--keep',
        type=Path,
        metavar='FILE',
        help="add the run to this file, under the client's name",
    )
    cut = sys.argv.index('--') if '--' in sys.argv else len(sys.argv)
    args, more = p.parse_args(sys.argv[1:cut]), sys.argv[cut + 1 :]
    out = args.out.resolve()
    out.unlink(missing_ok=True)
    with (
        tempfile.TemporaryDirectory() as d,
        served(
            make_policy(Path(d) / 'policy', args.client, args.preset),
            '--untrained',
            '--resize',
            '--idle',
            '3600',
        ) as (host, port),
    ):
        command = [
            args.python,
            str(root / f'clients/{args.client}.py'),
            '--address',
            f'{host}:{port}',
            '--episodes',
            str(args.episodes),
            '--out',
            str(out),
            *more,
        ]
        status = subprocess.run(command, env=clean(), cwd=root).returncode
    wrong = (
        f'the client ended with status {status}' if status else judge(out, args.episodes)
    )
    if args.keep and not wrong:
        keep(args.keep, args.client, out)
    print(
        wrong
        or f'{args.client}: {args.episodes} episodes through the server, with random'
        ' weights: a check of the machinery, not a result'
    )
    sys.exit(bool(wrong))


if __name__ == '__main__':
    main()
