"""LeRobot's own commands on the demonstration task: record, train, resume, evaluate, with
no flag beyond the type.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.sim, pytest.mark.slow]  # real programs, a minute together
bin_dir = Path(sys.executable).parent


def run(*command, cwd):
    "Run one command offline; its output, or the end of it as the failure."
    env = os.environ | {
        'HF_HUB_OFFLINE': '1',
        'HF_DATASETS_OFFLINE': '1',
        'OMP_NUM_THREADS': '1',
        'WANDB_MODE': 'disabled',
    }
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, '\n'.join(
        [' '.join(map(str, command)), done.stdout[-1500:], done.stderr[-3000:]]
    )
    return done.stdout + done.stderr


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    """Two recorded demonstrations, and a policy trained on them for two steps by
    lerobot-train.
    """
    d = tmp_path_factory.mktemp('lerobot')
    run(
        sys.executable,
        '-m',
        'halo.sim.flash_place',
        '--root',
        d / 'data',
        '--episodes',
        2,
        cwd=d,
    )
    run(
        bin_dir / 'lerobot-train',
        '--policy.type=halo',
        '--policy.device=cpu',
        '--policy.history_frames=4',
        '--policy.history_stride=3',
        '--dataset.repo_id=halo/flash_place',
        f'--dataset.root={d}/data',
        '--steps=2',
        '--batch_size=2',
        '--num_workers=0',
        '--save_freq=2',
        '--log_freq=1',
        f'--output_dir={d}/out',
        '--wandb.enable=false',
        cwd=d,
    )
    return d


def test_the_recording_opens_in_lerobot(work):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    ds = LeRobotDataset('halo/flash_place', root=work / 'data')
    frame = ds[10]
    assert (
        ds.num_episodes == 2
        and ds.fps == 10
        and frame['observation.images.primary'].shape == (3, 112, 112)
        and frame['task'].startswith('put the puck')
    )
    assert (
        json.loads((work / 'data/meta/info.json').read_text())['codebase_version'] == 'v3.0'
    )


def test_train_writes_a_policy_that_loads(work):
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    import halo.policy.configuration_halo  # noqa: F401 - as the plug-in does

    folder = work / 'out/checkpoints/000002/pretrained_model'
    policy = get_policy_class('halo').from_pretrained(folder)
    pre, post = make_pre_post_processors(policy.config, pretrained_path=str(folder))
    raw = {
        'observation.images.primary': torch.rand(3, 112, 112),
        'observation.images.wrist': torch.rand(3, 112, 112),
        'observation.state': torch.rand(4),
        'task': 'put the puck on the pad that flashed red',
    }
    action = post(policy.select_action(pre(raw)))
    assert (
        policy.config.model.sampling.history_frames == 4
        and action.shape == (1, 4)
        and torch.isfinite(action).all()
    )


def test_resume_goes_on(work):
    out = run(
        bin_dir / 'lerobot-train',
        f'--config_path={work}/out/checkpoints/last/pretrained_model/train_config.json',
        '--resume=true',
        '--steps=3',
        '--save_freq=1',
        cwd=work,
    )
    assert 'step:3' in out and 'step:1 ' not in out
    assert (work / 'out/checkpoints/000003/pretrained_model/model.safetensors').exists()


def test_eval_runs_the_registered_environment(work):
    run(
        bin_dir / 'lerobot-eval',
        f'--policy.path={work}/out/checkpoints/000002/pretrained_model',
        '--policy.device=cpu',
        '--env.type=flash_place',
        '--eval.n_episodes=2',
        '--eval.batch_size=2',
        f'--output_dir={work}/eval',
        cwd=work,
    )
    info = json.loads((work / 'eval/eval_info.json').read_text())
    assert (
        info['overall']['n_episodes'] == 2
        and len(list((work / 'eval').rglob('*.mp4'))) == 2
    )


def test_another_control_rate_is_refused(work):
    "The message that a user sees when the dataset runs at another rate than the policy."
    from lerobot.datasets.lerobot_dataset import LeRobotDatasetMetadata
    from lerobot.policies.factory import make_policy

    from halo.policy.configuration_halo import HaloConfig

    meta = LeRobotDatasetMetadata('halo/flash_place', root=work / 'data')
    with pytest.raises(ValueError, match=r'10 fps, the policy at 30; set --policy.fps=10'):
        make_policy(HaloConfig(device='cpu', fps=30.0), ds_meta=meta)
