"""Every command that this repository prints: collected, made quick, run in a clone made of
what git holds.

The clone lies below a folder whose name has a space and an umlaut; HOME is empty; data/,
outputs/ and runs/
are not there. RULES says how a command becomes quick and what must be there before it,
VALUES what its
placeholders stand for, EXCUSED which commands cannot run here, and why. All others run as
they are printed.

    python scripts/commands.py --list             # the table: what is printed, run, excused
    python scripts/commands.py --only mixture     # run the commands that hold a word
"""

import argparse
import ast
import itertools
import json
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

root = Path(__file__).resolve().parent.parent


# ---- what is printed

NAMES = (
    r'halo +[a-z]',
    r'make(?= +[a-z]+[a-z-]*\b|$)',
    r'scripts/\w+\.sh\b',
    r'lerobot-[\w-]+ +\S',
    r'torchrun +\S',
    r'python +-m +(?:halo|lerobot|http)\b',
    r'python +(?:scripts|clients|tests)/\w+\.py',
    r'accelerate +launch +\S',
    r'sbatch +\S',
    r'pip +install +\S',
    r'git +clone +\S',
    r'eval +"',
)
OURS = re.compile(r'(?:[A-Z_]+=\S+ +)*(?:%s)' % '|'.join(NAMES))
SHELL = {'sh', 'bash', 'shell', 'console', ''}
FENCE = re.compile(r'^ *(`{3,})(\w*)[^\n]*\n(.*?)^ *\1 *$', re.M | re.S)


@dataclass(frozen=True)
class Printed:
    """A command, the document that prints it, and its block: a block's commands run one
    after the other.
    """

    text: str
    where: str
    block: int


def uncomment(line):
    "A line of shell without its comment."
    quote = ''
    for i, c in enumerate(line):
        if quote:
            quote = '' if c == quote else quote
        elif c in '\'"':
            quote = c
        elif c == '#' and (i == 0 or line[i - 1].isspace()):
            return line[:i].rstrip()
    return line.rstrip()


def shell_lines(text):
    """The commands of a piece of shell: continued lines joined, comments and prompts
    dropped.
    """
    joined = re.sub(r'\\\n\s*', '', text)
    lines = (
        uncomment(re.sub(r'^\s*\$ ', '', line)).strip() for line in joined.splitlines()
    )
    return [re.sub(r' {2,}', ' ', line) for line in lines if line]


def ours(text):
    """`text` as a command of ours, or None.

    The [optional] parts and (remarks) of a usage go.
    """
    text = re.sub(r'\s+(?:\[[^\]]*\]|\(.*)(?=\s|$)', '', uncomment(text.strip()))
    text = re.sub(r' {2,}', ' ', text).strip()
    text = text if text.endswith(('...', ' .')) else text.rstrip('.,;')
    return text if OURS.match(text) else None


def inline(text):
    "Commands between backticks."
    found = re.finditer(r'(?<!`)`([^`\n]+)`(?!`)', text)
    return [c for m in found if (c := ours(m[1]))]


def markdown(text):
    "Blocks of commands in Markdown: fenced shell, and what stands between backticks."
    blocks = []
    for m in FENCE.finditer(text):
        lines = shell_lines(m[3])
        if m[2] in SHELL and (m[2] or any(map(OURS.match, lines))):
            blocks.append(lines)
    # a command may be broken over two lines
    prose = re.sub(r'(?<=\S)\n(?=\S)', ' ', FENCE.sub('', text))
    return [*blocks, *([c] for c in inline(prose))]


def lines_of(text):
    """Commands in plain text: between backticks, in a line of their own, after a colon to
    the line's end.
    """
    found = inline(text)
    for line in re.sub(r'`[^`\n]*`', '', text).splitlines():
        line = line.strip()
        after = [
            line[m.end() :] for m in re.finditer(': ', line) if OURS.match(line[m.end() :])
        ]
        parts = [line] if OURS.match(line) else after[:1]
        found += [c for p in parts if (c := ours(p))]
    return found


def notebook(path):
    "Blocks of a notebook: its Markdown, and shell in its code cells."
    for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown':
            yield from markdown(source)
        elif re.match(r'%%(bash|sh)\b', source):
            yield shell_lines(source.partition('\n')[2])
        elif found := re.findall(r'^\s*!(?!=)(.+)$', source, re.M):
            yield shell_lines('\n'.join(found))


def words(node):
    "The text of a string or f-string; what an f-string puts in is left out."
    return ''.join(
        n.value
        for n in ast.walk(node)
        if isinstance(n, ast.Constant) and isinstance(n.value, str)
    )


def module(path):
    "Blocks of a module: its docstrings, and what its command line prints as help."
    text = path.read_text(encoding='utf-8')
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)):
            doc = ast.get_docstring(node) or ''
            yield lines_of(doc) if isinstance(node, ast.Module) else inline(doc)
        for k in node.keywords if isinstance(node, ast.Call) else ():
            if k.arg == 'prog' and OURS.match(words(k.value)):
                yield [f'{words(k.value)} --help']
            elif k.arg in ('description', 'epilog', 'help', 'usage'):
                yield inline(words(k.value))
    if 'ArgumentParser(' in text and path.parent.name == 'scripts':
        yield [f'python scripts/{path.name} --help']


def subcommands(path):
    "What `halo` alone prints: every sub-command has a --help."
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if not isinstance(node, ast.Dict):
            continue
        for key, value in zip(node.keys, node.values):
            if isinstance(value, ast.Call) and ast.unparse(value.func) == 'Command':
                yield [f'halo {key.value} --help']


def comments(path):
    """Blocks of a configuration: commands in its comments, and between backticks in its
    notes.
    """
    lines = path.read_text(encoding='utf-8').splitlines()
    said = [x for x in lines if x.startswith('#') and not x.startswith(('#!', '#SBATCH'))]
    yield lines_of('\n'.join(x.lstrip('# ') for x in said))
    yield inline('\n'.join(x for x in lines if not x.startswith('#')))


def makefile(path):
    """What `make` alone prints: every target with a description, and the commands of the
    descriptions.
    """
    yield ['make']
    for m in re.finditer(r'^([a-z-]+):.*?## (.*)$', path.read_text(encoding='utf-8'), re.M):
        yield [f'make {m[1]}']
        yield lines_of(m[2])


def documents(project):
    "Every document that prints commands, with its blocks: (name, blocks)."

    def under(folder, *kinds):
        found = (p for kind in kinds for p in (project / folder).rglob(f'*.{kind}'))
        return [(p.relative_to(project).as_posix(), p) for p in sorted(found)]

    yield 'README.md', markdown((project / 'README.md').read_text(encoding='utf-8'))
    yield 'Makefile', makefile(project / 'Makefile')
    for name, p in under('nbs', 'ipynb'):
        if (
            not p.name.startswith('_')
            and p.name != 'index.ipynb'
            and '.ipynb_checkpoints' not in p.parts
        ):
            yield name, notebook(p)  # README.md is the index
    for name, p in [*under('configs', 'yaml', 'sh', 'txt'), *under('scripts', 'sh')]:
        yield name, comments(p)
    for name, p in [*under('halo', 'py'), *under('clients', 'py'), *under('scripts', 'py')]:
        yield name, module(p)
    yield 'halo/cli.py', [['halo'], *subcommands(project / 'halo/cli.py')]


def alternatives(text):
    "`a|b X` written out: a X, b X."
    m = re.search(r'(?<=\s)[a-z]+(?:\|[a-z]+)+(?=\s|$)', text)
    return (
        [text[: m.start()] + word + text[m.end() :] for word in m[0].split('|')]
        if m
        else [text]
    )


def collect(project=root):
    "Every printed command once, where it is printed first."
    found, seen = [], set()
    for where, blocks in documents(project):
        for n, block in enumerate(blocks):
            for text in itertools.chain.from_iterable(map(alternatives, block)):
                if text not in seen:
                    seen.add(text)
                    found.append(Printed(text, where, n))
    return found


# ---- how it is run


@dataclass(frozen=True)
class Rule:
    """What happens to commands in which `match` is found: all rules that match apply, in
    their order.
    """

    match: str
    change: tuple = ()  # (pattern, replacement) pairs for re.sub
    needs: tuple = ()  # what clone.Clone makes before
    serves: str = ''  # it runs until it is stopped: its output, once it is up
    slow: bool = False  # more than a few seconds: run by `pytest -m slow`


LITTLE = '--preset tiny --history 8 --hop 4 --ticks 6 --rounds 2'
ROLLOUT = (
    '--robot.discover_packages_path=mock_arm --robot.type=mock_arm --robot.log=log.json'
    ' --task=put --fps=10 --duration=2 --play_sounds=false'
    ' --return_to_initial_position=false --device=cpu'
)
DATA = '--dataset.repo_id=halo/little --dataset.root=data/little'
# of a shipped run file: the policy and its data small; one step on one process
SMALL = '--set policy.preset=tiny --set run.loggers=[]'
ONE_ROBOT = '--set data.root=data/little --set data.repo_id=halo/little'
STEP = (
    '--set run.steps=1 --set run.micro=2 --set run.accumulate=1 --set run.replicate=1'
    ' --set run.shard=1 --set run.dtype=float32 --set batch=2'
)
# skipped where there is no GPU
# npm is not asked
# 15 numbers of state
RULES = (
    # names of programs
    Rule(r'^(halo \w+|python -m halo[.\w]*)$', ((r'$', ' --help'),)),
    # make: the environment of this process is the clone's, so nothing is installed; the
    # tests of one notebook, one file
    Rule(r'^make\b', ((r'^make', 'make -o .venv/halo-setup.stamp'),)),
    Rule(
        r'make .*\b(demo|demo-train)\b',
        ((r'(demo-train|demo)\b', r'\1 ARGS="--quick --out outputs/demo"'),),
        slow=True,
    ),
    Rule(
        r'make .*\b(test|test-slow|test-sim|test-gpu|notebooks)$',
        ((r'$', ' NB=nbs/cli.ipynb'),),
        slow=True,
    ),
    Rule(
        r'make .*\btest(?![\w-])',
        ((r'$', ' TESTS="tests/test_tables.py -k sources_of_every_row"'),),
    ),
    Rule(r'make .*\btest-slow\b', ((r'$', ' TESTS="tests/test_data.py -k killed_build"'),)),
    Rule(
        r'make .*\btest-sim\b',
        ((r'$', ' TESTS="tests/test_evaluate.py -k same_as_lerobot_in"'),),
    ),
    Rule(r'make .*\btest-gpu\b', ((r'$', ' TESTS=tests/test_gpu.py'),)),
    Rule(
        r'make .*\btest-browser\b',
        ((r'$', ' TESTS="tests/test_sims.py -k scoring_form"'),),
        slow=True,
    ),
    Rule(r'make .*\brun$', ((r'$', ' NB=nbs/cli.ipynb'),)),
    Rule(r'make .*\brun\b', ((r'nbs/index.ipynb', 'nbs/cli.ipynb'),), slow=True),
    Rule(r'make .*\b(export|gates|lock|system)\b', slow=True),
    Rule(r'make .*\bdocs\b', ((r'\bdocs( ARGS=\S+)?', 'docs ARGS="--bare"'),), slow=True),
    Rule(
        r'make .*\blab\b',
        ((r'\blab\b', 'lab ARGS="--no-browser --port=PORT"'),),
        serves='is running at',
        slow=True,
    ),
    Rule(r'scripts/(docs|check_site)\.py$', slow=True),
    Rule(r'docs\.py$', ((r'$', ' --bare'),)),
    Rule(r'check_site\.py$', needs=('site',)),
    Rule(
        r'http\.server',
        ((r'-m http.server', '-u -m http.server PORT'),),
        serves='Serving HTTP',
        slow=True,
    ),
    # all channels of eight observations take minutes
    Rule(
        r'halo\.viz\.knockout .*--write',
        ((r'--write', '--observations 1 --channels 2 --steps 1'),),
    ),
    # installation: an index of empty wheels, clones of empty repositories
    Rule(r'pip install', needs=('wheels', 'clones')),
    Rule(r'pip install .*-e "?\.\[', slow=True),
    Rule(r'git clone', needs=('wheels', 'clones')),
    Rule(r'lavapipe\.sh', needs=('lavapipe',)),
    # recording, training, evaluation
    Rule(r'halo\.sim\.flash_place ', ((r'--episodes \d+', '--episodes 1'),), slow=True),
    Rule(
        r'lerobot-train',
        (
            (r'--batch_size=\d+', '--batch_size=2 --num_workers=0'),
            (r'--steps=1000', '--steps=1'),
            (r'--steps=2000', '--steps=2'),
        ),
        slow=True,
    ),
    Rule(
        r'lerobot-train\)?"? --policy.type=halo( \.\.\.)?$',
        (
            (
                r'( \.\.\.)?$',
                (
                    f' {DATA} --policy.device=cpu --steps=1 --batch_size=1 --num_workers=0'
                    ' --wandb.enable=false --policy.push_to_hub=false'
                ),
            ),
        ),
        needs=('data',),
    ),
    Rule(
        r'lerobot-eval',
        (
            (r'\.path=…', '.path=checkpoints/flash_place/full --env.type=flash_place'),
            (r'( --eval\.\S+)*$', ' --eval.n_episodes=1 --eval.batch_size=1'),
        ),
        slow=True,
    ),
    Rule(
        r'lerobot-rollout',
        (
            (
                r'--policy.path=\.\.\.|(?<=rollout )\.\.\.',
                '--policy.path=checkpoints/flash_place/full',
            ),
            (r'$', f' {ROLLOUT}'),
        ),
        slow=True,
    ),
    Rule(r'halo (evaluate|demo) --bench', ((r'$', ' --episodes 1'),), slow=True),
    Rule(
        r'halo evaluate --benchmark metaworld',
        ((r'--policy \S+', '--policy random:tiny --tasks easy/reach-v3'),),
    ),
    Rule(
        r'metaworld_demos --record',
        ((r'--episodes \d+', '--episodes 1 --tasks reach-v3 --size 64'),),
        slow=True,
    ),
    Rule(r'metaworld_demos --(tiers|hours)', needs=('mt50',), slow=True),
    Rule(
        r'studies/mt50\.yaml',
        ((r'(mt50\.yaml)', rf'\1 {SMALL} {ONE_ROBOT} {STEP}'),),
        ('data',),
        slow=True,
    ),
    Rule(
        r'halo record (show|convert) (data/demos|FOLDER)',
        ((r'FOLDER', 'data/demos'), (r'data/demos(/\S+)?', 'data/demos/little')),
        ('recording',),
        slow=True,
    ),
    Rule(
        r'first_gate (eyes|train|probe|ask)',
        (
            (r'(data/demos/RememberColor\d ?)+', 'data/demos/stand_in '),
            (r'--vlm runs/remember_color/vlm', '--vlm checkpoints/flash_place/vlm'),
            (r'data/remember_color3', 'data/stand_in'),
            (r'--vlm runs/rc3/vlm', '--vlm checkpoints/flash_place/vlm'),
            (r' --(steps|minutes) \d+|$', ' --steps 2 --batch 2 --held 2'),
        ),
        ('gate',),
        slow=True,
    ),
    Rule(r'results --again', ((r'CLONE', '.'),)),
    Rule(r'(memory|metaworld)_study configs', ((r'$', ' --report'),)),
    Rule(
        r'memory_study --play',
        (
            (r'--tasks.* --keep \S+', '--tasks RememberColor3-VLA-v0 --keep outputs/kept'),
            (r'$', ' --episodes 1'),
            (r'^', 'HALO_MANISKILL_PYTHON=VENV/bin/python '),
        ),
        ('simulator',),
        slow=True,
    ),
    Rule(
        r'memory_study --ship',
        (
            (r'--ship \S+ --out \S+', '--ship outputs/shown --out outputs/half'),
            (
                r'^',
                'mkdir -p outputs/shown && cp -r checkpoints/flash_place/full'
                ' outputs/shown/checkpoint && ',
            ),
        ),
    ),
    Rule(r'memory_study --given-away', needs=('taken',)),
    Rule(r'halo files NAME', ((r'NAME', 'configs/mixtures'),)),
    Rule(
        r'--policy\.path=POLICY',
        (
            (r'--dataset\.\S+ --dataset\.\S+', DATA),
            (r'\.fps=\d+', '.fps=10'),
            (r'\.device=cuda', '.device=cpu'),
            (r'--steps=\d+', '--steps=1'),
        ),
        ('data',),
        slow=True,
    ),
    Rule(
        r'halo check (?!data/flash\S+$)',
        ((r'check \S+', 'check data/little'),),
        ('data',),
        slow=True,
    ),
    Rule(r'halo\.train\.eyes', ((r'$', ' --steps 2 --batch 2'),), slow=True),
    Rule(
        r'halo\.studies\.baselines train',
        ((r'NAME', 'act'), (r'$', ' --steps 1')),
        ('demonstrations',),
        slow=True,
    ),
    Rule(
        r'halo\.train\.scale (?!.*--dry-run)|halo train (?!--)', needs=('run',), slow=True
    ),
    Rule(
        r'accelerate launch',
        (
            (r'(--config_file \S+)', r'\1 --num_machines 1 --num_processes 1 --cpu'),
            (r'--machine_rank N --main_process_ip FIRST ', ''),
        ),
        slow=True,
    ),
    Rule(r'sbatch|halo\.train\.scale', needs=('run',), slow=True),
    Rule(
        r'launch/pretrain\.yaml',
        ((r'(n\.yaml)', rf'\1 {SMALL} --set data.mixture=my_robot.yaml'),),
        ('mixture',),
        slow=True,
    ),
    Rule(
        r'launch/(finetune_\dgpu|base_\d\dgb)\.yaml',
        ((r'(\dg(?:pu|b)\.yaml)(?!.*\dgpu\.yaml)', rf'\1 {SMALL} {ONE_ROBOT}'),),
        ('data',),
        slow=True,
    ),
    Rule(
        r'launch/(pretrain|finetune_\dgpu|base_\d\dgb)\.yaml (?!.*--dry-run)',
        ((r'(run\.loggers=\[\])', rf'\1 {STEP}'),),
    ),
    Rule(r'test_scale\.py', ((r'NAME', 'parts'),), slow=True),
    Rule(r'halo\.data\.mixture show MIXTURE', needs=('mixture',), slow=True),
    Rule(
        r'halo\.data\.mixture (check|stats|store)',
        ((r'$', ' --quiet'),),
        ('mixture',),
        slow=True,
    ),
    Rule(
        r'halo\.data\.mixture \w+ (oxe|paper) --root',
        ((r'(check|store) (oxe|paper)', r'\1 LITTLE'),),
    ),
    Rule(r'halo\.data\.mixture (check|stats|store)(?!.*--root)', ((r'$', ' --root data'),)),
    Rule(r'halo\.data\.mixture (check|stats|store)', ((r'$', ' --preset tiny'),)),
    Rule(
        r'convert_dataset',
        ((r'--root=DIR', '--root=data/old'), (r'--repo-id=\S+', '--repo-id=halo/old')),
        ('old data',),
        slow=True,
    ),
    # serving and simulators
    Rule(
        r'halo serve --policy|halo\.deploy\.serve --untrained',
        (
            (r'--untrained', '--untrained --policy checkpoints/flash_place/full'),
            (r'( --port \d+)?$', ' --port PORT'),
        ),
        serves='ws://',
        slow=True,
    ),
    Rule(
        r'halo\.viz\.patching',
        ((r'--keep bench/(\S+)', r'--episodes 1 --keep outputs/\1'),),
        slow=True,
    ),
    Rule(
        r'halo export .*--rollouts',
        ((r'--rollouts \d+', '--rollouts 2'), (r'bench/export', 'outputs/export')),
        slow=True,
    ),
    Rule(
        r'openpi_check',
        ((r'$', ' --episodes 1'), (r'/tmp/openpi', 'outputs/openpi_client')),
        ('simulator',),
        slow=True,
    ),
    Rule(
        r'episode_check',
        (
            (
                r' --json bench/episodes.json',
                ' --episodes 2 --more 2 --json outputs/episodes.json',
            ),
        ),
        slow=True,
    ),
    Rule(
        r'fuzz_serve',
        (
            (
                r'( --messages \d+ --clients \d+)?$',
                ' --messages 40 --clients 2 --rounds 1 --limit 120',
            ),
        ),
        slow=True,
    ),
    Rule(
        r'sim_check\.py',
        ((r'--python \S+', '--python VENV/bin/python --preset tiny'),),
        ('simulator',),
        slow=True,
    ),
    Rule(
        r'sim_check\.py calvin',
        ((r'preset tiny', 'preset small'), (r'$', ' -- --limit 12')),
    ),
    Rule(r'sim_check\.py robomme', ((r'--limit \d+', '--limit 12'),)),
    Rule(
        r'clients/calvin\.py',
        (
            (r'\bpython ', 'VENV/bin/python '),
            (r'--episodes \d+', '--episodes 1 --limit 12'),
            (r'127.0.0.1:8000', '127.0.0.1:SERVED'),
            (r'^(?!CALVIN)', 'CALVIN_ROOT=calvin '),
        ),
        ('simulator', 'calvin served'),
        slow=True,
    ),
    Rule(
        r'clients/maniskill\.py .*--record',
        (
            (r'\bpython ', 'VENV/bin/python '),
            (r'--episodes \d+', '--episodes 2'),
            (r'--record \S+', '--record data/demos/touched'),
        ),
        ('simulator',),
        slow=True,
    ),
    Rule(
        r'clients/robomme\.py .*--re(cord|play)',
        (
            (r'\bpython ', 'VENV/bin/python '),
            (r'--episodes \d+', '--episodes 2'),
            (r'data/demos/\S+', 'data/demos/pressed'),
        ),
        ('simulator',),
        slow=True,
    ),
    Rule(
        r'libero_demos --(record|rate|same)',
        (
            (r'\bpython ', 'VENV/bin/python '),
            (r'$', " --tasks '*milk*' --size 32"),
            (r'--episodes \d+', '--episodes 1'),
            (r'--record \S+', '--record data/demos/milk'),
            (r'--rate \d+', '--rate 1'),
            (r'--keep \S+', '--keep outputs/libero_expert.json'),
        ),
        ('simulator',),
        slow=True,
    ),
    # benches and checks
    Rule(
        r'(halo|halo\.) ?bench threads|halo\.studies\.bench threads',
        ((r'^', 'env -u OMP_NUM_THREADS '),),
        slow=True,
    ),
    Rule(
        r'scripts/against\.py \w+',
        (
            (r'py \w+ .*', 'py HEAD --rounds 1 --out outputs/against.json'),
            # the copy has no history
            (
                r'^',
                'git init -q && git add -A && git -c user.name=me -c user.email=a@b commit'
                ' -qm all && ',
            ),
        ),
        ('simulator',),
        slow=True,
    ),
    Rule(
        r'(halo|halo\.) ?bench |halo\.studies\.bench ',
        ((r'( --preset \w+)?$', f' {LITTLE}'),),
        slow=True,
    ),
    Rule(r'halo study \w+(?!.*--report)', ((r'$', ' --report'),)),
    Rule(
        r'expert_start --out',
        ((r'bench/(.*)$', r'outputs/\1 --seeds 2 --steps 2 --read-steps 2'),),
        slow=True,
    ),
    Rule(r'bench_gpu', ((r'( \S+\.json)', r' outputs/gpu.json salr --try'),), slow=True),
    Rule(
        r'bench_cpu\.sh',
        ((r'(\.sh).*', r'\1 outputs/cpu.json'), (r'^', 'PATH="$PWD/little:$PATH" ')),
        ('little benches',),
        slow=True,
    ),
    Rule(
        r'benchmarks\.suite --keep',
        ((r'bench/\w+', 'outputs/kept'),),
        ('benchmark run',),
        slow=True,
    ),
    Rule(r'halo\.benchmarks\.suite --rows|halo reproduce|halo\.viz|landing', slow=True),
    Rule(
        r'scripts/commands\.py --only', ((r'--only \S+', '--only "make help"'),), slow=True
    ),
    Rule(
        r'scripts/landing\.py',
        ((r'FILM.webp STILL.webp', 'outputs/film.webp outputs/still.webp'),),
        ('outputs',),
    ),
    Rule(r'pytest -q', ((r'$', ' tests/test_tables.py -k sources_of_every_row'),)),
    Rule(
        r'halo\.benchmarks\.robot \w+ SHEET',
        (
            (r'\s*…$', ''),
            (r'(form.*)$', r'\1 --out outputs/form.html'),
            (r'(score.*)$', r'\1 <<< q'),
            (r'(read.*)$', r'\1 --answers outputs/answers.json'),
        ),
        ('sheet',),
        slow=True,
    ),
)
VALUES = {  # placeholder (a regular expression) -> what it stands for
    r'\bPOLICY\b': 'checkpoints/flash_place/full',
    r'\bRUN\.yaml': 'run.yaml',
    r'\bSHEET\.json': 'sheet.json',
    r'\bDIR/': 'data/',
    r'\bDIR\b': 'data',
    r'\bMIXTURE\b|\bLITTLE\b|\bmy_robot\.yaml': 'my_robot.yaml',
    r'\bOUT\b': 'outputs/out',
    r'\bID\b': 'halo/old',
    r'\bFOLDER\b': 'outputs/lavapipe',
    r'\btableN\b': 'table6',
    r'…/calvin_env': 'calvin',
    r'VENV/': 'outputs/openpi_client/',
}
EXCUSED = {  # a regular expression -> why such commands cannot run here
    r'--benchmark libero --prove': (
        'needs LIBERO and its 2.1 GB of assets; its output is kept in'
        ' bench/libero_prove.json'
    ),
    r'--benchmark libero --policy': (
        'needs LIBERO and its 2.1 GB of assets; its output is kept in'
        ' bench/libero_random_small.json'
    ),
    r'--benchmark libero_pro --policy': (
        'needs LIBERO-PRO and its 2.1 GB of assets; its output is kept in bench/'
    ),
    r'clients/calvin\.py --check': (
        "asks CALVIN's own predicates, so a stand-in of the simulator cannot answer"
    ),
    r'scripts/slurm_check\.py$': (
        'needs the daemons of Slurm and munge, and root to start them'
    ),
}
LEFT = re.compile(
    r'…|(?<!\S)\.\.\.|(?<![$\w"])(?:NAME|FILE|DIR|OUT|N|ID|COMMAND|DATASET)\b(?!=)'
)


@dataclass(frozen=True)
class Run:
    """A printed command as it is run: the command, what it needs, what it says once it
    serves, whether it is slow.
    """

    printed: Printed
    command: str
    needs: tuple = ()
    serves: str = ''
    slow: bool = False
    excuse: str = ''


def plan(printed):
    """How a printed command is run, or why not.

    Raises `ValueError` for a placeholder that has no value.
    """
    excuse = next(
        (why for pattern, why in EXCUSED.items() if re.search(pattern, printed.text)), ''
    )
    text, needs, serves, slow = printed.text, [], '', False
    for rule in RULES:
        if re.search(rule.match, text) and not (text.endswith('--help') and rule.change):
            for pattern, value in rule.change:
                text = re.sub(pattern, value, text, count=1)
            needs += [n for n in rule.needs if n not in needs]
            serves, slow = serves or rule.serves, slow or rule.slow
    for pattern, value in VALUES.items():
        text = re.sub(pattern, value, text)
    if not excuse and (m := LEFT.search(text)):
        raise ValueError(
            f'{printed.where} prints `{printed.text}`: nothing says what {m[0]!r} stands'
            ' for; add it to VALUES or RULES'
        )
    return Run(printed, text, tuple(needs), serves, slow, excuse)


def table(runs):
    "One line per command, and how many are printed, run and excused."
    lines = [
        f'{r.printed.where}: {r.printed.text}\n   '
        f' {"EXCUSED: " + r.excuse if r.excuse else r.command}'
        for r in runs
    ]
    return '\n'.join([*lines, '', summary(runs)])


def summary(runs):
    "How many commands are printed, run and excused."
    excused = sum(bool(r.excuse) for r in runs)
    return f'{len(runs)} printed, {len(runs) - excused} run, {excused} excused'


def helps(runs):
    "The runs that only print a command line's help; they need one process for all of them."
    return list(
        dict.fromkeys(
            r.command for r in runs if r.command.endswith('--help') and not r.excuse
        )
    )


def blocks(runs, slow=None):
    """What else is run, block by block: (document, runs). A block is slow if one of its
    commands is.
    A block of which every command has been run in the same form already is left out.
    """
    kept = [r for r in runs if not r.excuse and not r.command.endswith('--help')]
    seen = set()
    for _, group in itertools.groupby(
        kept, key=lambda r: (r.printed.where, r.printed.block)
    ):
        group = list(group)
        if {r.command for r in group} <= seen:
            continue
        seen |= {r.command for r in group}
        if slow is None or slow == any(r.slow for r in group):
            yield group[0].printed.where, group


def run_all(runs, folder):
    "Run everything, each document in a clone of its own: (what, what was wrong, seconds)."
    from clone import Clone

    began = time.monotonic()
    if texts := helps(runs):
        yield (
            f'{len(texts)} times --help',
            Clone(folder / 'helps').helps(texts),
            time.monotonic() - began,
        )
    for where, group in itertools.groupby(blocks(runs), key=lambda x: x[0]):
        clone = Clone(folder / where.replace('/', '_'), shared=folder)
        for run in itertools.chain.from_iterable(runs for _, runs in group):
            began = time.monotonic()
            yield f'{where}: {run.command}', clone.run(run), time.monotonic() - began
        clone.close()


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--list', action='store_true', help='print the table and run nothing')
    p.add_argument('--only', default='', help='run only commands that hold this text')
    args = p.parse_args()
    runs = [plan(c) for c in collect()]
    if args.only:
        blocks_of = {
            (r.printed.where, r.printed.block) for r in runs if args.only in r.printed.text
        }
        runs = [r for r in runs if (r.printed.where, r.printed.block) in blocks_of]
    if args.list:
        print(table(runs))
        return 0
    failed = 0
    with tempfile.TemporaryDirectory(prefix='halo-commands-') as folder:
        for text, wrong, seconds in run_all(runs, Path(folder)):
            failed += bool(wrong)
            print(f'{"FAILED" if wrong else "ok    "} {seconds:5.0f} s  {text}', flush=True)
            if wrong:
                print(
                    *(f'       {line}' for line in wrong.splitlines()[-12:]),
                    sep='\n',
                    flush=True,
                )
    print(f'{summary(runs)}, {failed} failed')
    return int(failed > 0)


if __name__ == '__main__':
    sys.exit(main())
