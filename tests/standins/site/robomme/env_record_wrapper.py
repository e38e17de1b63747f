"In the place of RoboMME: its shapes, with two frames shown before the episode."

import numpy as np


class Episode:
    def seen(self, n):
        rng = np.random.default_rng(n)
        rgb = [rng.integers(0, 256, (256, 256, 3), np.uint8) for _ in range(n)]
        return dict(
            front_rgb_list=rgb,
            wrist_rgb_list=rgb,
            joint_state_list=[np.zeros(7)] * n,
            gripper_state_list=[np.zeros(2)] * n,
        )

    def reset(self):
        return self.seen(3), dict(task_goal='pick the cube that was covered')

    def step(self, action):
        assert np.shape(action) == (8,) and np.isfinite(action).all(), action
        return self.seen(1), 0.0, False, False, dict(status='ongoing')


class BenchmarkEnvBuilder:
    def __init__(self, **options):
        assert options['action_space'] == 'joint_angle', options

    def make_env_for_episode(self, episode_idx, max_steps):
        return Episode()
