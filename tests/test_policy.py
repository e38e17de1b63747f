"""The policy on data that is not ours, through LeRobot's own training command and ours:
other shapes, names, sizes and damage.
"""

import inspect
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.utils.constants import ACTION, OBS_STATE
from test_weights import write_language

import halo.policy.configuration_halo as C
import halo.policy.modeling_halo as M
import halo.policy.processor_halo as P
from halo.method.config import preset
from halo.train.loop import TrainConfig, make_policy, train

root = Path(__file__).resolve().parent.parent
IMG = 'observation.images.'
SMALL = dict(
    preset='tiny',
    device='cpu',
    history_frames=4,
    history_stride=1,
    chunk_size=4,
    n_action_steps=2,
)
SMALL_CLI = [
    '--policy.type=halo',
    '--policy.device=cpu',
    '--policy.preset=tiny',
    '--policy.history_frames=4',
    '--policy.history_stride=1',
    '--policy.chunk_size=4',
    '--policy.n_action_steps=2',
]


def record(
    folder,
    cameras=None,
    state=4,
    action=4,
    fps=10,
    lengths=(8, 6),
    still=None,
    seed=0,
    depth=None,
):
    """A LeRobotDataset with pictures in its parquet files; `still`: a dimension of state
    and action that is always 0.1.
    """
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    cameras, rng = cameras or {'front': (32, 40)}, np.random.default_rng(seed)
    vector = lambda d: dict(dtype='float32', shape=(d,), names=None)
    features = {
        IMG + k: dict(dtype='image', shape=(*hw, 3), names=['height', 'width', 'channels'])
        for k, hw in cameras.items()
    }
    if depth:
        features[IMG + depth] = dict(
            dtype='image',
            shape=(32, 40, 1),
            names=['height', 'width', 'channels'],
            info=dict(is_depth_map=True, depth_unit='mm'),
        )
    features |= {OBS_STATE: vector(state), ACTION: vector(action)}
    ds = LeRobotDataset.create('me/robot', fps, features, folder, use_videos=False)
    for n in lengths:
        for _ in range(n):
            frame = {
                IMG + k: rng.integers(0, 256, (*hw, 3), np.uint8)
                for k, hw in cameras.items()
            }
            frame |= {
                OBS_STATE: rng.normal(size=state).astype(np.float32),
                ACTION: rng.normal(size=action).astype(np.float32),
            }
            if still is not None:
                frame[OBS_STATE][still] = frame[ACTION][still] = 0.1
            if depth:
                frame[IMG + depth] = rng.integers(300, 3000, (32, 40, 1)).astype(np.uint16)
            ds.add_frame(frame | dict(task='push the button'))
        ds.save_episode()
    ds.finalize()
    return LeRobotDataset('me/robot', folder)


def lerobot_train(monkeypatch, folder, out, *args, steps=1):
    "LeRobot's own command, in this process; returns the policy folder that it wrote."
    from lerobot.scripts import lerobot_train as command

    argv = [
        'lerobot-train',
        *args,
        '--dataset.repo_id=me/robot',
        f'--dataset.root={folder}',
        '--batch_size=2',
        f'--steps={steps}',
        '--num_workers=0',
        f'--save_freq={steps}',
        '--log_freq=1',
        f'--output_dir={out}',
        '--wandb.enable=false',
    ]
    monkeypatch.setattr(sys, 'argv', argv)
    command.main()
    return Path(out) / 'checkpoints' / 'last' / 'pretrained_model'


def loaded(folder):
    "Policy and processors of a folder, as LeRobot's evaluation makes them."
    from lerobot.policies.factory import make_pre_post_processors

    policy = M.HaloPolicy.from_pretrained(folder).eval()
    return policy, *make_pre_post_processors(policy.config, pretrained_path=str(folder))


def made(folder, **kw):
    """A policy for the dataset in `folder` that has trained for one step with
    halo.train.loop.
    """
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    ds = LeRobotDataset('me/robot', folder)
    tc = TrainConfig(steps=1, batch=2, warmup=1, log_every=1, save_every=1)
    return train(
        ds,
        Path(folder).with_name(Path(folder).name + '_run'),
        tc,
        progress=False,
        **{**SMALL, **kw},
    )


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    "A dataset of one camera `primary`, and a policy folder trained on it."
    d = tmp_path_factory.mktemp('base')
    record(d / 'data', {'primary': (32, 40)})
    return made(d / 'data')


def robot(policy, n=0, **change):
    "A raw observation of the policy's robot."
    x = {k: torch.rand(*f.shape) for k, f in policy.config.image_features.items()}
    return (
        x
        | {
            OBS_STATE: torch.full(policy.config.robot_state_feature.shape, float(n)),
            'task': 'push the button',
        }
        | change
    )


# Self-contained policies (deliverable 1)


def no_reading(monkeypatch):
    "Make every way to the VLM's and the expert's first weights an error."
    import transformers.modeling_utils as T

    def refuse(*a, **k):
        raise AssertionError("weights outside the policy were asked for")

    monkeypatch.setattr(T.PreTrainedModel, 'from_pretrained', classmethod(refuse))


@pytest.fixture(scope='module')
def with_vlm(tmp_path_factory):
    """A policy whose VLM and whose expert came from folders that have been deleted since,
    trained for two steps by halo.train.loop.
    """
    d = tmp_path_factory.mktemp('with_vlm')
    shutil.copytree(root / 'checkpoints/flash_place/vlm', d / 'vlm')
    write_language(d / 'language', preset('tiny'))
    ds = record(d / 'data')
    tc = TrainConfig(steps=2, batch=2, warmup=1, log_every=1, save_every=1)
    begun = dict(vlm_id=str(d / 'vlm'), expert_id=str(d / 'language'))
    folder = train(ds, d / 'run', tc, until=1, progress=False, **begun, **SMALL)
    shutil.rmtree(d / 'vlm')
    shutil.rmtree(d / 'language')
    return ds, folder, d


def sources(folder):
    "What a policy folder says of its first weights; no place to read from is in it."
    saved = json.loads((Path(folder) / 'config.json').read_text())
    for asked in ('vlm_id', 'expert_id'):
        assert not saved[asked] and not saved['model'][asked]
    return saved['vlm_source'], saved['expert_source']


def from_both(folder):
    "Whether a policy remembers the folders of `with_vlm`."
    vlm, expert = sources(folder)
    index = 'language (model.safetensors.index.json '
    return vlm.startswith('vlm (model.safetensors ') and expert.startswith(index)


def test_a_policy_folder_needs_nothing_else(with_vlm, monkeypatch, tmp_path):
    ds, folder, d = with_vlm
    no_reading(monkeypatch)
    monkeypatch.chdir(tmp_path)
    moved = shutil.copytree(folder, tmp_path / 'a place ü' / 'policy')
    assert from_both(moved)
    policy, pre, _ = loaded(moved)
    assert torch.isfinite(policy.select_action(pre(robot(policy)))).all()


def test_continuing_reads_no_vlm(with_vlm, monkeypatch, tmp_path):
    "halo.train.loop with init_from and resumed, and LeRobot's --policy.path and resume."
    ds, folder, d = with_vlm
    no_reading(monkeypatch)
    tc = TrainConfig(steps=2, batch=2, warmup=1, log_every=1, save_every=1)
    # the same command as before, the folders gone
    gone = dict(SMALL, vlm_id=str(d / 'vlm'), expert_id=str(d / 'language'))
    assert train(ds, d / 'run', tc, progress=False, **gone) == folder  # resumed
    new = train(
        ds, tmp_path / 'new', tc, until=1, progress=False, init_from=folder, **SMALL
    )
    assert from_both(new)
    one = lerobot_train(
        monkeypatch, d / 'data', tmp_path / 'out', f'--policy.path={folder}'
    )
    assert from_both(one)
    resumed = [
        'lerobot-train',
        f'--config_path={one}/train_config.json',
        '--resume=true',
        '--steps=2',
        '--save_freq=1',
    ]
    from lerobot.scripts import lerobot_train as command

    monkeypatch.setattr(sys, 'argv', resumed)
    command.main()
    assert (one.parent.parent / '000002/pretrained_model/model.safetensors').exists()


def test_a_scaled_run_is_resumed_and_exported_without_the_vlm(tmp_path, monkeypatch):
    import halo.train.scale as S

    shutil.copytree(root / 'checkpoints/flash_place/vlm', tmp_path / 'vlm')
    write_language(tmp_path / 'language', preset('tiny'))
    record(tmp_path / 'data')
    begun = dict(vlm_id=str(tmp_path / 'vlm'), expert_id=str(tmp_path / 'language'))
    run = tmp_path / 'run.yaml'
    run.write_text(
        json.dumps(
            dict(
                data=dict(root=str(tmp_path / 'data')),
                out=str(tmp_path / 'out'),
                policy=dict(SMALL, **begun, model=dict(max_state_dim=9)),
                run=dict(steps=2, micro=2, save_every=1, warmup=1, log_every=1, ahead=0),
            )
        )
    )
    assert S.main([str(run), '--until', '1', '--device', 'cpu']) == 0
    shutil.rmtree(tmp_path / 'vlm')
    shutil.rmtree(tmp_path / 'language')
    no_reading(monkeypatch)
    assert S.main([str(run), '--device', 'cpu']) == 0
    assert S.main([str(run), '--export', str(tmp_path / 'exported')]) == 0
    policy, pre, _ = loaded(tmp_path / 'exported')
    # the folders are gone, and with them what a hash is made of
    assert sources(tmp_path / 'exported') == ('vlm', 'language')
    assert (
        policy.config.model.max_state_dim == 9
        and torch.isfinite(policy.select_action(pre(robot(policy)))).all()
    )


def test_lerobots_command_begins_with_a_language_model(tmp_path, monkeypatch):
    """`--policy.expert_id=FOLDER` for a new policy: its layers are in it after a step too
    small to move them; with `--policy.path` the same word is noted as not read.
    """
    want = write_language(tmp_path / 'language', preset('tiny'))
    record(tmp_path / 'data')
    said = f'--policy.expert_id={tmp_path / "language"}'
    # too small for a float to notice
    still = ['--policy.optimizer_lr=1e-20', '--policy.scheduler_decay_lr=1e-20']
    there = '--policy.push_to_hub=false'
    one = lerobot_train(
        monkeypatch, tmp_path / 'data', tmp_path / 'a', *SMALL_CLI, *still, there, said
    )
    assert sources(one)[1].startswith('language (model.safetensors.index.json ')
    got = M.HaloPolicy.from_pretrained(one).model.blocks[3].expert.layer.mlp.up_proj.weight
    assert torch.equal(got, want['layers.3.mlp.up_proj.weight'].float())
    shutil.rmtree(tmp_path / 'language')
    path = f'--policy.path={one}'
    two = lerobot_train(monkeypatch, tmp_path / 'data', tmp_path / 'b', path, said)
    assert sources(two) == sources(one)


def test_a_name_beside_a_trained_policy_is_no_origin(tmp_path, monkeypatch):
    "A policy that began at random, and `--policy.expert_id` where its file is loaded."
    record(tmp_path / 'data')
    one = made(tmp_path / 'data')
    no_reading(monkeypatch)
    config = PreTrainedConfig.from_pretrained(one, cli_overrides=['--expert_id=elsewhere'])
    config.pretrained_path = one
    assert M.HaloPolicy.from_pretrained(one, config=config).config.expert_source == ''


def test_shipped_policies_name_no_place(monkeypatch):
    no_reading(monkeypatch)
    for f in ('full', 'no_history', 'no_salr'):
        folder = root / 'checkpoints/flash_place' / f
        saved = json.loads((folder / 'config.json').read_text())
        assert not saved['vlm_id'] and not saved['model']['vlm_id'] and saved['vlm_source']
        M.HaloPolicy.from_pretrained(folder)


def test_a_policy_carries_its_tokenizer(tmp_path, monkeypatch):
    """The tokenizer came from a folder; policy and processors move, the folder is gone;
    training goes on from them.
    """
    from halo.method.vlm import tiny_tokenizer

    tiny_tokenizer().save_pretrained(tmp_path / 'words')
    ds = record(tmp_path / 'data')
    named, folder = dict(SMALL, tokenizer=str(tmp_path / 'words')), tmp_path / 'policy'
    for part in make_policy(ds, **named):
        part.save_pretrained(folder)
    shutil.rmtree(tmp_path / 'words')
    folder = folder.rename(tmp_path / 'moved')
    want = [tiny_tokenizer()('push the button')['input_ids']]
    policy, pre, _ = loaded(folder)
    assert pre(robot(policy))['observation.language.tokens'].tolist() == want
    policy, pre, _ = make_policy(ds, init_from=folder, **named)
    assert pre(robot(policy))['observation.language.tokens'].tolist() == want


# Row c: --rename_map


def test_flags_follow_a_renamed_camera(base, tmp_path, monkeypatch):
    record(tmp_path / 'data', {'front': (32, 40)})
    seen = []
    original = M.HaloPolicy.observation
    monkeypatch.setattr(
        M.HaloPolicy,
        'observation',
        lambda self, batch, history=None: (
            seen.append((batch, o := original(self, batch, history))) or o
        ),
    )
    lerobot_train(
        monkeypatch,
        tmp_path / 'data',
        tmp_path / 'out',
        f'--policy.path={base}',
        '--rename_map={"observation.images.front": "observation.images.primary"}',
        steps=3,
    )
    assert seen
    for batch, obs in seen:
        flags = batch[f'{IMG}front_is_pad']
        assert torch.equal(obs.history_mask, ~flags[:, :-1])
    # some histories are short: frames 0 ... 3 of an episode
    assert not all(o.history_mask.all() for _, o in seen)


def test_a_history_without_flags_is_refused(base):
    policy, pre, _ = loaded(base)
    batch = {
        IMG + 'primary': torch.rand(2, 5, 3, 32, 40),
        OBS_STATE: torch.zeros(2, 5, 4),
        ACTION: torch.zeros(2, 4, 4),
        'task': ['push'] * 2,
    }
    with pytest.raises(
        ValueError,
        match=(
            r"'observation.images.primary' has 5 frames per sample and no"
            r" 'observation.images.primary_is_pad'"
        ),
    ):
        policy(pre(batch))


# Row e: vectors of one number, and padding


@pytest.mark.parametrize('state, action', [(1, 4), (4, 1), (1, 1)])
def test_one_number_through_lerobot_train(tmp_path, monkeypatch, state, action):
    seen = []
    original = M.HaloPolicy.observation
    monkeypatch.setattr(
        M.HaloPolicy,
        'observation',
        lambda self, batch, history=None: (
            seen.append((batch, o := original(self, batch, history))) or o
        ),
    )
    record(tmp_path / 'data', state=state, action=action)
    folder = lerobot_train(monkeypatch, tmp_path / 'data', tmp_path / 'out', *SMALL_CLI)
    batch, obs = seen[0]
    present = batch[OBS_STATE].reshape(2, 5, state)[:, -1]
    assert torch.equal(obs.state[:, :state], present) and not obs.state[:, state:].any()
    policy, pre, post = loaded(folder)
    assert post(policy.select_action(pre(robot(policy)))).shape == (1, action)


def test_padding_never_crops():
    with pytest.raises(ValueError, match='9 dimensions do not fit into the model.s 8'):
        M.pad_last(torch.zeros(2, 9), 8)


# Row f: a trained policy on data of other shapes


def test_the_saved_policy_has_the_new_shapes(base, tmp_path, monkeypatch):
    record(tmp_path / 'data', {'primary': (48, 64)}, state=6, action=5)
    folder = lerobot_train(
        monkeypatch, tmp_path / 'data', tmp_path / 'out', f'--policy.path={base}'
    )
    policy, pre, post = loaded(folder)
    c = policy.config
    assert (
        c.robot_state_feature.shape,
        c.action_feature.shape,
        c.image_features[IMG + 'primary'].shape,
    ) == ((6,), (5,), (3, 48, 64))
    assert post(policy.select_action(pre(robot(policy)))).shape == (1, 5)


def test_renamed_pictures_bring_their_size(base, tmp_path, monkeypatch):
    record(tmp_path / 'data', {'front': (48, 64)})
    folder = lerobot_train(
        monkeypatch,
        tmp_path / 'data',
        tmp_path / 'out',
        f'--policy.path={base}',
        '--rename_map={"observation.images.front": "observation.images.primary"}',
    )
    assert loaded(folder)[0].config.image_features[IMG + 'primary'].shape == (3, 48, 64)


def test_what_does_not_fit_is_refused_before_the_first_step(base, tmp_path, monkeypatch):
    record(tmp_path / 'data', {'primary': (32, 40)}, state=9)
    with pytest.raises(
        ValueError, match="'observation.state' has 9 dimensions, the model takes 8"
    ):
        lerobot_train(
            monkeypatch, tmp_path / 'data', tmp_path / 'out', f'--policy.path={base}'
        )
    assert not (tmp_path / 'out/checkpoints').exists()


# Row g: room for more dimensions


@pytest.mark.parametrize(
    'how',
    [
        '--policy.max_state_dim=14 --policy.max_action_dim=14',
        '--policy.model.max_state_dim=14 --policy.model.max_action_dim=14',
    ],
)
def test_fourteen_dimensions(tmp_path, monkeypatch, how):
    record(tmp_path / 'data', state=14, action=14)
    with pytest.raises(ValueError, match='set --policy.max_state_dim=14'):
        lerobot_train(monkeypatch, tmp_path / 'data', tmp_path / 'refused', *SMALL_CLI)
    folder = lerobot_train(
        monkeypatch, tmp_path / 'data', tmp_path / 'out', *SMALL_CLI, *how.split()
    )
    assert loaded(folder)[0].config.model == preset(
        'tiny',
        max_state_dim=14,
        max_action_dim=14,
        chunk=4,
        sampling__history_frames=4,
        sampling__history_stride=1,
    )


def test_a_preset_on_top_of_a_checkpoint_is_refused(base, tmp_path, monkeypatch):
    record(tmp_path / 'data', {'primary': (32, 40)})
    with pytest.raises(Exception) as e:
        lerobot_train(
            monkeypatch,
            tmp_path / 'data',
            tmp_path / 'out',
            f'--policy.path={base}',
            '--policy.preset=small',
        )
    assert "preset='small' was given on top of a whole model" in str(
        e.value.__cause__ or e.value
    )


# Row h: depth


def test_depth_is_left_out_and_named(tmp_path, monkeypatch, capfd):
    record(tmp_path / 'data', {'front': (32, 40)}, depth='front_depth')
    folder = lerobot_train(monkeypatch, tmp_path / 'data', tmp_path / 'out', *SMALL_CLI)
    policy, pre, _ = loaded(folder)
    assert (
        list(policy.config.image_features)
        == [IMG + 'front']
        == [k for k in policy.config.input_features if 'images' in k]
    )
    assert "'observation.images.front_depth' is left out" in ''.join(capfd.readouterr())
    assert torch.isfinite(policy.select_action(pre(robot(policy)))).all()


# Row i: dimensions that never change


def test_a_still_dimension_in_both_training_paths(base, tmp_path, monkeypatch, capfd):
    record(tmp_path / 'data', {'primary': (32, 40)}, still=2)
    folders = [
        lerobot_train(monkeypatch, tmp_path / 'data', tmp_path / 'new', *SMALL_CLI),
        lerobot_train(
            monkeypatch, tmp_path / 'data', tmp_path / 'next', f'--policy.path={base}'
        ),
        made(tmp_path / 'data'),
    ]
    assert (
        ''.join(capfd.readouterr()).count(
            "'observation.state' never changes in dimension 2"
        )
        >= 3
    )
    for f in folders:
        policy, pre, _ = loaded(f)
        x = pre(robot(policy, **{OBS_STATE: torch.tensor([0.0, 0.0, 0.1001, 0.0])}))[
            OBS_STATE
        ]
        assert abs(float(x[0, 2])) < 1e-3, f


# Row m: what a robot may send


@pytest.mark.parametrize(
    'change, says',
    [
        (
            {OBS_STATE: torch.tensor([0.0, torch.nan, 0.0, 0.0])},
            r"'observation.state' of shape \(1, 4\) holds NaN or infinity",
        ),
        (
            {OBS_STATE: torch.tensor([0.0, torch.inf, 0.0, 0.0])},
            r"'observation.state' of shape \(1, 4\) holds NaN or infinity",
        ),
        (
            {IMG + 'primary': torch.rand(4, 32, 40)},
            (
                r"'observation.images.primary' has shape \(1, 4, 32, 40\); it has an alpha"
                r" channel"
            ),
        ),
        (
            {IMG + 'primary': torch.rand(32, 40, 3)},
            r"'observation.images.primary' has shape \(1, 32, 40, 3\); move the channels",
        ),
        ({IMG + 'primary': torch.full((3, 32, 40), torch.nan)}, r"NaN or infinity"),
    ],
    ids=['nan', 'inf', 'rgba', 'hwc', 'nan picture'],
)
def test_bad_observations_give_one_sentence_and_no_action(base, change, says):
    policy, pre, _ = loaded(base)
    assert torch.isfinite(policy.select_action(pre(robot(policy)))).all()
    policy.reset()
    with pytest.raises(ValueError, match=says):
        policy.select_action(pre(robot(policy, **change)))
    # and the next one is as good as ever
    assert torch.isfinite(policy.select_action(pre(robot(policy)))).all()


# Row n: LoRA through LeRobot


def test_lora_through_lerobot(base, tmp_path, monkeypatch):
    from halo.benchmarks.suite import load_any
    from halo.deploy.serve import open_policy
    from halo.sim.evaluate import load_policy

    here = tmp_path / 'project'
    shutil.copytree(base, here / 'base')
    record(here / 'data', {'primary': (32, 40)})
    monkeypatch.chdir(here)
    folder = lerobot_train(
        monkeypatch,
        here / 'data',
        here / 'out',
        '--policy.path=base',
        '--peft.r=4',
        '--policy.optimizer_lr=0.01',
        steps=2,
    ).resolve()
    assert (
        not (folder / 'model.safetensors').exists()
        and (folder / 'adapter_config.json').exists()
    )
    before, after = M.HaloPolicy.from_pretrained(here / 'base'), load_policy(folder)[0]
    changed = [
        k
        for k, v in after.state_dict().items()
        if not torch.equal(v, before.state_dict()[k])
    ]
    assert before.state_dict().keys() == after.state_dict().keys()
    assert (
        any('.vlm.' in k for k in changed)
        and any('.expert.' in k for k in changed)
        and any('.rerep.' in k for k in changed)
        and any('heads' in k for k in changed)
    )
    from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
    from lerobot.policies.factory import make_policy as lerobot_policy

    config = PreTrainedConfig.from_pretrained(folder)
    config.pretrained_path = folder
    theirs = lerobot_policy(
        config, ds_meta=LeRobotDatasetMetadata('me/robot', here / 'data')
    ).eval()
    pre = load_policy(folder)[1]
    noise = torch.randn(1, 4, 8)
    raw = robot(after)
    a, b = (
        after.select_action(pre(dict(raw)), noise=noise),
        theirs.select_action(pre(dict(raw)), noise=noise),
    )
    assert torch.allclose(a, b, atol=1e-5)
    assert torch.equal(a, load_any(folder)[0].select_action(pre(dict(raw)), noise=noise))
    monkeypatch.chdir(tmp_path)  # another working directory, the whole project moved
    moved = here.rename(tmp_path / 'moved')
    served = open_policy(moved / folder.relative_to(here.resolve()))[0]
    assert torch.equal(served.select_action(pre(dict(raw)), noise=noise), a)
    shutil.rmtree(moved / 'base')
    with pytest.raises(
        ValueError, match="holds LoRA adapters for the policy 'base', which is not here"
    ):
        load_policy(moved / folder.relative_to(here.resolve()))


# Rows p and q: LeRobot's own expectations


def test_processors_before_the_policy(tmp_path):
    stats = {k: dict(mean=torch.zeros(4), std=torch.ones(4)) for k in (OBS_STATE, ACTION)}
    pre, post = P.make_halo_pre_post_processors(C.HaloConfig(device='cpu'), stats)
    assert (
        pre(
            {
                OBS_STATE: torch.zeros(4),
                IMG + 'primary': torch.rand(3, 32, 40),
                'task': 'push',
            }
        )['observation.language.tokens'].ndim
        == 2
    )


def test_the_annotation_is_the_class():
    assert (
        inspect.signature(M.HaloPolicy.__init__).parameters['config'].annotation
        is C.HaloConfig
    )


# LeRobot's main (deliverable 4)


def test_averaged_weights_are_written_whatever_lerobot_does(base, tmp_path, monkeypatch):
    """On 0.6.1, and where `save_pretrained(state_dict=...)` is swallowed as in LeRobot's
    successor.
    """
    from lerobot.policies.pretrained import PreTrainedPolicy

    import halo.train.scale as S

    policy, pre, post = loaded(base)
    ema = S.EMA(policy.model, 0.5)
    for w in ema.weights.values():
        w.add_(1.0)

    def swallowing(
        self,
        save_directory,
        *,
        repo_id=None,
        push_to_hub=False,
        card_kwargs=None,
        **push_to_hub_kwargs,
    ):
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        self._save_pretrained(Path(save_directory))

    def own_parameters(self, save_directory):
        from safetensors.torch import save_model

        self.config._save_pretrained(save_directory)
        save_model(self, str(save_directory / 'model.safetensors'))

    for name in ('0.6.1', 'main'):
        if name == 'main':
            monkeypatch.setattr(PreTrainedPolicy, 'save_pretrained', swallowing)
            monkeypatch.setattr(PreTrainedPolicy, '_save_pretrained', own_parameters)
        again = M.HaloPolicy.from_pretrained(
            S.write_policy(policy, pre, post, tmp_path / name, S.ScaleConfig(ema=0.5), ema)
        )
        for n, w in again.model.state_dict().items():
            assert torch.equal(w, ema.weights.get(n, w)), (name, n)


def test_what_the_disk_changed_is_noticed(base, tmp_path, monkeypatch):
    policy, *_ = loaded(base)
    tensors = dict(policy.state_dict())
    original = M.save_file

    def flip(t, file, meta):
        k = next(iter(t))
        original({**t, k: t[k] + 1}, file, meta)

    monkeypatch.setattr(M, 'save_file', flip)
    with pytest.raises(OSError, match='does not hold what was written'):
        M.write_weights(policy, tmp_path / 'p', tensors)


def test_a_new_instruction_drops_actions_and_keeps_the_history(base):
    """What LeRobot's successor does in `drop_queued_actions`, by the attributes that the
    policy names.
    """
    policy, pre, _ = loaded(base)
    policy.select_action(pre(robot(policy)))
    kept = {k: v.clone() for k, v in policy._history.rows[0].items()}
    assert len(policy._queue) == policy.config.n_action_steps - 1
    for attr in policy._action_queue_attrs:
        queue = getattr(policy, attr, None)
        (queue.get(ACTION) if isinstance(queue, dict) else queue).clear()
    assert not policy._queue and kept.keys() == policy._history.rows[0].keys()
    assert torch.isfinite(policy.select_action(pre(robot(policy)))).all()


KNOWN = {
    'PreTrainedPolicy.save_pretrained': [
        'self',
        'save_directory',
        'state_dict',
        'repo_id',
        'push_to_hub',
        'card_kwargs',
        'push_to_hub_kwargs',
    ],
    'PreTrainedPolicy.from_pretrained': [
        'pretrained_name_or_path',
        'config',
        'force_download',
        'resume_download',
        'proxies',
        'token',
        'cache_dir',
        'local_files_only',
        'revision',
        'strict',
        'kwargs',
    ],
    'PreTrainedPolicy._load_as_safetensor': [
        'model',
        'model_file',
        'map_location',
        'strict',
    ],
    'PreTrainedPolicy.select_action': ['self', 'batch', 'kwargs'],
    'PreTrainedPolicy.predict_action_chunk': ['self', 'batch', 'kwargs'],
    'factory.make_policy': ['cfg', 'ds_meta', 'env_cfg', 'rename_map'],
    'factory.make_pre_post_processors': [
        'policy_cfg',
        'pretrained_path',
        'pretrained_revision',
        'kwargs',
    ],
    'resolve_delta_timestamps': ['cfg', 'ds_meta'],
    'euler_integrate': [
        'denoise_fn',
        'noise',
        'num_steps',
        'rtc_processor',
        'rtc_enabled',
        'inference_delay',
        'prev_chunk_left_over',
        'execution_horizon',
    ],
    'RTCConfig': [
        'enabled',
        'prefix_attention_schedule',
        'max_guidance_weight',
        'execution_horizon',
        'debug',
        'debug_maxlen',
    ],
}


def test_lerobots_signatures_are_those_we_know():
    from lerobot.datasets.factory import resolve_delta_timestamps
    from lerobot.policies import factory
    from lerobot.policies.common.flow_matching import euler_integrate
    from lerobot.policies.pretrained import PreTrainedPolicy
    from lerobot.policies.rtc.configuration_rtc import RTCConfig

    here = {
        f'PreTrainedPolicy.{n}': getattr(PreTrainedPolicy, n)
        for n in (
            'save_pretrained',
            'from_pretrained',
            '_load_as_safetensor',
            'select_action',
            'predict_action_chunk',
        )
    }
    here |= {
        'factory.make_policy': factory.make_policy,
        'factory.make_pre_post_processors': factory.make_pre_post_processors,
        'resolve_delta_timestamps': resolve_delta_timestamps,
        'euler_integrate': euler_integrate,
        'RTCConfig': RTCConfig,
    }
    import lerobot

    for name, want in KNOWN.items():
        have = list(inspect.signature(here[name]).parameters)
        assert have == want, (
            f"LeRobot {lerobot.__version__}: {name} takes {have}, HALO was written for"
            f" {want}; read what changed there, adapt HALO, then this list"
        )


def test_a_run_that_cannot_begin_is_one_line(tmp_path, capsys):
    import halo.train.scale as S

    record(tmp_path / 'data', state=14, action=14)
    run = tmp_path / 'run.yaml'
    run.write_text(
        json.dumps(
            dict(
                data=dict(root=str(tmp_path / 'data')),
                out=str(tmp_path / 'out'),
                policy=SMALL,
                run=dict(steps=1),
            )
        )
    )
    assert S.main([str(run), '--device', 'cpu']) == 1
    assert (
        capsys.readouterr()
        .err.strip()
        .endswith(
            'set --policy.max_state_dim=14 for a new policy (a trained one cannot grow)'
        )
    )
    assert (
        S.main([str(tmp_path / 'none.yaml')]) == 1
        and 'none.yaml' in capsys.readouterr().err
    )


def test_three_numbers_are_no_moments_of_a_one_number_state(tmp_path):
    """A rollout's state of another length is refused, also where the policy's has one
    number.
    """
    record(tmp_path / 'data', state=1)
    policy, pre, _ = loaded(made(tmp_path / 'data'))
    with pytest.raises(
        ValueError,
        match=r"'observation.state' has shape \(1, 3\); the policy reads \(batch, 1\)",
    ):
        policy.select_action(pre(robot(policy, **{OBS_STATE: torch.zeros(3)})))


def test_a_run_file_that_is_no_yaml_is_named(tmp_path):
    import halo.train.scale as S

    (tmp_path / 'broken.yaml').write_text('data: {root: [')
    with pytest.raises(ValueError, match='broken.yaml is not YAML'):
        S.read_config(tmp_path / 'broken.yaml')
