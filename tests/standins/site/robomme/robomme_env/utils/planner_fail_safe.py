"In the place of RoboMME's planner: it holds still, or presses."

import numpy as np


class FailAwarePandaArmMotionPlanningSolver:
    def __init__(self, env, **options):
        assert options['vis'] is False and 'base_pose' in options, options
        self.env = env

    def close_gripper(self):
        self.env.step(np.zeros(8))

    def move_to_pose_with_screw(self, pose):
        raise RuntimeError('screw plan failed')

    def move_to_pose_with_RRTStar(self, pose):
        for _ in range(3):
            self.env.step(np.eye(8)[7])
