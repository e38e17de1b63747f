"""Meta-World's demonstrations: tiers, seeds, what is recorded, and the plan of hours. None
of these tests needs the simulator, except the one that is marked.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from halo.benchmarks import metaworld_demos as demos
from halo.benchmarks import suite
from halo.benchmarks.demonstrations import read_episodes, record

root = Path(__file__).resolve().parent.parent
LENGTH = {'reach-v3': 12, 'push-v3': 9}


class FakeArm:
    "Meta-World as far as a demonstration looks at it: success after `LENGTH` ticks."

    _max_episode_steps = 30

    def __init__(self, task, quality, size):
        self.task, self.size, self.task_description = task, size, f'do {task}'
        self.expert_policy = SimpleNamespace(get_action=lambda told: 3 * told[:4])
        self.executed = []

    def look(self):
        self.told = np.r_[self.hand, np.zeros(35)]
        pixels = np.full((self.size, self.size, 3), self.tick, np.uint8)
        return dict(pixels=pixels, agent_pos=self.hand)

    def reset(self, seed):
        self.tick, self.odd = 0, bool(seed % 2)
        self.hand = np.array([0.1, -0.2, 0.5, 1.0])
        self.executed.clear()
        return self.look(), dict(is_success=False)

    def step(self, action):
        assert action.dtype == np.float32
        self.executed.append(action)
        self.tick += 1
        won = self.tick == LENGTH[self.task] and not self.odd
        cut = self.tick == self._max_episode_steps
        return self.look(), 0.0, won, cut, dict(is_success=won)


@pytest.fixture
def arm(monkeypatch):
    "The arm that `Demonstrate` finds in place of the simulator's."
    made = {}

    def find(task, quality, size, crop):
        return made.setdefault(task, FakeArm(task, quality, size))

    monkeypatch.setattr(demos, 'environment', find)
    return made


def test_the_tasks_are_lerobots_and_mujoco_sleeps():
    known = demos.tiers()
    assert len(known) == 50
    counts = {t: list(known.values()).count(t) for t in dict.fromkeys(known.values())}
    assert counts == dict(easy=28, medium=11, hard=6, very_hard=5)


def test_without_the_simulator_the_module_loads_and_reads_results():
    import subprocess

    code = (
        'import sys\nfor m in ("metaworld", "mujoco"): sys.modules[m] = None\n'
        'from halo.benchmarks import metaworld_demos as d\n'
        'print(d.tier_table({"easy/reach-v3": dict(successes=1, n=2)}))'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0 and '50.0%' in done.stdout, done.stderr


def test_what_was_wanted_is_kept_and_what_trembled_is_executed(arm):
    e = demos.Demonstrate(size=8, noise=0.3)('reach-v3', 0)
    assert e.success and len(e) == 12 and e.prompt == 'do reach-v3'
    assert e.frames['image'].shape == (12, 8, 8, 3)
    assert [int(x[0, 0, 0]) for x in e.frames['image']] == list(range(12))  # before acting
    np.testing.assert_allclose(e.action, np.tile([0.3, -0.6, 1, 1], (12, 1)), rtol=1e-6)
    done = np.stack(arm['reach-v3'].executed)
    assert np.abs(done).max() <= 1 and (done[:, 3] == 1).all()
    assert np.abs(done - e.action)[:, :3].max() > 0.1
    np.testing.assert_allclose(e.state, np.tile([0.1, -0.2, 0.5, 1], (12, 1)), rtol=1e-6)


def test_the_same_seed_trembles_alike_and_another_does_not(arm):
    play = demos.Demonstrate(size=8)
    seen = []
    for seed in (0, 2, 0):
        play('reach-v3', seed)
        seen.append(np.stack(arm['reach-v3'].executed))
    np.testing.assert_array_equal(seen[0], seen[2])
    assert not np.array_equal(seen[0], seen[1])


def test_a_failure_ends_at_the_limit_and_is_not_kept(arm, tmp_path):
    play = demos.Demonstrate(size=8)
    e = play('push-v3', 1)
    assert not e.success and len(e) == 30
    about, work = demos.about(play), demos.jobs(['reach-v3', 'push-v3'], 2)
    record(tmp_path / 'a', about, work, play, wanted=2, progress=False)
    kept = [(e.task, e.seed) for e in read_episodes(tmp_path / 'a')]
    assert kept == [(t, s) for t in ('push-v3', 'reach-v3') for s in (0, 2)]
    text = demos.report(tmp_path / 'a')
    assert 'push-v3 2/3' in text and '4 episodes' in text and '66.7%' in text


def test_seeds_of_the_evaluation_are_refused(arm, tmp_path):
    from halo.benchmarks.suite import _METAWORLD_PROTOCOL

    play = demos.Demonstrate(size=8)
    first = _METAWORLD_PROTOCOL['first_seed']
    with pytest.raises(ValueError, match=str(first)):
        record(tmp_path / 'a', demos.about(play), [('reach-v3', first)], play)
    assert max(seed for _, seed in demos.jobs(['reach-v3'], 10_000)) < first


def test_another_noise_is_another_folder(arm, tmp_path):
    for noise in (0.1, 0.2):
        play = demos.Demonstrate(size=8, noise=noise)
        work = demos.about(play), [('reach-v3', 0)], play
        if noise == 0.1:
            record(tmp_path / 'a', *work, progress=False)
        else:
            with pytest.raises(ValueError, match='noise'):
                record(tmp_path / 'a', *work, progress=False)


def test_the_command_says_what_is_wrong(capsys, tmp_path):
    assert demos.main(['--record', str(tmp_path), '--tasks', 'fly-*']) == 1
    assert 'nothing to record' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        demos.main([])
    assert demos.main(['--tiers', str(tmp_path / 'none.json')]) == 1


def a_run(folder, samples_per_s):
    "A run's log: an event, then rows, the first of them slow."
    folder.mkdir(parents=True, exist_ok=True)
    rows = [dict(event='begun'), dict(step=1, samples_per_s=1)]
    rows += [dict(step=k, samples_per_s=samples_per_s) for k in (2, 3, 4)]
    text = '\n'.join(map(json.dumps, rows))
    (folder / 'metrics.jsonl').write_text(text + '\n')
    return folder


def an_evaluation(folder):
    "A result of two episodes of 100 and 300 ticks, 10 ms a tick, 2 s to begin."
    folder.mkdir(parents=True, exist_ok=True)
    lengths = {'easy/reach-v3': 100, 'hard/push-v3': 300}
    episodes = [dict(task=t, episode=0, ticks=n) for t, n in lengths.items()]
    times = [
        dict(task=t, episode=0, setup_s=2.0, total_s=2 + n / 100)
        for t, n in lengths.items()
    ]
    rates = {t: dict(successes=int('reach' in t), n=1) for t in lengths}
    doc = dict(episodes=episodes, per_task=rates)
    (folder / 'result.json').write_text(json.dumps(doc))
    (folder / 'timings.json').write_text(json.dumps(dict(seconds=8, episodes=times)))
    return folder


def test_the_plan_multiplies_what_was_measured(capsys, tmp_path):
    run, result = a_run(tmp_path / 'run', 16.0), an_evaluation(tmp_path / 'eval')
    assert demos.seconds_a_step(run, 32) == 2.0
    spent = demos.seconds_an_episode(result)
    assert np.isclose(spent['setup'], 2) and np.isclose(spent['tick'], 0.01)
    text = demos.hours(2.0, 1800, spent)
    assert '1.0 h' in text and '0.4 h' in text and '1.0 h if none' in text
    assert demos.main(['--hours', str(run), str(result)]) == 0
    assert 'steps of 2.00 s' in capsys.readouterr().out
    assert demos.main(['--tiers', str(result)]) == 0
    assert 'mean over 2 tiers' in capsys.readouterr().out
    (run / 'metrics.jsonl').write_text('{"event": "begun"}\n')
    assert demos.main(['--hours', str(run), str(result)]) == 1
    assert 'logged no step' in capsys.readouterr().err


def test_the_configuration_reads_what_the_recorder_writes():
    from halo.policy.configuration_halo import HaloConfig
    from halo.train.scale import global_batch, read_config

    c = read_config(root / 'configs/studies/mt50.yaml')
    assert global_batch(c['run'], 1) == c['batch']
    policy = HaloConfig(**c['policy'])
    assert policy.model.max_action_dim >= 4 and policy.model.max_state_dim >= 4
    assert policy.n_action_steps <= policy.model.chunk
    text = (root / 'nbs/benchmarks/10_metaworld.ipynb').read_text()
    for place in (c['data']['root'], f'{c["out"]}/policy'):
        assert place in text, f'the chapter does not name {place}'


def test_a_nameless_camera_reaches_the_policy_that_was_trained_on_it():
    from halo.benchmarks.suite import Benchmark, PolicyPlayer, random_policy

    look = dict(cameras={'image': [112, 112, 3]}, primary='image')
    sizes = dict(state_size=4, action_size=4)
    bench = Benchmark('b', ('t',), 1, None, None, dict(control_hz=80), {}, look | sizes)
    player = PolicyPlayer(*random_policy(bench, 'tiny', chunk_size=2, n_action_steps=1))
    player.reset(0)
    seen = dict(pixels=np.zeros((112, 112, 3), np.uint8), agent_pos=np.zeros(4))
    assert player.act(seen, 'reach').shape == (4,)
    assert not isinstance(seen['pixels'], dict)  # what was handed over is as it was


@pytest.mark.sim
@pytest.mark.slow
def test_an_expert_through_the_simulator_and_back(tmp_path):
    play = demos.Demonstrate(size=64, noise=0.2)
    work = demos.jobs(['reach-v3'], 1)
    record(tmp_path / 'a', demos.about(play), work, play, wanted=1, progress=False)
    (e,) = read_episodes(tmp_path / 'a')
    assert e.success and e.frames['image'].shape[1:] == (64, 64, 3)
    assert e.frames['image'].std() > 10 and np.abs(e.action).max() <= 1


@pytest.mark.sim
@pytest.mark.slow
def test_a_part_of_the_picture_is_what_one_would_cut_out(capsys):
    from PIL import Image

    crop, seen = '0.3,0.1,0.5', []
    for part in '', crop:
        env = demos.environment('shelf-place-v3', 'plain', 128, part)
        seen.append(env.reset(seed=2)[0]['pixels'].copy())
    box = 0.3 * 128, 0.1 * 128, 0.8 * 128, 0.6 * 128
    cut = Image.fromarray(seen[0]).resize((128, 128), Image.BILINEAR, box)
    apart = lambda a: np.abs(np.float32(a) - np.float32(seen[1])).mean()
    assert apart(cut) < 6 < 4 * apart(cut) < apart(np.fliplr(cut))
    bench = suite.open_benchmark('metaworld', quality='plain', size=128, crop=crop)
    played = bench.make_env('very_hard/shelf-place-v3', 0)
    np.testing.assert_array_equal(played.reset(seed=2)[0]['pixels'], seen[1])
    played.close()
    assert bench.protocol['part_of_picture'] == crop != bench.standard['part_of_picture']
    assert demos.main(['--record', 'nowhere', '--crop', '0.5,0,0.6']) == 1
    assert "'0.5,0,0.6'" in capsys.readouterr().err
