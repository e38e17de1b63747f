"""Simulators and robots that live elsewhere: the benchmark's own code where a clone is
present, LeRobot's real command on a mock robot, and the thin clients' imports.
"""

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from browser import chromium

root = Path(__file__).resolve().parent.parent
clone = os.environ.get('CALVIN_ROOT')
needs_clone = pytest.mark.skipif(
    not clone, reason='needs CALVIN_ROOT, a clone of github.com/mees/calvin with calvin_env'
)
needs_python = lambda name: pytest.mark.skipif(
    not os.environ.get(name),
    reason=f'needs {name}, the interpreter of that simulator\'s environment',
)


HEAVY = 'torch lerobot transformers fastcore scipy gymnasium PIL openpi_client websockets'
HEAVY = HEAVY.split()


THIN = 'thin calvin memory simpler robot demonstrations mikasa robomme_demos'.split()


@pytest.mark.parametrize('module', THIN)
def test_thin_modules_import_numpy_only(module):
    "In the simulator's environment there is no torch, no lerobot, no fastcore."
    code = f'''
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {HEAVY!r}:
            raise ImportError(f'{{name}} imported by a thin module')
sys.meta_path.insert(0, Refuse())
import halo.benchmarks.{module}
'''
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-600:]


@pytest.mark.parametrize('module', [m for m in THIN if m != 'robot'])
def test_thin_modules_parse_on_python_3_10(module):
    import ast

    ast.parse((root / f'halo/benchmarks/{module}.py').read_text(), feature_version=(3, 10))
    for line in (root / f'halo/benchmarks/{module}.py').read_text().splitlines():
        compile_fstrings(line)


def compile_fstrings(line):
    """Python 3.10 and 3.11 read an f-string as a token: no quote of its own kind inside a
    replacement field.
    """
    import io
    import tokenize

    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(line.strip()).readline))
    except (tokenize.TokenError, IndentationError, SyntaxError):
        return
    starts = []
    for t in tokens:
        if t.type == getattr(tokenize, 'FSTRING_START', -1):
            quote = t.string.lstrip('rfbRFB')
            assert quote not in starts, (
                f'an f-string reuses its quote: {line.strip()[:120]}'
            )
            starts.append(quote)
        elif t.type == getattr(tokenize, 'FSTRING_END', -1):
            starts.pop()
        elif t.type == tokenize.STRING and starts:
            assert t.string.lstrip('rbRB')[0] != starts[-1][0], (
                f'an f-string reuses its quote: {line.strip()[:120]}'
            )


def benchmark_module(name):
    "A module of the user's CALVIN clone, without the training package that it belongs to."
    folder = Path(clone) if (Path(clone) / 'calvin_models').exists() else Path(clone).parent
    file = folder / f'calvin_models/calvin_agent/evaluation/{name}.py'
    if not file.exists():
        pytest.skip(f'{clone} holds no calvin_models')
    return file


@needs_clone
def test_initial_scenes_are_the_benchmarks():
    """The benchmark's own function, cut out of its file (the rest needs its training
    package), gives our 192 scenes to the last bit.
    """
    import ast
    import contextlib

    from halo.benchmarks.calvin import ROBOT, fnv1, initial_scene, initial_states

    tree = ast.parse(benchmark_module('utils').read_text())
    wanted = [
        n
        for n in tree.body
        if isinstance(n, ast.FunctionDef)
        and n.name in ('temp_seed', 'get_env_state_for_initial_condition')
    ]
    space = dict(
        np=np, pi=np.pi, contextlib=contextlib, hasher=lambda text: fnv1(text.encode())
    )
    exec(compile(ast.Module(wanted, []), 'utils', 'exec'), space)
    for state in initial_states():
        robot, scene = space['get_env_state_for_initial_condition'](state)
        assert np.array_equal(scene, initial_scene(state)) and np.array_equal(
            robot, ROBOT
        ), state


@needs_clone
def test_instructions_and_rules_are_the_benchmarks():
    from halo.benchmarks.calvin import TASKS, instruction, rules

    lines = (
        benchmark_module('utils').parents[2]
        / 'conf/annotations/new_playtable_validation.yaml'
    )
    import yaml

    assert {k: v[0] for k, v in yaml.safe_load(lines.read_text()).items()} == {
        t: instruction(t) for t in TASKS
    }
    stub = types.ModuleType('calvin_agent.evaluation.utils')
    stub.temp_seed = None
    names = {
        'calvin_agent': types.ModuleType('calvin_agent'),
        'calvin_agent.evaluation': types.ModuleType('calvin_agent.evaluation'),
        'calvin_agent.evaluation.utils': stub,
    }
    sys.modules.update(names)
    try:
        spec = importlib.util.spec_from_file_location(
            'multistep', benchmark_module('multistep_sequences')
        )
        theirs = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(theirs)
    finally:
        for n in names:
            del sys.modules[n]
    tuples = lambda d: {k: tuple(v) if isinstance(v, list) else v for k, v in d.items()}
    same = {
        t: [({'grasped': 0, **tuples(p['condition'])}, p['effect']) for p in pairs]
        for t, pairs in theirs.tasks.items()
    }
    assert list(same) == list(TASKS)
    # an effect that repeats its condition changes nothing
    free = lambda pairs: [
        ({**c}, {k: v for k, v in e.items() if not (k == 'grasped' and c['grasped'] == v)})
        for c, e in pairs
    ]
    assert {t: free(p) for t, p in same.items()} == {t: free(p) for t, p in rules().items()}


@needs_clone
@pytest.mark.sim
@pytest.mark.slow
@needs_python('HALO_CALVIN_PYTHON')
def test_every_predicate_fires_in_the_clone():
    done = subprocess.run(
        [os.environ['HALO_CALVIN_PYTHON'], str(root / 'clients/calvin.py'), '--check'],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and '34 of 34 predicates' in done.stdout, (
        done.stdout[-1500:] + done.stderr[-800:]
    )


def test_a_client_without_its_simulator_says_what_to_do(tmp_path):
    for client, word in (
        ('calvin', 'CALVIN_ROOT'),
        ('maniskill', 'configs/requirements/maniskill.txt'),
        ('simpler', 'configs/requirements/simpler.txt'),
    ):
        env = {k: v for k, v in os.environ.items() if k != 'CALVIN_ROOT'}
        done = subprocess.run(
            [sys.executable, str(root / f'clients/{client}.py')],
            env=env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode and word in done.stderr, (client, done.stderr[-400:])


def test_robommes_client_does_not_hide_its_package(tmp_path):
    """clients/robomme.py has the name of the benchmark's package, which LeRobot's class
    imports.
    """
    for name, text in (
        ('lerobot/envs/robomme', 'import robomme.env_record_wrapper'),
        ('robomme/env_record_wrapper', 'raise SystemExit("the package was found")'),
    ):
        file = tmp_path / f'{name}.py'
        file.parent.mkdir(parents=True)
        file.write_text(text)
        for folder in file.relative_to(tmp_path).parents[:-1]:
            (tmp_path / folder / '__init__.py').touch()
    done = subprocess.run(
        [sys.executable, str(root / 'clients/robomme.py')],
        env=os.environ | {'PYTHONPATH': str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert 'the package was found' in done.stderr, done.stderr[-400:]


def test_a_kept_check_has_no_rate(tmp_path, monkeypatch):
    """scripts/sim_check.py --keep: one file for all simulators, each under its name, later
    runs in place of earlier ones; random weights get no rate.
    """
    monkeypatch.syspath_prepend(str(root / 'scripts'))
    import sim_check

    kept, out = tmp_path / 'sims.json', tmp_path / 'out.json'
    for client, ticks in (('calvin', 1), ('robomme', 2), ('calvin', 3)):
        out.write_text(
            json.dumps(
                dict(
                    benchmark=client,
                    success=dict(rate=0),
                    per_task={},
                    seconds=1,
                    conventions=dict(server=dict(weights='random')),
                    episodes=[dict(ticks=ticks)],
                )
            )
        )
        sim_check.keep(kept, client, out)
    d = json.loads(kept.read_text())
    assert {k: v['episodes'][0]['ticks'] for k, v in d.items()} == dict(
        calvin=3, robomme=2
    ) and all('success' not in v and 'per_task' not in v for v in d.values())
    shipped = json.loads((root / 'bench/sims.json').read_text())
    assert {*shipped} == {*sim_check.SHAPES} and all(
        v['conventions']['server']['weights'] == 'random' for v in shipped.values()
    )


def rollout(
    tmp_path,
    robot,
    *more,
    duration=2,
    seed=0,
    task='put the puck on the pad that flashed red',
):
    "LeRobot's own lerobot-rollout with the shipped checkpoint; what the mock robot logged."
    env = os.environ | {
        'PYTHONPATH': os.pathsep.join(
            [str(root), str(root / 'tests'), os.environ.get('PYTHONPATH', '')]
        ),
        'HF_LEROBOT_CALIBRATION': str(tmp_path / 'calibration'),
        'OMP_NUM_THREADS': '1',
    }
    done = subprocess.run(
        [
            str(Path(sys.executable).parent / 'lerobot-rollout'),
            '--strategy.type=base',
            f'--policy.path={root}/checkpoints/flash_place/full',
            '--robot.discover_packages_path=mock_arm',
            f'--robot.type={robot}',
            f'--robot.seed={seed}',
            f'--robot.log={tmp_path}/log.json',
            f'--task={task}',
            '--fps=10',
            f'--duration={duration}',
            '--play_sounds=false',
            '--return_to_initial_position=false',
            '--device=cpu',
            *more,
        ],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2500:]
    return json.loads((tmp_path / 'log.json').read_text())


@pytest.mark.slow
def test_lerobot_rollout_drives_a_mock_robot(tmp_path):
    log = rollout(tmp_path, 'mock_arm')
    actions = np.array(log['actions'])
    assert (
        log['robot'] == 'mock_arm'
        and len(actions) >= 3
        and actions.shape[1] == 4
        and np.isfinite(actions).all()
        and actions.std(0).min() > 0
    )
    # LeRobot looks once before the loop, then once per action
    assert log['looks'] == len(actions) + 1


@pytest.mark.sim
@pytest.mark.slow
def test_lerobot_rollout_solves_the_task_on_a_mock_robot(tmp_path):
    from halo.sim.flash_place import EVAL_SEED, FlashPlaceEnv

    probe = FlashPlaceEnv(cameras=())
    probe.reset(seed=EVAL_SEED)
    log = rollout(
        tmp_path, 'mock_flash_arm', duration=25, seed=EVAL_SEED, task=probe.task_description
    )
    assert log['success'] and log['ticks'] <= 70, {
        k: v for k, v in log.items() if k != 'actions'
    }


def test_simpler_message_round_trip(tmp_path):
    """Recorded messages: what each robot's client sends and what its simulator receives,
    against a file that SciPy's rotations made.
    """
    from scipy.spatial.transform import Rotation

    from halo.benchmarks.simpler import DIALECTS, Gripper, example, observe, to_simulator

    for robot, d in DIALECTS.items():
        record = json.loads((root / f'tests/simpler_{robot}.json').read_text())
        images, state = observe(d, example(robot))
        assert (
            np.allclose(state, record['state'], atol=1e-6)
            and list(images['primary'].shape) == record['image_shape']
            and int(images['primary'].astype(int).sum()) == record['image_sum']
        )
        gripper = Gripper(d)
        sent = [to_simulator(a, gripper) for a in record['policy_actions']]
        assert np.allclose(sent, record['simulator_actions'], atol=1e-6)
        assert np.allclose(
            [s[3:6] for s in sent],
            Rotation.from_euler(
                'xyz', [a[3:6] for a in record['policy_actions']]
            ).as_rotvec(),
            atol=1e-9,
        )


@pytest.mark.browser
@pytest.mark.skipif(chromium() is None, reason='needs Debian\'s Chromium')
def test_the_scoring_form_in_a_browser(tmp_path):
    "Two trials entered with clicks; the download is what read_form takes."
    from playwright.sync_api import sync_playwright

    from halo.benchmarks.robot import Sheet, read_form, schedule, write_form

    sheet = Sheet({'A': 'a', 'B': 'b'}, share=0.1)
    form = write_form(sheet, tmp_path / 'form.html')
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=chromium(), args=['--no-sandbox'])
        page = b.new_page()
        errors = []
        page.on('pageerror', lambda e: errors.append(str(e)))
        page.goto(form.as_uri())
        for k in range(2):
            for _ in schedule(sheet)[k]['steps']:
                page.locator('button:enabled', has_text='yes').last.click()
            page.fill('#note', f'note {k}')
            page.click('#next')
        with page.expect_download() as d:
            page.click('#save')
        d.value.save_as(tmp_path / 'trials.json')
        b.close()
    doc = read_form(sheet, tmp_path / 'trials.json', tmp_path / 'result.json')
    assert (
        not errors
        and [e['success'] for e in doc['episodes']] == [True, True]
        and [e['note'] for e in doc['episodes']] == ['note 0', 'note 1']
    )


@pytest.mark.parametrize(
    'names',
    [('image', 'wrist_image'), ('camera1', 'camera2')],
    ids=['lerobot 0.6.1', 'its successor'],
)
def test_robomme_whatever_its_cameras_are_called(names):
    from halo.benchmarks.memory import RoboMME

    env = object.__new__(RoboMME)
    env.prompt = 'press the button'
    front, wrist = (np.full((4, 4, 3), i, np.uint8) for i in (1, 2))
    images, state, _ = env.seen(
        dict(pixels=dict(zip(names, (front, wrist))), agent_pos=np.zeros(8))
    )
    assert images['primary'] is front and images['wrist'] is wrist
