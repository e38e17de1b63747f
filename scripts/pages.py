"""How the book reads: the size of its exported cells and the words of prose for a line of
code, chapter by chapter.

python scripts/pages.py                 # the working tree
  --at REVISION                         # as git holds it there
  --json                                # for a machine
"""

import argparse
import json
import re
import statistics
import subprocess
from pathlib import Path

root = Path(__file__).resolve().parent.parent
EXPORT = re.compile(r'^\s*#\s*\|\s*export', re.M)


def notebooks(revision=''):
    "Name and text of every notebook below nbs/, of the working tree or of a revision."
    if not revision:
        for path in sorted((root / 'nbs').rglob('*.ipynb')):
            if '.ipynb_checkpoints' not in path.parts:
                yield path.relative_to(root / 'nbs').as_posix(), path.read_text('utf-8')
        return
    git = lambda *args: (
        subprocess.run(
            ['git', *args], cwd=root, check=True, capture_output=True, text=True
        ).stdout
    )
    for name in git('ls-tree', '-r', '--name-only', revision, 'nbs').splitlines():
        if name.endswith('.ipynb'):
            yield name.removeprefix('nbs/'), git('show', f'{revision}:{name}')


def code_lines(source):
    "Lines that hold something, directives left out."
    lines = (line.strip() for line in source.splitlines())
    return [line for line in lines if line and not re.match(r'#\s*\|', line)]


def words(source):
    "Words of a Markdown cell; fenced blocks and formulas are left out."
    text = re.sub(r'```.*?```|\$\$.*?\$\$|\$[^$\n]*\$', ' ', source, flags=re.S)
    return len(re.findall(r'[A-Za-z][\w’\'-]*', re.sub(r'\]\([^)]*\)', ']', text)))


def measure(text):
    """Of one notebook: lines of its exported cells, lines of code, words, exported cells
    that no sentence announces.
    """
    exported, lines, prose, bare, announced = [], 0, 0, 0, False
    for cell in json.loads(text)['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown':
            prose += words(source)
            announced = announced or words(source) > 0
        elif cell['cell_type'] == 'code' and (found := code_lines(source)):
            lines += len(found)
            if EXPORT.search(source):
                exported.append(len(found))
                bare += not announced
            announced = False
    return dict(exported=exported, lines=lines, words=prose, bare=bare)


def summary(pages):
    "Median, nine in ten and largest of all exported cells."
    sizes = sorted(n for page in pages.values() for n in page['exported'])
    if not sizes:
        return dict(cells=0, median=0, p90=0, largest=0)
    return dict(
        cells=len(sizes),
        median=statistics.median(sizes),
        p90=sizes[int(0.9 * (len(sizes) - 1))],
        largest=sizes[-1],
    )


def table(pages):
    "The measures as text."
    head = f'{"chapter":34}{"cells":>6}{"largest":>8}{"bare":>6}{"lines":>7}{"words":>7}'
    head += f'{"words/line":>11}'
    rows = [head]
    for name, page in pages.items():
        sizes = page['exported']
        share = page['words'] / max(page['lines'], 1)
        rows.append(
            f'{name:34}{len(sizes):6}{max(sizes, default=0):8}{page["bare"]:6}'
            f'{page["lines"]:7}{page["words"]:7}{share:11.1f}'
        )
    s = summary(pages)
    rows.append(
        f'{s["cells"]} exported cells: median {s["median"]:g} lines, '
        f'nine in ten at most {s["p90"]}, the largest {s["largest"]}'
    )
    return '\n'.join(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--at', default='', metavar='REVISION', help='as git holds it there'
    )
    parser.add_argument('--json', action='store_true', help='print JSON')
    args = parser.parse_args()
    pages = {name: measure(text) for name, text in notebooks(args.at)}
    print(json.dumps(dict(pages=pages, **summary(pages))) if args.json else table(pages))


if __name__ == '__main__':
    main()
