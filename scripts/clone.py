"""A clone of this repository as a stranger has it: what git holds, an empty HOME, no data/,
outputs/, runs/, in a folder whose name has a space and an umlaut.

Commands run in it with the packages of this process's environment and with stand-ins
(tests/standins) for what
a test cannot ask: the desktop, Slurm, an index of packages, GitHub, simulators of other
environments.
"""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parent.parent
KEPT = re.compile(
    'PATH$|LANG|LC_|TERM|MUJOCO_GL|LD_LIBRARY_PATH|SSL_|OMP_NUM_THREADS|TMPDIR'
)
# matplotlib's list, which it makes once
FONTS = Path(tempfile.gettempdir()) / 'halo-commands-fonts'
BAD = ('Traceback (most recent call last)', 'does not provide the extra')
RUN = """data: {root: data/little, repo_id: halo/little, store: data/frames/little}
policy: {preset: tiny}
run: {steps: 2, micro: 2, save_every: 2, warmup: 1}
out: runs/little
"""
MIXTURE = {
    'me/my_robot': 'little',
    'images.front': 'images.top',
    'images.wrist': 'images.wrist_cam',
    'gripper: open_high, ': 'gripper: none',
    'gripper_range: [0, 100], gripper_at: [5]': '',
    'state_norm: quantiles': 'state_norm: mean_std',
    'action_norm: quantiles': 'action_norm: mean_std',
}
LITTLE = '--preset tiny --layers 0 --history 8 --hop 4 --ticks 6 --rounds 2'
SETUP = 'from setuptools import setup; setup(name={!r}, version="0.1")\n'
REPOSITORIES = {
    'mees/calvin_env': (),
    'RoboMME/robomme_benchmark': ('.',),
    'simpler-env/SimplerEnv': ('.', 'ManiSkill2_real2sim'),
}


def held(project):
    """The files that git holds of `project`; without git, all but what .gitignore names at
    its top.
    """
    done = subprocess.run(
        ['git', 'ls-files', '-z'], cwd=project, capture_output=True, text=True
    )
    if done.returncode == 0 and done.stdout:
        return [n for n in done.stdout.split('\0') if n and (project / n).is_file()]
    out = {'.git', '.venv', 'data', 'outputs', 'runs', '.pytest_cache', '.cache', '_docs'}
    files = (p.relative_to(project) for p in project.rglob('*') if p.is_file())
    return [str(p) for p in files if p.parts[0] not in out and '__pycache__' not in p.parts]


def copy_held(project, to):
    "Copy what git holds of `project` to the folder `to`."
    for name in held(project):
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(project / name, to / name)


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def settings(project):
    ini = ConfigParser(delimiters=['='])
    ini.read(project / 'settings.ini', encoding='utf-8')
    return ini['DEFAULT']


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def empty_wheel(folder, name, version, extras=()):
    "A wheel that holds nothing, in the place of one from an index."
    stem = f'{name.replace("-", "_")}-{version}'
    info = f'{stem}.dist-info'
    with zipfile.ZipFile(folder / f'{stem}-py3-none-any.whl', 'w') as z:
        more = ''.join(f'Provides-Extra: {e}\n' for e in sorted(extras))
        z.writestr(
            f'{info}/METADATA',
            f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{more}',
        )
        z.writestr(
            f'{info}/WHEEL',
            'Wheel-Version: 1.0\nGenerator: clone\nRoot-Is-Purelib: true\nTag:'
            ' py3-none-any\n',
        )
        z.writestr(f'{info}/RECORD', '')


class Clone:
    """The clone below `folder`, and what its commands find around it; `shared` keeps data
    that several clones need.
    """

    def __init__(self, folder, project=root, shared=None):
        self.top, self.shared = (
            Path(folder) / 'my häuser',
            Path(shared or folder) / 'shared',
        )
        self.root, self.home, self.made, self.servers = (
            self.top / 'halo clone',
            self.top / 'home',
            set(),
            [],
        )
        self.home.mkdir(parents=True)
        copy_held(project, self.root)
        shutil.copytree(root / 'tests/standins', self.top / 'standins')
        self.environment_of_this_process()

    def environment_of_this_process(self):
        """A .venv whose packages are those of this process; it can be written without
        writing there.
        """
        venv = self.root / '.venv'
        venv.mkdir()
        for name in ('bin', 'lib', 'pyvenv.cfg', 'halo.env'):
            if (Path(sys.prefix) / name).exists():
                (venv / name).symlink_to(Path(sys.prefix) / name)
        (venv / 'halo-setup.stamp').touch()

    def env(self):
        "The variables of a command."
        env = {k: v for k, v in os.environ.items() if KEPT.match(k)}
        env |= dict(
            HOME=str(self.home),
            VIRTUAL_ENV=str(self.root / '.venv'),
            MPLBACKEND='agg',
            GIT_CONFIG_COUNT='1',
            GIT_CONFIG_KEY_0=f'url.{self.top}/github/.insteadOf',
            GIT_CONFIG_VALUE_0='https://github.com/',
        )
        env |= {
            k: '1'
            for k in (
                'HF_HUB_OFFLINE',
                'TRANSFORMERS_OFFLINE',
                'HF_DATASETS_OFFLINE',
                'WANDB_DISABLED',
                'PIP_DRY_RUN',
                'PIP_NO_INDEX',
                'PIP_DISABLE_PIP_VERSION_CHECK',
            )
        }
        env |= dict(
            PIP_CONFIG_FILE=os.devnull,
            PIP_FIND_LINKS=(self.top / 'wheels').as_uri(),
            PIP_NO_BUILD_ISOLATION='0',
            TOKENIZERS_PARALLELISM='false',
            MPLCONFIGDIR=str(FONTS),
            PYTHONPATH=os.pathsep.join([str(self.root), str(self.root / 'tests')]),
        )
        path = [
            self.top / 'standins/bin',
            self.root / '.venv/bin',
            Path(sys.prefix) / 'bin',
            os.environ['PATH'],
        ]
        return env | dict(PATH=os.pathsep.join(map(str, path)))

    # ---- running

    def start(self, text, **options):
        "A command as a process with a group of its own."
        command = ['bash', '-c', f'set -o pipefail\n{text}']
        return subprocess.Popen(
            command,
            cwd=self.root,
            env=self.env(),
            start_new_session=True,
            text=True,
            errors='replace',
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            **options,
        )

    def run(self, run, limit=900):
        "What is wrong with a run of scripts/commands.py, or ''."
        try:
            for need in run.needs:
                self.need(need, run.command)
        except AssertionError as e:
            return f'{run.command}\n{e}'
        text = run.command.replace('PORT', str(port := free_port())).replace(
            'SERVED', str(getattr(self, 'served', ''))
        )
        if run.serves:
            return self.serve(text, run.serves, port)
        process = self.start(text)
        try:
            said, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            stop(process)
            return f'{text}\nhad not ended after {limit} s'
        wrong = f'ended with status {process.returncode}' if process.returncode else ''
        wrong = wrong or next((f'says {b!r}' for b in BAD if b in said), '')
        return f'{text}\n{wrong}\n{said[-4000:]}' if wrong else ''

    def helps(self, texts):
        """What is wrong with commands that print their help, or ''; one process imports for
        all of them.
        """
        process = self.start(f'python ../standins/helps.py {shlex.join(texts)}')
        said, _ = process.communicate(timeout=900)
        wrong = [x for x in said.splitlines() if x.startswith('FAILED')]
        return '\n'.join(wrong) or ('' if process.returncode == 0 else said[-3000:])

    def serve(self, text, says, port, limit=240):
        """Start a command that runs until it is stopped, wait for what it says, ask its
        port, stop it.
        """
        log = self.top / f'server-{port}.log'
        process = self.start(f'exec >"{log}" 2>&1\n{text}')
        try:
            if wrong := wait_for(process, log, says, limit):
                return f'{text}\n{wrong}\n{log.read_text(errors="replace")[-4000:]}'
            return '' if answers(port) else f'{text}\nnothing answers at port {port}'
        finally:
            stop(process)

    def close(self):
        for process in self.servers:
            stop(process)

    # ---- what commands need

    def need(self, name, command=''):
        "Make what a command needs, once."
        if name == 'wheels':
            return self.wheels(command)
        if name not in self.made:
            self.made.add(name)
            getattr(self, 'make_' + name.replace(' ', '_'))()

    def do(self, text):
        "Run a preparation; it must succeed."
        process = self.start(text)
        said, _ = process.communicate(timeout=600)
        assert process.returncode == 0, f'preparing: {text}\n{said[-3000:]}'

    def python(self, code):
        self.do(f"python - <<'HERE'\n{code}\nHERE")

    def wheels(self, command):
        "Empty wheels for what a pip command asks for, in the place of an index."
        from packaging.requirements import InvalidRequirement, Requirement

        asked, folder = command.split(), self.top / 'wheels'
        folder.mkdir(exist_ok=True)
        for file in re.findall(r'-r "?(?:\$\(halo files )?([^\s")]+)', command):
            asked += (
                (self.root / file).read_text().splitlines()
                if (self.root / file).exists()
                else []
            )
        for extra in re.findall(r'-e "?\.\[(\w+)\]', command):
            asked += settings(self.root).get(f'{extra}_requirements', '').split()
        pins = dict(
            x.split('==')
            for x in (self.root / 'constraints.txt').read_text().split()
            if '==' in x
        )
        for text in asked:
            try:
                need = Requirement(text.partition(' #')[0])
            except InvalidRequirement:
                continue
            exact = next(
                (s.version for s in need.specifier if s.operator in ('==', '>=')), '1.0'
            )
            version = pins.get(need.name, exact) if '-c ' in command else exact
            empty_wheel(folder, need.name, version, need.extras)

    def make_clones(self):
        "Repositories in the place of GitHub's, with a setup.py where pip installs them."
        for name, folders in REPOSITORIES.items():
            at = self.top / 'github' / name
            at.mkdir(parents=True)
            (at / 'README').write_text('a stand-in\n')
            for f in folders:
                (at / f).mkdir(exist_ok=True)
                (at / f / 'setup.py').write_text(
                    SETUP.format(f'{at.name}-{f}'.rstrip('-.'))
                )
            who = 'git -c user.name=x -c user.email=x@example.org'
            self.do(f'cd "{at}" && git init -q && git add . && {who} commit -qm stand-in')

    def make_lavapipe(self):
        "Mesa's Vulkan as scripts/lavapipe.sh leaves it: any library in its place."
        for folder in (self.root / 'outputs/lavapipe', self.home / 'lavapipe'):
            lib = folder / f'root/usr/lib/{os.uname().machine}-linux-gnu'
            icd = folder / 'root/usr/share/vulkan/icd.d'
            lib.mkdir(parents=True)
            icd.mkdir(parents=True)
            (icd / 'lvp_icd.json').write_text('{}')
            shutil.copy(Path('/bin/sh').resolve(), lib / 'libvulkan_lvp.so')

    def make_outputs(self):
        (self.root / 'outputs').mkdir(exist_ok=True)

    def make_data(self):
        "A LeRobot dataset of two cameras, three short episodes."
        if not (self.shared / 'little').exists():
            self.python(
                "from pathlib import Path\nfrom test_scale import"
                " record\nrecord(Path('data/new'))"
            )
            self.shared.mkdir(exist_ok=True)
            shutil.move(self.root / 'data/new', self.shared / 'little')
        shutil.copytree(self.shared / 'little', self.root / 'data/little')

    def make_demonstrations(self):
        self.do('python -m halo.sim.flash_place --root data/flash_place --episodes 1')

    def make_mt50(self):
        "A run's log and an evaluation's folder, as a study of Meta-World leaves them."
        self.python(
            "from pathlib import Path\nfrom test_metaworld import a_run, an_evaluation\n"
            "a_run(Path('runs/mt50'), 16.0)\nan_evaluation(Path('outputs/mt50'))"
        )

    def make_recording(self):
        "A folder of recorded episodes, as a simulator's client writes it."
        self.python(
            "from test_demonstrations import ABOUT, jobs, play, d\n"
            "d.record('data/demos/little', ABOUT, jobs(2), play, progress=False)"
        )

    def make_gate(self):
        "Demonstrations of a stand-in for a memory benchmark, and the dataset of them."
        self.python(
            "from pathlib import Path\nfrom test_first_gate import recording\n"
            "recording(Path('data/demos/stand_in'), Path('data/stand_in'))"
        )

    def make_taken(self):
        "A made-up recording of TakeItBack."
        self.python(
            "from pathlib import Path\nfrom test_memory_study import carried\n"
            "carried(Path('data/demos/TakeItBack'), True)"
        )

    def make_run(self):
        self.need('data')
        (self.root / 'run.yaml').write_text(RUN)

    def make_mixture(self):
        "The mixture of one's own robot, its lines changed as it says."
        self.need('data')
        text = (self.root / 'configs/mixtures/own_robot.yaml').read_text()
        for old, new in MIXTURE.items():
            assert old in text, old
            text = text.replace(old, new)
        (self.root / 'my_robot.yaml').write_text(text)

    def make_old_data(self):
        "The dataset as LeRobot 2.1 laid it out."
        self.need('data')
        shutil.copy(root / 'tests/standins/old_data.py', self.top / 'old_data.py')
        self.do('python ../old_data.py data/little data/old')

    def make_simulator(self):
        "An interpreter that finds stand-ins of the simulators, and a clone of CALVIN's."
        paths = f'{self.root}:{self.top}/standins/site'
        script(
            self.root / 'outputs/openpi_client/bin/python',
            f'#!/bin/sh\nexport PYTHONPATH="{paths}"\nexec "{self.root}/.venv/bin/python"'
            ' "$@"\n',
        )
        file = self.root / 'calvin/calvin_env/envs/play_table_env.py'
        file.parent.mkdir(parents=True)
        file.touch()

    def make_calvin_served(self):
        "An untrained policy of CALVIN's shapes, served."
        self.python(
            "import sys; sys.path.insert(0, 'scripts')\nfrom sim_check import make_policy\n"
            "make_policy('outputs/calvin_policy', 'calvin', 'small')"
        )
        self.served, log = free_port(), self.top / 'served.log'
        process = self.start(
            f'exec >"{log}" 2>&1\nexec python -m halo.deploy.serve --policy'
            f' outputs/calvin_policy --untrained --resize --port {self.served}'
        )
        self.servers.append(process)
        wrong = wait_for(process, log, 'ws://', 240)
        assert not wrong, log.read_text()

    def make_little_benches(self):
        "An interpreter that adds small sizes to every bench."
        script(
            self.root / 'little/python',
            f'#!/bin/sh\nexec "{self.root}/.venv/bin/python" "$@" {LITTLE}\n',
        )

    def make_benchmark_run(self):
        "A finished evaluation under the folders' names of LIBERO's."
        for name in ('libero', 'libero_pro'):
            self.do(
                'python -m halo.benchmarks.suite --benchmark flash_place --policy'
                f' random:tiny --episodes 1 --out outputs/benchmarks/{name}'
            )

    def make_sheet(self):
        "A pilot of the robot's trials, and answers from its form."
        self.make_outputs()
        sheet = dict(policies=dict(A='checkpoints/flash_place/full'), share=0.05)
        (self.root / 'sheet.json').write_text(json.dumps(sheet))
        self.python(
            "import json\nfrom halo.benchmarks.robot import Sheet, sheet_key\nsheet ="
            " Sheet(**json.load(open('sheet.json')))\nscores = {'0': dict(steps=[False],"
            " seconds=3, note='dropped')}\njson.dump(dict(key=sheet_key(sheet),"
            " scores=scores), open('outputs/answers.json', 'w'))"
        )

    def make_site(self):
        self.do('python scripts/docs.py --bare')


def wait_for(process, log, says, limit):
    "Wait until the file `log` holds `says`; what was wrong, or ''."
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if log.exists() and says in log.read_text(errors='replace'):
            return ''
        if process.poll() is not None:
            return f'ended with status {process.returncode}'
        time.sleep(0.2)
    return f'had not said {says!r} after {limit} s'


def answers(port):
    "Whether something speaks HTTP at `port`."
    for _ in range(50):
        try:
            urllib.request.urlopen(f'http://127.0.0.1:{port}/', timeout=20)
            return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            time.sleep(0.2)
    return False


def stop(process):
    "End a process and what it started."
    for sign, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 20)):
        try:
            os.killpg(process.pid, sign)
            process.wait(patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
