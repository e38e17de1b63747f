"""In the place of RoboMME: its shapes. Two frames are shown before the episode, but not in
StopCube: there a button is to be pressed at a tick that the simulator knows.
"""

from types import SimpleNamespace

import numpy as np
import torch


def wait(env, planner):
    while int(env.elapsed_steps) < env.unwrapped.steps_press:
        planner.close_gripper()


def press(env, planner):
    return [planner.move_to_pose_with_screw('down')]


class Sim:
    control_freq, timestep = 20, 0
    move_interval, stop_time, steps_press, stop_time_range = 4, 2, 6.0, (4, 8)

    def __init__(self):
        self.elapsed_steps = torch.ones(1, dtype=torch.int32)
        self.agent = SimpleNamespace(robot=SimpleNamespace(pose=None))
        self.task_list = [dict(solve=wait), dict(solve=press)]


class Episode:
    def __init__(self, task):
        self.unwrapped, self.shown = Sim(), 1 if task == 'StopCube' else 3
        self.goal = 'press' if task == 'StopCube' else 'pick the cube that was covered'

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
        return self.seen(self.shown), dict(task_goal=self.goal)

    def step(self, action):
        assert np.shape(action) == (8,) and np.isfinite(action).all(), action
        self.unwrapped.elapsed_steps += 1
        pressed = action[7] > 0.5 and self.shown == 1
        on_time = int(self.unwrapped.elapsed_steps) > self.unwrapped.steps_press
        status = ('success' if on_time else 'fail') if pressed else 'ongoing'
        return self.seen(1), 0.0, pressed, False, dict(status=status)

    def close(self):
        pass


class BenchmarkEnvBuilder:
    def __init__(self, **options):
        assert options['action_space'] == 'joint_angle', options
        self.task, self.dataset = options['env_id'], options['dataset']

    def get_episode_num(self):
        return dict(train=100, test=50, val=50)[self.dataset]

    def resolve_episode(self, episode):
        first = dict(train=2000, test=520_000, val=1_020_000)[self.dataset]
        return first + 100 * episode, 'easy'

    def make_env_for_episode(self, episode_idx, max_steps):
        return Episode(self.task)
