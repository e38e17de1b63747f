"""The plan against the whole program: command line, JSON, and sizes that must agree between
planning and the model.
"""

import json
import subprocess
import sys

import pytest

from halo import cli
from halo.method.config import preset
from halo.train.plan import (
    GPUS,
    Run,
    advise,
    main,
    memory,
    parser,
    plan,
    roofline,
    run_of,
    tick_cost,
)

PAPER = (
    '--preset paper --gpu a100-40g --count 32 --batch 1280 --accumulate 4 --views'
    ' 224x224,224x224'.split()
)


def test_paper_run_fits_and_fills_two_weeks(capsys):
    assert main([*PAPER, '--days', '14', '--json']) == 0
    p = json.loads(capsys.readouterr().out)
    assert (
        (p['micro'], p['replicate'], p['shard'], p['batch']) == (10, 4, 8, 1280)
        and p['fits']
        and not p['advice']
    )
    assert (
        p['total'] == pytest.approx(sum(p['memory'].values()))
        and p['steps'] * p['seconds']['all'] <= 14 * 86400
    )


@pytest.mark.parametrize('gpu', ['a6000', 'rtx4090'])
def test_advice_makes_it_fit_and_keeps_the_batch(gpu):
    run = Run(preset('paper'), gpu, micro=8, accumulate=16, views=((224, 224),))
    words, fixed = advise(run)
    assert (
        words
        and sum(memory(run).values())
        > GPUS[gpu].memory * 2**30
        >= sum(memory(fixed).values())
        and fixed.batch == run.batch
    )


def test_more_of_anything_costs_more():
    base = Run(preset('small'), 'h100', 8, micro=2)
    total = lambda **kw: sum(
        memory(Run(preset('small'), 'h100', 8, **{'micro': 2} | kw)).values()
    )
    assert (
        total(micro=4) > total() > total(freeze=('vision',))
        and total(checkpointing='none') > total(checkpointing='blocks') > total()
        and total(replicate=8) > total()
    )
    assert plan(base)['seconds']['all'] > 0


def test_streaming_saves_and_hops_cost():
    cost = {
        s: sum(tick_cost('paper', streaming=s).values()).flops for s in (True, 'hop', False)
    }
    assert cost[True] < cost['hop'] < cost[False]
    assert sum(roofline(tick_cost('paper'), 'a6000', 1, 1).values()) > 1 / 30


def test_wrong_arguments_have_one_sentence(capsys):
    for argv in (
        ['--gpu', 'abacus'],
        ['--batch', '100', '--count', '32'],
        ['--preset', 'huge'],
        ['--count', '8', '--replicate', '3'],
    ):
        assert main(argv) == 2 and capsys.readouterr().err.count('\n') == 1
    assert run_of(parser().parse_args(PAPER)).batch == 1280


def test_console_without_heavy_imports():
    code = (
        "import sys; from halo import cli; cli.main(['--version']); assert 'torch' not in"
        " sys.modules"
    )
    assert (
        'halo 0.'
        in subprocess.run(
            [sys.executable, '-c', code], capture_output=True, text=True, check=True
        ).stdout
    )


def test_module_runs_and_refuses():
    out = subprocess.run(
        [sys.executable, '-m', 'halo.cli', 'fly'], capture_output=True, text=True
    )
    assert out.returncode and all(k in out.stderr for k in cli.COMMANDS)
