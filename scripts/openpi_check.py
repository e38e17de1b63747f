"""Drive HALO with the stock `openpi-client` from a virtual environment of its own through
episodes of the demonstration task, and compare with the same episodes in-process.

Three processes: the policy server (`python -m halo.deploy.serve`), the stock client (an
environment with numpy < 2; it relays what it gets over a pipe), and this one, which runs
the simulator and the comparison.
Exit status 1 unless success and every executed action are equal.

    python scripts/openpi_check.py --venv /tmp/openpi        # makes the environment if it
    is not there (pip install openpi-client)
"""

import argparse
import contextlib
import json
import os
import re
import struct
import subprocess
import sys
import time
from pathlib import Path

root = Path(__file__).resolve().parent.parent


def read(pipe):
    "One length-prefixed message of a pipe, or None at its end."
    head = pipe.read(4)
    return pipe.read(struct.unpack('<I', head)[0]) if len(head) == 4 else None


def write(pipe, data):
    pipe.write(struct.pack('<I', len(data)) + data)
    pipe.flush()


def clean():
    "This process's variables without its packages."
    return {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'VIRTUAL_ENV')}


def relay(host, port):
    """Runs in the client's environment: what comes in goes to the server through the stock
    client, its answer goes out.
    """
    from importlib.metadata import version

    from openpi_client import msgpack_numpy
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    out, sys.stdout = sys.stdout.buffer, sys.stderr
    client = WebsocketClientPolicy(host, int(port))
    about = {
        'versions': {
            name: version(name)
            for name in ('openpi-client', 'numpy', 'websockets', 'msgpack')
        },
        'metadata': client.get_server_metadata(),
    }
    write(out, msgpack_numpy.packb(about))
    while (data := read(sys.stdin.buffer)) is not None:
        try:
            answer = client.infer(msgpack_numpy.unpackb(data))
        except RuntimeError as e:
            answer = {'error': str(e)}
        write(out, msgpack_numpy.packb(answer))


@contextlib.contextmanager
def served(policy, *more):
    "A policy server as a process, with `more` arguments; gives (host, port)."
    process = subprocess.Popen(
        [
            sys.executable,
            '-m',
            'halo.deploy.serve',
            '--policy',
            str(policy),
            '--port',
            '0',
            '--threads',
            '1',
            *more,
        ],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        line = process.stdout.readline()
        found = re.search(r'ws://([\d.]+):(\d+)', line)
        if not found:
            raise SystemExit(
                f'the server did not start: {line or "no output"} (python -m'
                f' halo.deploy.serve --policy {policy})'
            )
        yield found.groups()
    finally:
        process.terminate()
        print('server:', process.stdout.read().strip(), f'(exit status {process.wait(30)})')


class Stock:
    "The stock client at the other end of a pipe."

    def __init__(self, python, host, port):
        from halo.deploy.serve import packb, unpackb

        self.pack, self.unpack = packb, unpackb
        self.process = subprocess.Popen(
            [str(python), str(Path(__file__).resolve()), '--relay', host, port],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=clean(),
        )
        self.about = self.unpack(self.receive())

    def receive(self):
        if (data := read(self.process.stdout)) is None:
            raise SystemExit('the stock client ended; its message is above')
        return data

    def infer(self, obs):
        write(self.process.stdin, self.pack(obs))
        answer = self.unpack(self.receive())
        if 'error' in answer:
            raise SystemExit(f"the server refused: {answer['error']}")
        return answer

    def close(self):
        self.process.stdin.close()
        self.process.wait(20)


def nested(obs, task):
    return dict(images=obs['pixels'], state=obs['agent_pos'], prompt=task)


def flat(obs, task):
    return {
        'observation/image': obs['pixels']['primary'],
        'observation/wrist_image': obs['pixels']['wrist'],
        'observation/state': obs['agent_pos'],
        'prompt': task,
    }


def play(client, env, seed, form, execute):
    """One episode through the client: success, ticks, executed actions, milliseconds per
    answer.
    """
    import numpy as np

    obs, info = env.reset(seed=seed)
    actions, queue, ms, done, tick = [], [], [], False, 0
    while not done:
        message = form(obs, env.task_description) | dict(tick=tick)
        if queue:
            client.infer(
                {
                    k: v
                    for k, v in message.items()
                    if k in ('images', 'observation/image', 'tick')
                }
                | dict(frame_only=True)
            )
        else:
            start = time.perf_counter()
            queue = list(
                client.infer(message | (dict(reset=True, seed=seed) if tick == 0 else {}))[
                    'actions'
                ][:execute]
            )
            ms.append(1000 * (time.perf_counter() - start))
        actions.append(queue.pop(0))
        tick += 1
        obs, _, terminated, truncated, info = env.step(actions[-1])
        done = terminated or truncated
    return dict(
        seed=seed,
        success=bool(info['is_success']),
        ticks=tick,
        actions=np.stack(actions),
        ms=float(np.median(ms)),
    )


def make_venv(folder):
    "The client's Python, in an environment made with pip if it is not there."
    python = Path(folder) / 'bin/python'
    if not python.exists():
        print(f'making {folder} with openpi-client', flush=True)
        subprocess.run([sys.executable, '-m', 'venv', folder], check=True, env=clean())
        # which openpi-client 0.1.2 imports and does not name
        subprocess.run(
            [
                python,
                '-m',
                'pip',
                'install',
                '--quiet',
                'openpi-client',
                'typing-extensions',
            ],
            check=True,
            env=clean(),
        )
    return python


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument(
        '--venv',
        default=str(root / 'outputs/openpi_client'),
        help='virtual environment of the stock client; made if missing',
    )
    p.add_argument('--policy', default='checkpoints/flash_place/full')
    p.add_argument('--episodes', type=int, default=3)
    p.add_argument('--json', type=Path, help='write the comparison here')
    args = p.parse_args()
    import numpy as np
    import torch

    from halo.data.files import write_whole
    from halo.sim.evaluate import evaluate, load_policy
    from halo.sim.flash_place import EVAL_SEED, FlashPlaceEnv, FlashPlaceEnvConfig

    torch.set_num_threads(1)
    seeds, parts = (
        [EVAL_SEED + k for k in range(args.episodes)],
        load_policy(root / args.policy),
    )
    execute = parts[0].config.n_action_steps
    inside = evaluate(
        *parts, FlashPlaceEnvConfig(), seeds, n_envs=1, record=seeds, progress=False
    )
    env, rows, same = FlashPlaceEnv(), [], True
    with served(args.policy) as (host, port):
        client = Stock(make_venv(args.venv), host, port)
        print(
            'client:',
            client.about['versions'],
            ' server:',
            {k: client.about['metadata'][k] for k in ('policy', 'chunk', 'n_action_steps')},
        )
        for form in (nested, flat):
            for seed in seeds:
                got, want = play(client, env, seed, form, execute), inside.episode(seed)
                recorded = inside.records[seed]['action']
                equal = (
                    got['success'] == want['success']
                    and got['ticks'] == want['ticks']
                    and np.array_equal(got['actions'], recorded)
                )
                n = min(len(recorded), got['ticks'])
                rows.append(
                    dict(
                        form=form.__name__,
                        seed=seed,
                        success=got['success'],
                        in_process=want['success'],
                        ticks=got['ticks'],
                        in_process_ticks=want['ticks'],
                        largest_difference=float(
                            np.abs(got['actions'][:n] - recorded[:n]).max()
                        ),
                        equal=equal,
                        median_ms=round(got['ms'], 1),
                    )
                )
                print(json.dumps(rows[-1]), flush=True)
                same &= equal
        client.close()
    env.close()
    verdict = (
        f"{sum(r['success'] for r in rows)}/{len(rows)} served episodes succeed,"
        f" {sum(r['in_process'] for r in rows)}/{len(rows)} in-process; successes and all"
        f" actions {'equal' if same else 'DIFFER'}"
    )
    print(verdict)
    if args.json:
        write_whole(
            args.json,
            json.dumps(
                dict(
                    client=client.about['versions'],
                    execute=execute,
                    policy=args.policy,
                    episodes=rows,
                    verdict=verdict,
                ),
                indent=1,
            ),
        )
    sys.exit(not same)


if __name__ == '__main__':
    relay(*sys.argv[2:]) if sys.argv[1:2] == ['--relay'] else main()
