"Histories of LeRobot datasets: what a killed build leaves, images instead of video, a part of the episodes, worker processes."
import json, os, pickle, shutil, subprocess, sys, textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from halo.config import preset
from halo.data import EpisodeSampler, FrameStore, HistoryDataset, View, check_dataset, fingerprint, partial_root, split_episodes
from halo.sampling import downsample, history_ticks, resize_view

TOP, HAND = 'observation.images.top', 'observation.images.wrist_cam'
LENGTHS = (13, 17, 12)
CFG = preset('tiny', chunk=12, sampling__history_frames=3, sampling__history_stride=2, sampling__history_size=28, sampling__view_size=56, sampling__wrist_size=28)


def record(root, lengths=LENGTHS, video=True, tasks=('push', 'lift')):
    from lerobot.configs.video import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    kind, shapes = 'video' if video else 'image', {TOP: (64, 80), HAND: (56, 56)}
    features = {k: dict(dtype=kind, shape=(*s, 3), names=['height', 'width', 'channels']) for k, s in shapes.items()}
    features |= {'observation.state': dict(dtype='float32', shape=(2,), names=None), 'action': dict(dtype='float32', shape=(1,), names=None)}
    ds = LeRobotDataset.create('halo/test', 10, features, root, use_videos=video, rgb_encoder=RGBEncoderConfig(vcodec='h264', preset='ultrafast'))
    rng = np.random.default_rng(0)
    for e, length in enumerate(lengths):
        for t in range(length):
            frame = {k: np.kron(rng.integers(0, 256, (s[0] // 8, s[1] // 8, 3)), np.ones((8, 8, 1))).astype(np.uint8) for k, s in shapes.items()}
            ds.add_frame(frame | {'observation.state': np.float32([e, t]), 'action': np.float32([100*e + t]), 'task': tasks[e % len(tasks)]})
        ds.save_episode(parallel_encoding=False)
    ds.finalize()
    return LeRobotDataset('halo/test', root)


@pytest.fixture(scope='module')
def videos(tmp_path_factory): return record(tmp_path_factory.mktemp('videos')/'d')


def assert_right(data, dataset, rows):
    "Samples equal what LeRobot hands out frame by frame."
    s = data.cfg.sampling
    for i in rows:
        got, now = data[i], dataset[i]
        t, ticks = int(now['frame_index']), history_ticks(int(now['frame_index']), s.history_frames, s.history_stride)
        assert got['observation.history_mask'].sum() == len(ticks)
        for k, tick in enumerate(ticks, s.history_frames - len(ticks)):
            assert torch.equal(got['observation.history'][k], downsample(dataset[i - t + tick][TOP], s.history_size))
        assert torch.equal(got[TOP], resize_view(now[TOP], 28, s.view_size)) and torch.equal(got[HAND], resize_view(now[HAND], 28, s.wrist_size))
        assert torch.equal(got['observation.state'], now['observation.state']) and got['task'] == now['task'] and got['frame_index'] == t


@pytest.mark.parametrize('video', [True, False])
def test_samples(tmp_path, videos, video):
    dataset = videos if video else record(tmp_path/'images', video=False)
    data = HistoryDataset(dataset, CFG, TOP, [TOP, HAND], tmp_path/'store', progress=False)
    assert_right(data, dataset, (0, 3, 12, 13, 29, 30, 41))
    last = data[12]                                   # the last tick of the first episode
    assert last['action'].flatten().tolist() == [12.] * 12 and last['action_is_pad'].tolist() == [False] + [True] * 11


def test_part_of_the_episodes(tmp_path, videos):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    part = LeRobotDataset('halo/test', videos.root, episodes=[1])
    data = HistoryDataset(part, CFG, TOP, [TOP, HAND], tmp_path/'store', progress=False)
    assert len(data) == 17
    assert_right(data, part, (0, 5, 16))
    with pytest.raises(ValueError, match='lacks 2 of the episodes, the first is 0'):
        HistoryDataset(videos, CFG, TOP, [TOP, HAND], tmp_path/'store', progress=False)
    with pytest.raises(ValueError, match='no episode 2'): HistoryDataset(part, CFG, TOP, [TOP], episodes=[2])


def test_no_history(tmp_path, videos):
    data = HistoryDataset(videos, CFG.but(sampling__history_frames=0), TOP, [TOP], tmp_path/'store', progress=False)
    assert data.batch([3, 4])['observation.history'].shape == (2, 0, 3, 28, 28) and data.batch([3, 4])['observation.history_mask'].shape == (2, 0)


def test_workers(tmp_path, videos):
    data = HistoryDataset(videos, CFG, TOP, [TOP, HAND], tmp_path/'store', progress=False)
    sampler, plain = EpisodeSampler(len(data), 8, 1), EpisodeSampler(len(data), 8, 1)
    loader = torch.utils.data.DataLoader(data, batch_sampler=sampler, collate_fn=dict, num_workers=1)
    for batch, _ in zip(loader, range(2)):
        want = data.batch(next(plain))
        assert batch.keys() == want.keys() and all(torch.equal(v, want[k]) if isinstance(v, torch.Tensor) else v == want[k] for k, v in batch.items())
    again = pickle.loads(pickle.dumps(data))          # what a spawned worker receives: the maps are opened there, not copied
    assert len(pickle.dumps(data.store)) < 5000 and torch.equal(again[7][TOP], data[7][TOP])
    saved = sampler.state_dict(step=2)                # the loader has read ahead; two batches were used
    sampler.load_state_dict(saved)
    assert next(sampler) == next(plain)


@pytest.mark.slow
def test_killed_build_continues(tmp_path, videos):
    code = f'''
        import os, halo.data as d
        from halo.data import *
        calls, write = [], d.write_episode
        def die(*args):
            calls.append(1)
            if len(calls) > 2: os._exit(9)
            write(*args)
        d.write_episode = die
        FrameStore.build({str(videos.root)!r}, {{'{TOP}': 28}}, {str(tmp_path/'store')!r}, workers=1, progress=False)
    '''
    assert subprocess.run([sys.executable, '-c', textwrap.dedent(code)], env=os.environ | {'OMP_NUM_THREADS': '1'}).returncode == 9
    root = tmp_path/'store'
    assert not root.exists() and (partial_root(root)/'done.txt').read_text().split() == [TOP, '0', TOP, '1']
    with pytest.raises(ValueError, match='which continues the unfinished one'): FrameStore.open(root, videos, {TOP: 28})
    store = FrameStore.build(videos, {TOP: 28}, root, progress=False)
    assert not partial_root(root).exists()
    assert all(torch.equal(store[TOP][i], downsample(videos[i][TOP], 28)) for i in range(len(videos)))


def test_refused_stores(tmp_path, videos):
    root, sizes = tmp_path/'store', {TOP: View(28, 56)}
    FrameStore.build(videos, sizes, root, progress=False)
    for change, why in [(dict(format=0), 'format'), (dict(fingerprint='0'), 'with fingerprint 0 '), (dict(resizing=[9]*64), 'another way of resizing')]:
        text = (root/'store.json').read_text()
        (root/'store.json').write_text(json.dumps(json.loads(text) | change))
        with pytest.raises(ValueError, match=why): FrameStore.open(root, videos, sizes)
        (root/'store.json').write_text(text)
    os.truncate(root/f'{TOP}.u8', 10)
    with pytest.raises(ValueError, match='has 10 bytes instead of'): FrameStore.build(videos, sizes, root, progress=False)


def test_broken_video(tmp_path, videos):
    shutil.copytree(videos.root, tmp_path/'d')
    file = next((tmp_path/'d/videos').rglob('*.mp4'))
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ValueError, match=r'\.mp4 does not give frames 0 to .* download or record it again'):
        FrameStore.build(tmp_path/'d', {TOP: 28, HAND: 28}, tmp_path/'store', progress=False)
    assert not (tmp_path/'store').exists() and fingerprint(tmp_path/'d') != fingerprint(videos)


@pytest.mark.parametrize('fraction', [-.1, 1., .9])
def test_split_refuses(videos, fraction):
    with pytest.raises(ValueError, match='fraction'): split_episodes(videos, fraction, 0)


def test_unfinished_recording(tmp_path, videos):
    (tmp_path/'d/meta').mkdir(parents=True)
    (tmp_path/'d/meta/info.json').write_text((Path(videos.root)/'meta/info.json').read_text())
    with pytest.raises(ValueError, match=r'no finished episode .* finalize\(\)'): check_dataset(tmp_path/'d', primary=TOP, cameras=[TOP])
