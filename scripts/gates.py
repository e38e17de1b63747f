"""Check, in a temporary copy, that the notebooks are clean, that halo/ is what they export,
and that README.md is fresh.

The working tree is only read, so uncommitted work is safe. Exit status 1, with one line per
file and the command that mends it, if something is out of date.
"""

import difflib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import readme

root = Path(__file__).resolve().parent.parent
skipped = {'.ipynb_checkpoints', '__pycache__'}


def files(folder, pattern):
    """Paths under `folder` that match `pattern`, relative to it, without checkpoints and
    caches.
    """
    return {
        p.relative_to(folder): p
        for p in sorted(folder.rglob(pattern))
        if not skipped & set(p.parts)
    }


def copy(project, to):
    """Copy settings and notebooks of `project` to `to`; its library stays behind, so that
    export starts from nothing.
    """
    for name, path in {
        Path('settings.ini'): project / 'settings.ini',
        **{Path('nbs') / n: p for n, p in files(project / 'nbs', '*.ipynb').items()},
    }.items():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, to / name)
    (to / 'halo').mkdir()


def nbdev(command, cwd):
    """Run one nbdev command in `cwd`, without the user's own nbdev settings; return what it
    printed if it failed.
    """
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | {
        'XDG_CONFIG_HOME': str(cwd / 'none'),
        'XDG_CONFIG_DIRS': str(cwd / 'none'),
    }
    done = subprocess.run(
        [Path(sys.executable).parent / command],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr if done.returncode else ''


def unreadable(project):
    "Notebooks that are not JSON: nbdev_clean only warns about them."
    for name, path in files(project / 'nbs', '*.ipynb').items():
        try:
            json.loads(path.read_text(encoding='utf-8'))
        except ValueError as e:
            yield f'nbs/{name} is not a notebook ({e}): restore or remove it'


def differences(folder, was, now, pattern):
    """Names under `folder` whose text differs between the projects `was` and `now`, with
    the first differing lines.
    """
    a, b = files(was / folder, pattern), files(now / folder, pattern)
    for name in sorted(a.keys() | b.keys()):
        old, new = (
            side[name].read_text(encoding='utf-8') if name in side else ''
            for side in (a, b)
        )
        if name in a and name in b and old == new:
            continue
        lines = list(
            difflib.unified_diff(
                old.splitlines(),
                new.splitlines(),
                f'{folder}/{name}',
                'made again',
                lineterm='',
                n=0,
            )
        )
        yield f'{folder}/{name}', name in a, name in b, [line[:160] for line in lines[2:10]]


def style(project):
    "What ruff says of notebooks and scripts, by pyproject.toml's rules; '' if nothing."
    command = [Path(sys.executable).parent / 'ruff', 'check', '--no-cache', '--quiet']
    done = subprocess.run(
        [*command, '--output-format', 'concise', '.'],
        cwd=project,
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr if done.returncode else ''


def check(project):
    "Complaints about `project`, each one line or more of text."
    if broken := list(unreadable(project)):
        return broken
    complaints = []
    with tempfile.TemporaryDirectory(prefix='halo-gates-') as tmp:
        made = Path(tmp)
        copy(project, made)
        if out := nbdev('nbdev_clean', made):
            return [f'nbdev_clean failed:\n{out}']
        for name, _, _, lines in differences('nbs', project, made, '*.ipynb'):
            complaints.append(
                '\n'.join(
                    [
                        f'{name} is not clean: run .venv/bin/nbdev_clean --fname {name}',
                        *lines,
                    ]
                )
            )
        if out := nbdev('nbdev_export', made):
            return [*complaints, f'nbdev_export failed:\n{out}']
        for name, here, there, lines in differences('halo', project, made, '*.py'):
            why = (
                ('is not what the notebooks export' if there else 'comes from no notebook')
                if here
                else 'has not been exported'
            )
            fix = 'make export' if there else 'move it into a notebook or delete it'
            complaints.append(
                '\n'.join([f'{name} {why}: {"run " + fix if there else fix}', *lines])
            )
    if said := style(project):
        complaints.append(said.rstrip())
    if not readme.fresh(project):
        complaints.append('README.md is not what nbs/index.ipynb gives: run make export')
    return complaints


if __name__ == '__main__':
    complaints = check(root)
    for c in complaints:
        print(c, file=sys.stderr)
    if complaints:
        sys.exit(1)
    print(
        f"Gates: {len(files(root / 'nbs', '*.ipynb'))} notebooks clean,"
        f" {len(files(root / 'halo', '*.py'))} modules exported, README.md fresh"
    )
