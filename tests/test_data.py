"""Histories of LeRobot datasets: what a killed build leaves, images instead of video, a
part of the episodes, worker processes.
"""

import contextlib
import itertools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from halo.data.history import (
    EpisodeSampler,
    FrameStore,
    HistoryDataset,
    View,
    check_dataset,
    depth_cameras,
    fingerprint,
    near_dataset,
    partial_root,
    split_episodes,
)
from halo.method.config import preset
from halo.method.sampling import downsample, history_ticks, resize_view

TOP, HAND = 'observation.images.top', 'observation.images.wrist_cam'
ROLES = {TOP: 'primary', HAND: 'wrist'}
LENGTHS = (13, 17, 12)
CFG = preset(
    'tiny',
    chunk=12,
    sampling__history_frames=3,
    sampling__history_stride=2,
    sampling__history_size=28,
    sampling__view_size=56,
    sampling__wrist_size=28,
)


def record(root, lengths=LENGTHS, video=True, tasks=('push', 'lift')):
    from lerobot.configs.video import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    kind, shapes = 'video' if video else 'image', {TOP: (64, 80), HAND: (56, 56)}
    features = {
        k: dict(dtype=kind, shape=(*s, 3), names=['height', 'width', 'channels'])
        for k, s in shapes.items()
    }
    features |= {
        'observation.state': dict(dtype='float32', shape=(2,), names=None),
        'action': dict(dtype='float32', shape=(1,), names=None),
    }
    ds = LeRobotDataset.create(
        'halo/test',
        10,
        features,
        root,
        use_videos=video,
        rgb_encoder=RGBEncoderConfig(vcodec='h264', preset='ultrafast'),
    )
    rng = np.random.default_rng(0)
    for e, length in enumerate(lengths):
        for t in range(length):
            frame = {
                k: (
                    np.kron(
                        rng.integers(0, 256, (s[0] // 8, s[1] // 8, 3)), np.ones((8, 8, 1))
                    ).astype(np.uint8)
                )
                for k, s in shapes.items()
            }
            ds.add_frame(
                frame
                | {
                    'observation.state': np.float32([e, t]),
                    'action': np.float32([100 * e + t]),
                    'task': tasks[e % len(tasks)],
                }
            )
        ds.save_episode(parallel_encoding=False)
    ds.finalize()
    return LeRobotDataset('halo/test', root)


@pytest.fixture(scope='module')
def videos(tmp_path_factory):
    return record(tmp_path_factory.mktemp('videos') / 'd')


def assert_right(data, dataset, rows):
    "Samples equal what LeRobot hands out frame by frame."
    s = data.cfg.sampling
    for i in rows:
        got, now = data[i], dataset[i]
        t, ticks = (
            int(now['frame_index']),
            history_ticks(int(now['frame_index']), s.history_frames, s.history_stride),
        )
        assert got['observation.history_mask'].sum() == len(ticks)
        for k, tick in enumerate(ticks, s.history_frames - len(ticks)):
            assert torch.equal(
                got['observation.history'][k],
                downsample(dataset[i - t + tick][TOP], s.history_size),
            )
        assert torch.equal(
            got[TOP], resize_view(now[TOP], 28, s.view_size)
        ) and torch.equal(got[HAND], resize_view(now[HAND], 28, s.wrist_size))
        assert (
            torch.equal(got['observation.state'], now['observation.state'])
            and got['task'] == now['task']
            and got['frame_index'] == t
        )


@pytest.mark.parametrize('video', [True, False])
def test_samples(tmp_path, videos, video):
    dataset = videos if video else record(tmp_path / 'images', video=False)
    data = HistoryDataset(dataset, CFG, ROLES, tmp_path / 'store', progress=False)
    assert_right(data, dataset, (0, 3, 12, 13, 29, 30, 41))
    last = data[12]  # the last tick of the first episode
    assert (
        last['action'].flatten().tolist() == [12.0] * 12
        and last['action_is_pad'].tolist() == [False] + [True] * 11
    )


def test_part_of_the_episodes(tmp_path, videos):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    part = LeRobotDataset('halo/test', videos.root, episodes=[1])
    data = HistoryDataset(part, CFG, ROLES, tmp_path / 'store', progress=False)
    assert len(data) == 17
    assert_right(data, part, (0, 5, 16))
    with pytest.raises(ValueError, match='lacks 2 of the episodes, the first is 0'):
        HistoryDataset(videos, CFG, ROLES, tmp_path / 'store', progress=False)
    with pytest.raises(ValueError, match='no episode 2'):
        HistoryDataset(part, CFG, {TOP: 'primary'}, tmp_path / 'one', episodes=[2])


def test_no_history(tmp_path, videos):
    data = HistoryDataset(
        videos,
        CFG.but(sampling__history_frames=0),
        {TOP: 'primary'},
        tmp_path / 'store',
        progress=False,
    )
    assert data.batch([3, 4])['observation.history'].shape == (
        2,
        0,
        3,
        28,
        28,
    ) and data.batch([3, 4])['observation.history_mask'].shape == (2, 0)


def test_workers(tmp_path, videos):
    data = HistoryDataset(videos, CFG, ROLES, tmp_path / 'store', progress=False)
    sampler, plain = EpisodeSampler(len(data), 8, 1), EpisodeSampler(len(data), 8, 1)
    loader = torch.utils.data.DataLoader(
        data, batch_sampler=sampler, collate_fn=dict, num_workers=1
    )
    for batch, _ in zip(loader, range(2)):
        want = data.batch(next(plain))
        assert batch.keys() == want.keys() and all(
            torch.equal(v, want[k]) if isinstance(v, torch.Tensor) else v == want[k]
            for k, v in batch.items()
        )
    # what a spawned worker receives: the maps are opened there, not copied
    again = pickle.loads(pickle.dumps(data))
    assert len(pickle.dumps(data.store)) < 5000 and torch.equal(again[7][TOP], data[7][TOP])
    saved = sampler.state_dict(step=2)  # the loader has read ahead; two batches were used
    sampler.load_state_dict(saved)
    assert next(sampler) == next(plain)


@pytest.mark.slow
def test_killed_build_continues(tmp_path, videos):
    code = f'''
        import os, halo.data.history as d
        from halo.data.history import *
        calls, write = [], d.write_episode
        def die(*args):
            calls.append(1)
            if len(calls) > 2: os._exit(9)
            write(*args)
        d.write_episode = die
        sizes, to = {{'{TOP}': 28}}, {str(tmp_path / 'store')!r}
        FrameStore.build({str(videos.root)!r}, sizes, to, workers=1, progress=False)
    '''
    assert (
        subprocess.run(
            [sys.executable, '-c', textwrap.dedent(code)],
            env=os.environ | {'OMP_NUM_THREADS': '1'},
        ).returncode
        == 9
    )
    root = tmp_path / 'store'
    assert not root.exists() and (partial_root(root) / 'done.txt').read_text().split() == [
        TOP,
        '0',
        TOP,
        '1',
    ]
    with pytest.raises(ValueError, match='which continues the unfinished one'):
        FrameStore.open(root, videos, {TOP: 28})
    store = FrameStore.build(videos, {TOP: 28}, root, progress=False)
    assert not partial_root(root).exists()
    assert all(
        torch.equal(store[TOP][i], downsample(videos[i][TOP], 28))
        for i in range(len(videos))
    )


def test_refused_stores(tmp_path, videos):
    root, sizes = tmp_path / 'store', {TOP: View(28, 56)}
    FrameStore.build(videos, sizes, root, progress=False)
    for change, why in [
        (dict(format=0), 'format'),
        (dict(fingerprint='0'), 'with fingerprint 0 '),
        (dict(resizing=[9] * 64), 'another way of resizing'),
    ]:
        text = (root / 'store.json').read_text()
        (root / 'store.json').write_text(json.dumps(json.loads(text) | change))
        with pytest.raises(ValueError, match=why):
            FrameStore.open(root, videos, sizes)
        (root / 'store.json').write_text(text)
    os.truncate(root / f'{TOP}.u8', 10)
    with pytest.raises(ValueError, match='has 10 bytes instead of'):
        FrameStore.build(videos, sizes, root, progress=False)


def test_broken_video(tmp_path, videos):
    shutil.copytree(videos.root, tmp_path / 'd')
    file = next((tmp_path / 'd/videos').rglob('*.mp4'))
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(
        ValueError, match=r'\.mp4 does not give frames 0 to .* download or record it again'
    ):
        FrameStore.build(
            tmp_path / 'd', {TOP: 28, HAND: 28}, tmp_path / 'store', progress=False
        )
    assert not (tmp_path / 'store').exists() and fingerprint(tmp_path / 'd') != fingerprint(
        videos
    )


@pytest.mark.parametrize('fraction', [-0.1, 1.0, 0.9])
def test_split_refuses(videos, fraction):
    with pytest.raises(ValueError, match='fraction'):
        split_episodes(videos, fraction, 0)


def test_unfinished_recording(tmp_path, videos):
    (tmp_path / 'd/meta').mkdir(parents=True)
    (tmp_path / 'd/meta/info.json').write_text(
        (Path(videos.root) / 'meta/info.json').read_text()
    )
    with pytest.raises(ValueError, match=r'no finished episode .* finalize\(\)'):
        check_dataset(tmp_path / 'd', roles={TOP: 'primary'})


# What a robot's own data brings: names that mislead, depth, stamps that jitter, episodes of
# one frame, disks that cannot be written.
IMG, FAST = 'observation.images.', dict(vcodec='h264', preset='ultrafast')
SMALL = dict(
    preset='tiny',
    history_frames=2,
    history_stride=2,
    chunk_size=6,
    n_action_steps=4,
    device='cpu',
)
NAMES = {
    IMG + 'wrist_front': (60, 84),
    IMG + 'front_wrist': (96, 64),
    IMG + 'primary_hand': (84, 112),
}


def robot(
    root, cameras, lengths=(9, 7), depth=None, state=3, flagged=True, fps=10, as_video=True
):
    """A LeRobot dataset with `cameras` {key: (h, w)} and a depth map `front_depth` in 'mm'
    or 'm', (h, w, 1).
    """
    from lerobot.configs.video import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    kind, rng = 'video' if as_video else 'image', np.random.default_rng(0)
    features = {
        k: dict(dtype=kind, shape=(*hw, 3), names=['height', 'width', 'channels'])
        for k, hw in cameras.items()
    }
    if depth:
        features[IMG + 'front_depth'] = dict(
            dtype=kind, shape=(60, 84, 1), names=['height', 'width', 'channels']
        )
    if depth and flagged:
        features[IMG + 'front_depth']['info'] = {'is_depth_map': True}
    features |= {
        'observation.state': dict(dtype='float32', shape=(state,), names=None),
        'action': dict(dtype='float32', shape=(2,), names=None),
    }
    ds = LeRobotDataset.create(
        'halo/robot',
        fps,
        features,
        root,
        use_videos=as_video,
        rgb_encoder=RGBEncoderConfig(**FAST),
    )
    scene = {
        k: rng.integers(0, 256, (-(-h // 8), -(-w // 8) + 32, 3))
        for k, (h, w) in cameras.items()
    }
    for length in lengths:
        for t in range(length):
            frame = {
                k: (
                    np.kron(scene[k][:, t : t + -(-w // 8)], np.ones((8, 8, 1)))[
                        :h, :w
                    ].astype(np.uint8)
                )
                for k, (h, w) in cameras.items()
            }
            away = np.full((60, 84, 1), 700 + 10 * t) + np.arange(84)[None, :, None]
            if depth:
                frame[IMG + 'front_depth'] = (
                    away.astype(np.uint16)
                    if depth == 'mm'
                    else (away / 1000).astype(np.float32)
                )
            ds.add_frame(
                frame
                | {
                    'observation.state': rng.normal(size=state).astype(np.float32),
                    'action': rng.normal(size=2).astype(np.float32),
                    'task': 'push',
                }
            )
        ds.save_episode(parallel_encoding=False)
    ds.finalize()
    return LeRobotDataset('halo/robot', root)


def assignments(keys):
    "Every way to give one to three cameras their roles: {key: role}, primary first."
    for n in range(1, len(keys) + 1):
        for some in itertools.combinations(keys, n):
            for first in some:
                rest = [k for k in some if k != first]
                for roles in itertools.product(('secondary', 'wrist'), repeat=len(rest)):
                    yield {first: 'primary'} | dict(zip(rest, roles))


@pytest.fixture(scope='module')
def unlike(tmp_path_factory):
    return robot(tmp_path_factory.mktemp('unlike') / 'd', NAMES)


@pytest.mark.parametrize(
    'roles',
    list(assignments(list(NAMES))),
    ids=lambda r: '-'.join(f'{k[len(IMG) :]}.{v}' for k, v in r.items()),
)
def test_training_sees_what_a_rollout_sees(unlike, tmp_path, roles):
    """Row d: whatever the cameras are called, HALO's dataset, LeRobot's delta timestamps
    and a rollout give the policy the same pixels.
    """
    from lerobot.configs import FeatureType
    from lerobot.datasets.factory import resolve_delta_timestamps
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from lerobot.utils.feature_utils import dataset_to_policy_features

    from halo.policy.configuration_halo import HaloConfig
    from halo.policy.modeling_halo import HaloPolicy
    from halo.policy.processor_halo import make_halo_pre_post_processors

    feats = {
        k: f
        for k, f in dataset_to_policy_features(unlike.meta.features).items()
        if k in roles or 'images' not in k
    }
    model = CFG.but(chunk=6, sampling__fps=10.0)
    cfg = HaloConfig(
        model=model,
        n_action_steps=4,
        device='cpu',
        camera_roles=roles,
        input_features={k: f for k, f in feats.items() if f.type is not FeatureType.ACTION},
        output_features={'action': feats['action']},
    )
    assert cfg.roles == roles
    with torch.device('meta'):
        policy = HaloPolicy(cfg, load_vlm=False)
    pre, _ = make_halo_pre_post_processors(cfg, unlike.meta.stats)
    # the first tick, one with a whole history, the last; in the second episode
    rows = [0, 5, 8, 12]
    data = HistoryDataset(unlike, model, cfg.roles, tmp_path / 'store', progress=False)
    ours = policy.observation(
        pre(
            {
                k: v
                for k, v in data.batch(rows).items()
                if k not in ('episode_index', 'frame_index')
            }
        )
    )
    theirs = LeRobotDataset(
        'halo/robot',
        unlike.root,
        delta_timestamps=resolve_delta_timestamps(cfg, unlike.meta),
    )
    delta = policy.observation(
        pre(torch.utils.data.default_collate([theirs[i] for i in rows]))
    )
    rollouts = {}
    for a, z in data.bounds:
        policy.reset()
        for row in range(a, z):
            seen = pre(
                {
                    k: v
                    for k, v in unlike[row].items()
                    if k.startswith('observation') or k == 'task'
                }
            )
            rollouts[row] = policy.observation(
                seen, policy.history(policy.observe(seen, row - int(a)))
            )
    limit = {'primary': 56, 'secondary': 56, 'wrist': 28}
    assert [max(v.shape[-2:]) for v in ours.views] == [limit[r] for r in roles.values()]
    for i, row in enumerate(rows):
        for x in (delta, rollouts[row]):
            k = i if x is delta else 0
            assert [v.shape[1:] for v in x.views] == [
                v.shape[1:] for v in ours.views
            ] and x.history.shape[1:] == ours.history.shape[1:]
            assert all(
                torch.equal(v[k], w[i]) for v, w in zip(x.views, ours.views)
            ) and torch.equal(x.history_mask[k], ours.history_mask[i])
            there = ours.history_mask[i]
            assert torch.equal(x.history[k][there], ours.history[i][there]) and torch.equal(
                x.view_mask[k], ours.view_mask[i]
            )


def one_step(dataset, out, **more):
    "Train one step of two samples through halo.train.loop; the policy's folder."
    from halo.train.loop import TrainConfig, train

    return train(
        dataset,
        out,
        TrainConfig(steps=1, batch=2, warmup=0),
        store=out.parent / f'{out.name}-store',
        progress=False,
        **SMALL | more,
    )


def run_file(folder, dataset, **data):
    "A file for halo.train.scale that trains one step on `dataset`."
    import yaml

    policy = {k: v for k, v in SMALL.items() if k != 'device'}
    c = dict(
        data=dict(
            root=str(dataset.root), repo_id=dataset.repo_id, store=str(folder / 'frames')
        )
        | data,
        policy=policy,
        run=dict(steps=1, micro=2, accumulate=1, warmup=0),
        out=str(folder / 'run'),
    )
    (folder / 'run.yaml').write_text(yaml.safe_dump(c))
    return str(folder / 'run.yaml')


@pytest.mark.parametrize(
    'depth, flagged, as_video',
    [
        ('mm', True, True),
        ('m', True, True),
        ('mm', True, False),
        ('m', True, False),
        ('mm', False, False),
    ],
)
def test_depth_is_left_out_by_name(tmp_path, caplog, depth, flagged, as_video):
    """Row h: a depth map is no camera; the sentence names it before the first step, and the
    policy does not ask for it.
    """
    from halo.train.scale import dry_run

    dataset = robot(
        tmp_path / 'd',
        {IMG + 'front': (60, 84)},
        depth=depth,
        flagged=flagged,
        as_video=as_video,
    )
    assert depth_cameras(dataset.meta) == [IMG + 'front_depth'] and (
        not flagged or dataset.meta.depth_keys == [IMG + 'front_depth']
    )
    folder = one_step(dataset, tmp_path / 'out')
    said = [r.message for r in caplog.records if r.name == 'halo.data.history']
    assert said == [
        "camera 'observation.images.front_depth' of dataset halo/robot is a depth map (60 x"
        " 84 x 1): HALO reads colour pictures and leaves it out"
    ], said
    assert [
        k
        for k in json.loads((folder / 'config.json').read_text())['input_features']
        if 'images' in k
    ] == [IMG + 'front']
    found = {n: (ok, text) for n, ok, text in dry_run(run_file(tmp_path, dataset))}
    assert all(ok for ok, _ in found.values()) and said[0] in found['episodes'][1], found
    with pytest.raises(
        ValueError,
        match=(
            r"camera 'observation.images.front_depth' of dataset halo/robot is a depth map;"
            r" name an RGB camera instead: observation.images.front$"
        ),
    ):
        HistoryDataset(
            dataset,
            CFG,
            {IMG + 'front': 'primary', IMG + 'front_depth': 'secondary'},
            tmp_path / 's',
            progress=False,
        )


def jitter(root, seconds, seed=0):
    """Move every time stamp of the dataset in `root` by up to `seconds`, one by exactly
    that.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(seed)
    for file in Path(root).glob('data/*/*.parquet'):
        table = pq.read_table(file)
        at = table.column_names.index('timestamp')
        shift = rng.uniform(-seconds, seconds, len(table)) * 0.9
        shift[3] = seconds
        table = table.set_column(
            at,
            table.schema.field(at),
            pa.array((table['timestamp'].to_numpy() + shift).astype(np.float32)),
        )
        pq.write_table(table, file)
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    return lambda **kw: LeRobotDataset('halo/robot', root, **kw)


def test_the_datasets_tolerance_counts(unlike, tmp_path, capsys):
    """Row j: stamps off by up to 4 ms train under tolerance_s=0.01 in every path, to the
    very pixels of exact stamps; beyond it the sentence says how far off.
    """
    from halo.data.mixture import DatasetSpec, Member
    from halo.data.mixture import main as mixture_main
    from halo.train.scale import dry_run, main

    shutil.copytree(unlike.root, tmp_path / 'd')
    opened = jitter(tmp_path / 'd', 0.004)
    roles = dict(zip(NAMES, ('primary', 'wrist', 'secondary')))
    cfg, model = dict(SMALL, camera_roles=roles), CFG.but(chunk=6, sampling__fps=10.0)
    want = HistoryDataset(unlike, model, roles, tmp_path / 'exact', progress=False).batch(
        range(16)
    )
    got = HistoryDataset(
        opened(tolerance_s=0.01), model, roles, tmp_path / 's1', progress=False
    ).batch(range(16))
    path = HistoryDataset(
        tmp_path / 'd', model, roles, tmp_path / 's2', tolerance_s=0.01, progress=False
    ).batch(range(16))
    for b in (got, path):
        assert all(
            torch.equal(b[k], want[k])
            for k in ('observation.history', 'observation.history_mask', *roles)
        )
    one_step(opened(tolerance_s=0.01), tmp_path / 'own', **cfg)
    one_step(opened(), tmp_path / 'given', tolerance_s=0.01, **cfg)
    why = (
        r"frame 3 of episode 0 in dataset \S+ is stamped 0\.3040 s, 4\.0 ms from the"
        r" nearest picture in videos/\S+\.mp4, more than tolerance_s=0\.0001; "
        r"where that is how it was recorded, give tolerance_s=0\.005 \(to LeRobotDataset,"
        r" train or HistoryDataset; as data\.tolerance_s in a run file\), else record it"
        r" again$"
    )
    for refused in (
        lambda: one_step(opened(), tmp_path / 'no', **cfg),
        lambda: HistoryDataset(
            tmp_path / 'd', model, roles, tmp_path / 'no2', progress=False
        ),
        lambda: FrameStore.build(
            opened(), {k: 28 for k in roles}, tmp_path / 'no3', progress=False
        ),
    ):
        with pytest.raises(ValueError, match=why):
            refused()

    # a run's file
    def policy(file):
        (text := Path(file).read_text())
        Path(file).write_text(
            text.replace('policy:', f'policy:\n  camera_roles: {json.dumps(roles)}')
        )
        return file

    file = policy(run_file(tmp_path, unlike, root=str(tmp_path / 'd')))
    assert [n for n, ok, text in dry_run(file) if not ok] == ['episodes'] and dict(
        (n, t) for n, _, t in dry_run(file)
    )['episodes'].endswith('else record it again')
    file = policy(run_file(tmp_path, unlike, root=str(tmp_path / 'd'), tolerance_s=0.01))
    assert all(ok for _, ok, _ in dry_run(file)) and main([file, '--device', 'cpu']) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])['step'] == 1
    with pytest.raises(ValueError, match="tolerance_s='much' must be a positive number"):
        HistoryDataset(tmp_path / 'd', model, roles, tmp_path / 'no4', tolerance_s='much')
    # a mixture
    spec = DatasetSpec(
        str(tmp_path / 'd'),
        dict(zip(('primary', 'wrist', 'secondary'), NAMES)),
        state_norm='mean_std',
        action_norm='mean_std',
    )
    spec = replace(
        spec,
        action_space=replace(
            spec.action_space, frame='joint', rotation='none', gripper='none', arms=1
        ),
    )
    with pytest.raises(ValueError, match=why):
        Member(spec, model, frames=False, progress=False)
    frames, mask = Member(
        spec, model, store_root=tmp_path / 'm', tolerance_s=0.01, progress=False
    ).history(np.arange(16))
    assert torch.equal(frames, want['observation.history']) and torch.equal(
        mask, want['observation.history_mask']
    )
    (tmp_path / 'm.yaml').write_text(
        f'datasets:\n  - id: {tmp_path}/d\n    cameras: {json.dumps(spec.cameras)}\n   '
        ' state_norm: mean_std\n    action_norm: mean_std\n    action_space: {frame:'
        ' joint, rotation: none, gripper: none}\n'
    )
    check = ['check', str(tmp_path / 'm.yaml'), '--preset', 'tiny', '--quiet']
    assert mixture_main(check) == 1 and mixture_main([*check, '--tolerance-s', '0.01']) == 0
    assert (
        'give tolerance_s=0.005' in (out := capsys.readouterr().out)
        and '2 episodes, 16 frames' in out
    )


def test_a_stamp_without_a_picture_is_not_excused(unlike, tmp_path):
    shutil.copytree(unlike.root, tmp_path / 'd')
    opened = jitter(tmp_path / 'd', 0.4)
    with pytest.raises(
        ValueError,
        match=(
            r'from the nearest picture in .*the picture is missing: download or record it'
            r' again$'
        ),
    ):
        check_dataset(opened(tolerance_s=0.01), roles={next(iter(NAMES)): 'primary'})


def test_episodes_of_one_frame_train(tmp_path, caplog, capsys):
    """Row k: a short episode is padded, masked and said, in both training paths and the dry
    run; `allow_short=False` refuses it in each.
    """
    from halo.data.mixture import DatasetSpec, Member
    from halo.train.scale import dry_run, main

    dataset = robot(tmp_path / 'd', {IMG + 'front': (56, 56)}, lengths=(1, 1, 8))
    said = (
        '2 of 3 episodes of dataset halo/robot are shorter than the chunk of 6 (the'
        ' shortest has 1 tick): the steps that they lack are padded and masked in the loss'
    )
    why = (
        r'episode 0 of dataset \S+ has 1 ticks, fewer than the chunk of 6; lower'
        r' chunk_size, drop the episode '
        r'\(lerobot-edit-dataset --operation.type delete_episodes\), or give'
        r' allow_short=True to pad it with masked steps'
    )
    folder = one_step(dataset, tmp_path / 'out')
    assert [r.message for r in caplog.records if r.name == 'halo.data.history'] == [
        said
    ] and (folder / 'model.safetensors').is_file()
    with pytest.raises(ValueError, match=why):
        one_step(dataset, tmp_path / 'no', allow_short=False)
    found = {n: (ok, text) for n, ok, text in dry_run(run_file(tmp_path, dataset))}
    assert (
        found['episodes'] == (True, f'10 frames; {said}')
        and not (tmp_path / 'frames').exists()
    )
    assert main([run_file(tmp_path, dataset), '--device', 'cpu']) == 0 and np.isfinite(
        json.loads(capsys.readouterr().out.splitlines()[-1])['loss']
    )
    refused = {
        n: text
        for n, ok, text in dry_run(run_file(tmp_path, dataset, allow_short=False))
        if not ok
    }
    assert list(refused) == ['episodes'] and re.match(why, refused['episodes']), refused
    assert main(
        [run_file(tmp_path, dataset, allow_short=False), '--device', 'cpu']
    ) == 1 and re.match(why, capsys.readouterr().err.splitlines()[-1])
    spec = DatasetSpec(
        str(tmp_path / 'd'),
        {'primary': IMG + 'front'},
        state_norm='identity',
        action_norm='identity',
    )
    spec = replace(
        spec,
        action_space=replace(
            spec.action_space, frame='joint', rotation='none', gripper='none'
        ),
    )
    model = CFG.but(chunk=6, sampling__fps=10.0)
    assert len(Member(spec, model, frames=False, progress=False)) == 10
    with pytest.raises(ValueError, match=why):
        Member(spec, model, frames=False, progress=False, allow_short=False)


def test_only_episodes_of_one_frame_train(tmp_path):
    "Every sample has one real step, and the loss is that step's alone."
    from halo.train.loop import make_policy, preprocess
    from halo.train.scale import flow_draws, value_losses

    dataset = robot(tmp_path / 'd', {IMG + 'front': (56, 56)}, lengths=(1, 1))
    policy, pre, _ = make_policy(dataset, **SMALL)
    data = HistoryDataset(
        dataset, policy.config.model, policy.config.roles, tmp_path / 's', progress=False
    )
    batch = preprocess(pre, data.batch([0, 1]))
    assert (
        batch['action_is_pad'].tolist() == [[False] + [True] * 5] * 2
        and not batch['observation.history_mask'].any()
    )
    batch['action'] = batch['action'].clone().requires_grad_()
    noise, time = flow_draws(policy.config.model, 0, 0, range(2))
    policy.eval()  # no gate is drawn
    loss, _ = policy(batch, noise=noise.clone(), time=time)
    loss.backward()
    assert torch.isfinite(loss) and (batch['action'].grad[:, 0] != 0).any()
    assert all(
        torch.isfinite(p.grad).all() for p in policy.parameters() if p.grad is not None
    )
    square, mask, _ = value_losses(policy, batch, noise, time)
    # two samples, one step of two numbers
    assert (
        mask.sum() == 4
        and (square[:, 1:] == 0).all()
        and torch.allclose(square.sum() / 4, loss)
    )


@contextlib.contextmanager
def read_only(folder):
    """`folder` belongs to somebody else who lets us look: permissions bite root too once it
    has given up its rights.
    """
    for p in [folder, *Path(folder).rglob('*')]:
        p.chmod(0o555 if p.is_dir() else 0o444)
    rights = os.geteuid() == 0
    if rights:
        os.seteuid(65534)
    try:
        yield
    finally:
        if rights:
            os.seteuid(0)
        for p in [folder, *Path(folder).rglob('*')]:
            p.chmod(0o755 if p.is_dir() else 0o644)


@pytest.fixture
def shelf():
    """A folder that every user can enter: {shelf}/disk, and a cache {shelf}/cache that
    everybody can write.
    """
    with tempfile.TemporaryDirectory() as d:
        for name, mode in (('', 0o755), ('disk', 0o755), ('cache', 0o777)):
            (Path(d) / name).mkdir(exist_ok=True)
            (Path(d) / name).chmod(mode)
        yield Path(d)


def test_a_dataset_on_a_read_only_disk(unlike, shelf, monkeypatch, caplog):
    """The frame store and a mixture's statistics go to the cache with a sentence; nothing
    is written on the disk; what is finished there is read.
    """
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    from halo.data.mixture import DatasetSpec, Member

    model = CFG.but(chunk=6, sampling__fps=10.0)
    disk, cache = shelf / 'disk', shelf / 'cache'
    shutil.copytree(unlike.root, disk / 'd')
    dataset = LeRobotDataset('halo/robot', disk / 'd')
    roles = {k: 'primary' for k in list(NAMES)[:1]}
    listing = lambda: {
        p: (p.stat().st_mtime_ns, p.stat().st_size) for p in disk.rglob('*') if p.is_file()
    }
    monkeypatch.setenv('HALO_CACHE', str(cache))
    before = listing()
    spec = DatasetSpec(
        str(disk / 'd'),
        {'primary': list(NAMES)[0]},
        state_norm='mean_std',
        action_norm='mean_std',
    )
    spec = replace(
        spec,
        action_space=replace(
            spec.action_space, frame='joint', rotation='none', gripper='none'
        ),
    )
    monkeypatch.setattr('halo.data.mixture.open_dataset', lambda *a: dataset)
    with read_only(disk):
        data = HistoryDataset(dataset, model, roles, progress=False)
        assert (
            data.store.root.is_relative_to(cache) and data[3][list(NAMES)[0]].shape[0] == 3
        )
        # found there, not built again
        again = HistoryDataset(dataset, model, roles, progress=False)
        assert again.store.root == data.store.root
        Member(spec, model, progress=False)
        with pytest.raises(
            ValueError, match='frame store .*mine cannot be written; name another folder'
        ):
            FrameStore.build(dataset, {list(NAMES)[0]: 28}, disk / 'mine', progress=False)
    assert listing() == before and sorted(p.name for p in disk.iterdir()) == ['d']
    said = [
        r.message
        for r in caplog.records
        if r.name == 'halo.data.history' and 'written' in r.message
    ]
    assert (
        said[0]
        == f'{disk} cannot be written: the frames of dataset halo/robot are kept in {cache}'
        ' (set HALO_CACHE to choose another folder)'
    )
    assert (
        any('the statistics of dataset' in s for s in said)
        and len(list(cache.glob('*.statistics/*.json'))) == 1
    )
    monkeypatch.setenv('HALO_CACHE', str(disk / 'cache'))
    with (
        read_only(disk),
        pytest.raises(
            ValueError,
            match=(
                'can be written neither beside it .* set HALO_CACHE to a folder that can be'
                ' written'
            ),
        ),
    ):
        HistoryDataset(dataset, model, roles, progress=False)
    # built beside the dataset once it can be
    near = HistoryDataset(dataset, model, roles, progress=False).store.root
    assert near.parent == disk / 'd.frames'
    with read_only(disk):
        assert HistoryDataset(dataset, model, roles, progress=False).store.root == near


def test_where_the_cache_is(monkeypatch, tmp_path):
    from halo.data.history import cache_folder

    monkeypatch.setenv('HALO_CACHE', str(tmp_path / 'own'))
    assert cache_folder() == tmp_path / 'own'
    monkeypatch.delenv('HALO_CACHE')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    assert cache_folder() == tmp_path / 'halo'
    monkeypatch.delenv('XDG_CACHE_HOME')
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    assert cache_folder() == tmp_path / 'home/.cache/halo'


def test_a_dataset_named_by_the_folder_one_stands_in(unlike, monkeypatch):
    monkeypatch.chdir(unlike.root)
    meta = type('Meta', (), dict(root=Path('.'), repo_id='r'))
    assert (
        near_dataset(meta, 'frames', 'x')
        == unlike.root.with_name(f'{unlike.root.name}.frames') / 'x'
    )
