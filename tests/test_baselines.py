"""Baselines: the same ticks as HALO's, a training that can be killed, an evaluation that
repeats itself, shipped results that can be paired.
"""

import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch

from halo.data.history import HistoryDataset
from halo.method.config import preset
from halo.sim.flash_place import dataset_features
from halo.studies import baselines as B
from halo.train.loop import TrainConfig

needs = {'diffusion': 'diffusers', 'smolvla': 'num2words'}
NAMES = [
    pytest.param(
        n,
        marks=pytest.mark.skipif(
            n in needs and importlib.util.find_spec(needs[n]) is None,
            reason=f"needs {needs.get(n)}: pip install -e '.[baselines]'",
        ),
    )
    for n in ('act', 'diffusion', 'smolvla')
]
TASKS = [f'put the puck on the pad that flashed {c}' for c in ('red', 'blue')]
LENGTHS = (22, 18)


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    root, rng = tmp_path_factory.mktemp('data') / 'd', np.random.default_rng(0)
    features = {
        k: v | dict(dtype='image') if 'images' in k else v
        for k, v in dataset_features(112).items()
    }
    ds = LeRobotDataset.create('halo/test', 10, features, root, use_videos=False)
    for e, length in enumerate(LENGTHS):
        for t in range(length):
            pictures = {
                k: (
                    np.full((112, 112, 3), 10 * e + t, np.uint8)
                    + rng.integers(0, 99, (112, 112, 3), np.uint8)
                )
                for k in features
                if 'images' in k
            }
            ds.add_frame(
                pictures
                | {
                    'observation.state': np.float32([e, t, 0, 1]),
                    'action': np.float32([e, t, 0.5, -1]),
                    'task': TASKS[e],
                }
            )
        ds.save_episode()
    ds.finalize()
    return LeRobotDataset('halo/test', root)


def test_batches_are_the_dataset_s(dataset, tmp_path):
    data = B.Demonstrations(dataset, store_root=tmp_path / 's', progress=False)
    got, want = data.batch([3, 21, 22], n_obs=2), [dataset[i] for i in range(len(dataset))]
    camera = 'observation.images.wrist'
    # 22 is the first tick of episode 1
    for i, (before, now) in enumerate([(2, 3), (20, 21), (22, 22)]):
        assert torch.allclose(
            got[camera][i],
            torch.stack([want[before][camera], want[now][camera]]).float(),
            atol=1 / 255,
        )
        assert torch.equal(
            got['observation.state'][i],
            torch.stack(
                [want[before]['observation.state'], want[now]['observation.state']]
            ),
        )
    assert (
        got['action'][0, :3, 1].tolist() == [2, 3, 4] and not got['action_is_pad'][0].any()
    )
    assert (
        got['action'][1, :, 1].tolist() == [20, 21] + [21] * 14
        and got['action_is_pad'][1].tolist() == [False] * 2 + [True] * 14
    )
    assert got['action'][2, :3].tolist()[0] == got['action'][2, 1].tolist() and got[
        'action_is_pad'
    ][2, :3].tolist() == [True, False, False]
    assert got['task'] == [TASKS[0], TASKS[0], TASKS[1]]


def test_ticks_are_halo_s(dataset, tmp_path):
    halo = HistoryDataset(
        dataset,
        preset('tiny', chunk=16),
        dict(zip(dataset.meta.camera_keys, ('primary', 'wrist'))),
        store_root=tmp_path / 'h',
        progress=False,
    )
    assert halo.rows.tolist() == list(
        range(len(B.Demonstrations(dataset, store_root=tmp_path / 's', progress=False)))
    )


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_killed_training_goes_on(dataset, tmp_path, monkeypatch, name):
    monkeypatch.setattr(B, 'SMOLVLM', str(tmp_path / 'smolvlm'))
    tc = TrainConfig(steps=3, batch=2, lr=1e-4, warmup=1, log_every=1)
    whole = B.train_baseline(
        name, dataset, tmp_path / 'a', tc, store=tmp_path / 's', progress=False
    )
    for until in (2, None):
        again = B.train_baseline(
            name, dataset, tmp_path / 'b', tc, until, store=tmp_path / 's', progress=False
        )
    from safetensors.torch import load_file

    a, b = (load_file(f / 'model.safetensors') for f in (whole, again))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert [
        json.loads(l)['step'] for l in (tmp_path / 'b/log.jsonl').read_text().splitlines()
    ] == [1, 2, 3]
    kind, policy, pre, post = B.load_baseline(again)
    assert kind == name and sum(p.numel() for p in policy.parameters()) < 2e7
    assert any(isinstance(s, B.GoalColourStep) for s in pre.steps) == B.BASELINES[name].goal


@pytest.mark.parametrize('name', [n for n in NAMES if n.values == ('smolvla',)])
def test_a_trained_smolvla_needs_no_folder_of_its_machine(
    dataset, tmp_path, monkeypatch, name
):
    """Trained with tokenizer and sizes in one folder; loaded from elsewhere, where that
    folder is gone.
    """
    monkeypatch.setattr(B, 'SMOLVLM', tmp_path / 'there')
    tc = TrainConfig(steps=1, batch=2, lr=1e-4, warmup=1, log_every=1)
    B.train_baseline(
        name, dataset, tmp_path / 'run', tc, store=tmp_path / 's', progress=False
    )
    trained = json.loads((tmp_path / 'run/checkpoint/config.json').read_text())[
        'vlm_model_name'
    ]
    # an absolute path: LeRobot's own commands find it
    assert trained == str(tmp_path / 'there')
    shutil.rmtree(tmp_path / 'there')
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    monkeypatch.setattr(B, 'SMOLVLM', tmp_path / 'here')
    kind, policy, pre, _ = B.load_baseline(tmp_path / 'run/checkpoint')
    assert kind == name and policy.config.vlm_model_name == str(tmp_path / 'here')
    episode = dict(seed=1, success=True, ticks=1, task=TASKS[0])
    result = B.EvalResult([episode], dict(policy={}))
    target = B.ship_result(tmp_path / 'run', result, tmp_path / 'shipped/smolvla')
    assert not [f for f in target.glob('*.json') if str(tmp_path) in f.read_text()]
    assert json.loads((target / 'config.json').read_text())['vlm_model_name'] == B.MADE_BY
    assert (
        'train smolvla' in json.loads((target / 'provenance.json').read_text())['weights']
    )


def test_frozen_norms_come_back(dataset, tmp_path):
    folder = B.train_baseline(
        'act',
        dataset,
        tmp_path / 'a',
        TrainConfig(steps=1, batch=2, warmup=1),
        store=tmp_path / 's',
        progress=False,
    )
    norm = (
        B.load_baseline(folder)[1].model.backbone['bn1']
        if hasattr(B.load_baseline(folder)[1].model.backbone, '__getitem__')
        else B.load_baseline(folder)[1].model.backbone.bn1
    )
    assert not torch.equal(norm.running_var, torch.ones_like(norm.running_var))


@pytest.mark.parametrize(
    'changed', [dict(draw='at_motion'), dict(swap_colours=True), dict(state_noise=0.1)]
)
def test_what_a_baseline_would_ignore_is_refused(changed, tmp_path):
    (name,) = changed
    with pytest.raises(ValueError, match=f'{name}=.* leave {name} at'):
        B.train_baseline('act', None, tmp_path, TrainConfig(**changed))
    assert not any(tmp_path.iterdir())


def test_unknown_and_missing(dataset, tmp_path):
    with pytest.raises(ValueError, match='act, diffusion, smolvla'):
        B.make_baseline('rt2', dataset.meta)
    with pytest.raises(ValueError, match='config.json is missing'):
        B.load_baseline(tmp_path)
    for f in ('model.safetensors', 'policy_preprocessor.json', 'policy_postprocessor.json'):
        (tmp_path / f).write_text('')
    (tmp_path / 'config.json').write_text('{"type": "halo"}')
    with pytest.raises(ValueError, match="'halo'"):
        B.load_baseline(tmp_path)


def test_shipped_results_are_pairs():
    found = B.load_results()
    assert {'full', 'no_history', 'act', 'diffusion', 'smolvla'} <= set(found)
    rows = B.comparison(found)
    assert all(r['n'] == 60 and r['batch'] == 16 for r in rows) and all(
        (r['p'] is None) == (r['name'] == 'full') for r in rows
    )
    for n in B.BASELINES:
        if n in found:
            assert (
                found[n].conventions['training']['data']['frames'] == 16090
                and found[n].seeds == found['full'].seeds
            )
    assert B.table(rows).count('\n') == len(rows) + 1


@pytest.mark.sim
@pytest.mark.slow
def test_evaluation_repeats_itself(dataset, tmp_path):
    folder = B.train_baseline(
        'act',
        dataset,
        tmp_path / 'a',
        TrainConfig(steps=1, batch=2, warmup=1),
        store=tmp_path / 's',
        progress=False,
    )
    one, two = (B.evaluate_baseline(folder, [1_000_000], progress=False) for _ in range(2))
    keep = lambda r: [
        {k: v for k, v in e.items() if k != 'inference_ms'} for e in r.episodes
    ]
    assert keep(one) == keep(two) and len(one.episodes) == 1
    target = B.ship_result(tmp_path / 'a', one, tmp_path / 'out')
    assert (
        B.EvalResult.load(target / 'evaluation.json').conventions['policy']['type'] == 'act'
        and not (target / 'model.safetensors').exists()
    )
