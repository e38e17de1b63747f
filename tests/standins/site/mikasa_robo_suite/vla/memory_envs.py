"In the place of MIKASA-Robo: its shapes, in an episode of three ticks."

import gymnasium as gym
import numpy as np
import torch


class Little(gym.Env):
    LANGUAGE_INSTRUCTION = 'touch the cube of the colour that was shown'
    max_episode_steps = 3
    observation_space = gym.spaces.Dict()
    action_space = gym.spaces.Box(-1, 1, (7,), np.float32)

    def __init__(self, **options):
        assert options['num_envs'] == 1 and options['obs_mode'] == 'rgb', options

    def seen(self):
        rgb = self.np_random.integers(0, 256, (1, 128, 128, 6), np.uint8)
        return dict(rgb=torch.from_numpy(rgb), proprio=torch.zeros(1, 7))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return self.seen(), {}

    def step(self, action):
        assert np.shape(action) == (7,) and np.isfinite(action).all(), action
        return self.seen(), 0.0, False, False, dict(success=False)


for name in ('RememberColor3', 'RememberColor5', 'RememberColor9'):
    gym.register(f'{name}-VLA-v0', Little, disable_env_checker=True, order_enforce=False)
