"""Every command that this repository prints runs where nobody has been before: in a clone
of what git holds, with an empty HOME.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root / 'scripts'))
import clone  # noqa: E402
import commands

RUNS = [commands.plan(c) for c in commands.collect()]


# ---- the collector

PAGE = '''# A page
Call `make demo`, or `halo plan` of `halo.train.plan`; `lerobot-train` is a name,
`make` a command.

```sh
make demo   # the demonstration "as it is"
lerobot-train --policy.type=halo \\
              --steps=10
echo '# not a comment' && python -m http.server
```

```python
subprocess.run('halo bench tick')
```
'''


def test_markdown_is_collected():
    assert commands.markdown(PAGE) == [
        [
            'make demo',
            'lerobot-train --policy.type=halo --steps=10',
            "echo '# not a comment' && python -m http.server",
        ],
        ['make demo'],
        ['halo plan'],
        ['make'],
    ]


def test_plain_text_is_collected():
    text = (
        'Made by hand: python scripts/x.py FILE.json [more]   # a remark\n'
        'For each (`halo check a|b DIR`) make a copy: it is small.\n    scripts/y.sh out'
    )
    assert commands.lines_of(text) == [
        'halo check a|b DIR',
        'python scripts/x.py FILE.json',
        'scripts/y.sh out',
    ]
    assert commands.alternatives('halo check a|b DIR') == [
        'halo check a DIR',
        'halo check b DIR',
    ]


def test_notebooks_and_help_are_collected(tmp_path):
    cells = [
        dict(cell_type='markdown', source=['`halo serve`']),
        dict(cell_type='code', source=['x = 1\n', '!make gates\n']),
        dict(cell_type='code', source=['%%bash\n', 'halo plan --preset tiny\n']),
    ]
    (tmp_path / 'a.ipynb').write_text(json.dumps(dict(cells=cells)))
    assert list(commands.notebook(tmp_path / 'a.ipynb')) == [
        ['halo serve'],
        ['make gates'],
        ['halo plan --preset tiny'],
    ]
    (tmp_path / 'a.py').write_text(
        '"Doc: halo bench tick"\np = ArgumentParser(prog=f"halo check", epilog="As `make'
        ' lab` does.")\n'
    )
    assert [b for b in commands.module(tmp_path / 'a.py') if b] == [
        ['halo bench tick'],
        ['halo check --help'],
        ['make lab'],
    ]
    (tmp_path / 'Makefile').write_text(
        'all: b ## all of it: make all X=1 (or more)\n\t@true\nb:\n'
    )
    assert [b for b in commands.makefile(tmp_path / 'Makefile') if b] == [
        ['make'],
        ['make all'],
        ['make all X=1'],
    ]


def test_every_sub_command_is_collected():
    "However the table is put together."
    from halo.cli import COMMANDS

    found = [text for (text,) in commands.subcommands(root / 'halo/cli.py')]
    assert sorted(found) == sorted(f'halo {name} --help' for name in COMMANDS)


SURE = re.compile(
    r'python -m (?:halo|lerobot)[.\w]* [\w-]|lerobot-\w+ --|torchrun -|accelerate launch'
    r' -|sbatch \w'
    r'|pip install -|\bhalo'
    r' (?:plan|train|serve|evaluate|reproduce|bench|mixture|check|demo) (?:--|\w+\.\w)'
)


def texts():
    "What a reader sees of every document: (name, text), one line after the other."
    for name in ('README.md', *tracked('nbs/*.ipynb')):
        if name.endswith('.ipynb'):
            cells = json.loads((root / name).read_text(encoding='utf-8'))['cells']
            yield (
                name,
                '\n'.join(
                    ''.join(c['source']) for c in cells if c['cell_type'] == 'markdown'
                ),
            )
        else:
            yield name, (root / name).read_text(encoding='utf-8')
    for p in sorted(q for q in (root / 'configs').rglob('*') if q.is_file()):
        yield p.relative_to(root).as_posix(), p.read_text(encoding='utf-8')


def test_no_printed_command_is_overlooked():
    "What is surely a command stands where the collector looks: not bare in a sentence."
    known = [c.text for c in commands.collect()]
    for name, text in texts():
        text = re.sub(r' {2,}', ' ', re.sub(r'\\\n\s*', '', text))
        for m in SURE.finditer(text):
            begun = text[m.start() : m.end() + 12].split('\n')[0]
            begun = re.split('`| #', begun)[0].strip(' .,;')
            assert any(begun in k or k.startswith(begun) for k in known), (
                f'{name} prints {begun!r} where the collector does not see it'
            )


# ---- the commands


def test_counts():
    "All that is printed is run, but for a few, and each of those says why."
    print('\n' + commands.summary(RUNS))
    excused = [r for r in RUNS if r.excuse]
    assert len(RUNS) > 100 and len(excused) <= 5, [r.printed.text for r in excused]
    for pattern, why in commands.EXCUSED.items():
        assert len(why) > 20 and any(re.search(pattern, r.printed.text) for r in excused), (
            f'{pattern} excuses nothing'
        )
    tested = [
        r
        for slow in (False, True)
        for _, block in commands.blocks(RUNS, slow)
        for r in block
    ]
    assert {r.command for r in tested} | {*commands.helps(RUNS)} == {
        r.command for r in RUNS if not r.excuse
    }


def test_every_rule_is_used():
    for rule in commands.RULES:
        assert any(
            re.search(rule.match, r.printed.text) or re.search(rule.match, r.command)
            for r in RUNS
        ), f'no command matches {rule.match}'


def documents(slow):
    return list(dict.fromkeys(where for where, _ in commands.blocks(RUNS, slow)))


def run_document(where, slow, folder, shared):
    "Run the commands of a document, block by block, in one clone; all that went wrong."
    here, wrong = clone.Clone(folder, shared=shared), []
    try:
        for document, block in commands.blocks(RUNS, slow):
            if document == where:
                wrong += [w for r in block if (w := here.run(r))]
    finally:
        here.close()
        shutil.rmtree(folder, ignore_errors=True)
    assert not wrong, '\n\n'.join(wrong)


def test_every_help_is_printed(tmp_path):
    texts = commands.helps(RUNS)
    assert len(texts) > 20
    assert not (wrong := clone.Clone(tmp_path).helps(texts)), wrong


@pytest.mark.parametrize('where', documents(False))
def test_quick_commands(where, tmp_path, tmp_path_factory):
    run_document(where, False, tmp_path, tmp_path_factory.getbasetemp())


@pytest.mark.slow
@pytest.mark.parametrize('where', documents(True))
def test_slow_commands(where, tmp_path, tmp_path_factory):
    run_document(where, True, tmp_path, tmp_path_factory.getbasetemp())


# ---- the test of the test

BROKEN = {
    'halo plan --preset tiny --gpus a100': '--gpus',
    'python -m halo.nowhere --x 1': 'No module named halo.nowhere',
    'make dmeo': 'dmeo',
    'halo mixture show configs/mixtures/none.yaml': 'none.yaml',
    'xdg-open outputs/demo/nothing.html': 'nothing.html',
    'pip install -e ".[simm]"': 'does not provide the extra',
    'scripts/env.sh python scripts/none.py': 'none.py',
    'pip install -r configs/requirements/none.txt': 'none.txt',
}


@pytest.fixture(scope='module')
def elsewhere(tmp_path_factory):
    return clone.Clone(tmp_path_factory.mktemp('elsewhere'))


@pytest.mark.slow
@pytest.mark.parametrize('text', BROKEN)
def test_a_broken_command_is_caught(text, elsewhere):
    [[line]] = commands.markdown(f'```sh\n{text}  # a remark\n```')
    wrong = elsewhere.run(commands.plan(commands.Printed(line, 'page.md', 0)))
    assert BROKEN[text] in wrong, wrong


@pytest.mark.slow
def test_a_broken_help_is_caught(elsewhere):
    said = elsewhere.helps(
        ['halo --help', 'halo nothing --help', 'python scripts/none.py --help']
    )
    assert said.splitlines() == [
        'FAILED halo nothing --help',
        'FAILED python scripts/none.py --help',
    ]


def test_a_placeholder_without_a_value_is_caught():
    with pytest.raises(
        ValueError, match="page.md prints `halo check DATASET2 …`: nothing says what '…'"
    ):
        commands.plan(commands.Printed('halo check DATASET2 …', 'page.md', 0))


def test_a_server_that_does_not_start_is_caught(elsewhere):
    run = commands.Run(
        commands.Printed('', 'page.md', 0),
        'python -m http.server PORT -d nowhere-at-all',
        serves='never says this',
    )
    fails = commands.Run(run.printed, 'false', serves='x')
    assert 'ended with status 1' in elsewhere.run(fails)
    assert 'had not said' in elsewhere.serve('sleep 60', 'x', 1, limit=1)


def test_the_clone_is_a_strangers(tmp_path):
    """An empty HOME, a path with a space and an umlaut, nothing that git does not hold, and
    halo from the clone.
    """
    here = clone.Clone(tmp_path)
    assert not {'data', 'outputs', 'runs', '.git'} & {p.name for p in here.root.iterdir()}
    assert (
        ' ' in str(here.root)
        and 'ä' in str(here.root)
        and here.env()['HOME'] == str(here.home)
    )
    done = here.start(
        'find "$HOME" -mindepth 1; cd / && python -c "import halo; print(halo.__file__)"'
    )
    assert done.communicate()[0].strip() == str(here.root / 'halo/__init__.py')


def test_git_decides_what_the_clone_holds(tmp_path):
    (tmp_path / '.gitignore').write_text('ignored\n')
    for name in ('held', 'ignored', 'forgotten'):
        (tmp_path / name).write_text(name)
    # no repository: what is there
    assert {'held', 'forgotten'} <= set(clone.held(tmp_path))
    for command in (['init', '-q'], ['add', 'held', '.gitignore']):
        subprocess.run(
            ['git', *command],
            cwd=tmp_path,
            check=True,
            env=clone.os.environ | dict(GIT_CEILING_DIRECTORIES='/'),
        )
    assert sorted(clone.held(tmp_path)) == ['.gitignore', 'held']


# ---- nothing of the machine that made it

ELSEWHERE = re.compile(
    r'(?<![\w./:~}$-])/(?:home|root|Users|work|tmp|private|mnt|opt|var|data|srv|scratch|workspace|usr)/[\w.][^\s"\',)]*'
    r'|\b[A-Z]:\\\\?\w|file:///\w'
)
LOCAL = re.compile(r'(?:\./)?(?:runs|data|outputs)/[\w./-]+')
# of a run's file: where its user's data lie and what it writes
ANNOUNCED = ('out', 'store', 'root', 'mixture')


def tracked(*patterns):
    names = clone.held(root)
    return [n for n in names if any(Path(n).match(p) for p in patterns)]


def strings(value, key=''):
    "Every string of a JSON or YAML value, keys of dictionaries included: (key, string)."
    if isinstance(value, dict):
        for k, v in value.items():
            yield key, str(k)
            yield from strings(v, str(k))
    elif isinstance(value, list):
        for v in value:
            yield from strings(v, key)
    elif isinstance(value, str):
        yield key, value


def metadata(path):
    "The header of a safetensors file, without its tensors' places."
    with path.open('rb') as f:
        head = json.loads(f.read(int.from_bytes(f.read(8), 'little')))
    return head.get('__metadata__', {})


def shipped(path):
    "The values of a shipped file of any kind."
    if path.suffix == '.json':
        return json.loads(path.read_text(encoding='utf-8'))
    if path.suffix == '.safetensors':
        return {k: parsed(v) for k, v in metadata(path).items()}
    if path.suffix in ('.yaml', '.yml'):
        import yaml

        return yaml.safe_load(path.read_text(encoding='utf-8'))
    return path.read_text(encoding='utf-8').splitlines()


def parsed(text):
    try:
        return json.loads(text)
    except ValueError:
        return text


def local_values(path):
    """Values of a shipped file that name a folder of one machine: outside the repository,
    or one that git does not hold.
    """
    for key, value in strings(shipped(path)):
        if m := ELSEWHERE.search(value):
            yield (
                f'{path.relative_to(root)}: {key} = {value[:80]!r} names {m[0]}, a path of'
                ' one machine'
            )
        elif LOCAL.fullmatch(value):
            yield (
                f'{path.relative_to(root)}: {key} = {value!r}, a folder that git does not'
                ' hold'
            )


@pytest.mark.parametrize(
    'name',
    tracked(
        'checkpoints/**/*.json',
        'checkpoints/**/*.jsonl',
        'checkpoints/**/*.safetensors',
        'checkpoints/*/*/*',
        'bench/*.json',
        'nbs/tables/*',
        'tests/*.json',
    ),
)
def test_shipped_files_know_no_machine(name):
    assert not (found := list(local_values(root / name))), '\n'.join(found)


@pytest.mark.parametrize('name', tracked('configs/*/*'))
def test_configs_know_no_machine(name):
    """A run's file names the folders it writes, and as inputs only those, its user's data,
    or what another file writes.
    """
    import yaml

    text = (root / name).read_text(encoding='utf-8')
    found = [m[0] for m in ELSEWHERE.finditer(text) if not text.startswith('#!' + m[0])]
    assert not found, f'{name} names {found}'
    if not name.startswith('configs/launch/') or not name.endswith('.yaml'):
        return
    made = {
        c['out']
        for n in tracked('configs/launch/*.yaml')
        if 'out' in (c := yaml.safe_load((root / n).read_text()))
    }
    for key, value in strings(yaml.safe_load(text)):
        if LOCAL.fullmatch(value) and key not in ANNOUNCED:
            assert any(value.startswith(f'{out}/') for out in made), (
                f'{name}: {key} = {value!r} is written by no other file'
            )


@pytest.mark.parametrize('name', tracked('nbs/*.ipynb'))
def test_notebooks_know_no_machine(name):
    """Neither sources nor outputs hold an absolute path; an output that names a folder
    under runs/ names one that its page makes.
    """
    cells = json.loads((root / name).read_text(encoding='utf-8'))['cells']
    source = '\n'.join(''.join(c['source']) for c in cells)
    for cell in cells:
        assert not (m := ELSEWHERE.search(''.join(cell['source']))), (
            f'{name} {cell["id"]}: {m[0]}'
        )
        for key, value in strings(
            [
                {k: v for k, v in o.get('data', {}).items() if not k.startswith('image/')}
                | dict(text=o.get('text', ''))
                for o in cell.get('outputs', [])
            ]
        ):
            assert not (m := ELSEWHERE.search(value)), (
                f'{name}, an output of {cell["id"]}: {m[0]}'
            )
            for m in re.finditer(r'(?<![\w./-])(?:runs|data|outputs)/[\w./-]+\w', value):
                assert (
                    (root / m[0]).exists() or m[0] in source or m[0].split('/')[1] in source
                ), f'{name}, an output of {cell["id"]}, names {m[0]}'


def test_a_path_of_one_machine_is_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), 'root', tmp_path)
    (tmp_path / 'a.json').write_text(
        json.dumps(
            dict(
                good='checkpoints/x',
                vlm_id='runs/x/vlm',
                deep=[dict(at='see /home/someone/x')],
                url='https://a.org/data/x',
            )
        )
    )
    found = list(local_values(tmp_path / 'a.json'))
    assert (
        len(found) == 2
        and "vlm_id = 'runs/x/vlm', a folder that git does not hold" in found[0]
        and '/home/someone/x' in found[1]
    )
