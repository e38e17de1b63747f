"""Play the demonstration task over a real connection as a client does that knows little:
messages of pictures, state and prompt.

The server runs as `halo serve` starts it. Each run plays the same episodes over one
connection: with and without `reset`, with as
many actions of an answer executed as it says or with another number, and with a server that
may begin an episode by itself. Kept:
successes, warnings, and where the server saw a beginning. Exit status 1 unless every bar
holds.

    python scripts/episode_check.py --json bench/episodes.json
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from openpi_check import root, served


@dataclass(frozen=True)
class Run:
    "One way to play: arguments of the server, and what the client does."

    name: str
    server: tuple = ()
    told: bool = True  # the client sends reset
    execute: int | None = None  # actions executed of an answer; None: as many as it says
    frames: bool = False  # the frames in between are sent
    more: bool = False  # play all episodes, not only the first


def runs(execute):
    "What is measured for a policy that executes `execute` actions of a chunk."
    return [
        Run('reset told, as many actions as the answer says', more=True),
        Run('reset told, every frame sent', frames=True),
        Run(
            'reset told, but the server counts one tick (--execute 1)',
            ('--execute', '1'),
            execute=execute,
        ),
        Run('no reset', told=False),
        Run(
            'no reset, --new-episode reset',
            ('--new-episode', 'reset'),
            told=False,
            more=True,
        ),
        Run(
            'no reset, --new-episode reset, every frame sent',
            ('--new-episode', 'reset'),
            told=False,
            frames=True,
        ),
    ]


class Client:
    "Plays episodes over one connection and keeps what the server says about them."

    def __init__(self, address, run):
        from halo.deploy.serve import PolicyClient

        self.run, self.connection = run, PolicyClient(address)
        self.warnings, self.begun, self.sent = [], [], 0

    def play(self, env, seed):
        "One episode: success and ticks."
        obs, info = env.reset(seed=seed)
        if self.run.told:
            self.connection.reset(seed)
        queue, tick, done = [], 0, False
        while not done:
            if not queue:
                queue = self.ask(env, obs, seed, tick)
            elif self.run.frames:
                self.connection.frame(dict(primary=obs['pixels']['primary']))
            obs, _, terminated, truncated, info = env.step(queue.pop(0))
            tick, done = tick + 1, terminated or truncated
        return dict(seed=seed, success=bool(info['is_success']), ticks=tick)

    def ask(self, env, obs, seed, tick):
        "The actions to execute next."
        message = dict(
            images=obs['pixels'], state=obs['agent_pos'], prompt=env.task_description
        )
        answer = self.connection.infer(message)
        at = dict(seed=seed, tick=tick)
        if 'warning' in answer:
            self.warnings.append(at | dict(says=answer['warning']))
        if answer.get('new_episode'):
            self.begun.append(at)
        return list(answer['actions'][: self.run.execute or answer['execute']])


def measure(run, policy, env, seeds):
    "Play a run's episodes."
    start = time.perf_counter()
    with served(policy, *run.server) as (host, port):
        client = Client(f'{host}:{port}', run)
        episodes = [client.play(env, seed) for seed in seeds]
        client.connection.close()
    return summary(run, episodes, client) | dict(seconds=round(time.perf_counter() - start))


def summary(run, episodes, client):
    "A run's numbers."
    first = episodes[0]['seed']
    at_start = [b for b in client.begun if b['tick'] == 0]
    return dict(
        name=run.name,
        server=list(run.server),
        told=run.told,
        frames=run.frames,
        episodes=len(episodes),
        successes=sum(e['success'] for e in episodes),
        ticks=sum(e['ticks'] for e in episodes),
        warnings=len(client.warnings),
        warned=client.warnings[:1],
        begun=len(client.begun),
        false=len(client.begun) - len(at_start),
        missed=(
            sum(e['seed'] != first for e in episodes) - len(at_start)
            if run.server[:1] == ('--new-episode',)
            else None
        ),
        outcomes=[e['success'] for e in episodes],
    )


def judge(found):
    "Which bars hold, by name."
    told, frames, one, untold, begun, begun_frames = found
    n = untold['episodes']
    rate = lambda r: r['successes'] / r['episodes']
    return {
        'told: no warning in any episode': (
            not told['warnings'] and not frames['warnings'] and not one['warnings']
        ),
        'told: at least 11 of 12': rate(told) > 0.9,
        'the old default of one tick is worse': (
            sum(one['outcomes']) < sum(told['outcomes'][:n])
        ),
        'no reset: one warning, at the second beginning': (
            untold['warnings'] == 1
            and untold['warned'][0]['tick'] == 0
            and untold['warned'][0]['seed'] == untold['first'] + 1
        ),
        'no reset: the history misleads': rate(untold) < 0.5,
        'begun by the server: never within an episode': (
            not begun['false'] and not begun_frames['false']
        ),
        'begun by the server: at every beginning': (
            not begun['missed'] and not begun_frames['missed']
        ),
        'begun by the server: as good as told': (
            sum(begun['outcomes'][:n]) >= sum(told['outcomes'][:n]) - 1
        ),
    }


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--policy', default='checkpoints/flash_place/full')
    p.add_argument('--episodes', type=int, default=12, help='of each run')
    p.add_argument(
        '--more', type=int, default=60, help='of the runs that count false alarms'
    )
    p.add_argument('--json', type=Path, help='write the numbers here')
    args = p.parse_args()
    import torch

    from halo.data.files import write_whole
    from halo.sim.flash_place import EVAL_SEED, FlashPlaceEnv

    torch.set_num_threads(1)
    execute = json.loads((root / args.policy / 'config.json').read_text())['n_action_steps']
    env, found = FlashPlaceEnv(), []
    for run in runs(execute):
        seeds = [EVAL_SEED + k for k in range(args.more if run.more else args.episodes)]
        found.append(measure(run, args.policy, env, seeds) | dict(first=EVAL_SEED))
        print(
            json.dumps({k: v for k, v in found[-1].items() if k != 'outcomes'}), flush=True
        )
    env.close()
    bars = judge(found)
    n = args.episodes
    verdict = ', '.join(f"{sum(r['outcomes'][:n])}/{n} {r['name']}" for r in found)
    for k, v in bars.items():
        print('ok    ' if v else 'FAILED', k)
    print(verdict)
    document = dict(
        policy=args.policy,
        execute=execute,
        first_seed=EVAL_SEED,
        runs=found,
        bars=bars,
        verdict=verdict,
    )
    if args.json:
        write_whole(args.json, json.dumps(document, indent=1) + '\n')
    sys.exit(not all(bars.values()))


if __name__ == '__main__':
    main()
