"""Every rate that the repository holds, in one table."""

import json

import numpy as np
import pytest

from halo.benchmarks import memory_study as ms
from halo.benchmarks import results
from halo.benchmarks.metaworld_demos import tiers
from halo.benchmarks.tables import task_rows
from halo.data.files import place


def test_every_kept_record_is_in_the_table():
    lines, files = results.all_lines(), 0
    shown = {(g.policy, g.task): g for g in lines}
    for config in ms.studies():
        s = ms.read_study(config)
        for file in sorted(ms.keep_folder(s).glob('*-*.json')):
            variant, _, task = file.stem.rsplit('-', 2)
            r = json.loads(file.read_text())
            assert r['checkpoint_sha256'] in shown[f'{s.name}: {variant}', task].weights
            files += 1
    others = 'gate', 'mt50'
    studied = [
        g for g in lines if ':' in g.policy and not any(o in g.policy for o in others)
    ]
    assert files == sum(len(g.weights) for g in studied) > 0


def test_fifty_tasks_are_a_mean_over_tiers(monkeypatch):
    easy = np.array([t == 'easy' for t in tiers().values()], float)
    record = dict(
        each={t: [bool(e)] * 10 for t, e in zip(tiers(), easy)},
        checkpoint_sha256='a' * 64,
        machine='none',
        training=dict(seconds=1800),
    )
    first = record | dict(training=dict(seconds=1800, after=dict(seconds=5400)))
    second = record | dict(training=dict(seconds=3600, after=first['training']))
    each = dict(mt50=record, mt50_more=first, mt50_crop=second)
    found = lambda s, variant: [each[s.name]] if variant == 'halo' else []
    monkeypatch.setattr(results, 'kept_runs', found)
    rate = '25.0', '25 – 25 (episodes only)', '1 × 50 × 10'
    hours = '0.5', '2.0', '3.0'
    for got, name, hours in zip(results.fifty_lines(), each, hours, strict=True):
        assert got.line()[:6] == ['MT50', f'{name}: halo', *rate, hours]


def test_every_kept_run_of_fifty_tasks_is_in_the_table():
    shown = [w for g in results.all_lines() if g.task == 'MT50' for w in g.weights]
    files = (place('bench') / 'metaworld').glob('*/*.json')
    kept = [json.loads(f.read_text())['checkpoint_sha256'] for f in files]
    assert sorted(shown) == sorted(kept)


def test_one_run_has_no_interval_over_seeds():
    some = results.Got('T', 'p', np.ones((2, 10)), 0.1, ('a' * 64,) * 2, 'make it')
    assert 'episodes only' in some.line()[3]
    three = results.Got('T', 'p', np.eye(3), 0.1, ('a' * 64,) * 3, 'make it')
    assert 'only' not in three.line()[3] and three.line()[4] == '3 × 3'


def test_a_task_without_a_policy_is_named_too(capsys):
    assert results.main([]) == 0
    said = capsys.readouterr().out
    for task in {r['task'] for r in task_rows()}:
        assert task in said
    for task in results.untried(results.all_lines()):
        assert f'{task}: no trained policy here' in said


def test_every_policy_of_a_study_pays_for_its_eyes():
    lines = {g.policy: g for g in results.all_lines() if g.task == 'RememberColor3'}
    s = next(s for s in map(ms.read_study, ms.studies()) if s.name == 'remember_color')
    assert ms.eyes_minutes(s) > 1
    for variant in ('halo', 'no_history'):
        found = ms.records(s, variant, s.tasks[0])
        hours = sum(r['provenance']['seconds'] for r in found) / 3600
        want = pytest.approx(hours + ms.eyes_minutes(s) / 60)
        assert lines[f'remember_color: {variant}'].hours == want


def test_evaluations_and_the_first_gate_are_there_too():
    policies = [g.policy for g in results.all_lines()]
    assert {'full', 'no_history', 'act', 'smolvla', 'first gate: halo'} <= set(policies)


def test_a_clones_records_are_compared_and_kept(tmp_path, monkeypatch, capsys):
    folder = tmp_path / 'clone/bench/memory/remember_color'
    folder.mkdir(parents=True)
    own = place('bench') / 'memory/remember_color'
    for file in own.glob('halo-0-*.json'):
        (folder / file.name).write_text(file.read_text())
    assert results.retrained(folder) == []  # a copy was not made again
    file = folder / 'halo-0-RememberColor3.json'
    record = json.loads(file.read_text())
    record |= dict(checkpoint_sha256='b' * 64, seconds=1.0)
    monkeypatch.setattr(results, 'AGAIN', str(tmp_path / 'kept'))
    for wins, where in ((95, 'inside'), (30, 'outside')):
        record['each'] = [True] * wins + [False] * (100 - wins)
        file.write_text(json.dumps(record))
        assert results.main(['--again', str(folder)]) == 0
        said = capsys.readouterr().out
        assert '1 records kept' in said and f'{wins} % of 100, {where}' in said
        assert 'other weights bbbbbbbb' in said
    file.rename(folder / 'no_salr-0-RememberColor3.json')
    assert results.main(['--again', str(folder)]) == 0
    assert 'beside nothing that was kept here' in capsys.readouterr().out
    assert results.main(['--again', str(tmp_path)]) == 1
    assert 'holds no records of a study' in capsys.readouterr().err


def test_what_nobody_ran_is_listed():
    said = results.left_out()
    assert any(line.startswith('remember_color_sharp: ') for line in said)
    for line in said:
        name, left = line.split(': ')
        shown = [g.policy for g in results.all_lines()]
        assert all(f'{name}: {v}' not in shown for v in left.split(', '))
    assert f'not run: {said[0]}' in results.said()
