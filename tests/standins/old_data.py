"""Write the LeRobot dataset FROM as version 2.1 laid it out, to TO: a file for each
episode, lists as JSON lines.
"""

import json
import sys
from pathlib import Path

import pandas as pd


def lines(path, rows):
    path.write_text(''.join(json.dumps(r) + '\n' for r in rows))


def plain(x):
    return x.tolist() if hasattr(x, 'tolist') else x


def convert(old, new):
    info = json.loads((old / 'meta/info.json').read_text())
    (new / 'meta').mkdir(parents=True)
    (new / 'data/chunk-000').mkdir(parents=True)
    frames = pd.concat([pd.read_parquet(f) for f in sorted(old.glob('data/*/*.parquet'))])
    for n, rows in frames.groupby('episode_index'):
        rows.to_parquet(new / f'data/chunk-000/episode_{n:06d}.parquet', index=False)
    episodes = pd.concat(
        [pd.read_parquet(f) for f in sorted(old.glob('meta/episodes/*/*.parquet'))]
    )
    stats = [
        {
            k: {
                s: nested(e[f'stats/{k}/{s}'])
                for s in ('min', 'max', 'mean', 'std', 'count')
            }
            for k in info['features']
        }
        for _, e in episodes.iterrows()
    ]
    numbers = range(len(episodes))
    lines(
        new / 'meta/episodes_stats.jsonl',
        [dict(episode_index=n, stats=stats[n]) for n in numbers],
    )
    lines(
        new / 'meta/episodes.jsonl',
        [
            dict(episode_index=n, tasks=plain(e['tasks']), length=int(e['length']))
            for n, (_, e) in enumerate(episodes.iterrows())
        ],
    )
    tasks = pd.read_parquet(old / 'meta/tasks.parquet')
    lines(
        new / 'meta/tasks.jsonl',
        [dict(task_index=int(i), task=t) for t, i in zip(tasks.index, tasks['task_index'])],
    )
    info |= dict(
        codebase_version='v2.1',
        total_chunks=1,
        total_videos=0,
        video_path=None,
        data_path='data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet',
    )
    (new / 'meta/info.json').write_text(json.dumps(info))


def nested(x):
    x = plain(x)
    return [nested(v) for v in x] if isinstance(x, list) else x


if __name__ == '__main__':
    convert(*map(Path, sys.argv[1:]))
