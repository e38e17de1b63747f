"""Studies of memory tasks, without their simulator: what there is to do, what is kept."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_first_gate import recording

from halo.benchmarks import first_gate as fg
from halo.benchmarks import memory_study as ms
from halo.benchmarks.demonstrations import About, Episode, record
from halo.benchmarks.mikasa import STATE

root = Path(__file__).resolve().parents[1]
CONFIGS = sorted(f.stem for f in ms.studies())


@pytest.fixture
def study(tmp_path, monkeypatch):
    "A study of one task whose folders lie in `tmp_path`."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HALO_MANISKILL_PYTHON', sys.executable)
    monkeypatch.setattr(ms, 'keep_folder', lambda s: tmp_path / 'kept')
    how = dict(train=dict(steps=2), seeds=(0, 1, 2), episodes=4)
    return ms.Memory('little', ('RememberColor3-VLA-v0',), **how)


def carried(folder, knows: bool, episodes: int = 30):
    "A made-up recording of TakeItBack in which the hand's y gives the side away, or not."
    rng = np.random.default_rng(0)

    def play(task, seed):
        side, state = rng.choice([-0.1, 0.1]), rng.normal(size=(6, 7)).astype('f4')
        state[:, 0] = [0, 0.1, 0.2, 0.3, 0.2, 0.1]
        state[3, 1] = side / 3 if knows else 0.03 * rng.normal()
        objects = np.zeros((6, 4, 3), 'f4')
        objects[:, 3, 1] = side
        frames = dict(primary=np.zeros((6, 8, 8, 3), 'u1'))
        extra = dict(phase=np.array([0, 0, 0, 1, 1, 1]), objects=objects)
        action = np.zeros((6, 7), 'f4')
        return Episode(task, 'take it back', seed, True, frames, state, action, extra)

    names = [f'a{k}' for k in range(7)]
    about = About('made up', 20.0, list(STATE), names, 'none', dict(primary=[8, 8]), {})
    jobs = [('TakeItBack', k) for k in range(episodes)]
    record(folder, about, jobs, play, progress=False)
    return folder


def result(run: str, each: list) -> dict:
    "A kept record as `kept_play` makes it, as far as it is read here."
    provenance = dict(seconds=90.0, data=dict(episodes=9), commit='c' * 40)
    rest = dict(checkpoint_sha256='d' * 64, provenance=provenance, seeds=list(each))
    return dict(each=each) | rest


def test_what_the_hand_gives_away(tmp_path, capsys):
    told = ms.given_away(carried(tmp_path / 'told', True))
    silent = ms.given_away(carried(tmp_path / 'silent', False))
    assert told['each']['y'] > 0.95 > 0.3 > silent['each']['y']
    kept = tmp_path / 'kept.json'
    words = ['--given-away', str(tmp_path / 'told'), '--keep', str(kept)]
    assert ms.main(words) == 0
    assert json.loads(kept.read_text()) == told == json.loads(capsys.readouterr().out)


@pytest.mark.parametrize('name', CONFIGS)
def test_the_first_gate_takes_every_option_of_a_configuration(name, monkeypatch):
    monkeypatch.setenv('HALO_MANISKILL_PYTHON', sys.executable)
    s = ms.read_study(root / f'configs/studies/{name}.yaml')
    own, gate = 'halo.benchmarks.memory_study', 'halo.benchmarks.first_gate'
    count = {own: 0, gate: 0}
    for w in ms.works(s):
        for module, parser in ((own, ms.parser()), (gate, fg.parser())):
            if module in w.command:
                a = parser.parse_args(w.command[w.command.index(module) + 1 :])
                assert module == gate or a.play or a.baseline in ms.baselines()
                count[module] += 1
    runs = len(s.seeds) * len(s.variants)
    others = len(s.seeds) * sum('baseline' in how for how in s.variants.values())
    lessons = len(ms.lessons(s)) + len(ms.ask_work(s))
    assert count == {own: runs + others, gate: lessons + runs - others}


def test_each_variant_trains_as_it_is_called(monkeypatch):
    monkeypatch.setenv('HALO_MANISKILL_PYTHON', sys.executable)
    s = ms.read_study(root / 'configs/studies/remember_color.yaml')
    words = {v: ms.policy_work(s, v, 1)[0].command for v in s.variants}
    assert words['halo'][words['halo'].index('--frames') + 1] == '16'
    for v, w in words.items():
        if 'baseline' in s.variants[v]:
            continue
        blind = w[w.index('--frames') + 1] == '0'
        assert blind == v.startswith(('no_history', 'neither'))
        assert ('--no-salr' in w) == v.startswith(('no_salr', 'neither'))
        assert ('--train-vlm' in w) == v.endswith('trained')


def test_a_wrong_entry_is_named(tmp_path):
    file = tmp_path / 'study.yaml'
    file.write_text('name: x\ntasks: [A]\nsteps: 3\n')
    with pytest.raises(ValueError, match="'steps' is unknown"):
        ms.read_study(file)
    file.write_text('name: x\ntasks: [A]\n')
    with pytest.raises(ValueError, match='train needs steps'):
        ms.read_study(file)
    file.write_text('name: x\n')
    with pytest.raises(ValueError, match="'tasks' is unknown or missing"):
        ms.read_study(file)


def test_without_the_simulators_python_one_sentence(monkeypatch, capsys):
    monkeypatch.delenv('HALO_MANISKILL_PYTHON', raising=False)
    assert ms.main([str(root / 'configs/studies/take_it_back.yaml'), '--list']) == 1
    assert 'HALO_MANISKILL_PYTHON is not set' in capsys.readouterr().err


def test_an_unknown_variant_is_refused(study):
    with pytest.raises(ValueError, match="no variant 'full'; it has halo"):
        ms.chosen(study, ['full'])
    assert ms.chosen(study, seeds=[2]).seeds == (2,)


def test_three_seeds_make_an_interval(study):
    keep = ms.keep_folder(study)
    keep.mkdir()
    for n, each in enumerate([[1, 1, 0, 1], [1, 0, 1, 1], [0, 0, 1, 1]]):
        file = ms.record_file(keep, f'halo-{n}', study.tasks[0])
        file.write_text(json.dumps(result(f'halo-{n}', each)))
        said = ms.report(study)
        assert ('no interval' in said) == (n < 2)
    assert '66.7 %' in said and 'each seed: 75, 75, 50' in said and 'guessing 33 %' in said
    assert 'less' not in said
    blind = replace(study, variants=dict(halo={}, no_history={}))
    for n in range(3):
        file = ms.record_file(keep, f'no_history-{n}', study.tasks[0])
        file.write_text(json.dumps(result(f'no_history-{n}', [0, 0, 0, 0])))
    assert '  halo less no_history: +66.7 points [+' in ms.report(blind)
    assert ms.origins(study).count('1.5 min of 9 episodes, played') == 6


def test_the_same_work_is_not_done_twice(study):
    run = study.runs / 'halo-0'
    trained, played = ms.policy_work(study, 'halo', 0)
    assert not trained.done() and not played.done()
    run.mkdir(parents=True)
    (run / 'gate.json').write_text(json.dumps(dict(rows=[dict(step=1)])))
    assert not trained.done()
    (run / 'gate.json').write_text(json.dumps(dict(rows=[dict(step=1), dict(step=2)])))
    assert trained.done()


def test_a_record_of_other_weights_is_no_play_of_this_run(study):
    "A fresh clone holds records and no runs: everything is to be made anew."
    run, keep, task = study.runs / 'halo-0', ms.keep_folder(study), study.tasks[0]
    keep.mkdir()
    record = result('', [1, 0, 1, 1])
    ms.record_file(keep, 'halo-0', task).write_text(json.dumps(record))
    assert not ms.has_played(run, keep, task, 4)
    (run / 'checkpoint').mkdir(parents=True)
    own = dict(conventions=dict(server=dict(checkpoint=record['checkpoint_sha256'])))
    (run / 'RememberColor3.json').write_text(json.dumps(own))
    weights = run / 'checkpoint/model.safetensors'
    weights.write_bytes(b'others')
    assert not ms.has_played(run, keep, task, 4)
    own['conventions']['server']['checkpoint'] = ms.weights_of(run)
    (run / 'RememberColor3.json').write_text(json.dumps(own))
    assert not ms.has_played(run, keep, task, 4)
    record['checkpoint_sha256'] = ms.weights_of(run)
    ms.record_file(keep, 'halo-0', task).write_text(json.dumps(record))
    assert ms.has_played(run, keep, task, 4) and not ms.has_played(run, keep, task, 5)


def test_recordings_with_options_lie_apart(study):
    assert study.folders == [Path('data/demos/RememberColor3')]
    noisy = replace(study, record=dict(noise=0.2))
    assert noisy.folders == [Path('data/demos/little/RememberColor3')]
    assert ms.data_work(noisy)[0].command[-2:] == ['--noise', '0.2']


CLIENT = """
import hashlib, json, socket, sys
from pathlib import Path
a = dict(zip(sys.argv[1::2], sys.argv[2::2]))
host, port = a['--address'].split(':')
socket.create_connection((host, int(port))).close()  # a server listens
n = int(a['--episodes'])
weights = Path(a['--out']).parent / 'checkpoint/model.safetensors'
sha = hashlib.sha256(weights.read_bytes()).hexdigest()
own = dict(task=a['--task'], standard={}, protocol={}, server=dict(checkpoint=sha))
each = [dict(success=k % 2 == 0) for k in range(n)]
made = dict(success=dict(rate=0.5), seconds=1.0, seeds=list(range(n)), episodes=each)
json.dump(made | dict(conventions=own), open(a['--out'], 'w'))
"""


@pytest.mark.slow
def test_a_policy_is_served_played_and_kept(study, tmp_path, monkeypatch):
    "A real policy behind a real server; the client is a stand-in that only connects."
    demos, data = recording(tmp_path / 'demos', tmp_path / 'data')
    run = tmp_path / 'halo-0'
    few = ['--steps', '1', '--batch', '2', '--held', '2', '--every', '1']
    assert fg.main(['train', str(data), '--out', str(run), *few]) == 0
    (tmp_path / 'client.py').write_text(CLIENT)
    words = [sys.executable, str(tmp_path / 'client.py')]
    monkeypatch.setattr(ms, 'client', lambda: words)
    ms.play(run, study.tasks, 4, tmp_path / 'kept')
    kept = json.loads((tmp_path / 'kept/halo-0-RememberColor3.json').read_text())
    assert kept['each'] == [True, False, True, False]
    assert kept['checkpoint_sha256'] == ms.weights_of(run)
    assert ms.has_played(run, tmp_path / 'kept', study.tasks[0], 4)


def test_each_lesson_begins_where_the_last_one_ended(study):
    two = replace(study, eyes=[dict(vlm='own', steps=5, size=56), dict(steps=7, size=84)])
    first, second = ms.eyes_work(two)
    after = lambda w, flag: w.command[w.command.index(flag) + 1]
    assert after(first, '--vlm') == 'own' and after(first, '--size') == '56'
    assert after(second, '--vlm') == after(first, '--out') == str(two.runs / 'vlm')
    assert after(second, '--size') == '84' and second.after == ('eyes',)
    trained = ms.policy_work(two, 'halo', 0)[0]
    assert after(trained, '--vlm') == after(second, '--out') == str(ms.eyes_folder(two))
    assert trained.after == ('convert', 'eyes2')
    assert ms.eyes_folder(replace(two, eyes=dict(vlm='own'))) == 'own'
    assert not ms.eyes_work(replace(two, eyes=[dict(vlm='own')]))


def test_studies_may_share_their_demonstrations(study):
    other = replace(study, dataset='first')
    assert study.data == Path('data/little') and other.data == Path('data/first')
    assert other.folders == study.folders and other.runs == study.runs


def test_the_cells_of_table_6(study):
    keep = ms.keep_folder(study)
    keep.mkdir()
    for cell, each in dict(halo=[1, 1, 1, 0], neither_trained=[0, 0, 0, 1]).items():
        for n in range(3):
            file = ms.record_file(keep, f'{cell}-{n}', study.tasks[0])
            file.write_text(json.dumps(result(f'{cell}-{n}', each)))
    rows = [r.strip('| ').split(' | ') for r in ms.ablation_table(study).splitlines()]
    assert (
        rows[0] == ['VLM', 'history', 'SALR', 'seeds', 'RememberColor3'] and len(rows) == 10
    )
    assert rows[2][:4] == ['kept', 'yes', 'yes', '3'] and rows[2][4].startswith('75.0 [')
    assert rows[9][:4] == ['trained', 'no', 'no', '3'] and rows[9][4].startswith('25.0 [')
    assert [r[4] for r in rows[3:9]] == ['not run'] * 6


def test_eyes_are_asked_with_the_size_of_their_lesson(study):
    look = dict(frames=16, size=84, view=112)
    two = replace(
        study, look=look, eyes=[dict(steps=5, size=56), dict(steps=7, naming=1.0)]
    )
    sizes = [w.command[w.command.index('--size') + 1] for w in ms.ask_work(two)]
    assert sizes == ['56', '84'] and [w.after for w in ms.ask_work(two)] == [
        ('eyes',),
        ('eyes2',),
    ]
    for w in ms.ask_work(two):
        fg.parser().parse_args(w.command[3:])
    assert not ms.ask_work(replace(study, eyes=dict(steps=5, target=0)))


def test_a_policy_is_shipped_in_half_precision(tmp_path, capsys):
    import shutil

    import torch
    from safetensors.torch import load_file

    from halo.policy.modeling_halo import HaloPolicy

    source, run, out = (
        root / 'checkpoints/flash_place/full',
        tmp_path / 'run',
        tmp_path / 'out',
    )
    shutil.copytree(source, run / 'checkpoint')
    (run / 'checkpoint/training_state').mkdir()
    words = ['--ship', str(run), '--out', str(out)]
    assert ms.main(words) == 0
    assert not (out / 'training_state').exists() and not list(tmp_path.glob('out.*'))
    made = json.loads((out / 'shipped.json').read_text())
    assert made['shipped_from_sha256'] == ms.weights_of(run)
    half, full = (load_file(f / 'model.safetensors') for f in (out, source))
    assert {v.dtype for v in half.values() if v.is_floating_point()} == {torch.float16}
    for name, x in HaloPolicy.from_pretrained(out).model.state_dict().items():
        if f'model.{name}' in full:
            want = full[f'model.{name}'].half().float()
            torch.testing.assert_close(x.float(), want)
    assert ms.main(words) == 1 and 'is there already' in capsys.readouterr().err
    assert ms.main(['--ship', str(tmp_path / 'none'), '--out', str(tmp_path / 'x')]) == 1
    assert 'train first' in capsys.readouterr().err


@pytest.mark.parametrize(
    'words, said',
    [
        ([], 'name a configuration'),
        (['--play', 'x'], '--play needs --tasks'),
        (['--ship', 'x'], 'need --out'),
        (['--baseline', 'act', '--out', 'x'], '--baseline needs --data'),
        (['some.yaml', '--steps', '3'], 'are of --baseline'),
    ],
)
def test_arguments_that_cannot_be(words, said, capsys):
    with pytest.raises(SystemExit):
        ms.main(words)
    assert said in capsys.readouterr().err


def test_a_lesson_without_steps_is_no_lesson(tmp_path):
    file = tmp_path / 'study.yaml'
    file.write_text(
        'name: x\ntasks: [A]\ntrain: {steps: 3}\neyes: [{steps: 3}, {step: 4}]\n'
    )
    with pytest.raises(ValueError, match='lesson 2 of the eyes needs steps'):
        ms.read_study(file)
    file.write_text('')
    with pytest.raises(ValueError, match="'name' is unknown or missing"):
        ms.read_study(file)


def test_what_a_piece_of_work_began_ends_with_it(tmp_path):
    "A play is a server and a client; neither outlives the study."
    code = (
        'import subprocess, sys, time\n'
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "open('child', 'w').write(str(p.pid))\n"
        'time.sleep(60)\n'
    )
    words = [sys.executable, '-c', f'import os; os.chdir({str(tmp_path)!r})\n' + code]
    r = ms.begin(ms.Work('two', words, lambda: False), tmp_path)
    file, end = tmp_path / 'child', time.time() + 20
    while not (file.exists() and file.read_text()) and time.time() < end:
        time.sleep(0.05)
    child = Path('/proc') / file.read_text()
    assert child.exists()
    ms.stop(r)
    while child.exists() and (child / 'stat').read_text().split()[2] != 'Z':
        assert time.time() < end, 'the child lives on'
        time.sleep(0.05)


def test_answers_are_kept_as_soon_as_they_are_there(study):
    two = replace(study, eyes=[dict(steps=5), dict(steps=7)])
    kept = ms.keep_folder(two)
    assert np.isnan(ms.eyes_minutes(two))
    for k, name in enumerate(ms.lessons(two)):
        vlm, asked = ms.lesson_files(two, name)
        vlm.mkdir(parents=True)
        (vlm / 'log.json').write_text(json.dumps(dict(log=[dict(seconds=60.0)])))
        asked.write_text('{}')
        ms.keep_eyes(two)
        assert len(list(kept.iterdir())) == 2 * (k + 1)
    assert ms.eyes_minutes(two) == 2


def test_an_unknown_baseline_is_refused(tmp_path, capsys):
    assert ms.main(['--baseline', 'pi0', '--data', 'x', '--out', str(tmp_path / 'y')]) == 1
    assert "no baseline 'pi0'" in capsys.readouterr().err and not (tmp_path / 'y').exists()
