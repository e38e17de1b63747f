"""`halo check`: every planted fault is found, alone and among all others; nothing is found
in healthy data; whatever the damage, no traceback.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from halo import cli
from halo.train import check
from halo.train.check import Case, examine

FRONT, WRIST = 'observation.images.front', 'observation.images.wrist'
DATA, EPISODES = (f'{k}/chunk-000/file-000.parquet' for k in ('data', 'meta/episodes'))
TASKS = 'meta/tasks.parquet'


def record(root, seconds=(2.4, 2.0, 2.8), fps=10, state=6, action=6):
    from lerobot.configs.video import RGBEncoderConfig

    from halo.data.mixture import record_clock, silent

    with silent():
        record_clock(
            root,
            fps,
            seconds,
            {FRONT: (96, 128), WRIST: (64, 64)},
            state,
            action,
            encoder=RGBEncoderConfig(vcodec='h264', preset='ultrafast'),
        )
    return Path(root)


@pytest.fixture(scope='session')
def base(tmp_path_factory):
    "A healthy dataset: three episodes of 24, 20 and 28 ticks."
    return record(tmp_path_factory.mktemp('check') / 'healthy')


@pytest.fixture(scope='session')
def fast(tmp_path_factory):
    "A healthy dataset with twice the rate, an episode of one frame and one of twelve."
    return record(tmp_path_factory.mktemp('check') / 'fast', (1.2, 1.0, 1.4, 0.05, 0.6), 20)


def halo_check(root, *argv):
    "Exit status of `halo check` and its findings, {code: [finding, …]}."
    out = Path(f'{root}.json')
    status = cli.main(['check', str(root), '--json', str(out), *map(str, argv)])
    found = {}
    for f in json.loads(out.read_text())['findings'] if out.exists() else ():
        found.setdefault(f['code'], []).append(f)
    return status, found


def bad(found):
    "The codes of errors and warnings."
    return {c for c, fs in found.items() if any(f['severity'] != 'note' for f in fs)}


# ---- damage, as it happens to files


def edit(file, change):
    "Damage that rewrites a parquet file through a pandas frame."

    def damage(root):
        table = pq.read_table(root / file).to_pandas()
        new = change(table)
        pq.write_table(pa.Table.from_pandas(table if new is None else new), root / file)

    return damage


def put(column, episode, frames, dims, value):
    """Damage of numbers: `value`, or a function of the old ones; `episode=None` is all of
    them.
    """

    def change(t):
        rows = t.index if episode is None else t.index[t.episode_index == episode]
        for r in rows[frames]:
            x = np.array(t.at[r, column], copy=True)
            x[dims] = value(x[dims]) if callable(value) else value
            t.at[r, column] = x

    return edit(DATA, change)


def cell(column, episode, frames, value):
    "Damage of a column of single numbers."

    def change(t):
        rows = t.index[t.episode_index == episode][frames]
        t.loc[rows, column] = value(t.loc[rows, column]) if callable(value) else value

    return edit(DATA, change)


def restat(root):
    "Statistics of state and action as they are now, so that only the other fault remains."
    t = pq.read_table(root / DATA).to_pandas()

    def change(s):
        for k in check.VECTORS:
            x = np.stack(t[k].to_numpy()).astype(float)
            s[k] = {
                n: getattr(np, f)(x, 0).tolist()
                for n, f in dict(mean='mean', std='std', min='min', max='max').items()
            }
            s[k] |= {
                n: np.quantile(x, q, 0).tolist()
                for n, q in dict(q01=0.01, q99=0.99).items()
            }

    stats(change)(root)


def load_and_save(file, change):
    def damage(root):
        d = json.loads((root / file).read_text())
        change(d)
        (root / file).write_text(json.dumps(d))

    return damage


def stats(change):
    return load_and_save('meta/stats.json', change)


def info(change):
    return load_and_save('meta/info.json', change)


def shape(key, *new):
    return info(lambda d: d['features'][key].update(shape=list(new)))


def video(root, camera=FRONT):
    return next((root / 'videos' / camera).rglob('*.mp4'))


def cut(camera, share):
    return lambda root: os.truncate(
        video(root, camera), int(video(root, camera).stat().st_size * share)
    )


def reencode(camera, change):
    "Damage of pictures: `change` alters the list of frames."

    def damage(root):
        file = video(root, camera)
        with av.open(str(file)) as box:
            rate, frames = (
                box.streams.video[0].average_rate,
                [f.to_ndarray(format='rgb24') for f in box.decode(video=0)],
            )
        change(frames)
        with av.open(str(file), 'w') as box:
            s = box.add_stream(
                'libx264', rate=rate, options=dict(g='2', crf='20', preset='ultrafast')
            )
            s.height, s.width, s.pix_fmt = *frames[0].shape[:2], 'yuv420p'
            for f in frames:
                box.mux(s.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(f))))
            box.mux(s.encode())

    return damage


def hold(frames):  # episode 2 begins at frame 44
    for i in range(50, 68):
        frames[i] = frames[50]


def repeat(frames):
    for i in range(1, len(frames), 2):
        frames[i] = frames[i - 1]


def black(frames):
    for i in range(24):
        frames[i] = 0 * frames[i]


def rename(**new):
    "Damage: cameras whose names do not tell their role."

    def damage(root):
        pairs = {
            f'observation.images.{a}': f'observation.images.{b}' for a, b in new.items()
        }
        for f in ('meta/info.json', 'meta/stats.json'):
            text = (root / f).read_text()
            for a, b in pairs.items():
                text = text.replace(a, b)
            (root / f).write_text(text)

        def column(c):
            return next((c.replace(a, b) for a, b in pairs.items() if a in c), c)

        edit(EPISODES, lambda t: t.rename(columns=column))(root)
        for a, b in pairs.items():
            if (root / 'videos' / a).exists():
                (root / 'videos' / a).rename(root / 'videos' / b)

    return damage


def widen(key, n):
    "Damage: a vector of `n` numbers."

    def damage(root):
        edit(
            DATA,
            lambda t: t.assign(
                **{key: [np.resize(x, n).astype(np.float32) for x in t[key]]}
            ),
        )(root)
        shape(key, n)(root)
        restat(root)

    return damage


def degrees(root):
    "The action is the state, in degrees."
    edit(DATA, lambda t: t.assign(action=[np.rad2deg(x) for x in t['observation.state']]))(
        root
    )


def camera(key, *size, **more):
    "Damage: one more camera in the metadata."
    return info(
        lambda d: d['features'].update(
            {
                key: (
                    dict(
                        dtype='image',
                        shape=list(size),
                        names=['height', 'width', 'channels'],
                    )
                    | more
                )
            }
        )
    )


def extra_rows(t):
    return t._append(t[t.episode_index == 1].tail(2), ignore_index=True)


def stray(t):
    return t._append(
        t[t.episode_index == 1].assign(episode_index=9, index=lambda x: x['index'] + 500),
        ignore_index=True,
    )


def ragged(t):
    t.at[5, 'action'] = np.zeros(4, np.float32)


def no_tasks(root):
    edit(TASKS, lambda t: t.iloc[:0])(root)
    info(lambda d: d.update(total_tasks=0))(root)


def both(*damages):
    def damage(root):
        for d in damages:
            d(root)

    return damage


# name: (damage, what must be found and nothing else, a word that the sentence names, exit
# status)
FAULTS = {
    'primary camera unclear': (
        rename(front='cam_1', wrist='cam_2'),
        {'primary'},
        'cam_1',
        1,
    ),
    'no camera': (
        info(lambda d: [d['features'].pop(k) for k in (FRONT, WRIST)]),
        {'no-camera'},
        'RGB',
        1,
    ),
    'four channels': (shape(WRIST, 64, 64, 4), {'channels'}, WRIST, 1),
    'picture without channels': (shape(WRIST, 64, 64), {'picture-shape'}, '(64, 64)', 1),
    'flat picture': (shape(WRIST, 64, 640, 3), {'shape', 'video-size'}, WRIST, 1),
    'video missing': (lambda r: video(r).unlink(), {'video-missing'}, FRONT, 1),
    'video cut off': (cut(WRIST, 0.5), {'video-cut', 'frames'}, WRIST, 1),
    'no video': (
        lambda r: video(r).write_text('no video'),
        {'video-unreadable', 'frames'},
        FRONT,
        1,
    ),
    'pictures of another size': (
        lambda r: shutil.copy(video(r, WRIST), video(r)),
        {'video-size', 'twins'},
        '96 x 128',
        1,
    ),
    'video too short': (
        edit(
            EPISODES,
            lambda t: (
                t.__setitem__(
                    f'videos/{FRONT}/from_timestamp',
                    t[f'videos/{FRONT}/from_timestamp'] + 2.0,
                )
                or t.__setitem__(
                    f'videos/{FRONT}/to_timestamp', t[f'videos/{FRONT}/to_timestamp'] + 2.0
                )
            ),
        ),
        {'video-short', 'frames'},
        'episode 2 until 9.20 s',
        1,
    ),
    'video span': (
        edit(
            EPISODES,
            lambda t: t.__setitem__(
                f'videos/{WRIST}/to_timestamp',
                t[f'videos/{WRIST}/to_timestamp'] - [0, 1, 0],
            ),
        ),
        {'video-span'},
        'episode 1 has 20 ticks',
        1,
    ),
    'video not listed': (
        edit(EPISODES, lambda t: t.drop(columns=f'videos/{WRIST}/from_timestamp')),
        {'video-index'},
        WRIST,
        1,
    ),
    'camera hangs': (
        reencode(FRONT, hold),
        {'frozen'},
        'episode 2 stands still from frame 6 to 23',
        0,
    ),
    'camera at half rate': (reencode(FRONT, repeat), {'stale'}, FRONT, 0),
    'camera black': (reencode(WRIST, black), {'blank'}, f'{WRIST} in episode 0', 0),
    'no action': (info(lambda d: d['features'].pop('action')), {'no-vector'}, 'action', 1),
    'state too large': (
        widen('observation.state', 14),
        {'size'},
        '--policy.max_state_dim=14',
        1,
    ),
    'action is a matrix': (shape('action', 2, 3), {'vector'}, '(2, 3)', 1),
    'wrong length': (shape('action', 5), {'length', 'stats-length'}, '6 numbers', 1),
    'wrong fps': (
        info(lambda d: d.update(fps=5)),
        {'fps', 'stamps-rate', 'video-rate', 'video-span'},
        '10 a second',
        1,
    ),
    'NaN': (
        put('action', 1, slice(7, 9), 3, np.nan),
        {'nan'},
        'action[3] is nan in episode 1 from frame 7 on (2 ',
        1,
    ),
    'infinity': (
        put('observation.state', 2, slice(3, 4), 0, -np.inf),
        {'nan'},
        'observation.state[0] is -inf in episode 2',
        1,
    ),
    'NaN in time': (
        cell('timestamp', 0, slice(4, 5), np.nan),
        {'nan'},
        'timestamp is nan in episode 0 from frame 4',
        1,
    ),
    'constant': (
        both(put('action', None, slice(None), 5, 0.5), restat),
        {'constant'},
        'action[5] is 0.5 in every frame',
        0,
    ),
    'nearly constant': (
        both(put('action', None, slice(None), 5, lambda x: 100 + 1e-4 * x), restat),
        {'constant'},
        'action[5] changes by',
        0,
    ),
    'outlier': (
        both(put('action', 2, slice(9, 10), 4, 4e3), restat),
        {'outlier'},
        'action[4] is 4000 in episode 2, frame 9',
        0,
    ),
    'another unit in an episode': (
        both(put('observation.state', 1, slice(None), slice(None), np.rad2deg), restat),
        {'units'},
        'episode 1',
        0,
    ),
    'degrees and radians': (
        both(degrees, restat),
        {'units'},
        'action follows observation.state at 57.3 times',
        0,
    ),
    'jitter': (
        cell('timestamp', 1, slice(5, 9), lambda t: t + 0.004),
        {'stamps'},
        '--tolerance_s=0.005',
        1,
    ),
    'gap in time': (
        cell('timestamp', 1, slice(8, None), lambda t: t + 0.3),
        {'stamps-gap'},
        'jump by 0.40 s after frame 7 (3 frames are missing)',
        1,
    ),
    'clock runs back': (
        cell('timestamp', 2, slice(8, None), lambda t: t - 0.5),
        {'stamps-order'},
        '0.300 s at frame 8 follows 0.700 s',
        1,
    ),
    'no statistics': (
        lambda r: (r / 'meta/stats.json').unlink(),
        {'stats-missing', 'stats-cameras'},
        'observation.state',
        1,
    ),
    'a statistic missing': (
        stats(lambda s: s['action'].pop('std')),
        {'stats-missing'},
        'std of action',
        1,
    ),
    'statistics too short': (
        stats(lambda s: s['action'].update(mean=[0.0] * 4)),
        {'stats-length'},
        'has 4 numbers',
        1,
    ),
    'NaN in statistics': (
        stats(lambda s: s['action']['std'].__setitem__(2, float('nan'))),
        {'stats-nan'},
        'std of action',
        1,
    ),
    'statistics of another dataset': (
        stats(lambda s: s['action'].update(mean=[3.0] * 6)),
        {'stats-foreign'},
        'says 3 and',
        1,
    ),
    'statistics a little old': (
        stats(lambda s: s['action'].update(std=[1.2 * x for x in s['action']['std']])),
        {'stats-foreign'},
        'action',
        0,
    ),
    'camera statistics missing': (
        stats(lambda s: s.pop(FRONT)),
        {'stats-cameras'},
        'use_imagenet_stats=false',
        0,
    ),
    'no instruction at all': (no_tasks, {'no-task'}, 'no task', 1),
    'empty instruction': (
        edit(TASKS, lambda t: t.rename(index={'watch the clock': '  '})),
        {'task-empty'},
        'instruction 0',
        1,
    ),
    'instruction without text': (
        cell('task_index', 1, slice(None), 7),
        {'task-unknown'},
        '20 rows, from episode 1 on, have task 7',
        1,
    ),
    'endless instruction': (
        edit(TASKS, lambda t: t.rename(index={'watch the clock': 'watch the clock ' * 60})),
        {'task-long'},
        'more than 128',
        1,
    ),
    'rows missing': (
        edit(DATA, lambda t: t.drop(t.index[30:34])),
        {'rows-missing'},
        'episode 1 has 16 of 20 frames',
        1,
    ),
    'rows twice': (
        edit(DATA, extra_rows),
        {'rows-double'},
        'episode 1 has 22 rows for 20',
        1,
    ),
    'frames out of order': (
        cell('frame_index', 1, slice(3, 5), lambda x: x[::-1].to_numpy()),
        {'rows-order'},
        'row 3 of episode 1',
        1,
    ),
    'stray rows': (edit(DATA, stray), {'rows-stray'}, 'episode 9', 1),
    'parquet file missing': (
        lambda r: (r / DATA).unlink(),
        {'file-missing'},
        f'{DATA} with episodes 0 to 2',
        1,
    ),
    'parquet file cut off': (
        lambda r: os.truncate(r / DATA, 2000),
        {'unreadable'},
        DATA,
        1,
    ),
    'column missing': (
        edit(DATA, lambda t: t.drop(columns='action')),
        {'unreadable'},
        'column action',
        1,
    ),
    'ragged column': (edit(DATA, ragged), {'unreadable'}, 'different lengths ([4, 6])', 1),
    'episode gap': (
        both(
            edit(EPISODES, lambda t: t[t.episode_index != 1]),
            info(lambda d: d.update(total_episodes=2, total_frames=52)),
        ),
        {'episode-gap', 'rows-stray', 'stats-foreign'},
        'episode 2 comes after episode 0',
        1,
    ),
    'wrong counts': (
        info(lambda d: d.update(total_episodes=4, total_frames=99)),
        {'counts'},
        'counts 4 episodes, meta/episodes 3',
        1,
    ),
}


@pytest.mark.parametrize('name', FAULTS)
def test_a_planted_fault_is_found(name, base, tmp_path, capsys):
    damage, codes, word, want = FAULTS[name]
    root = shutil.copytree(base, tmp_path / 'd')
    damage(root)
    status, found = halo_check(root)
    assert bad(found) == codes, capsys.readouterr().out
    sentences = [f"{f['text']}; {f['fix']}" for c in codes for f in found[c]]
    assert any(word in s for s in sentences), sentences
    assert status == want
    text = capsys.readouterr().out
    assert all(
        f'{f["text"]}; {f["fix"]}.' in text for c in codes for f in found[c][: check.MANY]
    )
    again = [check.Finding(**f) for fs in found.values() for f in fs]
    assert (
        check.status(again, strict=True) == 1
        and check.status([f for f in again if f.code not in codes], strict=True) == 0
    )


def test_all_faults_together(fast, tmp_path, capsys):
    "Twenty-four kinds in one dataset, and not one hides another."
    root = shutil.copytree(fast, tmp_path / 'd')

    def run_back(t):
        return t - 0.3

    for damage in (
        reencode(FRONT, lambda f: [f.__setitem__(i, f[48]) for i in range(48, 70)]),
        widen('observation.state', 14),
        put('action', 0, slice(7, 9), 3, np.nan),
        put('observation.state', 1, slice(4, 5), 2, 5e3),
        put('action', None, slice(None), 5, 0.5),
        cell('timestamp', 0, slice(9, 12), lambda t: t + 0.004),
        cell('timestamp', 1, slice(8, None), lambda t: t + 0.3),
        cell('timestamp', 2, slice(8, None), run_back),
        cell('task_index', 1, slice(None), 7),
        edit(TASKS, lambda t: t.rename(index={'watch the clock': ''})),
        stats(lambda s: s['action'].update(mean=[3.0] * 6)),
        stats(lambda s: s['observation.state'].pop('std')),
        stats(lambda s: s.pop(WRIST)),
        edit(DATA, stray),
        edit(DATA, lambda t: t.drop(t.index[t.episode_index == 4][:3])),
        info(lambda d: d.update(total_frames=99)),
        edit(
            EPISODES,
            lambda t: t.__setitem__(
                f'videos/{FRONT}/to_timestamp',
                t[f'videos/{FRONT}/to_timestamp'] + [0, 0.5, 0, 0, 0],
            ),
        ),
        camera('observation.images.range', 96, 128, 1, info=dict(is_depth_map=True)),
        camera('observation.images.rgba', 96, 128, 4),
        lambda r: video(r, WRIST).unlink(),
        rename(front='cam_1', wrist='cam_2'),
    ):
        damage(root)
    status, found = halo_check(root)
    want = {
        'primary',
        'channels',
        'depth',
        'video-missing',
        'video-span',
        'frozen',
        'size',
        'fps',
        'nan',
        'outlier',
        'constant',
        'stamps',
        'stamps-gap',
        'stamps-order',
        'task-unknown',
        'task-empty',
        'stats-foreign',
        'stats-missing',
        'stats-cameras',
        'rows-stray',
        'rows-missing',
        'counts',
        'one-frame',
        'short',
    }
    assert status == 1 and want <= found.keys(), want - found.keys()
    assert 'unfinished' not in found
    text = capsys.readouterr().out
    # no command while nobody has said which camera is primary
    assert 'Train it' not in text and text.count('\nerror') > 15


def test_healthy_data(base, fast, tmp_path, capsys):
    for more in ((), ('--deep',), ('--policy.history_frames=0',)):
        status, found = halo_check(base, '--strict', *more)
        assert status == 0 and not bad(found), found
    status, found = halo_check(fast)
    assert status == 0 and bad(found) == {'fps', 'one-frame', 'short'}
    status, found = halo_check(
        fast,
        '--policy.fps=20',
        '--policy.history_stride',
        12,
        '--policy.chunk_size=1',
        '--policy.n_action_steps=1',
    )
    assert bad(found) == {'one-frame'}


@pytest.mark.sim
def test_nothing_in_the_demonstration_data(tmp_path, capsys):
    from halo.sim.flash_place import main

    main(['--root', str(tmp_path / 'demo'), '--episodes', '3'])
    for more in ((), ('--deep',)):
        status, found = halo_check(tmp_path / 'demo', '--strict', *more)
        assert status == 0 and not bad(found), capsys.readouterr().out


def test_images_in_parquet(tmp_path):
    "A dataset without videos: pictures lie in the parquet files."
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    features = {
        FRONT: dict(dtype='image', shape=(32, 48, 3), names=['height', 'width', 'channels'])
    }
    features |= {
        k: dict(dtype='float32', shape=(1,), names=['lift']) for k in check.VECTORS
    }
    ds, rng = (
        LeRobotDataset.create(
            'local/pictures', 10, features, tmp_path / 'd', use_videos=False
        ),
        np.random.default_rng(0),
    )
    for e in range(2):
        for t in range(20):
            ds.add_frame(
                {FRONT: rng.integers(0, 256, (32, 48, 3), dtype=np.uint8), 'task': 'lift'}
                | {k: np.float32([np.sin(t / 3 + e)]) for k in check.VECTORS}
            )
        ds.save_episode()
    ds.finalize()
    status, found = halo_check(tmp_path / 'd', '--strict', '--deep')
    assert status == 0 and not bad(found) and 'single' in found
    edit(DATA, lambda t: t.at[25, FRONT].update(bytes=b'not a picture'))(tmp_path / 'd')
    status, found = halo_check(tmp_path / 'd')
    assert status == 1 and bad(found) == {'frames'} and found['frames'][0]['episode'] == 1


# ---- what is asked for


def test_room(base, monkeypatch):
    monkeypatch.setattr(check, 'free_bytes', lambda folder: 1000)
    assert bad(halo_check(base)[1]) == {'disk'}
    monkeypatch.undo()
    monkeypatch.setattr(check, 'card', lambda case: ('a small card', 2**28))
    status, found = halo_check(base)
    assert (
        status == 0
        and bad(found) == {'memory'}
        and 'a small card has 0' in found['memory'][0]['text']
    )


def test_stamps_as_filmed(base, tmp_path):
    """A trembling clock is no fault where the video has its pictures at the very times that
    the rows say; training takes it.
    """
    from fractions import Fraction

    from halo.data.history import check_dataset

    root, late = (
        shutil.copytree(base, tmp_path / 'd'),
        np.random.default_rng(0).integers(0, 5, 72),
    )
    edit(
        DATA, lambda t: t.assign(timestamp=(t.timestamp + late / 1000).astype(np.float32))
    )(root)
    assert bad(halo_check(root)[1]) == {'stamps'}
    root = shutil.copytree(
        root, tmp_path / 'filmed'
    )  # LeRobot keeps decoders open, by path
    for c in (FRONT, WRIST):
        with av.open(str(video(root, c))) as box:
            frames = [f.to_ndarray(format='rgb24') for f in box.decode(video=0)]
        with av.open(str(video(root, c)), 'w') as box:
            s = box.add_stream('libx264', rate=10, options=dict(g='2', preset='ultrafast'))
            s.height, s.width, s.pix_fmt, s.time_base = (
                *frames[0].shape[:2],
                'yuv420p',
                Fraction(1, 1000),
            )
            s.codec_context.time_base = Fraction(1, 1000)
            # one more: torchcodec does not give the last picture of such a file
            for i, f in enumerate([*frames, frames[-1]]):
                f = av.VideoFrame.from_ndarray(np.ascontiguousarray(f))
                f.pts, f.time_base = 100 * i + int([*late, 0][i]), Fraction(1, 1000)
                box.mux(s.encode(f))
            box.mux(s.encode())
    status, found = halo_check(root, '--strict')
    assert status == 0 and not bad(found), bad(found)
    check_dataset(root, roles={FRONT: 'primary', WRIST: 'wrist'})


def test_the_size_of_a_view_is_a_field_too(base, tmp_path, capsys):
    root = shutil.copytree(base, tmp_path / 'd')
    status, found = halo_check(
        root, '--policy.model.sampling.wrist_size=28', '--run', tmp_path / 'run.yaml'
    )
    assert status == 0 and any('is read at 28 x 28' in f['text'] for f in found['picture'])
    import yaml

    assert '--policy.model.sampling.wrist_size=28' in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / 'run.yaml').read_text())['policy']['model'] == dict(
        sampling=dict(wrist_size=28)
    )
    assert cli.main(['check', str(root), '--policy.model.sampling.speed=1']) == 2


def test_nowhere_to_write(base, monkeypatch):
    monkeypatch.setattr('halo.data.history.writable', lambda folder: False)
    status, found = halo_check(base)
    assert (
        status == 1 and bad(found) == {'disk'} and 'HALO_CACHE' in found['disk'][0]['fix']
    )


def test_flags_settle_what_they_can(base, tmp_path, capsys):
    root = shutil.copytree(base, tmp_path / 'd')
    widen('observation.state', 14)(root)
    rename(front='cam_1', wrist='cam_2')(root)
    assert halo_check(root)[0] == 1
    status, found = halo_check(
        root,
        '--primary',
        'cam_2',
        '--policy.max_state_dim=14',
        '--run',
        tmp_path / 'run.yaml',
        '--strict',
    )
    assert status == 0 and not bad(found)
    import yaml

    run, text = yaml.safe_load((tmp_path / 'run.yaml').read_text()), capsys.readouterr().out
    assert run['policy'] == dict(
        preset='tiny', primary_camera='observation.images.cam_2', max_state_dim=14
    ) and run['data']['root'] == str(root)
    assert all(f'--policy.{k}={v}' in text for k, v in run['policy'].items())
    status, found = halo_check(root, '--primary', 'cam_9', '--policy.max_state_dim=14')
    assert status == 1 and 'cam_9' in found['primary'][0]['text']


@pytest.mark.parametrize(
    'argv, why',
    [
        (['{}/nowhere'], 'no folder'),
        (['{}'], 'meta/info.json is missing'),
        (['me/not_there'], 'neither a folder nor to be had from the hub'),
        (['BASE', '--policy.speed=3'], '--policy.speed is no field'),
        (['BASE', '--policy.fps=fast'], 'makes no model'),
        (['BASE', '--policy.fps'], 'has no value'),
        (['BASE', '--batch', '0'], '--batch=0'),
        (['BASE', '--json', '{}/no/x.json'], 'cannot be written'),
        (['BASE', '--json', '{}'], 'cannot be written'),
    ],
)
def test_exit_status_2(argv, why, base, tmp_path, capsys):
    assert (
        cli.main(
            ['check', *[str(base) if a == 'BASE' else a.format(tmp_path) for a in argv]]
        )
        == 2
    )
    err = capsys.readouterr().err
    assert why in err and len(err.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_unknown_arguments_are_status_2(base):
    for argv in (
        ['--preset', 'giant'],
        ['--gpu', 'abacus'],
        ['--deep', '--quick'],
        ['--unknown'],
    ):
        with pytest.raises(SystemExit) as e:
            cli.main(['check', str(base), *argv])
        assert e.value.code == 2


def test_a_report_that_cannot_be_written_leaves_the_old_one(base, tmp_path, monkeypatch):
    (tmp_path / 'x.json').write_text('old')
    monkeypatch.setattr(
        check.os,
        'replace',
        lambda *a: (_ for _ in ()).throw(OSError(28, 'No space left on device')),
    )
    assert cli.main(['check', str(base), '--json', str(tmp_path / 'x.json')]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ['x.json'] and (
        tmp_path / 'x.json'
    ).read_text() == 'old'


def test_a_check_of_ones_own(base):
    def cold(case):
        yield check.warning('cold', 'dataset', 'it is cold', 'heat')

    def broken(case):
        yield check.note('half', 'dataset', 'half', '')
        raise RuntimeError('unforeseen')

    assert [f.code for f in examine(Case.open(base), [cold, broken])] == [
        'unfinished',
        'cold',
        'half',
    ]


def test_by_name(base, tmp_path, monkeypatch):
    """A dataset of the hub: the local copy first, else its numbers and the first video
    files; all of them with --deep.
    """
    import fnmatch

    import huggingface_hub
    import lerobot.datasets.dataset_metadata as m

    monkeypatch.setattr('lerobot.utils.constants.HF_LEROBOT_HOME', tmp_path / 'home')
    shutil.copytree(base, tmp_path / 'home/me/here')
    monkeypatch.chdir(tmp_path)
    assert cli.main(['check', 'me/here']) == 0
    hub = shutil.copytree(base, tmp_path / 'hub')
    for c in (FRONT, WRIST):
        shutil.copy(video(hub, c), video(hub, c).with_name('file-001.mp4'))
    edit(
        EPISODES,
        lambda t: (
            [t.__setitem__(f'videos/{c}/file_index', [0, 0, 1]) for c in (FRONT, WRIST)]
            and None
        ),
    )(hub)

    def download(name, allow_patterns, **kw):
        to = tmp_path / f'cache{len(list(tmp_path.glob("cache*")))}'
        for f in (p for p in hub.rglob('*') if p.is_file()):
            if any(
                fnmatch.fnmatch(f.relative_to(hub).as_posix(), p) for p in allow_patterns
            ):
                (to / f.relative_to(hub)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(f, to / f.relative_to(hub))
        return str(to)

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
    monkeypatch.setattr(m, 'get_safe_version', lambda *a: 'v3.0')
    case = Case.open('me/there')
    found = {f.code: f for f in examine(case)}
    assert '2 video files were not fetched' in found['not-fetched'].text and not [
        f for f in found.values() if f.severity != 'note'
    ]
    assert '--dataset.repo_id=me/there' in check.train_command(
        case
    ) and 'dataset.root' not in check.train_command(case)
    assert {f.code for f in examine(Case.open('me/there', deep=True))} == found.keys() - {
        'not-fetched'
    }


# ---- damage that nobody thought of

ODD = {
    'no features': lambda d: d.update(features={}),
    'fps 0': lambda d: d.update(fps=0),
    'fps text': lambda d: d.update(fps='ten'),
    'no shape': lambda d: d['features'][FRONT].pop('shape'),
    'empty shape': lambda d: d['features']['action'].update(shape=[]),
    'no names': lambda d: d['features'][FRONT].pop('names'),
    'two sides': lambda d: d['features'][FRONT].update(shape=[96, 128]),
    'no totals': lambda d: [
        d.pop(k) for k in ('total_episodes', 'total_frames', 'total_tasks')
    ],
    'old': lambda d: d.update(codebase_version='v2.1'),
    'path': lambda d: d.update(data_path='data/{nothing}.parquet'),
    'no video path': lambda d: d.update(video_path=None),
    'list': lambda d: d.update(features=[1]),
}


@pytest.mark.parametrize('name', ODD)
def test_odd_metadata(name, base, tmp_path, capsys):
    root = shutil.copytree(base, tmp_path / 'd')
    info(ODD[name])(root)
    status = cli.main(['check', str(root)])
    assert status in (1, 2) or name == 'no names'
    if status == 2:
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize('seed', range(4))
def test_random_damage_is_never_a_traceback(seed, base, tmp_path):
    root, rng = shutil.copytree(base, tmp_path / 'd'), np.random.default_rng(seed)
    files = sorted(p for p in root.rglob('*') if p.is_file())
    for f in rng.choice(files, 2, replace=False):
        raw = bytearray(f.read_bytes())
        for at in rng.integers(0, len(raw), 20):
            raw[at] = rng.integers(256)
        f.write_bytes(raw[: int(len(raw) * rng.uniform(0.5, 1))])
    assert cli.main(['check', str(root)]) in (0, 1, 2)


@pytest.mark.slow
def test_as_a_program(base, tmp_path):
    "The module as a script: report on stdout, nothing else on stderr."
    done = subprocess.run(
        [sys.executable, '-m', 'halo.train.check', base],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | dict(PYTHONPATH=str(Path(check.__file__).parents[2])),
    )
    assert (
        done.returncode == 0 and done.stderr == '' and '0 errors, 0 warnings' in done.stdout
    )


@pytest.mark.slow
def test_the_printed_commands_run(fast, tmp_path):
    """Both commands of a report train, on data with another rate, 14 dimensions and an
    episode of one frame.
    """
    import shlex

    from halo.train import scale

    root = shutil.copytree(fast, tmp_path / 'd')
    widen('observation.state', 14)(root)
    case = Case.open(root, dict(history_frames=2, model=dict(sampling=dict(wrist_size=28))))
    assert case.advice.items() >= dict(fps=20, history_stride=12, max_state_dim=14).items()
    words = shlex.split(check.train_command(case, steps=1))
    done = subprocess.run(
        [
            Path(sys.executable).parent / words[0],
            *words[1:],
            '--save_checkpoint=false',
            '--policy.device=cpu',
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (tmp_path / 'run.yaml').write_text(check.run_file(case, steps=1))
    assert (
        scale.main(
            [str(tmp_path / 'run.yaml'), '--dry-run', '--set', f'out={tmp_path}/run']
        )
        == 0
    )
    assert (
        scale.main(
            [str(tmp_path / 'run.yaml'), '--device', 'cpu', '--set', f'out={tmp_path}/run']
        )
        == 0
    )
