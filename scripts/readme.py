"""Write README.md from nbs/index.ipynb: `readme.py` writes it, `readme.py --check` says
whether it is fresh. Needs no Quarto.

The notebook's own directives decide what is shown: `#| hide` drops a cell, `#| echo: false`
its code, `#| output: false` its outputs.
Relative links are rewritten from nbs/ to the top of the repository, and pictures among the
outputs become files under assets/readme/.
"""

import base64
import json
import os
import posixpath
import re
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
note = (
    '<!-- Made from nbs/index.ipynb by scripts/readme.py: edit the notebook, then run `make'
    ' export`. -->'
)
link = re.compile(r'(\]\(|\b(?:src|href)=")([^)\s"]+)')


def text(value):
    return value if isinstance(value, str) else ''.join(value or [])


def to_top(target):
    """A link target of nbs/index.ipynb as seen from the top folder; addresses, anchors and
    absolute paths stay.
    """
    if re.match(r'[a-z][a-z0-9+.-]*:|[#/]', target, re.I):
        return target
    path, mark, rest = target.partition('#')
    return posixpath.normpath(posixpath.join('nbs', path)) + mark + rest


def relink(markdown):
    "`markdown` with its relative links rewritten, fenced code excepted."
    parts = re.split(r'(^```.*?^```\s*?$)', markdown, flags=re.M | re.S)
    return ''.join(
        p if i % 2 else link.sub(lambda m: m[1] + to_top(m[2]), p)
        for i, p in enumerate(parts)
    )


def directives(source):
    "The leading `#|` lines of a cell as a dictionary, and the code below them."
    lines, found = source.splitlines(), {}
    while lines and re.match(r'#\s*\|', lines[0]):
        name, _, value = lines.pop(0).partition('|')[2].partition(':')
        if name.split():
            found[name.split()[0]] = value.strip()
    return found, '\n'.join(lines).strip()


def fence(code, language=''):
    "`code` in a fence that it cannot close."
    marks = '`' * max(3, 1 + max(map(len, re.findall('`+', code)), default=0))
    return f'{marks}{language}\n{code}\n{marks}'


def show(output, name, pictures):
    "One output as Markdown; a picture is put into `pictures` under its path."
    if output['output_type'] == 'stream':
        return (
            fence(text(output['text']).rstrip(), 'text')
            if output['name'] == 'stdout'
            else ''
        )
    data = output.get('data', {})
    if 'image/png' in data:
        path = f'assets/readme/{name}.png'
        pictures[path] = base64.b64decode(text(data['image/png']))
        return f'![]({path})'
    if 'text/markdown' in data:
        return relink(text(data['text/markdown'])).strip()
    return fence(text(data['text/plain']).rstrip(), 'text') if 'text/plain' in data else ''


def cell_blocks(cell, number, pictures):
    "The Markdown blocks of one cell."
    source = text(cell['source'])
    if cell['cell_type'] == 'markdown':
        return [relink(source.strip())]
    if cell['cell_type'] != 'code':
        return []
    found, code = directives(source)
    if {'hide', 'default_exp', 'export'} & found.keys() or found.get('include') == 'false':
        return []
    blocks = [fence(code, 'python')] if code and found.get('echo') != 'false' else []
    if found.get('output') == 'false':
        return blocks
    return blocks + [
        show(o, f'{number}-{i}', pictures) for i, o in enumerate(cell.get('outputs', []))
    ]


def convert(notebook):
    "README.md as text, and its pictures by path, from a notebook given as a dictionary."
    pictures = {}
    blocks = [
        b
        for n, cell in enumerate(notebook['cells'])
        for b in cell_blocks(cell, n, pictures)
    ]
    return '\n\n'.join([note, *filter(None, blocks)]) + '\n', pictures


def made(project):
    "What `project`'s index notebook gives: bytes by path."
    readme, pictures = convert(
        json.loads((project / 'nbs/index.ipynb').read_text(encoding='utf-8'))
    )
    return {'README.md': readme.encode(), **pictures}


def fresh(project):
    "Whether every file on disk is what the notebook gives."
    return all(
        (project / p).exists() and (project / p).read_bytes() == b
        for p, b in made(project).items()
    )


def write(project):
    "Write the files that differ, each under a temporary name first."
    for path, content in made(project).items():
        target = project / path
        if target.exists() and target.read_bytes() == content:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + '.part')
        part.write_bytes(content)
        os.replace(part, target)
        print(f'Wrote {path}')


if __name__ == '__main__':
    if '--check' not in sys.argv[1:]:
        write(root)
    elif not fresh(root):
        sys.exit('README.md is not what nbs/index.ipynb gives: run make export')
