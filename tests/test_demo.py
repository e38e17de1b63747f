"""The demonstration's command: defaults, refusals, shipping, both modes in miniature."""

import json

import pytest

from halo.sim.evaluate import EvalResult
from halo.studies import demo


def options(*argv):
    return demo.defaults(demo.parser().parse_args(argv))


def test_variants_differ_in_one_field():
    from halo.policy.configuration_halo import HaloConfig

    full = HaloConfig(device='cpu', **demo.VARIANTS['full']).model
    assert full.salr.enabled and full.sampling.history_frames > 0
    assert HaloConfig(device='cpu', **demo.VARIANTS['no_history']).model == full.but(
        sampling__history_frames=0
    )
    assert HaloConfig(device='cpu', **demo.VARIANTS['no_salr']).model == full.but(
        salr__enabled=False
    )


def test_evaluation_seeds_are_unseen():
    assert (
        len(demo.SEEDS) >= 60
        and min(demo.SEEDS) > demo.FRESH_SEED + options().episodes
        and options('--train-from-scratch').episodes < demo.FRESH_SEED
    )


def test_quick_leaves_what_ships_alone():
    quick, real = (
        options('--train-from-scratch', '--quick'),
        options('--train-from-scratch'),
    )
    for k in ('checkpoints', 'data', 'runs', 'out'):
        assert getattr(quick, k) != getattr(real, k)


@pytest.mark.parametrize(
    'argv, says',
    [
        (['--seeds', '0'], '--seeds is 0'),
        (['--episodes', '-1'], '--episodes is -1'),
        (['--checkpoints', 'nowhere'], '--train-from-scratch'),
    ],
)
def test_bad_input_is_one_sentence(argv, says, capsys):
    assert demo.main(argv) == 1
    said = capsys.readouterr().err.strip()
    assert says in said and '\n' not in said and 'Traceback' not in said


def test_shipping_replaces_whole_folders(tmp_path):
    (tmp_path / 'run/checkpoint/training_state').mkdir(parents=True)
    (tmp_path / 'run/checkpoint/training_state/optimizer.safetensors').write_text('big')
    (tmp_path / 'run/log.jsonl').write_text('{}')
    for text in ('old', 'new'):
        (tmp_path / 'run/checkpoint/model.safetensors').write_text(text)
        demo.ship(tmp_path / 'run', tmp_path / 'shipped/full')
    assert {p.name: p.read_text() for p in (tmp_path / 'shipped/full').iterdir()} == {
        'model.safetensors': 'new',
        'log.jsonl': '{}',
    }
    assert [p.name for p in (tmp_path / 'shipped').iterdir()] == ['full']


def test_an_evaluation_is_reused_only_for_the_same_weights_and_seeds(tmp_path):
    (tmp_path / 'model.safetensors').write_text('weights')
    made = EvalResult(
        [dict(seed=s, success=True, ticks=1, task='t') for s in (1, 2)],
        dict(policy=dict(checkpoint_sha256=demo.sha256(tmp_path / 'model.safetensors'))),
    )
    file = made.save(tmp_path / 'r.json')
    assert demo.reusable(file, tmp_path, [1, 2], 0).seeds == [1, 2]
    assert (
        demo.reusable(file, tmp_path, [1, 3], 0) is None
        and demo.reusable(file, tmp_path, [1, 2], 1) is None
        and demo.reusable(tmp_path / 'none.json', tmp_path, [1, 2], 0) is None
    )
    (tmp_path / 'model.safetensors').write_text('others')
    assert demo.reusable(file, tmp_path, [1, 2], 0) is None


@pytest.mark.sim
@pytest.mark.slow
def test_both_modes_in_miniature(tmp_path, capsys):
    common = [
        '--quick',
        '--checkpoints',
        f'{tmp_path}/checkpoints',
        '--out',
        f'{tmp_path}/out',
    ]
    assert (
        demo.main(
            [
                '--train-from-scratch',
                *common,
                '--data',
                f'{tmp_path}/data',
                '--runs',
                f'{tmp_path}/runs',
            ]
        )
        == 0
    )
    shipped = tmp_path / 'checkpoints/full'
    assert {
        'model.safetensors',
        'config.json',
        'provenance.json',
        'log.jsonl',
        'evaluation.json',
        'policy_preprocessor.json',
        'policy_postprocessor.json',
    } <= {p.name for p in shipped.iterdir()}
    assert not list(shipped.rglob('optimizer*'))
    before = {
        p: p.stat().st_mtime_ns
        for p in (tmp_path / 'checkpoints').rglob('model.safetensors')
    }
    assert demo.main([*common, '--data', f'{tmp_path}/fresh']) == 0
    # the demonstration changes no checkpoint
    assert 'reused' in capsys.readouterr().out and before == {
        p: p.stat().st_mtime_ns for p in before
    }
    assert (
        len(json.loads((tmp_path / 'out/results/full.json').read_text())['episodes']) == 2
    )
    assert (tmp_path / 'out/report.html').read_text().count('<video') == 6
