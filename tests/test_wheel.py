"""As a wheel without the clone, and as a clone used from elsewhere: the same commands, from
a working directory whose name has a space and an umlaut.
"""

import ast
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from halo.data.files import SHIPS, ships

# Two builds, an installation and dozens of processes: what needs them is slow
root = Path(__file__).resolve().parent.parent
shared = Path(sys.executable).parent  # the environment's commands
pip = [sys.executable, '-m', 'pip', '--quiet', '--disable-pip-version-check']
offline = ['--no-deps', '--no-index']


def sh(*command, **kwargs):
    "Run a command that must succeed; returns what it printed."
    command = [str(c) for c in command]
    done = subprocess.run(command, capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, f'{command}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}'
    return done.stdout


def state(folder):
    "What would change if something were written into `folder`."
    return {
        p.relative_to(folder): (p.stat().st_size, p.stat().st_mtime_ns)
        for p in folder.rglob('*')
    }


@pytest.fixture(scope='module')
def clone(tmp_path_factory):
    "What git holds of this tree, in a folder of its own."
    if not (root / '.git').exists():
        pytest.skip('needs the repository: without git nobody knows what it holds')
    to = tmp_path_factory.mktemp('a') / 'Klon für Größeres'
    for name in sh('git', 'ls-files', '-z', cwd=root).split('\0'):
        if name and (root / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, to / name)
    return to


def build(source, to):
    "The wheel of a clone or an sdist."
    sh(*pip, 'wheel', *offline, '--no-build-isolation', '-w', to, source)
    (found,) = to.glob('*.whl')
    return found


@pytest.fixture(scope='module')
def wheel(clone, tmp_path_factory):
    "Built from a copy: the clone itself stays as git holds it."
    source = tmp_path_factory.mktemp('b') / 'source'
    shutil.copytree(clone, source)
    return build(source, tmp_path_factory.mktemp('wheel'))


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
    "The folder of an installed wheel, and nothing of the clone."
    to = tmp_path_factory.mktemp('c') / 'Räder und Teile'
    sh(*pip, 'install', *offline, '--target', to, wheel)
    return to


class Door:
    "HALO as it lies in `home`, used from a folder `cwd` in which nobody has been."

    def __init__(self, home, cwd):
        self.home, self.cwd = home, cwd
        self.cwd.mkdir(parents=True)
        (cwd.parent / 'nobody').mkdir()
        self.env = {
            k: v for k, v in os.environ.items() if not k.startswith(('HF_HOME', 'XDG_'))
        }
        self.env |= dict(
            PYTHONPATH=str(home), HOME=str(cwd.parent / 'nobody'), OMP_NUM_THREADS='1'
        )
        self.before = state(home)

    def start(self, *command, **kwargs):
        command = [str(c) for c in command]
        return subprocess.Popen(
            command,
            cwd=self.cwd,
            env=self.env,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **kwargs,
        )

    def __call__(self, *command, status=0):
        "Standard output and error of a command that ends with `status`."
        process = self.start(*command)
        out, err = process.communicate()
        assert process.returncode == status, f'{command}\n{out[-1500:]}\n{err[-3000:]}'
        return out, err

    def halo(self, *args, **kwargs):
        return self(sys.executable, '-m', 'halo.cli', *args, **kwargs)


@pytest.fixture(params=['wheel', 'clone'])
def door(request, tmp_path):
    "Both ways in; a wheel's folder is the same after every command."
    home = request.getfixturevalue('installed' if request.param == 'wheel' else 'clone')
    door = Door(home, tmp_path / 'ein Ort für Läufe')
    door.packed = request.param == 'wheel'
    yield door
    if door.packed:
        assert state(home) == door.before, 'something was written among the modules'


# What is in it


@pytest.mark.slow
def test_a_wheel_of_an_sdist_is_the_wheel_of_the_clone(clone, wheel, tmp_path):
    source = tmp_path / 'source'
    shutil.copytree(clone, source)
    code = (
        'from setuptools.build_meta import build_sdist; import sys;'
        ' build_sdist(sys.argv[1])'
    )
    sh(sys.executable, '-c', code, tmp_path, cwd=source)
    (sdist,) = tmp_path.glob('*.tar.gz')
    content = [
        {
            n: hashlib.sha256(z.read(n)).digest()
            for n in z.namelist()
            if 'dist-info/' not in n
        }
        for z in map(zipfile.ZipFile, (wheel, build(sdist, tmp_path / 'out')))
    ]
    assert content[0] == content[1]


@pytest.mark.slow
def test_everything_that_ships_is_in_it(clone, installed):
    held = {
        p.relative_to(clone) for s in SHIPS for p in [clone / s, *(clone / s).rglob('*')]
    }
    want = {p for p in held if (clone / p).is_file()}
    assert want == {p for p in want if (installed / 'halo/shipped' / p).is_file()}
    assert not {'bench', 'tests', 'settings.ini'} & {p.name for p in installed.iterdir()}


def words(path):
    "Every text in a module, with f-strings' constant parts."
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


modules = [p for p in sorted((root / 'halo').rglob('*.py')) if p.name != '_modidx.py']


@pytest.mark.parametrize('path', modules, ids=lambda p: p.stem)
def test_no_text_names_what_a_wheel_lacks(path):
    targets = re.findall(r'^([a-z-]+):.*##', (root / 'Makefile').read_text(), re.M)
    assert 'demo-train' in targets
    for text in words(path):
        asked = re.search(rf'\bmake ({"|".join(targets)})\b(?! (?:the|a|it|sure))', text)
        assert not asked, f'a wheel has no Makefile: {text!r}'
        assert 'pip install -e' not in text, f'a wheel is no clone: {text!r}'
        for name in re.findall(
            r'(?<![\w/.])(?:scripts|configs|clients|checkpoints|nbs|bench|tests)/[\w./-]*\w',
            text,
        ):
            assert ships(name), f'{name} does not ship: {text!r}'


# What it does


@pytest.mark.slow
def test_it_is_the_one_that_is_meant(door):
    code = "import halo, halo.data.files as f; print(halo.__file__); print(f.CLONE)"
    file, clone = door(sys.executable, '-c', code)[0].splitlines()
    assert Path(file) == door.home / 'halo/__init__.py'
    assert clone == ('None' if door.packed else str(door.home))
    assert 'usage: halo COMMAND' in door.halo()[0]
    assert re.fullmatch(r'halo \d+\.\d+\.\d+\n', door.halo('--version')[0])
    if door.packed:
        assert door(door.home / 'bin/halo', '--version') == door.halo('--version')


@pytest.mark.slow
def test_shipped_files_are_named_where_they_are(door):
    for name in (
        'configs/requirements/libero.txt',
        'checkpoints/flash_place/full',
        'constraints.txt',
    ):
        path = Path(door.halo('files', name)[0].strip())
        assert (
            path.exists()
            and path.is_relative_to(door.home)
            and path.as_posix().endswith(name)
        )
    assert 'configs/mixtures' in door.halo('files')[0]
    assert 'does not come with HALO' in door.halo('files', 'bench/cpu.json', status=1)[1]


@pytest.mark.slow
def test_commands_that_read_what_ships(door):
    "One process for all: what takes the time is to import PyTorch and LeRobot."
    commands = [
        ('mixture', 'show', 'oxe'),
        ('reproduce', 'table6'),
        ('bench', '--help'),
        ('plan', '--preset', 'tiny', '--gpu', 'rtx4090', '--batch', '8'),
    ]
    code = (
        'import sys; from halo import cli; from halo.studies import baselines\n'
        f'for argv in {commands}:\n'
        '    try: status = cli.main(argv)\n'
        '    except SystemExit as e: status = e.code\n'
        '    assert not status, (argv, status)\n'
        'sys.exit(baselines.main(["table"]))'
    )
    out = door(sys.executable, '-c', code)[0]
    for said in (
        'IPEC-COMMUNITY',
        'MF yes SALR yes',
        'McNemar against HALO: p',
        '--preset',
        'SmolVLA architecture',
    ):
        assert said in out, out
    assert 'holds no evaluation' not in out and not list(door.cwd.iterdir())


@pytest.mark.slow
def test_a_shipped_policy_is_served(door):
    policy = door.halo('files', 'checkpoints/flash_place/full')[0].strip()
    server = door.start(
        sys.executable, '-m', 'halo.cli', 'serve', '--policy', policy, '--port', 0
    )
    try:
        said = server.stdout.readline()
        assert re.search(r'\(halo\) on ws://127.0.0.1:\d+$', said.strip()), (
            said + server.stderr.read()
        )
        server.send_signal(signal.SIGINT)
        assert (
            server.communicate(timeout=60)[0].strip() == 'stopped'
            and server.returncode == 0
        )
    finally:
        server.kill()
        server.wait()


@pytest.mark.slow
def test_lerobot_finds_the_plugin(door):
    code = (
        'from importlib.metadata import distribution as d;'
        ' print(d("lerobot_policy_halo").locate_file(""))\nfrom importlib.util import'
        ' find_spec; print(find_spec("lerobot_policy_halo").origin)'
    )
    dist, module = map(Path, door(sys.executable, '-c', code)[0].splitlines())
    assert module == door.home / 'lerobot_policy_halo.py' and (
        dist == door.home or not door.packed
    )
    asked = [
        '--policy.type=halo',
        '--policy.preset=tiny',
        '--policy.push_to_hub=false',
        '--output_dir=out',
        '--dataset.repo_id=me/none',
        f'--dataset.root={door.cwd}/none',
    ]
    # as far as the data set, which is not there
    err = door(shared / 'lerobot-train', *asked, status=1)[1]
    assert "'type': 'halo'" in err and 'none' in err.splitlines()[-1], err[-2000:]


@pytest.mark.slow
def test_a_client_needs_no_installation(door):
    client = door.halo('files', 'clients/calvin.py')[0].strip()
    door.env.pop('CALVIN_ROOT', None)
    del door.env['PYTHONPATH']
    assert 'CALVIN_ROOT is not set' in door(sys.executable, client, status=1)[1]
    client = client.replace('calvin.py', 'simpler.py')
    said = door(sys.executable, client, status=1)[1].splitlines()[-1]
    assert (
        str(door.home) in said
        and Path(re.search(r'see (.*simpler\.txt)', said)[1]).is_file()
    )


@pytest.mark.sim
@pytest.mark.slow
def test_the_demonstration_in_miniature(door):
    out = door(sys.executable, '-m', 'halo.studies.demo', '--quick')[0]
    place = door.cwd if door.packed else door.home
    assert 'The report is' in out and (place / 'outputs/quick/out/report.html').is_file()
    assert not door.packed or {p.name for p in door.cwd.iterdir()} == {'outputs'}


# Records without weights


@pytest.mark.parametrize('name', ['act', 'diffusion', 'smolvla'])
def test_a_record_without_weights_says_so(name, monkeypatch, tmp_path):
    from lerobot.configs import PreTrainedConfig

    from halo.benchmarks import suite as benchmarks
    from halo.sim.evaluate import config_hash, load_policy
    from halo.studies import baselines

    monkeypatch.chdir(tmp_path)  # as from anywhere
    folder = baselines.SHIPPED / name
    for load in (load_policy, baselines.load_baseline, benchmarks.load_any):
        with pytest.raises(
            ValueError,
            match=(
                f'baselines/{name} holds the record of a run, no'
                f' weights.*halo.studies.baselines train {name}'
            ),
        ):
            load(f'checkpoints/baselines/{name}')
    for file in folder.glob('*.json'):
        assert not re.search(r'"(runs|data|outputs|/)[^"]*/', file.read_text()), file
    hashed = baselines.load_results()[name].conventions['policy']['config_sha256']
    assert config_hash(PreTrainedConfig.from_pretrained(folder)) == hashed
