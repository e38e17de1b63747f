"In the place of Hydra and CALVIN: the table's shapes, in which nothing ever succeeds."

import contextlib
from types import SimpleNamespace

import numpy as np


class Table:
    "What halo.benchmarks.calvin asks of calvin_env's environment."

    def reset(self, robot_obs, scene_obs):
        self.ticks, self.rng = 0, np.random.default_rng(0)
        return self.seen()

    def seen(self):
        sizes = dict(rgb_static=200, rgb_gripper=84)
        rgb = {k: self.rng.integers(0, 256, (n, n, 3), np.uint8) for k, n in sizes.items()}
        return dict(rgb_obs=rgb, robot_obs=np.zeros(15))

    def step(self, action):
        assert np.shape(action) == (7,) and np.isfinite(action).all(), action
        self.ticks += 1
        return self.seen(), 0.0, False, {}

    def get_info(self):
        return {}


class Tasks:
    "No instruction is ever carried out."

    def get_task_info_for_set(self, before, now, tasks):
        return set()


def initialize_config_dir(folder, version_base):
    return contextlib.nullcontext()


def compose(name, overrides):
    return SimpleNamespace(env=Table, tasks=Tasks)


utils = SimpleNamespace(instantiate=lambda cls, **options: cls())
