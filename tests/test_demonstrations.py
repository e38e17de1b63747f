"""Recorders: what a folder of episodes keeps, refuses and becomes, with an environment of
numpy in place of a simulator.
"""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from halo.benchmarks import demonstrations as d
from halo.benchmarks import mikasa

root = Path(__file__).resolve().parent.parent
ABOUT = d.About(
    benchmark='toy',
    fps=20.0,
    state_names=['x', 'y'],
    action_names=['a', 'b', 'c'],
    control_mode='none',
    cameras=dict(primary=[24, 32], wrist=[16, 16]),
    versions=dict(toy='1'),
    more=dict(evaluation_seeds=100),
)


def play(task, seed):
    "An episode of noise; every fifth fails. The length depends on the seed."
    rng, t = np.random.default_rng(seed), 3 + seed % 3
    return d.Episode(
        task,
        f'do {task}',
        seed,
        seed % 5 != 4,
        dict(
            primary=rng.integers(0, 256, (t, 24, 32, 3), np.uint8),
            wrist=rng.integers(0, 256, (t, 16, 16, 3), np.uint8),
        ),
        rng.normal(size=(t, 2)),
        rng.normal(size=(t, 3)),
        dict(where=rng.normal(size=(t, 4)), phase=np.arange(t)),
    )


def equal(a, b):
    "Whether two episodes are the same to the last bit."
    x, y = d._arrays(a), d._arrays(b)
    assert list(x) == list(y)
    assert all(x[k].dtype == y[k].dtype and np.array_equal(x[k], y[k]) for k in x)
    return (a.task, a.prompt, a.seed, a.success) == (b.task, b.prompt, b.seed, b.success)


def jobs(n, *tasks):
    return [(t, s) for t in tasks or ('A',) for s in range(n)]


@pytest.fixture
def folder(tmp_path):
    d.record(tmp_path / 'demos', ABOUT, jobs(7, 'A', 'B'), play, progress=False)
    return tmp_path / 'demos'


# ---- recording


def test_what_was_played_is_read_back(folder):
    episodes = list(d.read_episodes(folder))
    assert [(e.task, e.seed) for e in episodes] == [
        (t, s) for t in 'AB' for s in (0, 1, 2, 3, 5, 6)
    ]
    assert all(equal(e, play(e.task, e.seed)) for e in episodes)


def test_the_summary_counts_failures(folder):
    s = d.summary(folder)
    assert s['episodes'] == 12 and s['failed'] == [('A', 4), ('B', 4)]
    assert {t: (r['successes'], r['n']) for t, r in s['tasks'].items()} == {
        'A': (6, 7),
        'B': (6, 7),
    }
    assert s['frames'] == sum(len(e) for e in d.read_episodes(folder))
    assert '6 of 7' in d.spoken(s)


def test_nothing_is_played_twice(folder):
    count = Counter()

    def counted(task, seed):
        count[task, seed] += 1
        return play(task, seed)

    d.record(folder, ABOUT, jobs(8, 'A', 'B'), counted, progress=False)
    assert count == Counter([('A', 7), ('B', 7)])


def test_an_interrupted_recording_goes_on(tmp_path):
    def dies(task, seed):
        if seed == 3:
            raise KeyboardInterrupt
        return play(task, seed)

    with pytest.raises(KeyboardInterrupt):
        d.record(tmp_path / 'x', ABOUT, jobs(5), dies, progress=False)
    assert d.summary(tmp_path / 'x')['episodes'] == 3
    assert not list((tmp_path / 'x').rglob('*.part*'))
    assert d.record(tmp_path / 'x', ABOUT, jobs(5), play, progress=False)['episodes'] == 4


def test_as_many_as_wanted(tmp_path):
    s = d.record(tmp_path / 'x', ABOUT, jobs(20, 'A', 'B'), play, wanted=6, progress=False)
    assert {t: r['successes'] for t, r in s['tasks'].items()} == dict(A=6, B=6)
    again = d.record(tmp_path / 'x', ABOUT, jobs(20, 'A', 'B'), play, wanted=6)
    assert again == s


def test_processes_write_what_one_writes(tmp_path, folder):
    s = d.record(tmp_path / 'x', ABOUT, jobs(7, 'A', 'B'), play, workers=2, progress=False)
    assert s['episodes'] == 12 and s['failed'] == d.summary(folder)['failed']
    pairs = zip(d.read_episodes(tmp_path / 'x'), d.read_episodes(folder), strict=True)
    assert all(equal(a, b) for a, b in pairs)


def test_an_error_in_a_process_is_raised(tmp_path):
    with pytest.raises(ValueError, match='is not what the folder is about'):
        small = replace(ABOUT, cameras=dict(primary=[8, 8]))
        d.record(tmp_path / 'x', small, jobs(3), play, workers=2, progress=False)


@pytest.mark.parametrize(
    'kept, refused', [(100, 100), (100, 10**10), ([7, 9], 9), (dict.fromkeys('7'), None)]
)
def test_evaluation_seeds_are_refused(tmp_path, kept, refused):
    about = replace(ABOUT, more=dict(evaluation_seeds=kept))
    asked = [('A', s) for s in (0, refused) if s is not None]
    if refused is None:
        assert d.record(tmp_path / 'x', about, asked, play, progress=False)['episodes'] == 1
        return
    with pytest.raises(ValueError, match=f'seed {refused} of A belongs to the evaluation'):
        d.record(tmp_path / 'x', about, asked, play, progress=False)
    assert not (tmp_path / 'x').exists()


def test_another_about_is_refused(folder):
    other = replace(ABOUT, versions=dict(toy='2'))
    with pytest.raises(ValueError, match="versions.toy: '2' instead of '1'"):
        d.record(folder, other, jobs(1), play, progress=False)


def test_a_damaged_file_is_named(folder):
    path = d.episode_files(folder)[2]
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=f'{path.name} is no episode'):
        list(d.read_episodes(folder))


# ---- the data set


def rows(out):
    "All rows of a data set, and it."
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset('halo/x', out)
    return dataset, iter(dataset)


def test_a_converted_data_set_gives_everything_back(folder, tmp_path):
    dataset, at = rows(d.convert(folder, tmp_path / 'out'))
    for e in d.read_episodes(folder):
        for t in range(len(e)):
            row = next(at)
            for k, x in e.frames.items():
                picture = (row[f'observation.images.{k}'] * 255).round().byte()
                assert np.array_equal(picture.permute(1, 2, 0).numpy(), x[t])
            assert np.array_equal(row['observation.state'].numpy(), e.state[t])
            assert np.array_equal(row['action'].numpy(), e.action[t])
            assert row['task'] == e.prompt and int(row['frame_index']) == t
    assert next(at, None) is None and dataset.fps == 20
    assert not [k for k in dataset.features if 'where' in k or 'extra' in k]
    said = json.loads((tmp_path / 'out/meta/demonstrations.json').read_text())
    assert [(w['task'], w['seed']) for w in said['episodes']] == [
        (e.task, e.seed) for e in d.read_episodes(folder)
    ]


def test_folders_that_agree_become_one_data_set(folder, tmp_path):
    d.record(tmp_path / 'c', replace(ABOUT, more={}), jobs(2, 'C'), play, progress=False)
    dataset, _ = rows(d.convert([folder, tmp_path / 'c'], tmp_path / 'out'))
    assert dataset.num_episodes == 14 and len(dataset.meta.tasks) == 3
    d.record(tmp_path / 'd', replace(ABOUT, fps=10.0), jobs(2), play, progress=False)
    with pytest.raises(ValueError, match='cannot be one data set: fps: 10.0 instead of'):
        d.convert([folder, tmp_path / 'd'], tmp_path / 'both')


def test_a_data_set_is_whole_or_not_there(folder, tmp_path):
    path = d.episode_files(folder)[-1]
    path.write_bytes(b'nothing')
    with pytest.raises(ValueError, match='is no episode'):
        d.convert(folder, tmp_path / 'out')
    assert not [p for p in tmp_path.iterdir() if 'out' in p.name]


def test_the_command(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from halo import cli

    assert cli.main(['record', 'show', 'demos', '--sheet', 'a.png']) == 0
    assert '12 episodes' in capsys.readouterr().out and Path('a.png').stat().st_size
    assert cli.main(['record', 'convert', 'demos', 'out']) == 0
    assert cli.main(['record', 'convert', 'demos', 'out']) == 1
    assert 'out exists' in capsys.readouterr().err
    assert cli.main(['record', 'show', 'out']) == 1


# ---- MIKASA's experts, without MIKASA


class Still:
    "A tensor's, pose's or link's stand-in."

    def __init__(self, *at):
        self.at = np.array(at, float)
        self.pose, self.tcp, self.p = self, self, [self]
        self.linear_velocity = [self]

    cpu = lambda self: self
    numpy = lambda self: self.at


class Desk:
    "RememberColor without physics."

    def __init__(self, n, cue, empty, right):
        self.cubes = {k: Still(0.02 * k, 0.12 * k - 0.2, 1000) for k in range(n)}
        self.agent, self.true_color_indices = Still(-0.1, 0, 0.3), np.array([right])
        self.cue_steps_per_env, self.empty_steps_per_env = [cue], [empty]
        self.elapsed_steps = np.array([0])

    def step(self, action):
        self.elapsed_steps = self.elapsed_steps + 1
        if mikasa.phase(self) == mikasa.CHOOSE:
            for cube in self.cubes.values():
                cube.at[2] = 0.02
        self.agent.at += 0.1 * np.asarray(action[:3])


@pytest.mark.parametrize('n, cue, empty, right', [(3, 1, 1, 0), (5, 5, 2, 4), (9, 2, 5, 7)])
def test_the_expert_waits_and_touches_the_right_cube(n, cue, empty, right):
    desk = Desk(n, cue, empty, right)
    expert, start = mikasa.Touch(desk), desk.agent.at.copy()
    for _ in range(cue + empty):
        assert np.array_equal(desk.agent.at, start)
        desk.step(expert.act())
    for _ in range(12):
        desk.step(expert.act())
    tool = desk.agent.at
    off = {k: np.linalg.norm(mikasa.place(c) - tool) for k, c in desk.cubes.items()}
    assert min(off, key=off.get) == right and off[right] < 0.05


def test_what_lies_behind_a_camera_has_no_pixel():
    ahead, behind = np.array([[0.1, -0.2, 2.0]]), np.array([[0.0, 0, -1]])
    lens = np.array([[50.0, 0, 64], [0, 50, 64], [0, 0, 1]])
    eye = np.eye(4)[:3]
    assert np.allclose(mikasa.project(ahead, lens, eye), [[66.5, 59.0]])
    assert np.isnan(mikasa.project(behind, lens, eye)).all()


def test_official_seeds_are_never_demonstrated(tmp_path):
    about = mikasa.about('cpu', False, 0.0, {})
    for seed in (4242424242, 5 * 10**9):
        with pytest.raises(ValueError, match='belongs to the evaluation'):
            d.record(tmp_path / 'x', about, [('A', seed)], play)


def test_the_client_knows_its_options():
    done = subprocess.run(
        [sys.executable, root / 'clients/maniskill.py', '--help'],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and '--record' in done.stdout, done.stderr
