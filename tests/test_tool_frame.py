"""The turned tool: a turn and its way back, what the state says and the picture does not,
an expert that a turn does not disturb; and the study that stands on it.
"""

import json
from itertools import product

import numpy as np
import pytest
from lerobot.envs.configs import EnvConfig
from lerobot.envs.factory import make_env, make_env_config
from lerobot.envs.utils import env_to_policy_features

from halo.sim import flash_place as E
from halo.sim import tool_frame as T
from halo.studies import salr_mujoco as S

sim = pytest.mark.sim


@pytest.fixture(scope='module')
def env():
    env = T.ToolFrameEnv(image_size=56)
    yield env
    env.close()


@pytest.fixture(scope='module')
def blind():
    env = T.ToolFrameEnv(cameras=())
    yield env
    env.close()


def fixed(env, angle):
    "`env` with its tool at `angle`, whatever the seed draws."

    class Fixed(type(env)):
        def reset(self, *, seed=None, options=None):
            return super().reset(seed=seed, options={**(options or {}), 'angle': angle})

    return Fixed(cameras=())


# Without the simulator


def test_turning_back_undoes_a_turn():
    rng = np.random.default_rng(0)
    for action, angle in zip(rng.uniform(-1, 1, (200, 4)), rng.uniform(-4, 4, 200)):
        there = T.turned(action, angle)
        assert np.abs(T.turned(there, -angle) - action).max() < 1e-15
        assert np.array_equal(there[2:], action[2:])
        assert np.isclose(np.hypot(*there[:2]), np.hypot(*action[:2]))


def test_a_turn_is_counter_clockwise_and_by_zero_is_none():
    assert np.allclose(T.turned([1, 0, 0, 0], np.pi / 2), [0, 1, 0, 0])
    action = np.random.default_rng(1).uniform(-1, 1, 4)
    assert np.array_equal(T.turned(action, 0), action)


@pytest.mark.parametrize('bad', [np.zeros(3), np.zeros((2, 4)), 1.0])
def test_a_bad_action_is_one_sentence(bad):
    with pytest.raises(ValueError, match='tool_frame takes 4 numbers'):
        T.turned(bad, 0.1)


def test_registered_beside_flash_place():
    cfg = make_env_config('tool_frame', image_size=56)
    assert EnvConfig.get_choice_class('tool_frame') is T.ToolFrameEnvConfig
    features = env_to_policy_features(cfg)
    assert {k: f.shape for k, f in features.items()} == {
        'action': (4,),
        'observation.state': (6,),
        'observation.images.primary': (3, 56, 56),
    }
    old = env_to_policy_features(make_env_config('flash_place'))
    assert old['observation.state'].shape == (4,) and len(old) == 4
    with pytest.raises(ValueError, match='fps is 30'):
        make_env_config('tool_frame', fps=30)


def test_recordings_hold_what_is_shown():
    made = T.ToolFrameEnv(56)
    assert made.recorded()['observation.state']['names'] == list(T.STATE)
    assert set(made.recorded()) == {
        'action',
        'observation.state',
        'observation.images.primary',
    }
    assert E.FlashPlaceEnv(56).recorded() == E.dataset_features(56)


def test_another_environment_is_not_taken_for_a_recording(tmp_path):
    settings = dict(seed=0, noise=0.2, image_size=56)
    (tmp_path / 'meta').mkdir()
    log = dict(settings=settings | dict(environment='ToolFrameEnv'), open=False, episodes=4)
    (tmp_path / E.LOG).write_text(json.dumps(log))
    with pytest.raises(ValueError, match="environment='ToolFrameEnv', not None"):
        E.record_demonstrations(tmp_path, 4, image_size=56)


# The task


@sim
def test_the_picture_does_not_show_the_angle(env):
    one, two = (env.reset(seed=5, options=dict(angle=a))[0] for a in (-1.0, 2.0))
    assert np.array_equal(one['pixels']['primary'], two['pixels']['primary'])
    assert np.array_equal(one['agent_pos'][:4], two['agent_pos'][:4])
    assert np.allclose(two['agent_pos'][4:], [np.cos(2.0), np.sin(2.0)])
    assert env.observation_space['agent_pos'].contains(two['agent_pos'])


@sim
def test_a_seed_fixes_the_angle_and_keeps_the_episode_of_flash_place(env):
    infos = [env.reset(seed=5)[1] for _ in range(2)]
    angle = env.angle
    env.reset(seed=6)
    assert infos[0] == infos[1] and env.angle != angle and env.grasped
    other = E.FlashPlaceEnv(cameras=())
    assert other.reset(seed=5)[1]['target'] == infos[0]['target']
    other.close()


@sim
@pytest.mark.parametrize('angle', [0.0, 0.7, -2.0])
def test_an_action_moves_the_hand_along_the_tool(blind, angle):
    moved = []
    for way in ((0.5, 0.0), (0.0, 0.5)):
        blind.reset(seed=5, options=dict(angle=angle))
        before = blind.hand
        for _ in range(3):
            blind.step([*way, 0, 1])
        moved.append((blind.hand - before)[:2])
    c, s = np.cos(angle), np.sin(angle)
    for found, axis in zip(moved, ((c, s), (-s, c))):
        assert np.dot(found, axis) > 0.9 * np.linalg.norm(found) > 0.01


@sim
def test_a_turn_does_not_disturb_the_expert(blind):
    seeds, straight = range(E.EVAL_SEED, E.EVAL_SEED + 8), fixed(blind, 0.0)
    runs = [[E.demonstrate(env, s) for s in seeds] for env in (straight, blind)]
    for one, two in zip(*runs):
        assert one['success'] and two['success']
        assert np.abs(one['pucks'][-1] - two['pucks'][-1]).max() < 0.01
    first = [
        (a['actions'][0], b['actions'][0], b['frames'][0]['agent_pos'][4:])
        for a, b in zip(*runs)
    ]
    for one, two, (c, s) in first:
        assert np.allclose(T.turned(two, np.arctan2(s, c)), one, atol=1e-6)
    straight.close()


@sim
def test_lerobot_makes_it():
    (vec,) = make_env(make_env_config('tool_frame', image_size=56), n_envs=1).values()
    obs, _ = vec[0].reset(seed=[5])
    assert obs['agent_pos'].shape == (1, 6) and list(obs['pixels']) == ['primary']
    assert vec[0].call('task_description')[0].startswith('put the puck')
    vec[0].close()


# The study


def result(cell, variant, seed, success, error):
    episodes = [dict(success=bool(s), distance=0.1) for s in success]
    row = dict(cell=cell, variant=variant, seed=seed, rollouts=episodes)
    return row | dict(squared_error=dict(planar=error, all=error))


def test_resampling_crosses_seeds_and_episodes():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 5))
    everything = np.tile(np.arange(5), (2000, 1))
    by_seed = S.resampled(x, everything, rng)
    possible = {round(sum(three) / 3, 9) for three in product(x.mean(1), repeat=3)}
    assert set(by_seed.round(9)) <= possible and len(set(by_seed.round(9))) == 10
    assert (S.resampled(np.ones((3, 5)), everything, rng) == 1).all()


def test_a_difference_that_is_there_is_told_and_one_that_is_not_is_not():
    wins, even = [1] * 9 + [0], [0, 1] * 5
    of = lambda v, s, e: [result('hidden', v, k, s, [e] * 4) for k in range(3)]
    found = of('salr', wins, 0.01) + of('mlp', [0] * 10, 0.04) + of('film', even, 0.01)
    against = S.verdict(found, 'hidden', 'mlp')
    assert 'success better (+90' in against and 'rmse better (-0.100' in against
    assert 'distance not told apart' in against
    assert 'rmse not told apart (+0.000' in S.verdict(found, 'hidden', 'film')
    assert 'hidden    salr    3' in S.table(found)


def test_kept_results_are_whole_and_alike():
    found = S.kept()
    assert len({(r['cell'], r['variant'], r['seed']) for r in found}) == len(found)
    for r in found:
        assert len(r['rollouts']) == S.Plan().rollouts
        assert len(r['squared_error']['planar']) == S.Plan().held
        # a setting that came later stood at what is now its default
        settings = vars(S.TrainConfig()) | r['train']
        assert settings == vars(S.TrainConfig(**S.TRAIN)) | dict(seed=r['seed'])
        model = S.policy_config(r['cell'], r['variant'])['model']
        assert r['config']['model'].keys() == model.keys()
        assert all(r['config']['model'][k].items() <= model[k].items() for k in model)
    sizes = [r['parameters']['between'] for r in found]
    assert max(sizes) < 1.05 * min(sizes)


def test_nothing_is_trained_where_everything_is_kept(monkeypatch, capsys):
    monkeypatch.setattr(S, 'run', None)
    S.main(['--seeds', '0'])
    assert 'action RMSE' in capsys.readouterr().out


@sim
@pytest.mark.slow
def test_a_miniature_of_the_study(tmp_path):
    little = S.TrainConfig(steps=2, batch=2, warmup=1, save_every=2, log_every=1)
    plan = S.Plan(episodes=2, held=1, rollouts=2, n_envs=1, train=little)
    where = dict(data=tmp_path / 'data', runs=tmp_path / 'runs', out=tmp_path / 'out')
    S.study(['hidden'], ['salr', 'film'], [0], plan, **where)
    found = S.kept(tmp_path / 'out')
    assert [r['variant'] for r in found] == ['salr', 'film']
    assert all(len(r['rollouts']) == 2 and len(r['log']) == 2 for r in found)
    before = (tmp_path / 'out/hidden_salr_0.json').stat().st_mtime
    S.study(['hidden'], ['salr', 'film'], [0], plan, **where)
    assert (tmp_path / 'out/hidden_salr_0.json').stat().st_mtime == before
