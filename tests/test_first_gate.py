"""The commands of the first gate, on a stand-in that needs no simulator."""

import json
import subprocess
import sys

import pytest

from halo.benchmarks import first_gate as fg
from halo.benchmarks.demonstrations import About, Episode, convert, record
from halo.train.own_eyes import stand_in


def play(task, seed):
    e = stand_in(seed, side=56)
    return Episode(task, e.prompt, seed, True, e.frames, e.state, e.action, e.extra)


def recording(demos, data, episodes=9):
    "Record the stand-in into the folder `demos`, convert it into `data`; both folders."
    names = [f'n{k}' for k in range(7)]
    sizes = dict(primary=[56, 56], wrist=[56, 56])
    about = About('stand-in', 20.0, names, names, 'none', sizes, {})
    jobs = [('stand_in', k) for k in range(episodes)]
    record(demos, about, jobs, play, progress=False)
    return demos, convert(demos, data)


@pytest.fixture(scope='module')
def recorded(tmp_path_factory):
    "A folder of demonstrations, and the dataset made of it."
    root = tmp_path_factory.mktemp('gate')
    return recording(root / 'demos', root / 'data')


def test_eyes_policy_and_probe(recorded, tmp_path, capsys):
    demos, data = map(str, recorded)
    few = ['--steps', '2', '--batch', '2', '--held', '2']
    vlm, run = str(tmp_path / 'vlm'), tmp_path / 'run'
    assert fg.main(['eyes', demos, '--out', vlm, *few]) == 0
    log = json.loads((tmp_path / 'vlm/log.json').read_text())
    assert log['episodes'] == 7 and log['labels'].startswith('privileged')
    told = fg.ask([demos], fg.Look(), vlm, held=2, n=32)['demos']['held']
    assert 0 <= told['found'] <= 1 and sum(told['mistakes'].values()) <= 32
    assert round(32 * (1 - told['cue'])) >= sum(told['mistakes'].values())
    made = ['train', data, '--vlm', vlm, '--out', str(run), '--every', '1', *few]
    assert fg.main(made) == 0
    kept = json.loads((run / 'gate.json').read_text())
    assert [r['step'] for r in kept['rows']] == [1, 2]
    assert kept['rows'][0]['episodes'] == 2 and str(tmp_path) not in json.dumps(kept)
    saved = json.loads((run / 'checkpoint/config.json').read_text())
    assert [k for k in saved['input_features'] if 'images' in k] == [fg.CAMERA('wrist')]
    capsys.readouterr()
    assert fg.main(['probe', demos, data, '--policy', str(run / 'checkpoint')]) == 0
    said = capsys.readouterr().out
    assert 'history' in said and said.count('cue') == said.count('place') == 4


def test_a_policy_without_history_is_measured(recorded, tmp_path):
    look = fg.Look(frames=0, gates=True, freeze=False)
    tc = fg.TrainConfig(steps=1, batch=2, warmup=0, draw='at_motion', state_noise=0.1)
    rows = fg.curve(recorded[1], tmp_path / 'run', look, '', tc, every=1, held=3)
    assert rows[0]['episodes'] == 3 and 0 <= rows[0]['right'] <= 1


def test_both_cameras_have_their_sizes(recorded):
    look = fg.Look(cameras=('wrist', 'primary'), other=28)
    every = fg.opened(recorded[1], look, 2)[2]
    batch = every.batch([0])
    assert batch[fg.CAMERA('wrist')].shape[-1] == 56
    assert batch[fg.CAMERA('primary')].shape[-1] == 28


def test_an_unknown_camera_is_named(recorded):
    with pytest.raises(ValueError, match='top'):
        fg.opened(recorded[1], fg.Look(cameras=('top',)), 2)


def test_a_result_is_kept_with_its_policy(tmp_path):
    run = tmp_path / 'run'
    (run / 'checkpoint').mkdir(parents=True)
    (run / 'gate.json').write_text(json.dumps(dict(rows=[dict(right=0.9)], how={})))
    (run / 'checkpoint/provenance.json').write_text('{"commit": "c"}')
    rules = dict(episodes=50, control_rate=20)
    own = dict(task='RememberColor3-VLA-v0', standard=rules)
    own |= dict(protocol=rules | dict(episodes=100), server=dict(checkpoint='h'))
    played = [dict(seed=k, success=k > 0) for k in range(3)]
    result = dict(conventions=own, success=dict(n=3), seconds=1, seeds=[0, 1, 2])
    (tmp_path / 'r.json').write_text(json.dumps(result | dict(episodes=played)))
    out = tmp_path / 'kept.json'
    module = 'halo.benchmarks.first_gate'  # as a program of its own
    command = [sys.executable, '-m', module, 'keep', run, tmp_path / 'r.json', '--out', out]
    subprocess.run(command, check=True)
    kept = json.loads(out.read_text())
    assert kept['each'] == [False, True, True] and kept['checkpoint_sha256'] == 'h'
    # what was played counts, not what was asked for
    assert kept['differs'] == ['episodes: 3 instead of 50']
    assert kept['provenance'] == dict(commit='c') and kept['curve'][0]['right'] == 0.9


def test_a_curve_ends_where_the_training_ends(tmp_path, monkeypatch):
    "Steps that are no multiple of `every` are trained too, and measured."
    from halo.train import decision
    from halo.train.loop import TrainConfig

    def train(dataset, out, tc, until, **how):
        out.mkdir(parents=True, exist_ok=True)
        row = json.dumps(dict(step=until, loss=1.0, seconds=2.0))
        (out / 'log.jsonl').write_text(row + '\n')
        return out

    monkeypatch.setattr(decision, 'train', train)
    monkeypatch.setattr(decision, 'measured', lambda folder, held: dict(right=1.0))
    for steps, every, want in ((7, 3, [3, 6, 7]), (6, 3, [3, 6]), (2, 5, [2])):
        rows = decision.gate(None, None, tmp_path / f'{steps}', TrainConfig(steps), every)
        assert [r['step'] for r in rows] == want
