"""Robots without hardware for `lerobot-rollout`, registered as a LeRobot plug-in
(--robot.discover_packages_path=mock_arm).

`mock_arm` integrates its actions and shows noise; `mock_flash_arm` is the demonstration
task behind a robot's interface, so that a rollout can succeed or fail.
Both write what happened to `log`, a JSON file.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from lerobot.robots import Robot, RobotConfig

AXES, CAMERAS, SIZE = ('x', 'y', 'z', 'gripper'), ('primary', 'wrist'), 112


@RobotConfig.register_subclass('mock_arm')
@dataclass(kw_only=True)
class MockArmConfig(RobotConfig):
    log: str = ''
    seed: int = 0


@RobotConfig.register_subclass('mock_flash_arm')
@dataclass(kw_only=True)
class MockFlashArmConfig(MockArmConfig):
    pass


class MockArm(Robot):
    "Four axes and two cameras; an action moves the axes."

    config_class, name = MockArmConfig, 'mock_arm'

    def __init__(self, config):
        super().__init__(config)
        self.config, self.connected, self.actions, self.looks = config, False, [], 0

    @cached_property
    def observation_features(self):
        return {f'{a}.pos': float for a in AXES} | {c: (SIZE, SIZE, 3) for c in CAMERAS}

    @cached_property
    def action_features(self):
        return {f'{a}.vel': float for a in AXES}

    @property
    def is_connected(self):
        return self.connected

    @property
    def is_calibrated(self):
        return True

    def calibrate(self):
        pass

    def configure(self):
        pass

    def connect(self, calibrate=True):
        self.connected = True
        self.start()

    def start(self):
        self.state, self.rng = (
            np.zeros(4, np.float32),
            np.random.default_rng(self.config.seed),
        )

    def see(self):
        return self.state, {
            c: self.rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8) for c in CAMERAS
        }

    def get_observation(self):
        if not self.connected:
            raise ConnectionError('the mock arm is not connected')
        self.looks += 1
        state, pictures = self.see()
        return {f'{a}.pos': float(v) for a, v in zip(AXES, state)} | pictures

    def move(self, action):
        self.state = self.state + 0.01 * action

    def send_action(self, action):
        if set(action) != set(self.action_features):
            raise ValueError(
                f'the mock arm takes {sorted(self.action_features)}, got {sorted(action)}'
            )
        self.actions.append([float(action[f'{a}.vel']) for a in AXES])
        self.move(np.array(self.actions[-1], np.float32))
        return action

    def report(self):
        return {}

    def disconnect(self):
        self.connected = False
        if self.config.log:
            Path(self.config.log).write_text(
                json.dumps(
                    dict(
                        robot=self.name,
                        looks=self.looks,
                        actions=self.actions,
                        **self.report(),
                    )
                )
            )


class MockFlashArm(MockArm):
    """The demonstration task as a robot: the episode of `seed`, success as the simulator
    sees it.
    """

    config_class, name = MockFlashArmConfig, 'mock_flash_arm'

    def start(self):
        from halo.sim.flash_place import FlashPlaceEnv

        self.env, self.success, self.over, self.ticks = FlashPlaceEnv(SIZE), False, False, 0
        self.obs, _ = self.env.reset(seed=self.config.seed)
        self.task = self.env.task_description

    def see(self):
        return self.obs['agent_pos'], {c: self.obs['pixels'][c] for c in CAMERAS}

    def move(self, action):
        if self.over:
            return
        self.obs, _, terminated, truncated, info = self.env.step(action)
        self.ticks, self.success, self.over = (
            self.ticks + 1,
            self.success or bool(info['is_success']),
            terminated or truncated,
        )

    def report(self):
        return dict(task=self.task, success=self.success, ticks=self.ticks, over=self.over)
