"""The chapter's robot through LeRobot's real command: fourteen joints, three cameras of
three shapes, thirty ticks a second.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from halo.deploy.twoarms import CAMERAS, JOINTS, TICKS, Desk, expert, record


def test_the_demonstrator_touches_the_named_button():
    for seed in range(20):
        desk, rng = Desk(seed), np.random.default_rng(seed)
        for _ in range(TICKS):
            desk.step(expert(desk, rng))
        assert desk.success, seed


@pytest.mark.slow
def test_lerobot_rollout_drives_it(tmp_path):
    from halo.train.loop import make_policy

    data = record(tmp_path / 'data', 1)
    assert data.meta.features['observation.state']['names'] == JOINTS and data.fps == 30
    config = dict(
        preset='tiny',
        device='cpu',
        primary_camera='observation.images.overhead',
        max_state_dim=14,
        max_action_dim=14,
    )
    for part in make_policy(data, **config):
        part.save_pretrained(tmp_path / 'policy')
    command = [
        Path(sys.executable).parent / 'lerobot-rollout',
        '--strategy.type=base',
        f'--policy.path={tmp_path}/policy',
        '--robot.type=two_arms',
        f'--robot.log={tmp_path}/log.json',
        '--task=touch the red button',
        '--fps=30',
        '--duration=2',
        '--device=cpu',
        '--play_sounds=false',
        '--return_to_initial_position=false',
    ]
    env = os.environ | {
        'OMP_NUM_THREADS': '1',
        'HF_LEROBOT_CALIBRATION': str(tmp_path / 'calibration'),
    }
    done = subprocess.run(
        list(map(str, command)),
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2500:]
    assert json.loads((tmp_path / 'log.json').read_text())['ticks'] >= 3
    saved = json.loads((tmp_path / 'policy/config.json').read_text())
    shapes = {
        k.rpartition('.')[2]: tuple(f['shape'][1:])
        for k, f in saved['input_features'].items()
        if 'images' in k
    }
    assert shapes == CAMERAS


def test_another_robot_is_refused():
    from halo.deploy.twoarms import TwoArms, TwoArmsConfig

    robot = TwoArms(TwoArmsConfig())
    with pytest.raises(ValueError, match='the robot takes'):
        robot.send_action({'x.pos': 0.0})
