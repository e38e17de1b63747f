"""In the place of MIKASA-Robo: its shapes, in an episode of eight ticks. One tick shows a
cube, one nothing; then three stand there, and the hand goes where actions send it.
"""

from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import sapien
import torch


def thing(*place):
    return SimpleNamespace(pose=SimpleNamespace(p=torch.tensor([place])))


class Camera:
    def get_params(self):
        looks_down = [[1.0, 0, 0, 0], [0, -1, 0, 0], [0, 0, -1, 1]]
        lens = [[100.0, 0, 64], [0, 100, 64], [0, 0, 1]]
        made = dict(intrinsic_cv=lens, extrinsic_cv=looks_down)
        return {k: torch.tensor([v]) for k, v in made.items()}


class Body:
    name = 'scene-0_panda_wristcam_camera_link'

    def find_component_by_type(self, kind):
        return sapien.render.RenderBodyComponent()


class Little(gym.Env):
    LANGUAGE_INSTRUCTION = 'touch the cube of the colour that was shown'
    max_episode_steps = 8
    observation_space = gym.spaces.Dict()
    action_space = gym.spaces.Box(-1, 1, (7,), np.float32)
    cue_steps_per_env = empty_steps_per_env = torch.ones(1)
    scene = SimpleNamespace(sub_scenes=[SimpleNamespace(entities=[Body()])])

    def __init__(self, **options):
        assert options['num_envs'] == 1 and options['obs_mode'] == 'rgb', options
        self._sensors = dict(base_camera=Camera(), hand_camera=Camera())
        self.cubes = {k: thing(0.0, 0.1 * k - 0.1, 0.02) for k in range(3)}

    def seen(self):
        rgb = self.np_random.integers(0, 256, (1, 128, 128, 6), np.uint8)
        return dict(rgb=torch.from_numpy(rgb), proprio=torch.zeros(1, 7))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.true_color_indices = torch.tensor([int(self.np_random.integers(3))])
        self.elapsed_steps = torch.zeros(1)
        self.agent = SimpleNamespace(tcp=thing(0.0, 0.0, 0.2))
        return self.seen(), {}

    def step(self, action):
        assert np.shape(action) == (7,) and np.isfinite(action).all(), action
        hand = self.agent.tcp.pose.p
        hand += 0.1 * torch.as_tensor(action[:3], dtype=hand.dtype)
        self.elapsed_steps += 1
        cube = self.cubes[int(self.true_color_indices)].pose.p
        near = (hand - cube).norm() < 0.04
        return self.seen(), 0.0, False, False, dict(success=bool(near))


for name in ('RememberColor3', 'RememberColor5', 'RememberColor9'):
    gym.register(f'{name}-VLA-v0', Little, disable_env_checker=True, order_enforce=False)
