"""The book's form: parts that import one way only, code that fits the page."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root / 'scripts'))
import docs  # noqa: E402
import gates  # noqa: E402
import pages  # noqa: E402

PARTS = list(docs.PARTS)
RUFF = Path(sys.executable).parent / 'ruff'


def imported(path, package):
    "Modules of halo that a module imports, anywhere in it."
    inside = list(path.relative_to(package.parent).with_suffix('').parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) - node.level + 1] if node.level else []
            module = '.'.join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f'{module}.{a.name}' for a in node.names)


def upward(package):
    "Imports of a part that stands later in the list: 'method/vlm.py imports halo.viz'."
    wrong = set()
    for path in sorted(package.rglob('*.py')):
        part = path.relative_to(package).parts[0]
        if part not in PARTS:
            continue
        later = PARTS[PARTS.index(part) + 1 :]
        for name in imported(path, package):
            words = name.split('.')
            if words[0] == 'halo' and len(words) > 1 and words[1] in [*later, 'cli']:
                wrong.add(f'{path.relative_to(package)} imports halo.{words[1]}')
    return sorted(wrong)


def test_every_part_is_a_package_and_a_folder():
    packages = {p.name for p in (root / 'halo').iterdir() if (p / '__init__.py').is_file()}
    folders = {p.parent.name for p in (root / 'nbs').glob('*/*.ipynb')}
    assert packages - {'shipped'} == folders - {'.ipynb_checkpoints'} == set(PARTS)


def test_modules_stand_in_the_part_of_their_notebook():
    for name, text in pages.notebooks():
        if found := re.search(r'#\|\s*default_exp (\S+?)(\\n)?"', text):
            assert found[1].split('.')[0] == name.split('/')[0] or found[1] == 'cli', name


def test_imports_go_one_way():
    assert upward(root / 'halo') == []


@pytest.mark.parametrize(
    'line', ['from ..viz.masks import x', 'import halo.train.loop', 'from .. import viz']
)
def test_an_upward_import_is_found(tmp_path, line):
    module = tmp_path / 'halo/method/vlm.py'
    module.parent.mkdir(parents=True)
    module.write_text(f'def f():\n    {line}\n')
    part = 'train' if 'train' in line else 'viz'
    assert upward(tmp_path / 'halo') == [f'method/vlm.py imports halo.{part}']


def test_the_code_fits_the_page():
    assert gates.style(root) == ''


@pytest.mark.parametrize(
    'code, rule',
    [
        (f'x = {"1 + " * 30}1', 'E501'),
        ('x = 1; y = 2', 'E702'),
        ('if 1: x = 1', 'E701'),
        ('import sys\n\nx = 1', 'F401'),
    ],
)
def test_what_does_not_fit_is_found(tmp_path, code, rule):
    (tmp_path / 'nbs').mkdir()
    (tmp_path / 'pyproject.toml').write_text((root / 'pyproject.toml').read_text())
    cell = dict(cell_type='code', id='a', metadata={}, outputs=[], execution_count=None)
    book = dict(cells=[cell | dict(source=[code])], metadata={}, nbformat=4)
    (tmp_path / 'nbs/a.ipynb').write_text(json.dumps(book | dict(nbformat_minor=5)))
    assert rule in gates.style(tmp_path)


def test_no_part_of_the_paper_has_an_exception():
    said = (root / 'pyproject.toml').read_text()
    assert 'per-file-ignores' not in said
    for part in ('method', 'realtime', 'policy'):
        for path in (root / 'nbs' / part).glob('*.ipynb'):
            assert not re.search(
                r'# ?(ruff:|noqa)', path.read_text().replace('# noqa: F401', '')
            )


OLD = """
config sampling vlm salr flow expert model stream graph configuration_halo
processor_halo modeling_halo files mixture envs evaluate pretrain scale plan check
report demo baselines bench control serve twoarms tables thin calvin memory simpler
robot
""".split()


def old_paths(folder):
    "Lines of tracked files that name a module where it no longer is."
    names = '|'.join(OLD)
    old = rf'(?<![\w./-])halo\.({names})\b|\bhalo/({names}|train|data|benchmarks)\.py'
    command = ['git', 'grep', '-nP', old, '--', '.', ':!tests/test_book.py']
    return subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout


def test_no_old_path_is_left():
    assert old_paths(root) == ''


@pytest.mark.parametrize('text', ['python -m halo.envs', 'halo/train.py', 'halo.vlm.pack'])
def test_an_old_path_is_found(tmp_path, text):
    subprocess.run(['git', 'init', '-q'], cwd=tmp_path, check=True)
    (tmp_path / 'page.md').write_text(f'see `{text}`, not `halo.train.loop`\n')
    subprocess.run(['git', 'add', '.'], cwd=tmp_path, check=True)
    assert text in old_paths(tmp_path)


def test_every_part_has_one_opening_page():
    for part in PARTS:
        page = json.loads((root / f'nbs/{part}/index.ipynb').read_text(encoding='utf-8'))
        text = ''.join(''.join(c['source']) for c in page['cells'])
        for path in (root / 'nbs' / part).glob('[0-9]*.ipynb'):
            book = json.loads(path.read_text(encoding='utf-8'))
            title = ''.join(book['cells'][0]['source']).splitlines()[0].removeprefix('# ')
            assert f'[{title}]({path.name})' in text, path


def test_the_maps_are_drawn():
    command = [sys.executable, root / 'scripts/tick_map.py', '--check']
    assert subprocess.run(command).returncode == 0
