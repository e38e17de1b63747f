"""Studies: what is kept survives a killed process, and the tasks are what they say."""

import json
import multiprocessing
import os
import signal
import time

import pytest
import torch

from halo.studies import salr_study as S
from halo.studies import study as K


def toy(task, variant, seed, rate, share):
    "A run that takes no time; 4e-3 is its best rate."
    return dict(error=0.1 + 0.01 * seed + abs(rate - 4e-3), steps=round(10 * share))


def slow(task, variant, seed, rate, share):
    "A run during which there is time to be killed."
    time.sleep(0.2)
    return toy(task, variant, seed, rate, share)


def study(train=toy):
    "Two tasks, two variants, tuned on one of the tasks."
    return K.Study('toy', ('one', 'two'), ('a', 'b'), train, tuning_tasks=('one',))


CELLS = [(t, v) for t in ('one', 'two') for v in 'ab']


def test_a_study_is_resumed_and_not_repeated(tmp_path, capsys):
    K.run_study(study(), tmp_path, CELLS, 2, 1)
    assert capsys.readouterr().out.count('\n') == 2 * 6 + 2 * 4
    assert K.rate_of(study(), tmp_path, 'a') == 4e-3
    for t, v in CELLS:
        runs = K.kept(tmp_path, t, v)
        assert [r['seed'] for r in runs] == [0, 1]
        assert {r['rate'] for r in runs} == {4e-3} and {r['threads'] for r in runs} == {1}
        assert all({'commit', 'torch', 'seconds', 'error'} <= set(r) for r in runs)
    K.run_study(study(), tmp_path, CELLS, 3, 1)
    assert capsys.readouterr().out.count('\n') == 4, 'one more seed in each cell'
    assert [r['steps'] for r in K.kept(tmp_path, 'one', 'a', 'tuning')] == [5] * 6


def test_two_workers_share_a_study(tmp_path):
    K.run_study(study(slow), tmp_path, CELLS, 1, 2)
    assert K.left(study(), tmp_path, CELLS, 1) == []
    files = [json.loads(p.read_text())['runs'] for p in tmp_path.glob('*.json')]
    assert sum(map(len, files)) == 2 * 6 + 4


def test_a_killed_run_leaves_whole_files(tmp_path):
    spawn = multiprocessing.get_context('spawn')
    worker = spawn.Process(target=K.run_study, args=(study(slow), tmp_path, CELLS, 1, 1))
    worker.start()
    until = time.monotonic() + 60
    while len(list(tmp_path.glob('*.json'))) < 1 and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    done = sum(len(json.loads(p.read_text())['runs']) for p in tmp_path.glob('*.json'))
    todo = len(K.left(study(), tmp_path, CELLS, 1))
    assert 0 < done < 16 and todo == 16 - done
    # the claim of the killed run is free again, and only what is missing is made
    K.run_study(study(), tmp_path, CELLS, 1, 1)
    assert K.left(study(), tmp_path, CELLS, 1) == []


@pytest.mark.parametrize(
    'argv, said',
    [
        (['--cell', 'nowhere/linear'], "unknown task 'nowhere'; known are additive"),
        (['--cell', 'additive/nothing'], "unknown variant 'nothing'; known are linear"),
        (['--cell', 'additive'], "cell 'additive' is not of the form TASK/VARIANT"),
        (['--seeds', '0'], 'both must be 1 or more'),
    ],
)
def test_bad_names_are_refused_in_one_sentence(tmp_path, capsys, argv, said):
    with pytest.raises(SystemExit):
        S.main([*argv, '--out', str(tmp_path)])
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_unknown_study_is_refused():
    with pytest.raises(SystemExit, match="unknown study 'nothing'; known are salr"):
        K.main(['nothing'])


def test_medians_intervals_and_verdicts():
    mid, low, high = K.interval([1.0, 2.0, 3.0, 4.0, 100.0])
    assert mid == 3 and 1 <= low < 3 < high <= 100
    a = [dict(seed=s, error=0.5 + 0.01 * s) for s in range(8)]
    b = [dict(seed=s, error=1.0) for s in range(1, 9)]
    c = K.compare(a, b)
    assert 0.5 < c['low'] <= c['ratio'] <= c['high'] < 0.6 and c['verdict'] == 'better'
    assert (c['won'], c['seeds']) == (7, 7)
    assert K.verdict(0.9, 1.1) == 'no difference shown' and K.verdict(1.1, 2) == 'worse'
    assert K.compare(a[:3], b)['verdict'] == 'too few seeds'
    with pytest.raises(ValueError, match='no seed is in both'):
        K.ratios(a[:1], b)


def scene(n=2000):
    "Dots, robots, and the columns [state, red dot, 1] of a linear regression."
    g = torch.Generator().manual_seed(0)
    dots, robot = S.scatter(n, g), S.robots(n, g)
    return dots, robot, torch.cat([robot.state(), dots.flatten(1), torch.ones(n, 1)], 1)


def unexplained(x, y):
    "The share of the variance of y that no linear map of x explains."
    x, y = x.double(), y.double()
    best = torch.linalg.lstsq(x, y, rcond=1e-6, driver='gelsd').solution
    return float((y - x @ best).var() / y.var())


def test_only_the_additive_task_is_linear():
    dots, robot, x = scene()
    rest = {k: unexplained(x, S.target(t, dots, robot)[:, 0]) for k, t in S.TASKS.items()}
    assert rest['additive'] < 1e-9
    assert min(e for k, e in rest.items() if k != 'additive') > 0.1
    assert min(rest[k] for k in ('bilinear', 'hidden', 'history')) > 0.95


def test_every_task_is_linear_in_products_of_state_and_picture():
    dots, robot, x = scene()
    s = torch.cat([robot.state(), torch.ones(len(x), 1)], 1)
    pairs = torch.einsum('na,nb->nab', s, torch.cat([dots.flatten(1), s], 1)).flatten(1)
    for name, task in S.TASKS.items():
        y = S.target(task, dots, robot)
        assert y.shape == (len(x), S.CHUNK, 2) and (y == y[:, :1]).all()
        assert unexplained(pairs, y[:, 0]) < 1e-9, name
        assert 0.5 < float(y.var()) < 2


def test_a_state_has_mean_zero_and_variance_one():
    state = S.robots(20000, torch.Generator().manual_seed(1)).state()
    assert state.mean(0).abs().max() < 0.05 and (state.var(0) - 1).abs().max() < 0.05


def test_parameters_are_matched():
    own = {v: S.sizes(v)[0] for v in S.VARIANTS}
    assert all(abs(n / own['linear'] - 1) < 0.05 for n in own.values()), own


def test_a_run_is_repeated_to_the_last_bit():
    first, again = (S.train('hidden', 'film', 3, 4e-3, share=2 / 300) for _ in range(2))
    other = S.train('hidden', 'film', 4, 4e-3, share=2 / 300)
    assert first == again and first['steps'] == 2
    assert first['sha256'] != other['sha256']


def test_blind_models_start_as_those_that_see():
    cfg = S.config('history', 'linear')
    plain, fast = S.HaloModel(cfg), S.Blindfold(cfg)
    plain.embed.visual.load_state_dict(S.eyes())
    fast.load_state_dict(plain.state_dict(), strict=False)
    g = torch.Generator().manual_seed(5)
    pictures, state = S.draw(S.scatter(3, g)), S.robots(3, g).state()
    with torch.no_grad():
        a = plain.encode(S.observe(pictures, state, True)).cache[-1]
        b = fast.encode(S.Seen(S.look(pictures, True), state)).cache[-1]
    torch.testing.assert_close(a, b)
