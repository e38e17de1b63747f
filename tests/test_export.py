"""Exported policies: other kinds of policies, the folder, and what is refused."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.factory import make_pre_post_processors

from halo.deploy import export as ex
from halo.deploy.exported import Exported, drawn, read_about
from halo.policy.configuration_halo import HaloConfig
from halo.policy.modeling_halo import HaloPolicy

FRONT, HAND = 'observation.images.front', 'observation.images.wrist'


def a_policy(mode='MEAN_STD', **how):
    "An untrained tiny policy with two cameras that are not square, and its processors."
    torch.manual_seed(0)
    features = {
        FRONT: PolicyFeature(FeatureType.VISUAL, (3, 90, 120)),
        HAND: PolicyFeature(FeatureType.VISUAL, (3, 60, 80)),
        'observation.state': PolicyFeature(FeatureType.STATE, (5,)),
    }
    action = {'action': PolicyFeature(FeatureType.ACTION, (6,))}
    modes = dict(VISUAL='IDENTITY', STATE=mode, ACTION=mode)
    config = HaloConfig(
        input_features=features,
        output_features=action,
        preset='tiny',
        normalization_mapping=modes,
        n_action_steps=3,
        device='cpu',
        **how,
    )
    stats = {}
    for key, d in (('observation.state', 5), ('action', 6)):
        low = torch.linspace(-2, 1, d)
        ends = dict(min=low, q01=low + 0.1, q99=low + 1.5, max=low + 2)
        stats[key] = ends | dict(mean=low + 1, std=torch.linspace(0.3, 2, d))
    policy = HaloPolicy(config).eval()
    return policy, *make_pre_post_processors(config, dataset_stats=stats)


def episode(policy, pre, post, robot, ticks=8, sizes=((90, 120), (60, 80))):
    "Largest difference of the actions of policy and robot over some ticks."
    rng, apart = np.random.default_rng(0), 0.0
    policy.reset()
    robot.reset()
    for _ in range(ticks):
        pictures = {
            k: rng.integers(0, 256, (*s, 3), dtype=np.uint8)
            for k, s in zip((FRONT, HAND), sizes)
        }
        state = rng.normal(size=5).astype(np.float32)
        noise = drawn(robot.about, seed=0)
        batch = {
            k: torch.from_numpy(v).permute(2, 0, 1)[None] / 255
            for k, v in pictures.items()
        }
        batch |= {'observation.state': torch.from_numpy(state)[None], 'task': ['lift it']}
        with torch.inference_mode():
            a = post(policy.select_action(pre(batch), noise=torch.from_numpy(noise)))
        b = robot.act(pictures, state, 'lift it', noise)
        apart = max(apart, float(np.abs(a[0].numpy() - b).max()))
    return apart


KINDS = dict(
    no_history=dict(mode='MIN_MAX', history_frames=0),
    hopping=dict(
        mode='QUANTILES', salr=False, history_frames=4, history_stride=2, history_hop=2
    ),
    present=dict(
        model=dict(
            sampling=dict(current='view_and_video', history_frames=3),
            flow=dict(method='heun', steps=4),
        ),
        history_stride=2,
    ),
)


@pytest.mark.parametrize('kind', KINDS)
def test_a_robot_without_torch_does_what_the_policy_does(kind, tmp_path):
    policy, pre, post = a_policy(**KINDS[kind])
    said = ex.export(policy, pre, post, tmp_path / 'out', words=12)
    assert said['difference'] < 1e-4
    robot = Exported(tmp_path / 'out', threads=1)
    assert robot.about == said
    assert episode(policy, pre, post, robot) < 2e-4
    assert sorted(f.name for f in (tmp_path / 'out').iterdir()) == sorted(
        ['policy.json', 'prefix.onnx', 'denoise.onnx', 'tokenizer.json']
    )


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    "An exported policy: (policy, pre, post, folder)."
    loaded = a_policy(history_frames=2, history_stride=1)
    out = tmp_path_factory.mktemp('export') / 'out'
    ex.export(*loaded, out, words=8)
    return *loaded, out


def test_the_robots_module_imports_nothing_heavy():
    code = (
        'import sys; import halo.deploy.exported;'
        "print([m for m in ('torch', 'lerobot', 'transformers', 'fastcore', 'onnx')"
        ' if m in sys.modules])'
    )
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert out.stdout.strip() == '[]', out


def test_lighter_weights_are_smaller_and_near(written, tmp_path):
    policy, pre, post, out = written
    said = ex.export(policy, pre, post, tmp_path / 'int8', 8, 'int8')
    assert said['weights'] == 'int8' and said['difference'] < 0.5
    size = lambda f: (f / 'prefix.onnx').stat().st_size
    assert size(tmp_path / 'int8') < 0.5 * size(out)
    shutil.copytree(out, tmp_path / 'half')
    ex.lighten(tmp_path / 'half/prefix.onnx', 'float16')
    assert size(tmp_path / 'int8') < size(tmp_path / 'half') < 0.7 * size(out)


def test_other_actions_are_refused_and_nothing_is_left(written, tmp_path, monkeypatch):
    policy, pre, post, out = written
    copied = lambda model, lay, to: shutil.copytree(out, to, dirs_exist_ok=True)
    monkeypatch.setattr(ex, 'write_programs', copied)
    for found, kind in ((0.01, 'float32'), (float('nan'), 'int8'), (0.01, 'int8')):
        monkeypatch.setattr(ex, 'difference', lambda *a: found)
        with pytest.raises(RuntimeError, match=f'float32.*differ by {found:.1e}'):
            ex.export(policy, pre, post, tmp_path / 'out', 8, kind)
    each = iter((1e-6, float('inf')))
    monkeypatch.setattr(ex, 'difference', lambda *a: next(each))
    with pytest.raises(RuntimeError, match='int8 programs.*differ by inf'):
        ex.export(policy, pre, post, tmp_path / 'out', 8, 'int8')
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_kept(written, tmp_path):
    policy, pre, post, _ = written
    (tmp_path / 'thesis.txt').write_text('all of it')
    for extra in (None, 'policy.json'):
        if extra:  # an exported policy with something of the user's beside it
            for f in written[3].iterdir():
                shutil.copy(f, tmp_path)
        with pytest.raises(ValueError, match='holds other things'):
            ex.export(policy, pre, post, tmp_path, 8)
    assert (tmp_path / 'thesis.txt').read_text() == 'all of it'


def test_bad_input_is_said_in_one_sentence(written, tmp_path):
    policy, pre, post, out = written
    with pytest.raises(ValueError, match='words=0'):
        ex.export(policy, pre, post, tmp_path / 'a', 0)
    policy.config.model = policy.config.model.but(sampling__positions='installed')
    with pytest.raises(ValueError, match="positions='installed'"):
        ex.export(policy, pre, post, tmp_path / 'a', 8)
    policy.config.model = policy.config.model.but(sampling__positions='qwen')
    with pytest.raises(ValueError, match="weights='fp4'"):
        ex.export(policy, pre, post, tmp_path / 'a', 8, 'fp4')
    with pytest.raises(ValueError, match='prefix.onnx is missing'):
        (tmp_path / 'policy.json').write_text('{}')
        read_about(tmp_path)
    robot = Exported(out, threads=1)
    front, hand = (np.zeros((*s, 3), np.uint8) for s in ((90, 120), (60, 80)))
    good = dict(pictures={FRONT: front, HAND: hand}, state=np.zeros(5))
    bad = (
        (dict(instruction='lift it', state=np.zeros(4)), r'state has shape \(4,\)'),
        (dict(instruction='lift it', state=np.full(5, np.nan)), 'NaN or infinity'),
        (dict(instruction='lift it', pictures={FRONT: front}), "wrist' is missing"),
        (dict(instruction=' '), 'the instruction is empty'),
        (dict(instruction='lift it ' * 20), 'the program takes 8; export'),
        (
            dict(instruction='lift it', pictures={FRONT: front[:60], HAND: hand}),
            'crop it to that shape',
        ),
        (dict(instruction='lift it', noise=np.zeros((1, 2, 3))), 'noise has shape'),
    )
    for wrong, said in bad:
        with pytest.raises(ValueError, match=said):
            robot.act(**good | wrong)
    assert robot.tick == 0  # nothing was counted
    robot.act(**good, instruction='lift it')


def test_large_weights_lie_beside_their_program(written, tmp_path, monkeypatch):
    policy, pre, post, out = written
    monkeypatch.setattr(ex, 'LARGE', 0)
    with pytest.raises(ValueError, match='below 0 MiB'):
        ex.export(policy, pre, post, tmp_path / 'a', 8, 'int8')
    said = ex.export(policy, pre, post, tmp_path / 'a', 8)
    assert said['difference'] < 1e-4 and 'prefix.onnx.data' in said['files']
    size = lambda f: (f / 'prefix.onnx').stat().st_size
    assert size(tmp_path / 'a') < 0.5 * size(out)
    ex.export(policy, pre, post, tmp_path / 'a', 8)  # an export may be written again
    (tmp_path / 'a/denoise.onnx.data').unlink()
    with pytest.raises(ValueError, match='denoise.onnx.data is missing'):
        Exported(tmp_path / 'a')


def test_another_format_is_refused(written, tmp_path):
    for name in ('policy.json', 'prefix.onnx', 'denoise.onnx', 'tokenizer.json'):
        (tmp_path / name).write_bytes((written[3] / name).read_bytes())
    about = json.loads((tmp_path / 'policy.json').read_text())
    (tmp_path / 'policy.json').write_text(json.dumps(about | dict(format=99)))
    with pytest.raises(ValueError, match='format 99, this version reads 1'):
        read_about(tmp_path)


def test_a_step_that_is_not_exported_is_named(written, tmp_path):
    policy, pre, post, _ = written
    from lerobot.processor import RenameObservationsProcessorStep

    step = next(s for s in pre.steps if isinstance(s, RenameObservationsProcessorStep))
    step.rename_map = {'camera1': FRONT}
    try:
        with pytest.raises(ValueError, match='camera1'):
            ex.export(policy, pre, post, tmp_path / 'a', 8)
    finally:
        step.rename_map = {}


def test_the_command(tmp_path, capsys):
    assert ex.main([str(tmp_path / 'nowhere'), '--out', str(tmp_path / 'a')]) == 1
    assert 'is not a policy folder' in capsys.readouterr().err
    done = ex.main(['checkpoints/flash_place/no_history', '--out', str(tmp_path / 'a')])
    said = capsys.readouterr().out
    assert done == 0 and 'written' in said and 'weights float32' in said
    for wrong in (['--rollouts', '-1'], ['--keep', 'x.json']):
        with pytest.raises(SystemExit):
            ex.main(['checkpoints/flash_place/full', '--out', str(tmp_path / 'b'), *wrong])
    assert not (tmp_path / 'b').exists()
