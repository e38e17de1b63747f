"""The repository as a whole: installation, plug-in discovery, notebooks as the source, and
the scripts that check them.
"""

import ast
import json
import re
import shutil
import socket
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import distribution
from pathlib import Path
from types import SimpleNamespace

import pytest
from nbdev.config import get_config

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root / 'scripts'))
import gates  # noqa: E402
import readme
import test_notebooks

notebooks = [
    p
    for p in sorted((root / 'nbs').rglob('*.ipynb'))
    if not p.name.startswith('_') and '.ipynb_checkpoints' not in p.parts
]
# what nbdev and Quarto read at the top of a cell, and the flags of settings.ini
known = {
    'default_exp',
    'export',
    'exporti',
    'exports',
    'exec_doc',
    'hide',
    'hide_line',
    'filter_stream',
    'eval',
    'echo',
    'output',
    'include',
    'warning',
    'label',
    'code-fold',
    'code-summary',
    'fig-cap',
    'fig-alt',
    'fig-align',
    'tbl-cap',
    'layout-ncol',
    'column',
}


def settings():
    ini = ConfigParser(delimiters=['='])
    ini.read(root / 'settings.ini', encoding='utf-8')
    return ini['DEFAULT']


def cells(path, kind=None):
    return [
        c
        for c in json.loads(path.read_text(encoding='utf-8'))['cells']
        if kind in (None, c['cell_type'])
    ]


def source(cell):
    return ''.join(cell['source'])


def texts(path):
    "What a reader sees of a notebook as text, pictures left out: (cell, text)."
    for n, cell in enumerate(cells(path)):
        yield f'cell {n}', source(cell)
        for out in cell.get('outputs', []):
            parts = [out.get('text', '')] + [
                v for k, v in out.get('data', {}).items() if k == 'text/plain'
            ]
            yield from ((f'an output of cell {n}', readme.text(p)) for p in parts)


def python(code):
    return subprocess.run(
        [sys.executable, '-c', code], cwd=root / 'tests', capture_output=True, text=True
    )


# Installation


def test_installed_under_the_name_lerobot_looks_for():
    # LeRobot compares the name as written in the metadata, so `-` for `_` would hide the
    # plug-in
    assert (
        distribution('lerobot_policy_halo').metadata['Name']
        == settings()['lib_name']
        == 'lerobot_policy_halo'
    )


def test_one_version():
    import halo

    assert (
        halo.__version__
        == settings()['version']
        == distribution('lerobot_policy_halo').version
    )


def test_constraints_admit_the_requirements():
    from packaging.requirements import Requirement

    pins = dict(
        line.split('==')
        for line in (root / 'constraints.txt').read_text().split('\n')
        if '==' in line
    )
    for group in ('requirements', 'sim_requirements', 'dev_requirements'):
        for need in map(Requirement, settings()[group].split()):
            assert need.name in pins, (
                f'{need.name} is not in constraints.txt: run make lock'
            )
            assert need.specifier.contains(pins[need.name]), (
                f'constraints.txt pins {need.name}=={pins[need.name]}, settings.ini asks'
                f' {need}'
            )


@pytest.mark.slow
def test_lerobot_finds_the_plugin_by_itself():
    done = python(
        'from lerobot.utils.import_utils import register_third_party_plugins as register;'
        ' register()\nfrom lerobot.configs.policies import PreTrainedConfig\nassert "halo"'
        ' in PreTrainedConfig.get_known_choices(),'
        ' sorted(PreTrainedConfig.get_known_choices())'
    )
    assert done.returncode == 0 and 'Could not import' not in done.stderr, done.stderr[
        -2000:
    ]


# Notebooks


@pytest.mark.parametrize('path', notebooks, ids=lambda p: p.stem)
def test_notebook_form(path):
    first = cells(path)[0]
    assert first['cell_type'] == 'markdown' and re.match(r'# \S.*\n+> \S', source(first)), (
        'opens with a # title and a > promise'
    )
    assert path.stat().st_size < 1e6, (
        f'{path.stat().st_size / 1e6:.2f} MB: make the outputs smaller'
    )
    assert not [
        o for c in cells(path, 'code') for o in c['outputs'] if o['output_type'] == 'error'
    ], 'holds the output of an error'
    for where, text in texts(path):
        found = re.search(r'.{0,60}(?<![\w.])/(home|root|Users|work|tmp)/\w.{0,60}', text)
        assert not found, f'{where} shows a path of the machine that ran it: {found[0]}'


@pytest.mark.parametrize('path', notebooks, ids=lambda p: p.stem)
def test_directives_are_known(path):
    flags = set(settings()['tst_flags'].split())
    for cell in cells(path, 'code'):
        found, code = readme.directives(source(cell))
        assert found.keys() <= known | flags, (
            f'unknown directive {found.keys() - known - flags} in:\n{source(cell)[:200]}'
        )
        # nbdev reads directives at the top of a cell only: below the first line of code one
        # would silently do nothing
        late = re.findall(r'^#\s*\|\s*(\w[\w-]*)', code, re.M)
        assert not set(late) & (known | flags), (
            f'directive {late} stands below code in:\n{source(cell)[:200]}'
        )


@pytest.mark.parametrize(
    'path', sorted(p for p in (root / 'halo').rglob('*.py')), ids=lambda p: p.stem
)
def test_nothing_is_unpickled(path):
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        names = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module or '']
            if isinstance(node, ast.ImportFrom)
            else []
        )
        assert not {n.partition('.')[0] for n in names} & {
            'pickle',
            'dill',
            'cloudpickle',
            'joblib',
            'shelve',
        }, f'line {node.lineno}'
        if isinstance(node, ast.Call) and ast.unparse(node.func) == 'torch.load':
            assert any(
                k.arg == 'weights_only' and ast.unparse(k.value) == 'True'
                for k in node.keywords
            ), f'line {node.lineno}: weights_only=True'


# The scripts, on a project of one notebook


@pytest.fixture
def project(tmp_path):
    "A project whose gates pass."
    shutil.copy2(root / 'settings.ini', tmp_path)
    cell = lambda kind, id, text: dict(
        cell_type=kind,
        id=id,
        metadata={},
        source=text.splitlines(True),
        **(dict(execution_count=None, outputs=[]) if kind == 'code' else {}),
    )
    pages = {
        'index': [
            cell('markdown', 'a1', '# Index\n\n> Promise.'),
            cell('markdown', 'a2', '[one](00_one.ipynb) and ![](../assets/x.png)'),
        ],
        '00_one': [
            cell('markdown', 'b1', '# one\n\n> Promise.'),
            cell('code', 'b2', '#| default_exp one'),
            cell('code', 'b3', '#| export\ndef one(): return 1'),
            cell('code', 'b4', '#| slow\nraise RuntimeError'),
            cell('code', 'b5', 'assert one() == 1'),
        ],
    }
    (tmp_path / 'nbs').mkdir()
    for name, content in pages.items():
        save(tmp_path / f'nbs/{name}.ipynb', content)
    for command in ('nbdev_clean', 'nbdev_export'):
        assert not gates.nbdev(command, tmp_path)
    readme.write(tmp_path)
    assert gates.check(tmp_path) == []
    return tmp_path


def save(path, content):
    path.write_text(
        json.dumps(dict(cells=content, metadata={}, nbformat=4, nbformat_minor=5)),
        encoding='utf-8',
    )


def edit(path, old, new):
    text = path.read_text(encoding='utf-8')
    assert old in text
    path.write_text(text.replace(old, new), encoding='utf-8')


@pytest.mark.parametrize(
    'file, old, new, says',
    [
        (
            'halo/one.py',
            'return 1',
            'return 2',
            'halo/one.py is not what the notebooks export',
        ),
        (
            'nbs/00_one.ipynb',
            'return 1',
            'return 2',
            'halo/one.py is not what the notebooks export',
        ),
        (
            'nbs/00_one.ipynb',
            '"execution_count": null',
            '"execution_count": 3',
            'nbs/00_one.ipynb is not clean',
        ),
        ('nbs/00_one.ipynb', '"cells"', '"cells', 'nbs/00_one.ipynb is not a notebook'),
        ('nbs/index.ipynb', 'and', 'or', 'README.md is not what nbs/index.ipynb gives'),
    ],
)
def test_gates_name_what_is_out_of_date(project, file, old, new, says):
    edit(project / file, old, new)
    before = {p: p.read_bytes() for p in project.rglob('*') if p.is_file()}
    assert [says in c for c in gates.check(project)] == [True]
    # the gates changed nothing
    assert before == {p: p.read_bytes() for p in project.rglob('*') if p.is_file()}


def test_gates_see_a_module_of_no_notebook(project):
    (project / 'halo/stray.py').write_text('x = 1\n')
    assert any('halo/stray.py comes from no notebook' in c for c in gates.check(project))


def test_readme_links_from_the_top(project):
    assert (
        '[one](nbs/00_one.ipynb) and ![](assets/x.png)'
        in (project / 'README.md').read_text()
    )
    assert (
        readme.to_top('https://a.b/c') == 'https://a.b/c'
        and readme.to_top('#top') == '#top'
        and readme.to_top('../LICENSE#x') == 'LICENSE#x'
    )


def test_flags_decide_which_cells_run(project, monkeypatch):
    path = project / 'nbs/00_one.ipynb'
    monkeypatch.setattr(test_notebooks, 'root', project)

    def test(flags, limit):
        return next(test_notebooks.test_all([path], flags, limit, 1, fresh=True))[1::2]

    passed, out = test([], 120)
    assert passed, out  # the slow cell, which raises, was skipped
    passed, out = test(['slow'], 120)
    assert not passed and 'RuntimeError' in out
    assert test_notebooks.flagged(path, ['slow']) and not test_notebooks.flagged(
        path, ['gpu']
    )
    assert not test([], 0.01)[0]  # a limit stops it


def test_forked_notebooks_pass_and_fail_like_fresh_ones(project):
    """Two at a time from one process; what one of them does to its interpreter, the other
    does not see.
    """
    code = f"""import sys; sys.path.insert(0, {str(root / 'scripts')!r})
import test_notebooks as t, nbdev.test, os; from pathlib import Path
t.root = Path({str(project)!r}); os.chdir(t.root); path = t.root/'nbs/00_one.ipynb'
paths = [path, path.with_name('01_two.ipynb')]
for flags, limit in (([], 120), (['slow'], 120), ([], 0.01)):
    print([passed for _, passed, *_ in t.test_all(paths, flags, limit, 2)])"""
    (project / 'nbs/01_two.ipynb').write_text((project / 'nbs/00_one.ipynb').read_text())
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert out.stdout.splitlines() == [
        '[True, True]',
        '[False, False]',
        '[False, False]',
    ], out.stdout + out.stderr


def test_libraries_are_imported_before_the_forks(monkeypatch):
    "A formatter once took the imports for unused: every notebook paid for them again."
    monkeypatch.chdir(root)
    asked = []
    noted = SimpleNamespace(import_module=asked.append)
    monkeypatch.setattr(test_notebooks, 'importlib', noted)
    test_notebooks.preload()
    assert tuple(asked) == test_notebooks.PRELOADED
    assert {name.split('.')[0] for name in asked} >= {'lerobot', 'transformers'}


def test_tests_have_no_network():
    with pytest.raises(AssertionError, match='without a network'):
        socket.create_connection(('192.0.2.1', 80), timeout=1)


def test_no_address_is_made_up():
    "Empty fields make no link; nbdev would make an address out of a user's name."
    s = settings()
    assert 'user' not in s
    assert [s[k] for k in ('doc_host', 'doc_baseurl', 'git_url')] == ['', '', '']
    about = get_config()
    assert not about.git_url and not about.doc_host
    made_up = re.compile(r'github\.com/halo|halo\.github\.io', re.I)
    top = [root / 'README.md', root / '_quarto.yml']
    held = [*(root / 'halo').rglob('*.py'), *notebooks, *top]
    assert [p for p in held if made_up.search(p.read_text('utf-8'))] == []
