"""LIBERO-Object's demonstrations: where a hand takes hold, how it goes on when it slips,
and what is recorded. None of these tests needs the simulator; one runs the commands on a
stand-in.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from halo.benchmarks import libero_demos as demos

root = Path(__file__).resolve().parent.parent
DOWN = np.diag([1.0, -1, -1])


def box(x, y, z, width, depth, height, yaw=0.0):
    "One box that stands on z, turned."
    c, s = np.cos(yaw), np.sin(yaw)
    axes = np.array([[[c, -s, 0], [s, c, 0], [0, 0, 1]]])
    half = np.array([[width, depth, height]]) / 2
    return demos.corners(np.array([[x, y, z + height / 2]]), axes, half)


def scene(thing, others=np.zeros((0, 8, 3)), hand=(-0.15, 0, 0.26)):
    walls = [box(0, 0.26 + s * 0.075, 0, 0.14, 0.013, 0.145) for s in (-1, 1)]
    basket = np.concatenate([box(0, 0.26, 0, 0.14, 0.15, 0.017), *walls])
    middle = np.mean(demos.span(thing), axis=0)
    return demos.Scene(np.array(hand, float), DOWN, thing, basket, others, middle)


@pytest.mark.parametrize('degrees', [0, 20, 70, 135])
def test_the_fingers_close_on_the_narrow_faces(degrees):
    yaw = np.radians(degrees)
    g = demos.plan(scene(box(0.1, -0.1, 0, 0.07, 0.04, 0.02, yaw)))
    assert np.isclose(g.width, 0.04)
    assert abs(demos.half_turn(g.yaw - yaw - np.pi / 2)) < 1e-9
    np.testing.assert_allclose(g.place, [0.1, -0.1, demos.TIP], atol=1e-9)


def test_a_tall_thing_is_held_near_its_top_with_the_palm_above_it():
    g = demos.plan(scene(box(0, 0, 0, 0.05, 0.05, 0.14)))
    assert 0.14 - demos.PALM < g.place[2] < 0.14


def test_a_ledge_between_the_pads_is_avoided():
    body = box(0, 0, 0, 0.05, 0.05, 0.11)
    top = box(0, 0, 0.107, 0.03, 0.05, 0.02)  # as wide as the body along y only
    s = scene(np.concatenate([body, top]))
    assert demos.grasp_along(s, np.pi / 2).ledge and not demos.grasp_along(s, 0).ledge
    assert abs(demos.half_turn(demos.plan(s).yaw)) < 1e-9


def test_the_foot_of_a_flat_thing_is_no_ledge():
    for z in np.linspace(-0.002, 0.002, 9):
        assert not demos.plan(scene(box(0, 0, z, 0.08, 0.04, 0.018))).ledge


def test_where_no_face_will_do_the_hand_goes_between_them():
    thing = box(0, 0, 0, 0.06, 0.04, 0.018)
    around = [box(0, s * 0.1, 0, 0.03, 0.03, 0.15) for s in (-1, 1)]
    around += [box(s * 0.1, 0, 0, 0.03, 0.03, 0.15) for s in (-1, 1)]
    g = demos.plan(scene(thing, np.concatenate(around)))
    turned = abs(demos.half_turn(2 * g.yaw)) / 2
    assert g.hits == 0 and turned > np.radians(15) and g.width < demos.OPENING


def test_the_way_is_shortened_and_stays_straight():
    way = np.array([0.3, -0.1, 0.05])
    a = demos.towards(way, np.array([0, 0, 2.0]), -1)
    np.testing.assert_allclose(a[:3], way / 0.3)
    assert a[5] == 0.5 and a[6] == -1


class World:
    "A hand that goes half of the way asked for, and carries what it has closed on."

    options = dict(_max_episode_steps=280, task_description='put it there')

    def __init__(self, slips=()):
        self.slips, self.ticks, self.held = set(slips), 0, False
        self.s = scene(box(0.05, -0.1, 0, 0.05, 0.05, 0.13))
        self.unwrapped = SimpleNamespace(_env=SimpleNamespace(env=self), **self.options)
        self.executed = []

    def look(self):
        return self.s

    def seen(self):
        picture = np.full((4, 4, 3), self.ticks % 256, np.uint8)
        return dict(pixels=dict(image=picture, image2=picture), agent_pos=np.zeros(8))

    def reset(self, seed):
        self.__init__(self.slips)
        return self.seen(), {}

    def step(self, action):
        self.executed.append(action)
        self.ticks += 1
        way, off = 0.025 * action[:3], np.abs(self.s.hand - self.s.origin)
        closed = action[6] > 0 and self.ticks not in self.slips
        self.held = closed and (self.held or bool((off < [0.02, 0.02, 0.08]).all()))
        move = way if self.held else [0, 0, -demos.span(self.s.thing)[0][2]]
        self.s = replace(
            self.s,
            hand=self.s.hand + way,
            thing=self.s.thing + move,
            origin=self.s.origin + move,
        )
        low, high = demos.span(self.s.target)
        inside = (low < self.s.origin).all() and (self.s.origin < high).all()
        return self.seen(), 0.0, bool(inside), False, dict(is_success=bool(inside))


def test_a_thing_that_slips_is_taken_again():
    lost = World()
    expert, phases, done = demos.PickPlace(lost.look), [], False
    while not done and len(phases) < 280:
        action = expert.act()
        if phases.count('carry') == 3:
            lost.slips = lost.slips or {lost.ticks + 1}
        done = lost.step(action)[2]
        phases.append(expert.phase)
    order = [p for k, p in enumerate(phases) if k == 0 or phases[k - 1] != p]
    assert done and order.count('over') == 2 and order[-1] in ('lower', 'release')


@pytest.fixture
def world(monkeypatch):
    "The world that a demonstration finds in place of the simulator's."
    made = World()
    monkeypatch.setattr(demos, 'environment', lambda *a, **k: made)
    monkeypatch.setattr(demos, 'looker', lambda inner: inner.look)
    return made


def test_what_was_wanted_is_kept_and_what_trembled_is_executed(world):
    e = demos.Demonstrate(noise=0.2)('milk', 0)
    assert e.success and e.prompt == 'put it there' and set(e.frames) == {'image', 'image2'}
    assert [int(x[0, 0, 0]) for x in e.frames['image']] == list(range(len(e)))
    done = np.stack(world.executed)
    assert done.dtype == np.float32 and np.abs(done).max() <= 1
    assert np.abs(done - e.action)[:, :3].max() > 0.1
    np.testing.assert_array_equal(done[:, 3:], e.action[:, 3:])
    again = demos.Demonstrate(noise=0.2)('milk', 0)
    np.testing.assert_array_equal(again.action, e.action)


def test_without_libero_the_command_says_what_to_install():
    code = (
        'import sys\nsys.modules["libero"] = None\n'
        'from halo.benchmarks import libero_demos as d\nsys.exit(d.main(["--rate", "1"]))'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 1 and 'configs/requirements/libero.txt' in done.stderr


STANDIN = """
import sys
from halo.benchmarks.libero_demos import main
folder, small = sys.argv[1], ['--size', '32']
for words in (['--same'], ['--rate', '2', '--keep', f'{folder}/rate.json'],
              ['--rate', '3', '--keep', f'{folder}/rate.json'],
              ['--record', f'{folder}/a', '--episodes', '2', '--tasks', '*milk*']):
    print('status', main(words + small))
"""


def test_the_commands_on_a_stand_in(tmp_path):
    from halo.benchmarks.demonstrations import read_about, read_episodes

    paths = os.pathsep.join(map(str, (root, root / 'tests/standins/site')))
    words = [sys.executable, '-c', STANDIN, str(tmp_path)]
    env = os.environ | dict(PYTHONPATH=paths)
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    found = [x.split()[1] for x in done.stdout.splitlines() if x.startswith('status')]
    assert found == ['0', '0', '1', '0'] and 'holds other tries' in done.stderr, done.stderr
    assert "are the evaluation's (fixed, seeded)" in done.stdout
    kept = json.loads((tmp_path / 'rate.json').read_text())
    assert [r['successes'] for r in kept['tasks'].values()] == [2, 2]
    two = list(read_episodes(tmp_path / 'a'))
    assert [e.seed for e in two] == [0, 1] and two[0].state.shape[1] == 8
    assert not np.array_equal(two[0].frames['image'][0], two[1].frames['image'][0])
    about = read_about(tmp_path / 'a')
    assert about.fps == 20 and about.more['quality'] == 'plain'
