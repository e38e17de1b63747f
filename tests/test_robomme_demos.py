"""RoboMME's recorder, with a simulator of numpy: what a planner does from its seat is what
is kept, evaluation seeds are refused, and what was recorded can be played again.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from halo.benchmarks import demonstrations as d
from halo.benchmarks import memory
from halo.benchmarks import robomme_demos as r

root = Path(__file__).resolve().parent.parent
SIZES = dict(primary=(6, 8, 3), wrist=(4, 4, 3))


class Still:
    "What an actor's place is asked of."

    def __init__(self, *at):
        self.pose = SimpleNamespace(p=[SimpleNamespace(cpu=lambda: self)])
        self.at = at

    def numpy(self):
        return np.array(self.at, float)


def rest(env, hand):
    while env.elapsed_steps[0] < env.unwrapped.steps_press:
        hand.rest()


def press(env, hand):
    return hand.press()


class Sim:
    "A button that is to be pressed once the clock has reached 9."

    def __init__(self, solves=(rest, press)):
        self.elapsed_steps, self.timestep = np.array([1]), 0
        self.move_interval, self.stop_time = 6, 2
        self.steps_press, self.stop_time_range = 9.0, (6, 12)
        self.cube, self.target = Still(0, -0.3, 0.02), Still(0, 0, 0.01)
        self.task_list = [dict(solve=s) for s in solves]


class Stage:
    "The simulator behind the client's `reset` and `step`; red and state are the clock."

    task, prompt = 'StopCube', 'press at the second time'

    def __init__(self, limit=40, solves=(rest, press), noise=0):
        self.limit, self.solves, self.noise, self.done = limit, solves, noise, []

    def seen(self):
        t = int(self.sim.elapsed_steps[0])
        images = {k: np.full(v, t + self.noise, np.uint8) for k, v in SIZES.items()}
        return images, np.full(8, t, np.float32), self.prompt

    def reset(self, seed):
        self.sim, self.done = Sim(self.solves), []
        return self.seen()

    def step(self, action):
        assert action.dtype == np.float32 and action.shape == (8,)
        self.done.append(action.copy())
        self.sim.elapsed_steps = self.sim.elapsed_steps + 1
        pressed = action[7] > 0.5
        success = bool(pressed and self.sim.elapsed_steps[0] == 10)
        return *self.seen(), bool(pressed), success

    def known(self):
        return r.known(self.sim)


class Hand:
    "A planner that goes on after the end, as the real one does."

    def __init__(self, seat):
        self.seat, self.shared = seat, np.zeros(8)

    def rest(self):
        self.shared[:] = [0.1] * 7 + [-1]  # an array that it will use again
        self.seat.step(self.shared)
        self.shared[:] = np.nan

    def press(self):
        for _ in range(5):
            self.seat.step([[0.2] * 7 + [1.0]])


# ---- one episode


def test_what_is_kept_is_what_was_carried_out():
    stage = Stage()
    e = r.demonstrate(stage, 2000, Hand)
    assert e.success and len(e) == 9 and np.array_equal(e.action, stage.done)
    assert e.action[:-1, 7].tolist() == [-1] * 8 and e.action[-1, 7] == 1


def test_picture_state_and_knowledge_are_of_one_tick():
    e = r.demonstrate(Stage(), 2000, Hand)
    clock = e.extra['elapsed'].tolist()
    assert clock == list(range(1, 10)) == e.state[:, 0].tolist()
    assert all(x[:, 0, 0, 0].tolist() == clock for x in e.frames.values())
    assert e.extra['passes'].tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 2]
    assert e.extra['press_at'][0] == 9 and e.extra['window'][0].tolist() == [6, 12]


def test_the_limit_calls_a_planner_back():
    e = r.demonstrate(Stage(limit=4), 2000, Hand)
    assert len(e) == 4 and not e.success


def test_an_expert_without_a_way_is_counted(tmp_path):
    def no_way(env, hand):
        return -1

    def never(env, hand):
        raise AssertionError('the list went on after a failure')

    e = r.demonstrate(Stage(solves=(no_way, never)), 2000, Hand)
    assert len(e) == 1 and not e.success and e.action[0].tolist() == [1.0] * 8
    about = replace(r.about(SIZES, {}), more=dict(evaluation_seeds=r.EVALUATION))
    made = d.record(
        tmp_path / 'x', about, [('StopCube', 2000)], lambda t, s: e, progress=False
    )
    assert made['episodes'] == 0 and made['failed'] == [('StopCube', 2000)]


def failed(*_):
    raise RuntimeError('screw plan failed')


def test_a_search_follows_a_failed_screw():
    answers = [-1, RuntimeError('no tree'), 'way']

    def search(*_):
        a = answers.pop(0)
        if isinstance(a, Exception):
            raise a
        return a

    assert r.patient(failed, search)('there') == 'way' and not answers
    assert r.patient(lambda goal: goal, failed)('there') == 'there'
    with pytest.raises(r.Ended):
        r.patient(failed, lambda goal: -1)('there')


def test_the_end_is_no_failed_motion():
    "A motion in whose midst the episode ends is not tried again."
    tried = []

    def ends(goal):
        tried.append(goal)
        raise r.Ended

    with pytest.raises(r.Ended):
        r.patient(ends, ends)('there')
    assert tried == ['there']


@pytest.mark.parametrize('interval', [60, 80, 120])
def test_passes_are_counted_halfway(interval):
    for k in range(1, 6):
        at = interval * k - interval // 2
        assert [r.passes(t, interval) for t in (at - 1, at)] == [k - 1, k]


# ---- seeds


class Split:
    def __init__(self, **options):
        self.first = dict(train=2000, test=520_000, val=1_020_000)[options['dataset']]
        self.n = 3 if options['env_id'] == 'StopCube' else 0

    def get_episode_num(self):
        return self.n

    def resolve_episode(self, k):
        return self.first + 100 * k, 'easy'


@pytest.fixture
def benchmark(monkeypatch):
    "A benchmark of three episodes a split."
    module = SimpleNamespace(BenchmarkEnvBuilder=Split)
    monkeypatch.setitem(sys.modules, 'robomme', SimpleNamespace())
    monkeypatch.setitem(sys.modules, 'robomme.env_record_wrapper', module)


def test_episodes_are_called_by_their_seeds(benchmark):
    assert r.split('StopCube', 'train') == {2000: 0, 2100: 1, 2200: 2}
    assert r.jobs('StopCube', 'train', 1, 2) == [('StopCube', 2100), ('StopCube', 2200)]


@pytest.mark.parametrize('dataset', ['test', 'val'])
def test_seeds_of_the_evaluation_are_refused(benchmark, tmp_path, dataset):
    where = str(tmp_path / 'x')
    with pytest.raises(SystemExit, match='belongs to the evaluation'):
        r.main(['--task', 'StopCube', '--record', where, '--dataset', dataset])
    seed = next(iter(r.split('StopCube', dataset)))
    with pytest.raises(ValueError, match='belongs to the evaluation'):
        d.record(where, r.about(SIZES, {}), [('StopCube', seed)], None)
    assert not Path(where).exists()


@pytest.mark.parametrize(
    'words, why',
    [
        (['--first', '1', '--episodes', '3'], 'has 2 episodes'),
        (['--first', '-1'], 'from number -1 on'),
        (['--task', 'StopCubes'], "no task 'StopCubes'"),
    ],
)
def test_what_the_split_lacks_is_said(benchmark, tmp_path, words, why):
    with pytest.raises(SystemExit, match=why):
        r.main(['--task', 'StopCube', '--record', str(tmp_path / 'x'), *words])


def test_without_the_option_a_policy_plays_the_test_split(monkeypatch):
    asked = []
    monkeypatch.setattr(r, 'run_robomme', asked.append)
    r.main([])
    r.main(['--dataset', 'val'])
    assert [a.dataset for a in asked] == ['test', 'val']


# ---- the stage


class LeRobots:
    "LeRobot's class for RoboMME, as far as it is used."

    shown, alive = 1, []

    def __init__(self, task, dataset, max_steps, episode_idx):
        self.number = episode_idx
        self._env = SimpleNamespace(unwrapped=Sim(), close=lambda: self.alive.remove(self))

    def reset(self):
        self.alive.append(self)
        picture = np.zeros((6, 8, 3), np.uint8)
        self._last_raw_obs = dict(front_rgb_list=[picture] * self.shown)
        pixels = dict(image=picture, wrist_image=picture[:4, :4])
        obs = dict(pixels=pixels, agent_pos=np.full(8, self.number, np.float32))
        return obs, dict(task_goal=['press'])


@pytest.fixture
def lerobots(benchmark, monkeypatch):
    "A fresh class, so that nothing is left alive of another test."
    made = type('Fresh', (LeRobots,), dict(alive=[]))
    monkeypatch.setattr(memory, '_robomme', lambda: made)
    return made


def test_one_simulator_is_alive_at_a_time(lerobots):
    stage = r.Stage('StopCube')
    for number, seed in enumerate((2000, 2100, 2200)):
        assert stage.reset(seed)[1][0] == number and len(lerobots.alive) == 1
    stage.close()
    stage.close()
    assert not lerobots.alive
    with pytest.raises(ValueError, match='no episode of seed 520000'):
        stage.reset(520_000)


def test_a_task_that_begins_with_a_video_is_refused(lerobots):
    lerobots.shown = 4
    with pytest.raises(ValueError, match='shows 3 frames before'):
        r.Stage('StopCube').reset(2000)


# ---- played again


@pytest.fixture
def recorded():
    return r.demonstrate(Stage(), 2000, Hand)


def test_a_tape_solves_the_task_again(recorded):
    stage = Stage()
    out = r.replayed(stage, recorded)
    assert out == dict(seed=2000, success=True, ticks=9, same=True)
    assert np.array_equal(stage.done, recorded.action)


def test_another_start_or_another_end_is_not_the_same(recorded):
    out = r.replayed(Stage(noise=1), recorded)
    assert out['success'] and not out['same']
    early = np.roll(recorded.action, -2, 0)
    out = r.replayed(Stage(), d.Episode(**vars(recorded) | dict(action=early)))
    assert not out['success'] and not out['same']


def test_a_folder_is_played_as_far_as_asked(recorded, tmp_path, monkeypatch, capsys):
    about = r.about(SIZES, {})
    never = np.where(recorded.action == 1, -1, recorded.action)  # pressed
    both = {
        2000: recorded,
        2100: d.Episode(**vars(recorded) | dict(seed=2100, action=never)),
    }
    jobs = [('StopCube', s) for s in both]
    d.record(tmp_path / 'x', about, jobs, lambda t, s: both[s], progress=False)
    monkeypatch.setattr(r, 'Stage', lambda task, dataset: Stage())
    for episodes, status in ((1, 0), (2, 1)):
        with pytest.raises(SystemExit) as end:
            r.main(['--replay', str(tmp_path / 'x'), '--episodes', str(episodes)])
        assert end.value.code == status
    assert 'seed 2100: NOT solved' in capsys.readouterr().out


# ---- the client, with stand-ins for the simulator


def client(*words):
    "What the client says, where stand-ins are in place of the simulator."
    return subprocess.run(
        [sys.executable, root / 'clients/robomme.py', *map(str, words)],
        env=dict(PYTHONPATH=str(root / 'tests/standins/site'), PATH='/usr/bin:/bin'),
        cwd=root,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_the_client_records_in_processes_and_plays_again(tmp_path):
    where = ['--task', 'StopCube', '--record', tmp_path / 'demos']
    done = client(*where, '--episodes', 3, '--workers', 2)
    assert done.returncode == 0, done.stderr[-800:]
    assert 'succeeded in 3 of 3' in done.stdout
    done = client('--replay', tmp_path / 'demos', '--episodes', 3)
    assert done.returncode == 0 and done.stdout.count('the same') == 3, done.stderr[-800:]


def test_the_client_knows_its_options():
    done = client('--help')
    assert done.returncode == 0, done.stderr
    assert all(w in done.stdout for w in ('--record', '--first', '--workers', '--replay'))
