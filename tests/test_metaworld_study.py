"""A policy for fifty tasks: what there is to do, what is kept of a run, and what a mean
over tiers is worth. None of these tests needs the simulator, except the one that is marked.
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from halo.benchmarks import metaworld_study as mw
from halo.benchmarks.metaworld_demos import tier_means, tiers

root = Path(__file__).resolve().parent.parent
STUDY = root / 'configs/studies/mt50_study.yaml'


@pytest.fixture
def study(tmp_path, monkeypatch):
    "The study in an empty place."
    monkeypatch.setattr(mw, 'place', lambda name: tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return mw.read_fifty(STUDY)


SHA = hashlib.sha256(b'weights').hexdigest()


def a_run(run, won=lambda task, trial: trial < 5, trials=10, sha=SHA):
    "A run that was trained and played, as the commands of a study leave it."
    (run / 'played').mkdir(parents=True)
    (run / 'policy').mkdir()
    (run / 'policy/model.safetensors').write_bytes(b'weights')
    rows = [dict(step=k, loss=1 / k, samples_per_s=32.0) for k in range(50, 301, 50)]
    (run / 'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    begun = dict(time=0, event='start at step 0 of 300: 1 processes', commit='c' * 40)
    (run / 'events.jsonl').write_text(json.dumps(begun) + '\n')
    step = run / 'checkpoints/step_00000300'
    step.mkdir(parents=True)
    (step / 'state.json').write_text(json.dumps(dict(step=300, run=dict(batch=32))))
    episodes = [
        dict(task=f'{tier}/{task}', episode=k, success=won(task, k))
        for k in range(trials)
        for task, tier in tiers().items()
    ]
    policy = dict(checkpoint_sha256=sha, history={}, salr={}, parameters=2)
    told = dict(policy=policy, differs=['quality'], versions={})
    result = dict(episodes=episodes, conventions=told)
    (run / 'played/result.json').write_text(json.dumps(result))
    (run / 'played/timings.json').write_text(json.dumps(dict(seconds=60.0, episodes=[])))
    return run


def test_the_commands_of_the_study_are_understood(study):
    from halo.benchmarks import demonstrations, metaworld_demos, suite
    from halo.train import scale

    parsers = {
        'halo.benchmarks.metaworld_demos': metaworld_demos.parser(),
        'halo.benchmarks.suite': suite.parser(),
        'halo.train.scale': scale._parser(''),
        'halo.benchmarks.metaworld_study': mw.parser(),
    }
    works = mw.everything(study)
    assert len(works) == 2 + 3 * len(study.variants) * len(study.seeds)
    for w in works:
        module, words = w.command[2], w.command[3:]
        if module in parsers:
            parsers[module].parse_args(words)
        else:
            assert module == demonstrations.__name__ and words[0] == 'convert'
    assert not any(w.done() for w in works)


def test_a_study_goes_on_from_another(study, monkeypatch):
    more = mw.some(mw.read_fifty(root / 'configs/studies/mt50_more.yaml'), ['halo'])
    assert 'init_from=runs/mt50/halo-0/policy' in more.changes('halo', 0)
    works = {w.name: w for w in mw.everything(more)}
    at = [*works].index
    for w in works.values():
        assert all(at(first) < at(w.name) for first in w.after), w.name
    assert 'train halo-0 of mt50' in works['train halo-0'].after
    assert not works['train halo-0 of mt50'].command[-1].startswith('init_from')
    monkeypatch.setattr(mw, 'has_policy', lambda run, steps: run.parent.name == 'mt50')
    left = [w.name for w in mw.everything(more) if not w.done()]
    assert left == ['record', 'convert', 'train halo-0', 'play halo-0', 'keep halo-0']


def test_a_third_study_keeps_all_that_it_began_with(study):
    crop = mw.read_fifty(root / 'configs/studies/mt50_crop.yaml')
    runs = [Path('runs/mt50_more/halo-0'), Path('runs/mt50/halo-0')]
    assert crop.begin('halo', 0) == runs[0] and crop.begins('halo', 0) == runs
    keep = mw.run_work(crop, 'halo', 0)[2].command
    a = mw.parser().parse_args(keep[keep.index('--keep') :])
    assert a.after == runs
    for run in (*runs, a.keep[0]):
        a_run(run)
    training = mw.kept_run(a.keep[0], a.after)['training']
    assert mw.spent(training).count('300 steps') == 3
    assert mw.seconds(training) == 3 * training['seconds']
    assert training['after']['after']['checkpoint_sha256'] == SHA


def test_data_goes_where_training_looks_for_it(study):
    moved = replace(study, set=('data.root=data/elsewhere',))
    assert mw.demonstrations_work(moved)[1].command[-1] == 'data/elsewhere'


def test_what_a_run_began_with_is_kept(study):
    begun, run = a_run(study.run('halo', 0)), a_run(Path('runs/more/halo-0'))
    file = study.record('halo', 0)
    assert mw.main(['--keep', str(run), str(file), '--after', str(begun)]) == 0
    first = json.loads(file.read_text())['training']['after']
    assert first['checkpoint_sha256'] == SHA and first['steps'] == 300
    assert '300 steps in 5 min, commit cccccccc, then 300 steps' in mw.report(study)


def test_demonstrations_and_evaluation_look_alike(study):
    record = mw.demonstrations_work(study)[0].command
    play = mw.run_work(study, 'halo', 0)[1].command
    for k, v in study.look.items():
        assert f'{k}={v}' in play
        assert k == 'every' or f'--{k}={v}' in record


def test_each_variant_is_what_it_is_called(study):
    from halo.policy.configuration_halo import HaloConfig
    from halo.train.scale import global_batch, read_config

    for variant in study.variants:
        c = read_config(root / study.config, study.changes(variant, 3))
        policy = HaloConfig(**c['policy'])
        blind = variant in ('no_history', 'neither')
        assert (policy.model.sampling.history_frames == 0) == blind
        assert policy.model.salr.enabled == (variant in ('halo', 'no_history'))
        assert c['run'].seed == 3 and Path(c['out']) == study.run(variant, 3)
        assert global_batch(c['run'], 1) == c['batch']


def test_a_picture_that_is_not_drawn_is_not_looked_at(study):
    mw.check_look(study)
    with pytest.raises(ValueError, match='n_action_steps is 8'):
        mw.check_look(replace(study, look=dict(every=16)))


def test_a_run_is_kept_with_what_made_it(study, capsys):
    run = a_run(study.run('halo', 0))
    file = study.record('halo', 0)
    assert mw.main(['--keep', str(run), str(file)]) == 0
    kept = json.loads(file.read_text())
    assert [*kept['each']] == [*tiers()] and sum(kept['each']['reach-v3']) == 5
    made = kept['training']
    assert made['steps'] == 300 and made['seconds'] == 300.0
    assert made['commits'] == ['c' * 40] and made['curve'][-1]['step'] == 300
    done = {w.name: w.done() for w in mw.run_work(study, 'halo', 0)}
    assert done == {'train halo-0': False, 'play halo-0': True, 'keep halo-0': True}
    short = replace(study, set=('run.steps=300',))
    assert all(w.done() for w in mw.run_work(short, 'halo', 0))
    (run / 'played/result.json').unlink()
    assert mw.main(['--keep', str(run), str(file)]) == 1
    assert 'play the policy first' in capsys.readouterr().err


def test_what_was_played_with_other_weights_does_not_count(study):
    run, file = a_run(study.run('halo', 0)), study.record('halo', 0)
    assert mw.main(['--keep', str(run), str(file)]) == 0
    assert mw.has_result(run) and mw.is_kept(file, run)
    (run / 'policy/model.safetensors').write_bytes(b'trained again')
    assert not mw.has_result(run) and not mw.is_kept(file, run)
    (run / 'policy/model.safetensors').write_bytes(b'weights')
    record = json.loads(file.read_text()) | dict(checkpoint_sha256='b' * 64)
    file.write_text(json.dumps(record))
    assert mw.has_result(run) and not mw.is_kept(file, run)


def test_the_report_says_what_was_run_and_what_was_not(study):
    won = lambda task, trial: tiers()[task] == 'easy' or trial < 3
    for seed in (0, 1, 2):
        run = a_run(study.run('halo', seed), won)
        assert mw.main(['--keep', str(run), str(study.record('halo', seed))]) == 0
        said = mw.report(replace(study, seeds=tuple(range(seed + 1))))
        assert ('trials alone' in said) == (seed < 2)
    assert 'not run: no_history, no_salr, neither' in said
    rates = {t: dict(successes=10 if g == 'easy' else 3, n=10) for t, g in tiers().items()}
    want = tier_means(rates)
    assert f'{100 * want["tiers"]:5.1f} %' in said and f'{100 * want["tasks"]:5.1f}' in said
    assert 'SmolVLA' in said


def test_the_interval_covers_the_truth():
    rng, hits, n = np.random.default_rng(0), 0, 200
    for _ in range(n):
        truth = rng.beta(0.3, 0.6, 50)  # many tasks that are never solved
        want = 100 * float(truth @ mw.weights()['tiers'])
        x = rng.random((1, 50, 10)) < truth[None, :, None]
        _, low, high = mw.tier_intervals(x.astype(float), 200)['tiers']
        hits += low <= want <= high
    assert hits >= 0.9 * n


def test_one_trial_has_no_interval(study):
    a_run(study.run('halo', 0), trials=1)
    assert mw.main(['--keep', str(study.run('halo', 0)), str(study.record('halo', 0))]) == 0
    said = mw.report(study)
    assert said.count('no interval') == 6 and '[100' not in said


def test_a_wrong_entry_is_named(tmp_path, capsys):
    file = tmp_path / 'a.yaml'
    file.write_text('{name: a, config: b, trails: 3}')
    assert mw.main([str(file), '--list']) == 1
    assert "'trails' is unknown" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        mw.main([])


@pytest.mark.sim
@pytest.mark.slow
def test_pictures_that_are_not_drawn_change_nothing(monkeypatch):
    from halo.benchmarks.suite import (
        PolicyPlayer,
        open_benchmark,
        random_policy,
        run_episode,
    )

    found = {}
    look = dict(history_frames=4, history_stride=4, chunk_size=8, n_action_steps=4)
    for every in (1, 4):
        bench = open_benchmark('metaworld', quality='plain', size=112, every=every)
        policy = random_policy(bench, 'tiny', **look)
        make = bench.make_env

        def short(task, episode, make=make):
            env = make(task, episode)
            env._max_episode_steps = 40
            return env

        object.__setattr__(bench, 'make_env', short)
        player = PolicyPlayer(*policy)
        found[every] = run_episode(bench, player, 'easy/reach-v3', 0)[0]
    assert found[1] == found[4] and found[1]['ticks'] == 40
    with pytest.raises(ValueError, match='every'):
        open_benchmark('metaworld', every=0)
