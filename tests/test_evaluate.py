"""Evaluation against LeRobot's own rollout, its files, and its refusals."""

import json
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.envs.factory import make_env, make_env_config, make_env_pre_post_processors
from lerobot.envs.utils import FreezeAfterEpisodeEnd
from lerobot.scripts.lerobot_eval import rollout

import halo.sim.flash_place
from halo.policy.configuration_halo import HaloConfig
from halo.policy.modeling_halo import HaloPolicy
from halo.policy.processor_halo import make_halo_pre_post_processors
from halo.sim.evaluate import (
    EvalResult,
    compare,
    episode_noise,
    evaluate,
    load_policy,
    looks_every,
    observation_at,
    split_seeds,
    wilson,
)


class Follow(gym.Env):
    """The state integrates the actions; success when its first value leaves (-limit,
    limit), limit drawn from the seed.
    """

    metadata, render_mode, _max_episode_steps, task, task_description = (
        {'render_fps': 10},
        'rgb_array',
        14,
        'follow',
        'move the dot',
    )
    observation_space = gym.spaces.Dict(
        dict(
            pixels=gym.spaces.Dict(
                dict(primary=gym.spaces.Box(0, 255, (56, 56, 3), np.uint8))
            ),
            agent_pos=gym.spaces.Box(-9, 9, (2,), np.float32),
        )
    )
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def look(self):
        image = np.full((56, 56, 3), 40, np.uint8)
        row, col = (np.clip(self.x * 8 + 28, 0, 55)).astype(int)
        image[row, :, 0], image[:, col, 1] = 255, 255
        return dict(pixels=dict(primary=image), agent_pos=self.x.astype(np.float32))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.limit, self.t = (
            self.np_random.normal(size=2),
            self.np_random.uniform(1, 3),
            0,
        )
        return self.look(), dict(is_success=False)

    def step(self, action):
        self.x, self.t = self.x + action, self.t + 1
        done = bool(abs(self.x[0]) > self.limit)
        return self.look(), 0.0, done, self.t >= 14 and not done, dict(is_success=done)

    def render(self):
        return self.look()['pixels']['primary']


@EnvConfig.register_subclass('follow')
@dataclass
class FollowConfig(EnvConfig):
    task: str | None = 'follow'
    fps: int = 10

    def create_envs(self, n_envs, use_async_envs=False):
        return {
            'follow': {
                0: gym.vector.SyncVectorEnv(
                    [lambda: FreezeAfterEpisodeEnd(Follow())] * n_envs
                )
            }
        }

    @property
    def gym_kwargs(self):
        return {}


def make_policy(cameras=(('primary', 56),), size=2, scale=0.5, **changes):
    torch.manual_seed(0)
    cfg = HaloConfig(
        preset='tiny',
        device='cpu',
        chunk_size=6,
        denoising_steps=2,
        **dict(n_action_steps=3, history_frames=3, history_stride=2) | changes,
        input_features={
            'observation.state': PolicyFeature(FeatureType.STATE, (size,)),
            **{
                f'observation.images.{name}': PolicyFeature(FeatureType.VISUAL, (3, s, s))
                for name, s in cameras
            },
        },
        output_features={'action': PolicyFeature(FeatureType.ACTION, (size,))},
    )
    stats = {
        k: dict(mean=torch.zeros(size), std=torch.full((size,), scale))
        for k in ('observation.state', 'action')
    }
    return HaloPolicy(cfg).eval(), *make_halo_pre_post_processors(cfg, stats)


@pytest.fixture(scope='module')
def parts():
    return make_policy()


def same_as_lerobot(policy, pre, post, env_cfg, seeds, monkeypatch):
    """Actions and successes of `evaluate` equal those of LeRobot's `rollout` where the
    noise is fixed.
    """
    m = policy.config.model
    monkeypatch.setattr(
        'halo.sim.evaluate.batch_noise',
        lambda policy, seeds, tick: torch.ones(len(seeds), m.chunk, m.max_action_dim),
    )
    ours = evaluate(
        policy, pre, post, env_cfg, seeds, n_envs=len(seeds), record=seeds, progress=False
    )
    monkeypatch.setattr(
        policy,
        '_noise',
        lambda obs, noise, original=policy._noise: original(
            obs, torch.ones(len(obs), m.chunk, m.max_action_dim)
        ),
    )
    vec = next(iter(make_env(env_cfg, n_envs=len(seeds)).values()))[0]
    theirs = rollout(
        vec,
        policy,
        *make_env_pre_post_processors(env_cfg, policy.config),
        pre,
        post,
        seeds=list(seeds),
    )
    vec.close()
    for row, e in enumerate(ours.episodes):
        assert e['ticks'] == int((~theirs['done'][row]).sum()) + 1
        assert e['success'] == bool(theirs['success'][row][: e['ticks']].any())
        assert np.array_equal(
            ours.records[e['seed']]['action'], theirs['action'][row, : e['ticks']].numpy()
        )
    return ours


def test_same_as_lerobot(parts, monkeypatch):
    ours = same_as_lerobot(*parts, FollowConfig(), [3, 4, 5, 6], monkeypatch)
    assert len({e['ticks'] for e in ours.episodes}) > 1  # rows that end at different ticks


@pytest.mark.sim
def test_same_as_lerobot_in_the_simulator(monkeypatch):
    seeds = [halo.sim.flash_place.EVAL_SEED, halo.sim.flash_place.EVAL_SEED + 1]
    same_as_lerobot(
        *make_policy((('primary', 112), ('wrist', 112)), 4),
        make_env_config('flash_place'),
        seeds,
        monkeypatch,
    )


def test_again_is_the_same(parts):
    runs = [
        evaluate(
            *parts, FollowConfig(), range(7), n_envs=4, record=range(7), progress=False
        )
        for _ in range(2)
    ]
    timeless = [
        [{k: v for k, v in e.items() if k != 'inference_ms'} for e in r.episodes]
        for r in runs
    ]
    assert timeless[0] == timeless[1] and runs[0].conventions == runs[1].conventions
    for s in range(7):
        for k, v in runs[0].records[s].items():
            assert np.array_equal(v, runs[1].records[s][k]), (s, k)


def test_evaluation_leaves_the_callers_random_state_alone(parts):
    torch.manual_seed(7)
    want = torch.rand(3)
    torch.manual_seed(7)
    evaluate(*parts, FollowConfig(), [1], progress=False)
    assert torch.equal(torch.rand(3), want)


def test_batches_do_not_matter(parts):
    a, b = (
        evaluate(*parts, FollowConfig(), range(5), n_envs=n, record=[4], progress=False)
        for n in (1, 5)
    )
    assert [(e['seed'], e['success'], e['ticks']) for e in a.episodes] == [
        (e['seed'], e['success'], e['ticks']) for e in b.episodes
    ]
    assert np.allclose(a.records[4]['action'], b.records[4]['action'], atol=1e-4)


def test_a_recording_lets_the_policy_plan_the_same_again(parts):
    policy, pre, post = parts
    result = evaluate(policy, pre, post, FollowConfig(), [2], record=[2], progress=False)
    r, e = result.records[2], result.episodes[0]
    for tick, chunk in zip(r['chunk_ticks'], r['chunks']):
        obs = observation_at(policy, pre, r, e['task'], int(tick))
        with torch.no_grad():
            again = post(policy.denoise(obs, episode_noise([2], int(tick), (6, 8))))[
                0
            ].numpy()
        assert np.allclose(again, chunk, atol=1e-5)


def test_files(parts, tmp_path):
    result = evaluate(*parts, FollowConfig(), [1, 2], record=[2], progress=False)
    back = EvalResult.load(result.save(tmp_path / 'r.json'))
    assert back.episodes == result.episodes and set(back.records) == {2}
    d = json.loads((tmp_path / 'r.json').read_text())
    assert {'success', 'goals', 'prompts', 'seeds', 'conventions', 'episodes'} <= d.keys()
    assert {
        'env',
        'fps',
        'versions',
        'policy',
        'chunk',
        'n_action_steps',
        'denoising',
        'normalisation',
        'cameras',
        'noise',
    } <= d['conventions'].keys()
    assert not [p for p in tmp_path.iterdir() if p.suffix == '.tmp']


def test_a_truncated_folder_is_refused(parts, tmp_path):
    for p in parts:
        p.save_pretrained(tmp_path)
    load_policy(tmp_path)
    file = tmp_path / 'model.safetensors'
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match='truncated'):
        load_policy(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match='model.safetensors is missing'):
        load_policy(tmp_path)


@pytest.mark.parametrize(
    'call, says',
    [
        (lambda p: evaluate(*p, FollowConfig(), [], progress=False), 'at least one'),
        (lambda p: evaluate(*p, FollowConfig(), [1, 1], progress=False), 'different'),
        (lambda p: evaluate(*p, FollowConfig(), [1], n_envs=0, progress=False), 'n_envs=0'),
        (
            lambda p: evaluate(*p, FollowConfig(), [1], record=[2], progress=False),
            'not evaluated',
        ),
        (lambda p: wilson(3, 2), '3 successes in 2'),
        (
            lambda p: compare(
                EvalResult([dict(seed=1, success=True, task='t')], {}),
                EvalResult([dict(seed=2, success=True, task='t')], {}),
            ),
            'different seeds',
        ),
    ],
)
def test_bad_input(parts, call, says):
    with pytest.raises(ValueError, match=says):
        call(parts)


@pytest.mark.parametrize('executed,stride,every', [(3, 2, 1), (4, 2, 2), (6, 3, 3)])
def test_no_picture_is_missed_that_was_not_drawn(monkeypatch, executed, stride, every):
    "Noise in the place of pictures that the policy does not look at changes no action."
    policy, pre, post = make_policy(n_action_steps=executed, history_stride=stride)
    assert looks_every(policy) == every
    look, step, done, told = Follow.look, Follow.step, [], []

    def noisy(self):
        image = look(self)
        told.extend([self.look_every] * (self.t > 0))  # all draw what they begin with
        if self.t % self.look_every:
            noise = np.random.randint(0, 255, (56, 56, 3), np.uint8)
            image['pixels']['primary'] = noise
        return image

    def noted(self, action):
        done.append(np.array(action))
        return step(self, action)

    monkeypatch.setattr(Follow, 'step', noted)
    play = lambda **how: evaluate(
        policy, pre, post, FollowConfig(), range(3), progress=False, **how
    )
    play()
    want, done[:] = np.stack(done), []
    monkeypatch.setattr(Follow, 'look_every', 1, raising=False)
    monkeypatch.setattr(Follow, 'look', noisy)
    play()
    assert np.array_equal(want, np.stack(done)) and set(told) == {every}
    told.clear()
    film = play(record=[1]).records[1]['frames.primary']
    assert set(told) == {1, every} and (film.reshape(len(film), -1) == 40).any(1).all()


def test_a_policy_that_does_not_say_where_it_looks_sees_every_picture():
    class Foreign:
        config = object()

    assert looks_every(Foreign()) == 1
    assert looks_every(make_policy(history_frames=0)[0]) == 3


def test_split_keeps_order_and_balances():
    for n in range(1, 40):
        for size in range(1, 12):
            batches = split_seeds(range(n), size)
            assert sum(batches, []) == list(range(n)) and max(map(len, batches)) <= size
