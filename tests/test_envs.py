"""The flash_place task: nothing leaks the goal, seeds fix episodes, LeRobot runs it, and an
interrupted recording goes on.
"""

import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from lerobot.envs.configs import EnvConfig
from lerobot.envs.factory import make_env, make_env_config
from lerobot.envs.utils import env_to_policy_features

from halo.sim import flash_place as E

sim = pytest.mark.sim


@pytest.fixture(scope='module')
def env():
    env = E.FlashPlaceEnv(image_size=56)
    yield env
    env.close()


def roll(env, seed, ticks=12, **options):
    "Observations of `ticks` ticks under fixed random actions."
    obs, _ = env.reset(seed=seed, options=options)
    actions = np.random.default_rng(0).uniform(-1, 1, (ticks, 4))
    return [obs, *(env.step(a)[0] for a in actions)]


def same(a, b):
    return np.array_equal(a['agent_pos'], b['agent_pos']) and all(
        np.array_equal(a['pixels'][c], b['pixels'][c]) for c in a['pixels']
    )


# Without the simulator


def test_import_needs_no_simulator():
    code = (
        "import sys, halo.sim.flash_place as E; E.FlashPlaceEnv().task_description;"
        " sys.exit('mujoco' in sys.modules or 'metaworld' in sys.modules)"
    )
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


def test_missing_simulator_is_one_sentence(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named '{name.split('.')[0]}'")

    monkeypatch.setattr(E.importlib, 'import_module', absent)
    with pytest.raises(
        ImportError,
        match=r"needs MuJoCo and Meta-World.*pip install 'lerobot_policy_halo\[sim\]'",
    ):
        E.require_sim()


def test_missing_gl_is_one_sentence(monkeypatch):
    for name in ('MUJOCO_GL', 'DISPLAY'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, 'mujoco', raising=False)
    monkeypatch.setattr(E.sys, 'platform', 'linux')
    monkeypatch.setattr(E.ctypes.util, 'find_library', lambda name: None)
    with pytest.raises(RuntimeError, match='libosmesa6.*libegl1.*MUJOCO_GL'):
        E.choose_gl()


def test_gl_choice_respects_the_user(monkeypatch):
    monkeypatch.setenv('MUJOCO_GL', 'chosen')
    assert E.choose_gl() == 'chosen'


def test_registered_in_lerobot():
    cfg = make_env_config('flash_place')
    assert (
        EnvConfig.get_choice_class('flash_place') is E.FlashPlaceEnvConfig
        and cfg.type == 'flash_place'
        and cfg.fps == 10
    )
    features = env_to_policy_features(cfg)
    assert {k: f.shape for k, f in features.items()} == {
        'action': (4,),
        'observation.state': (4,),
        'observation.images.primary': (3, 112, 112),
        'observation.images.wrist': (3, 112, 112),
    }
    with pytest.raises(ValueError, match='fps is 30'):
        make_env_config('flash_place', fps=30)


def test_an_env_is_pickled_without_a_scene():
    assert pickle.loads(pickle.dumps(E.FlashPlaceEnv(32))).image_size == 32


@pytest.mark.parametrize('bad', [8, 1000, 56.0])
def test_bad_image_size(bad):
    with pytest.raises(ValueError, match='between 16 and 480'):
        E.FlashPlaceEnv(bad)


# The task


@sim
def test_a_seed_fixes_the_episode(env):
    first, again, other = roll(env, 5), roll(env, 5), roll(env, 6)
    assert all(map(same, first, again)) and not same(first[0], other[0])
    fresh = E.FlashPlaceEnv(56)
    assert all(map(same, first, roll(fresh, 5)))
    fresh.close()


@sim
def test_environments_of_one_kind_share_a_renderer_and_not_a_picture():
    "Ten renderers took longer than a whole rollout."
    first, second = E.FlashPlaceEnv(40), E.FlashPlaceEnv(40)
    alone = roll(first, 5)
    first.close()
    for env, seed in ((first, 5), (second, 6)):
        env.reset(seed=seed)
    (one,), (two,) = first._renderers.values(), second._renderers.values()
    assert one is two
    del one, two
    actions = np.random.default_rng(0).uniform(-1, 1, (12, 4))
    beside = [first.observe()]
    for a in actions:
        second.step(a)  # whose picture comes between
        beside.append(first.step(a)[0])
    assert all(map(same, alone, beside))
    first.close()
    second.observe()  # goes on when the other has given the renderer back
    second.close()
    assert not [k for k in E._SHARED if k[2] == 40]


@sim
def test_environments_may_be_stepped_in_threads():
    "An environment that was first drawn elsewhere gets a renderer of the thread it is in."
    envs = [E.FlashPlaceEnv(40) for _ in range(3)]
    want = [roll(env, seed) for seed, env in enumerate(envs)]
    with ThreadPoolExecutor(3) as pool:
        again = list(pool.map(roll, envs, range(3)))
        for env in envs:
            env.close()
    assert all(all(map(same, a, b)) for a, b in zip(want, again))


@sim
def test_rules_of_lists_are_drawn_too():
    pads = [[-0.17, 0.73], [0.0, 0.79], [0.17, 0.73]]
    env = E.FlashPlaceEnv(40, rules=E.FlashPlaceSpec(pads=pads))
    assert env.reset(seed=1)[0]['pixels']['primary'].shape == (40, 40, 3)
    env.close()


@sim
def test_only_the_ticks_that_are_looked_at_are_drawn(monkeypatch):
    env, drawn = E.FlashPlaceEnv(32), []
    whole = roll(env, 5)
    picture = E.FlashPlaceEnv.picture
    keep = lambda self, *a: drawn.append(self.tick) or picture(self, *a)
    monkeypatch.setattr(E.FlashPlaceEnv, 'picture', keep)
    env.look_every = 3
    spared = roll(env, 5)
    assert set(drawn) == set(range(0, 13, 3))
    for tick, obs in enumerate(spared):
        assert np.array_equal(obs['agent_pos'], whole[tick]['agent_pos'])
        assert same(obs | dict(agent_pos=0), whole[tick - tick % 3] | dict(agent_pos=0))
    env.close()


@sim
def test_every_goal_and_pad_occurs():
    env = E.FlashPlaceEnv(cameras=())
    infos = [env.reset(seed=s)[1] for s in range(60)]
    assert {(i['goal'], i['target']) for i in infos} == {
        (g, t) for g in range(3) for t in range(3)
    }


@sim
def test_the_observation_never_holds_the_goal(env):
    """The same seed and actions under the three instructions: identical observations, all
    the way.
    """
    runs = [roll(env, 5, goal=colour) for colour in E.COLOURS]
    assert all(map(same, runs[0], runs[1])) and all(map(same, runs[0], runs[2]))
    assert set(runs[0][0]) == {'pixels', 'agent_pos'} and runs[0][0]['agent_pos'].shape == (
        4,
    )


@sim
def test_the_colours_are_visible_during_the_flash_only(env):
    env.reset(seed=5)
    order = env.order.copy()
    for tick in range(12):
        env.order = order
        first = env.observe()
        env.order = np.roll(order, 1)
        assert same(first, env.observe()) == (tick >= env.rules.flash_ticks)
        env.order = order
        env.step([0, 0, 0, -1])


@sim
def test_the_experts_motion_keeps_the_goal_secret_until_the_lift():
    env = E.FlashPlaceEnv(cameras=())
    for seed in range(3):
        runs = [E.demonstrate(env, seed, 0.2, colour) for colour in E.COLOURS]
        carry = runs[0]['phases'].index('carry')
        assert runs[0]['phases'].index('lift') > env.rules.flash_ticks
        assert all(r['phases'][:carry] == runs[0]['phases'][:carry] for r in runs)
        assert all(
            np.array_equal(r['actions'][:carry], runs[0]['actions'][:carry]) for r in runs
        )
        assert len({tuple(r['actions'][carry + 2]) for r in runs}) == 3


@sim
def test_the_expert_succeeds_and_another_pad_is_no_success():
    env = E.FlashPlaceEnv(cameras=())
    runs = [E.demonstrate(env, E.EVAL_SEED + s) for s in range(12)]
    assert (
        sum(r['success'] for r in runs) >= 11
        and max(len(r['actions']) for r in runs) < env.rules.max_ticks
    )
    env.reset(seed=0)
    expert, right, judged = E.FlashPlaceExpert(env), env.goal, []
    for _ in range(env.rules.max_ticks):
        env.goal = (right + 1) % 3  # the expert aims at another pad …
        action = expert.act()
        env.goal = right  # … than the judge
        *_, terminated, truncated, info = env.step(action)
        judged.append(info['placed'])
    assert truncated and not terminated and not info['final_info']['is_success']
    assert set(judged) - {-1} == {int(np.flatnonzero(env.order == (right + 1) % 3)[0])}


@sim
def test_full_deflection_is_four_centimetres(env):
    for axis in range(3):
        env.reset(seed=1)
        action = np.eye(4)[axis] - [0, 0, 0, 1]
        steps = []
        for _ in range(3):
            before = env.hand
            env.step(action)
            steps.append((env.hand - before)[axis])
        assert 0.035 < steps[-1] < 0.045


@sim
def test_projection_hits_the_puck(env):
    for seed in range(3):
        env.reset(seed=seed)
        column, row = env.project_to_image(env.puck, size=224).astype(int)
        red, green, blue = env.picture('primary', 224)[row, column]
        assert red > 150 and green > 90 and blue < 70


@sim
@pytest.mark.parametrize('action', [[0, 0, 0], [0, 0, float('nan'), 0], [[0, 0, 0, 0]]])
def test_bad_actions(env, action):
    with pytest.raises(ValueError, match='4 finite numbers'):
        env.step(action)


# LeRobot runs it


class Experts(torch.nn.Module):
    "The scripted experts of a synchronous vector environment, as a LeRobot policy."

    def __init__(self, vector):
        super().__init__()
        self.vector, self.weight = vector, torch.nn.Parameter(torch.zeros(1))

    def reset(self):
        self.experts = [E.FlashPlaceExpert(e.unwrapped) for e in self.vector.envs]

    def select_action(self, batch):
        assert batch['observation.images.primary'].shape == (2, 3, 32, 32) and batch[
            'observation.state'
        ].shape == (2, 4)
        assert batch['task'] == list(self.vector.call('task_description'))
        return torch.from_numpy(np.stack([e.act() for e in self.experts]))


@sim
def test_lerobots_rollout():
    from lerobot.scripts.lerobot_eval import rollout

    vector = make_env(make_env_config('flash_place', image_size=32), n_envs=2)[
        'flash_place'
    ][0]
    identity = lambda x: x
    out = rollout(
        vector,
        Experts(vector),
        identity,
        identity,
        identity,
        identity,
        seeds=[E.EVAL_SEED, E.EVAL_SEED + 5],
    )
    lengths = (~out['done']).sum(1) + 1
    assert out['success'].any(1).all() and lengths[0] != lengths[1]
    solo = E.FlashPlaceEnv(cameras=())
    assert lengths.tolist() == [
        len(E.demonstrate(solo, E.EVAL_SEED + s)['actions']) for s in (0, 5)
    ]
    vector.close()


@sim
def test_a_vector_resets_each_environment_by_its_own_seed():
    vector = E.FlashPlaceEnvConfig(image_size=32).create_envs(2)['flash_place'][0]
    solo = E.FlashPlaceEnv(32)
    for seeds in ([3, 4], [4, 9]):
        obs, _ = vector.reset(seed=seeds)
        for i, seed in enumerate(seeds):
            assert np.array_equal(
                obs['pixels']['primary'][i], solo.reset(seed=seed)[0]['pixels']['primary']
            )
    vector.envs[0]._frozen = ({}, 0.0, True, False, {})  # an ended episode: a seed thaws it
    vector.reset(seed=[5, 6])
    assert not vector.envs[0].is_frozen
    vector.close(), solo.close()


@sim
@pytest.mark.slow
@pytest.mark.parametrize('context', ['forkserver', 'spawn'])
def test_worker_processes(context, monkeypatch):
    if context == 'spawn':
        make = E.gym.vector.AsyncVectorEnv
        monkeypatch.setattr(
            E.gym.vector,
            'AsyncVectorEnv',
            lambda fns, context, **kw: make(fns, context='spawn', **kw),
        )
    vector = E.FlashPlaceEnvConfig(image_size=32).create_envs(2, use_async_envs=True)[
        'flash_place'
    ][0]
    obs, _ = vector.reset(seed=[3, 4])
    solo = E.FlashPlaceEnv(32)
    for i, seed in enumerate((3, 4)):
        assert np.array_equal(
            obs['pixels']['wrist'][i], solo.reset(seed=seed)[0]['pixels']['wrist']
        )
    assert list(vector.call('_max_episode_steps')) == [70, 70]
    vector.step(np.zeros((2, 4), np.float32))
    vector.close()


# Recording


def load(root):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    return LeRobotDataset('halo/flash_place', root)


def check(root, episodes):
    """The dataset in `root` holds the first `episodes` seeds' demonstrations, whole and in
    order.
    """
    dataset, env = load(root), E.FlashPlaceEnv(32)
    assert dataset.num_episodes == episodes and json.loads((root / E.LOG).read_text())[
        'seeds'
    ] == list(range(episodes))
    table, seen = dataset.hf_dataset.with_format('numpy'), 0
    for seed in range(episodes):
        demo = E.demonstrate(env, seed, 0.2)
        rows = table[seen : seen + len(demo['actions'])]
        assert set(rows['episode_index'].tolist()) == {seed} and np.array_equal(
            rows['action'], demo['actions']
        )
        assert np.array_equal(
            rows['observation.state'], np.stack([f['agent_pos'] for f in demo['frames']])
        )
        assert dataset[seen]['task'] == demo['task']
        first = dataset[seen]['observation.images.primary'].permute(1, 2, 0).numpy() * 255
        assert np.abs(first - demo['frames'][0]['pixels']['primary']).mean() < 4
        seen += len(demo['actions'])
    assert seen == len(dataset)


@sim
def test_an_interrupted_recording_loads_and_goes_on(tmp_path, monkeypatch):
    root, real = tmp_path / 'set', E.demonstrate

    def interrupted(env, seed, noise):
        # Ctrl-C in the middle of the second episode
        if seed == 1:
            os.kill(os.getpid(), 2)
        return real(env, seed, noise)

    monkeypatch.setattr(E, 'demonstrate', interrupted)
    with pytest.raises(KeyboardInterrupt, match='2 of 4 demonstrations'):
        E.record_demonstrations(root, 4, image_size=32)
    monkeypatch.setattr(E, 'demonstrate', real)
    check(root, 2)
    E.record_demonstrations(root, 3, image_size=32)
    check(root, 3)
    stamp = {p: p.stat().st_mtime_ns for p in root.rglob('*')}
    E.record_demonstrations(root, 3, image_size=32)
    assert stamp == {p: p.stat().st_mtime_ns for p in root.rglob('*')}, (
        'a finished dataset is reused untouched'
    )
    with pytest.raises(ValueError, match='image_size=32, not 64'):
        E.record_demonstrations(root, 3, image_size=64)


@sim
@pytest.mark.slow
def test_a_killed_recording_goes_on_from_its_checkpoint(tmp_path):
    root = tmp_path / 'set'
    code = f"""import os, halo.sim.flash_place as E
E.CHECKPOINT, real = 2, E.demonstrate
def demonstrate(env, seed, noise):
    return os._exit(9) if seed == 3 else real(env, seed, noise)
E.demonstrate = demonstrate
E.record_demonstrations({str(root)!r}, 4, image_size=32)"""
    assert subprocess.run([sys.executable, '-c', code]).returncode == 9
    assert json.loads((root / E.LOG).read_text())['open']
    E.record_demonstrations(root, 3, image_size=32)
    check(root, 3)


@sim
def test_recording_refuses_a_foreign_folder_and_evaluation_seeds(tmp_path):
    (tmp_path / 'note.txt').write_text('mine')
    with pytest.raises(ValueError, match='no flash_place recording'):
        E.record_demonstrations(tmp_path, 1)
    with pytest.raises(ValueError, match='reserved for evaluation'):
        E.record_demonstrations(tmp_path / 'set', 1, seed=E.EVAL_SEED, image_size=32)
    assert (tmp_path / 'note.txt').read_text() == 'mine'


@sim
@pytest.mark.slow
def test_two_recordings_into_one_folder(tmp_path):
    """The second says in one line that the first is under way and leaves with status 1; the
    first is not disturbed; a finished one is only read.
    """
    root = tmp_path / 'set'
    code = """import sys, time, pathlib, halo.sim.flash_place as E
while len(sys.argv) > 7 and not pathlib.Path(sys.argv[7]).exists(): time.sleep(0.02)
E.main(sys.argv[1:7])"""

    def start(*after):
        command = [
            sys.executable,
            '-c',
            code,
            '--root',
            str(root),
            '--episodes',
            '6',
            '--image-size',
            '32',
            *after,
        ]
        return subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )

    second, first = start(str(root / E.LOG)), start()
    said = second.communicate(timeout=300)[1]
    assert second.returncode == 1 and said.strip().splitlines() == [
        f'halo.sim.flash_place: another recording into {root} is under way: wait for it, or'
        ' choose another folder'
    ], said
    assert 'Traceback' not in first.communicate(timeout=300)[1] and first.returncode == 0
    check(root, 6)
    # finished: no lock is asked for
    with E.recording_lock(root):
        assert E.record_demonstrations(root, 6, image_size=32) == root


@pytest.mark.parametrize(
    'make, words',
    [
        (lambda d: d, 'holds files but no flash_place recording: choose an empty folder'),
        (lambda d: d / 'note.txt/set', 'cannot be written'),
    ],
)
def test_a_recording_that_cannot_begin_is_one_line(tmp_path, capsys, make, words):
    (tmp_path / 'note.txt').write_text('mine')
    with pytest.raises(SystemExit) as e:
        E.main(['--root', str(make(tmp_path)), '--episodes', '1'])
    said = capsys.readouterr().err.strip().splitlines()
    assert e.value.code == 1 and len(said) == 1 and words in said[0]


def test_a_second_recording_is_one_line(tmp_path, capsys):
    with E.recording_lock(tmp_path / 'set'), pytest.raises(SystemExit) as e:
        E.main(['--root', str(tmp_path / 'set'), '--episodes', '1'])
    said = capsys.readouterr().err.strip().splitlines()
    assert (
        e.value.code == 1
        and len(said) == 1
        and 'is under way: wait for it, or choose another folder' in said[0]
    )
    assert not (tmp_path / 'set').exists()
