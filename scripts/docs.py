"""Render nbs/ as a website into _docs/, with Quarto where it is installed and with
smalldocs elsewhere. No cell is run.

nbdev's processors apply the directives; exported cells stay as code, each under an anchor
that `name` in backticks links to.
The site's options are those of _quarto.yml at the top of the repository; its sidebar lists
the notebooks in their order, part by part.
Maths and fonts come from npm (scripts/vendor.py), the first page from scripts/landing.py;
no page asks another machine for anything.

    python scripts/docs.py              # into _docs/
      --to DIR      elsewhere (a folder that is not there yet, or a site made before)
      --offline     from the cache alone; npm is not asked
      --bare        without what comes from npm: formulas as they are written, the reader's
      own fonts
"""

import argparse
import ast
import base64
import gzip
import hashlib
import html
import io
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import check_site
import landing
import lean
import vendor
import yaml
from execnb.nbio import mk_cell, read_nb, write_nb
from nbdev.doclinks import nbglob
from nbdev.process import NBProcessor, Processor
from nbdev.processors import (
    add_links,
    filter_stream_,
    hide_,
    hide_line,
    populate_language,
    strip_ansi,
)
from PIL import Image

root = Path(__file__).resolve().parent.parent
# Folders of nbs/ and packages of halo/, in the order in which one may import from the next
PARTS = dict(
    method='The method',
    realtime='In real time',
    policy='A LeRobot policy',
    data='Data',
    sim='Simulated task',
    train='Training',
    viz='Seeing inside',
    studies='Studies',
    deploy='Deployment',
    benchmarks='Benchmarks',
)
FURTHER = 'Further'  # notebooks of no part
# What scripts/site/after.html adds to every page
TWINS = re.compile(r'<script>\s*// Explorers follow the page.*?</script>\s*', re.S)
MATHS = re.compile(r'https://[^"\']*/katex@[\d.]+/dist/')


def names_of(node):
    """What a definition is linked by: its name, `Class.name` for a patch, and its public
    methods.
    """
    if isinstance(node, ast.ClassDef):
        return [
            node.name,
            *(
                f'{node.name}.{o.name}'
                for o in node.body
                if isinstance(o, ast.FunctionDef) and not o.name.startswith('_')
            ),
        ]
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return []
    if (
        not any('patch' in ast.unparse(d) for d in node.decorator_list)
        or not node.args.args
        or node.args.args[0].annotation is None
    ):
        return [node.name]
    owners = re.findall(r'\w+', ast.unparse(node.args.args[0].annotation))
    return [f'{o}.{node.name}' for o in owners]


class exported(Processor):
    """Fold an exported cell open, say where it goes, and give it its first name as an
    anchor; further names are kept in `also`.
    """

    def begin(self):
        self.known = set()  # names that differ in case only share one anchor: the first
        self.module = next(
            (
                c.directives_['default_exp'][0]
                for c in self.nb.cells
                if 'default_exp' in c.get('directives_', {})
            ),
            '',
        )

    def cell(self, cell):
        if (
            cell.cell_type != 'code'
            or not {'export', 'exporti', 'exports'} & cell.directives_.keys()
        ):
            return
        named = [
            n
            for n in dict.fromkeys(
                n.lower() for o in ast.parse(cell.source).body for n in names_of(o)
            )
            if n not in self.known
        ]
        self.known |= set(named)
        options = [
            '#| code-fold: show',
            f'#| code-summary: "halo/{self.module.replace(".", "/")}.py"',
        ]
        if named:
            options.append(f'#| label: {named[0]}')
        cell.source = '\n'.join([*options, cell.source])
        cell.also = named[1:]


class title(Processor):
    """Turn the opening `# title` and `> promise` into front matter; what else that cell
    says stays (nbdev's own processor would drop it).
    """

    def begin(self):
        first = self.nb.cells[0]
        lines = first.source.splitlines() if first.cell_type == 'markdown' else []
        fields = {}
        for field, mark in (('title', '# '), ('description', '> ')):
            found = next((l for l in lines if l.startswith(mark)), None)
            if found:
                lines.remove(found)
                fields[field] = found[2:].strip()
        if not fields:
            return
        first.source = '\n'.join(lines).strip() or None
        self.nb.cells.insert(
            0,
            mk_cell(
                f'---\n{yaml.safe_dump(fields, allow_unicode=True, width=10**6)}---', 'raw'
            ),
        )
        self.nb.cells[0].directives_ = {}


def drop_widgets(cell):
    """Drop what stands for a widget where no kernel is: its name in words says nothing to a
    reader.
    """
    if cell.cell_type == 'code':
        cell.outputs = [
            o
            for o in cell.get('outputs', [])
            if not (d := o.get('data', {}))
            or not (
                'application/vnd.jupyter.widget-view+json' in d
                or re.match(r'[HV]?Box\(', ''.join(d.get('text/plain', '')))
            )
        ]


def drop_empty(cell):
    "Drop code cells of which only directives were there."
    if cell.cell_type == 'code' and not cell.source.strip():
        cell.source = None


def page_names(paths):
    "nbdev's page names (without the leading number) to the names that the site has."
    names = (p.relative_to(root / 'nbs').with_suffix('.html') for p in paths)
    return {
        (
            p.parent / re.sub(r'^\d+[a-zA-Z0-9]*_', '', p.name.lower())
        ).as_posix(): p.as_posix()
        for p in names
    }


def modules_of(notebook):
    """The modules that a chapter speaks of: its own, and those from which its code imports.

    As nbdev names their pages: `policy.configuration` for `policy.configuration_halo`.
    """
    code = '\n'.join(c.source for c in notebook.cells if c.cell_type == 'code')
    found = set(re.findall(r'^#\| *default_exp ([\w.]+)', code, re.M))
    found |= set(re.findall(r'\b(?:from|import) halo\.([\w.]+)', code))
    for part, names in re.findall(r'\bfrom halo\.(\w+) import ([\w, ]+)', code):
        found |= {f'{part}.{n}' for n in re.findall(r'\w+', names)}
    return {m.removesuffix('_halo') for m in found}


def meant(markdown, modules):
    """Without nbdev's links to a word's namesake: a small name is common, and means the
    function of another chapter only where that chapter's module is used.
    """

    def keep(m):
        known = m[2].removesuffix('.html').replace('/', '.') in modules
        return m[0] if known or m[1][0].isupper() else f'`{m[1]}`'

    return re.sub(r'\[`([^`\n]+)`\]\(/+([\w/-]+\.html)#?[\w.]*\)', keep, markdown)


def relinked(markdown, pages, folder):
    "nbdev's links (from the top of nbs/) as links to the site's pages from `folder`."

    def link(m):
        page = pages.get(m[1], m[1])
        return f'](./{posixpath.relpath(page, folder.as_posix())}{m[2]})'

    # nbdev links a name also inside a link of the author's, whose own it would break
    nested = re.compile(r'\[[^\[\]\n]*(?:\[`[^`\n]+`\]\(/[^)]*\)[^\[\]\n]*)+\]\(')
    plain = re.compile(r'\[(`[^`\n]+`)\]\(/[^)]*\)')
    markdown = nested.sub(lambda m: '[' + plain.sub(r'\1', m[0][1:-2]) + '](', markdown)
    return re.sub(r'\]\(/+([\w/-]+\.html)(#[\w.]*)\)', link, markdown)


def anchored(cells):
    """The cells, with anchors before a cell for the further names it defines; a heading
    that reads like a name gets an id of its own.
    """
    labels = {
        c: found[1]
        for c in range(len(cells))
        if cells[c].cell_type == 'code'
        and (found := re.search(r'^#\| label: (\S+)', cells[c].source or '', re.M))
    }
    seen, out = set(labels.values()), []
    for c in cells:
        also = [n for n in dict.fromkeys(getattr(c, 'also', [])) if n not in seen]
        if also:
            out.append(
                mk_cell(
                    '```{=html}\n<div class="halo-anchors">'
                    + ''.join(f'<span id="{n}"></span>' for n in also)
                    + '</div>\n```',
                    'markdown',
                )
            )
        seen |= set(also)
        out.append(c)
    for c in out:
        if c.cell_type == 'markdown' and c.source:
            c.source = re.sub(
                r'^(#{2,6} )(.+?)\s*$',
                lambda m: (
                    m[0]
                    if slug(m[2]) not in seen or '{#' in m[2]
                    else f'{m[1]}{m[2]} {{#about-{slug(m[2])}}}'
                ),
                c.source,
                flags=re.M,
            )
    return out


def slug(heading):
    "The id that a heading is given."
    return re.sub(
        r'\s+', '-', re.sub(r'[^\w\s.-]', '', heading.replace('`', '').strip().lower())
    )


def lighter(data: str) -> str:
    """A PNG (base64) in 256 colours, if that is smaller; pictures of a camera, which have
    thousands, stay as they are and become files with losses (`webp`).
    """
    out, picture = io.BytesIO(), Image.open(io.BytesIO(base64.b64decode(data)))
    if is_photo(picture):
        return data
    colours = picture.convert('RGB').quantize(256, dither=Image.Dither.NONE)
    colours.save(out, 'PNG', optimize=True)
    return min(data, base64.b64encode(out.getvalue()).decode(), key=len)


def is_photo(picture) -> bool:
    "Whether a picture has more colours than a drawing with its soft edges."
    return picture.convert('RGB').getcolors(20_000) is None


def webp(kind: str, data: str) -> str:
    """A picture (base64, `kind` png or jpeg) as an image's source: the same pixels as
    lossless WebP; a photo, in which nobody sees the difference, in good quality. The
    picture itself, if that is smaller.
    """
    picture, out = Image.open(io.BytesIO(base64.b64decode(data))), io.BytesIO()
    seen = 'RGBA' if 'A' in picture.mode or 'transparency' in picture.info else 'RGB'
    photo = kind == 'jpeg' or is_photo(picture)
    how = dict(quality=82) if photo else dict(lossless=True, quality=60)
    picture.convert(seen).save(out, 'WEBP', method=4, **how)
    made = base64.b64encode(out.getvalue()).decode()
    if len(made) < len(data):
        return f'image/webp;base64,{made}'
    return f'image/{kind};base64,{data}'


def folded_solutions(page: str) -> str:
    "What a solution prints and draws is a part of it: inside of the fold."
    out, rest = [], page
    while (at := rest.find('<summary>Solution</summary>')) >= 0:
        shut = rest.index('</details>', at)
        after = shut + len('</details>')
        end = after + cell_end(rest[after:])
        out += [rest[:shut], rest[after:end], '</details>']
        rest = rest[end:]
    return ''.join(out) + rest


def cell_end(markup: str) -> int:
    "Where the `div` ends in which `markup` begins."
    depth = 0
    for m in re.finditer(r'<(/?)div\b', markup):
        depth += -1 if m[1] else 1
        if depth < 0:
            return m.start()
    raise ValueError('a cell of the page does not end')


def slim(page: str, short: bool = True) -> str:
    """A rendered page without what nobody sees: marks of code that has the text's own
    colour, a mark between two neighbours of one colour, the explorers' script where no
    explorer is, and pictures larger than need be. `short`: as lean.py writes it.
    """
    page = re.sub(r'<span class="(?:bu|va)">([^<]*)</span>', r'\1', page)
    same = re.compile(
        r'<span class="(\w\w)">([^<]*)</span>((?:<span class="\1">[^<]*</span>)+)'
    )
    inside = lambda m: re.sub(r'<[^>]*>', '', m[3])
    page = same.sub(lambda m: f'<span class="{m[1]}">{m[2]}{inside(m)}</span>', page)
    if short:
        page = lean.short(page)
    if '<iframe class="halo-twin"' not in page:
        page = TWINS.sub('', page)
    picture = r'(?<=src="data:)image/(png|jpeg);base64,([A-Za-z0-9+/=]+)'
    return re.sub(picture, lambda m: webp(m[1], m[2]), page)


def apart(page: str, folder: Path, up: str) -> str:
    """A rendered page with its larger pictures as files of `folder`, named by what is in
    them: as text inside of the page a picture takes a third more, and delays the reading.
    `up`: the way from the page to the site's top. Explorers' frames keep theirs.
    """

    def out(m):
        if len(m[2]) < 2048:
            return m[0]
        data = base64.b64decode(m[2])
        name = f'{hashlib.sha256(data).hexdigest()[:16]}.{m[1]}'
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        return f'{up}{folder.name}/{name}'

    inside = r'(?<=<img src=")data:image/(png|jpeg|webp);base64,([A-Za-z0-9+/=]+)(?=")'
    return re.sub(inside, out, page)


def lean_twins(page: str) -> str:
    """The explorers' frames in fewer bytes: an attribute between single quotes may hold
    `"`, `<` and `>` as they are, the indentation of a drawing is not drawn, and its places
    need not be known to a millionth of a point.
    """
    plainly = {"'": '&#x27;', '&quot;': '"', '&lt;': '<', '&gt;': '>'}

    def thin(m):
        inner = re.sub("'|&quot;|&lt;|&gt;", lambda c: plainly[c[0]], m[1])
        inner = re.sub(r'<svg .*?</svg>', lambda s: lean.drawing(s[0]), inner, flags=re.S)
        return " srcdoc='" + re.sub(r'>\n\s+<', '>\n<', inner) + "'"

    return re.sub(r' srcdoc="([^"]*)"', thin, page)


def process(path, to, pages):
    """Write the notebook `path` to `to` with its directives applied and nbdev's links
    turned to the site's pages.
    """
    notebook = read_nb(path)
    modules = modules_of(notebook)
    NBProcessor(
        nb=notebook,
        procs=[
            title,
            populate_language,
            strip_ansi,
            hide_line,
            filter_stream_,
            hide_,
            add_links,
            exported,
            drop_widgets,
            drop_empty,
        ],
    ).process()
    for cell in notebook.cells:
        for o in cell.get('outputs', []):
            if isinstance(png := o.get('data', {}).get('image/png'), str):
                o['data']['image/png'] = lighter(png)
        if cell.cell_type == 'markdown':
            cell.source = relinked(
                meant(cell.source, modules), pages, path.relative_to(root / 'nbs').parent
            )
    notebook.cells = anchored(list(notebook.cells))
    to.parent.mkdir(parents=True, exist_ok=True)
    write_nb(notebook, to)


def sidebar(paths):
    "Every notebook: the overview first, then part by part, each opened by its own page."
    books = sorted(p.relative_to(root / 'nbs') for p in paths)
    href = lambda p: f'nbs/{p.as_posix()}'
    inside = lambda p: p.parts[0] if len(p.parts) > 1 else ''
    order = lambda p: (p.name != 'index.ipynb', p)
    first = [p for p in books if not inside(p) and p.name == 'index.ipynb']
    made = [dict(text='Overview', href=href(p)) for p in first]
    made += [href(p) for p in books if not inside(p) and p.name.startswith('00_')]
    for folder, name in PARTS.items():
        pages = sorted((p for p in books if inside(p) == folder), key=order)
        if pages:
            made.append(dict(section=name, contents=[href(p) for p in pages]))
    rest = [p for p in books if href(p) not in made and p not in first]
    rest = [href(p) for p in rest if inside(p) not in PARTS]
    return made + ([dict(section=FURTHER, contents=rest)] if rest else [])


def options(paths, bare=False, quarto=False):
    "The site's options with the first page and a sidebar of all notebooks."
    made = yaml.safe_load((root / '_quarto.yml').read_text(encoding='utf-8'))
    made['project']['render'] = ['index.qmd', *made['project'].get('render', [])]
    made['website'].setdefault('sidebar', {})['contents'] = sidebar(paths)
    made['project']['resources'] = [
        *made['project'].get('resources', []),
        'film.webp',
        'still.webp',
    ]
    if bare:
        made['format']['html']['html-math-method'] = 'plain'
    # smalldocs knows KaTeX alone, and says so
    if not quarto:
        del made['format']['html']['html-math-method']
    return made


def no_styles_from_elsewhere(folder):
    """Themes import their fonts from another machine; the site's own style names fonts that
    lie beside it.
    """
    for css in folder.rglob('*.css'):
        text = css.read_text(encoding='utf-8')
        kept = re.sub(
            r'@import\s*(?:url\(\s*["\']?(?:https?:)?//[^)]*\)|(["\'])(?:https?:)?//.*?\1)[^;]*;',
            '',
            text,
        )
        if kept != text:
            css.write_text(kept, encoding='utf-8')


def one_icon_font(folder):
    "WOFF2 is read by every browser that runs these pages: its elder stays behind."
    for css in folder.rglob('bootstrap-icons.min.css'):
        text = css.read_text(encoding='utf-8')
        elder = r',url\("[^"]*\.woff\?[^"]*"\) format\("woff"\)'
        css.write_text(re.sub(elder, '', text), encoding='utf-8')
        for font in css.parent.rglob('*.woff'):
            font.unlink()


def plain(markup: str) -> str:
    "The text of a piece of HTML."
    return html.unescape(re.sub(r'<[^>]+>', '', markup))


def names_in(code: str) -> str:
    "What a piece of code defines, and what it takes from elsewhere."
    define = r'^\s*(?:async )?(?:def|class) (\w+)|^([A-Za-z_]\w+) *[:=]'
    found = re.findall(define, code, re.M)
    taken = re.findall(r'^\s*from [\w.]+ import ([\w, ]+)$', code, re.M)
    names = [n for pair in found for n in pair] + re.findall(r'\w+', ' '.join(taken))
    return ' '.join(dict.fromkeys(n for n in names if n))


def lean_search(folder, short=True):
    """The search index with prose as it is and, of code, its names: the index is fetched
    whole, and nobody looks for a bracket. `short`: without the second name of an entry,
    its address once more, which smalldocs never reads.
    """
    index = folder / 'search.json'
    if not index.exists():  # a site without a search
        return
    entries, codes = json.loads(index.read_text(encoding='utf-8')), {}
    for e in entries:
        page = e['href'].partition('#')[0]
        if page not in codes:
            text = (folder / page).read_text(encoding='utf-8')
            pieces = re.findall(r'<pre\b[^>]*>(.*?)</pre>', text, re.S)
            codes[page] = {' '.join(c.split()): names_in(c) for c in map(plain, pieces)}
        for code, names in codes[page].items():
            e['text'] = e['text'].replace(code, names) if code else e['text']
        if short:
            e.pop('objectID', None)
    made = json.dumps(entries, ensure_ascii=False, separators=(',', ':'))
    index.write_text(made, encoding='utf-8')


def own_maths(folder, bare):
    "Point the pages to the KaTeX beside them (or, bare, to none)."
    for page in folder.rglob('*.html'):
        text = page.read_text(encoding='utf-8')
        up = '../' * (len(page.relative_to(folder).parts) - 1)
        changed = (
            re.sub(r'<link[^>]*/katex@[^>]*>|<script[^>]*/katex@[^>]*></script>', '', text)
            if bare
            else MATHS.sub(f'{up}site_libs/katex/', text)
        )
        if changed != text:
            page.write_text(changed, encoding='utf-8')


def policy_in_the_page(folder):
    """The programs of the demonstration's policies and what runs them, packed, in `live`;
    made once and kept in .cache/live.
    """
    made = root / '.cache/live'
    command = 'from halo.deploy.live import write_files as w; import sys, pathlib as p;'
    command += ' w(p.Path(sys.argv[1]))'
    done = subprocess.run([sys.executable, '-c', command, str(made)], cwd=root)
    if done.returncode:
        sys.exit('docs: the policies of the page were not exported; the message is above.')
    shutil.copytree(made, folder / 'live')
    ours = folder / 'site_libs/onnxruntime-web'
    shutil.move(ours / 'ort.mjs', folder / 'live/ort.mjs')
    wasm = (ours / 'ort.wasm').read_bytes()
    (folder / 'live/ort.wasm.gz').write_bytes(gzip.compress(wasm, 9, mtime=0))
    (ours / 'ort.wasm').unlink()
    for page in folder.rglob('nbs/**/*.html'):
        text = page.read_text(encoding='utf-8')
        if '<iframe class="halo-live"' in text:
            up = '../' * (len(page.relative_to(folder).parts) - 1)
            said = f'<meta name="halo-live" content="{up}live/"></head>'
            page.write_text(text.replace('</head>', said, 1), encoding='utf-8')


def build(to, offline=False, bare=False):
    """The site in the folder `to`.

    Raises `vendor.Missing` before anything is made if a package is not to be had.
    """
    if to.exists() and any(to.iterdir()) and not (to / 'site_libs').is_dir():
        sys.exit(f'docs: {to} is not empty and no site; name another folder')
    if not bare:
        archives = [vendor.fetch(p, offline=offline) for p in vendor.PACKAGES]
    paths = [p for p in nbglob(root / 'nbs', as_path=True) if p.suffix == '.ipynb']
    with tempfile.TemporaryDirectory(dir=to.parent, prefix='.site-') as temporary:
        built = Path(temporary) / 'source'
        names = page_names(paths)
        for path in paths:
            process(path, built / path.relative_to(root), names)
        for media in (root / 'nbs').rglob('*'):
            if (
                media.suffix
                in {'.png', '.gif', '.svg', '.jpg', '.mp4', '.webm', '.csv', '.css'}
                and '.ipynb_checkpoints' not in media.parts
            ):
                (built / media.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(media, built / media.relative_to(root))
        shutil.copy2(root / 'LICENSE', built)
        shutil.copytree(root / 'scripts/site', built / 'style')
        if (root / 'assets').is_dir():
            shutil.copytree(root / 'assets', built / 'assets')
        landing.write(
            built,
            live={p.relative_to(root / 'nbs').with_suffix('').as_posix() for p in paths},
        )
        quarto = shutil.which('quarto')
        made = options(paths, bare, bool(quarto))
        (built / '_quarto.yml').write_text(
            yaml.safe_dump(made, sort_keys=False), encoding='utf-8'
        )
        command = (
            [quarto, 'render', '--no-execute']
            if quarto
            else [Path(sys.executable).parent / 'smalldocs', 'render', '.', '--quiet']
        )
        if subprocess.run(command, cwd=built).returncode:
            sys.exit('The site was not rendered; the message is above.')
        rendered = built / made['project'].get('output-dir', '_site')
        no_styles_from_elsewhere(rendered)
        one_icon_font(rendered)
        lean.used_icons(rendered)
        lean_search(rendered, short=not quarto)
        own_maths(rendered, bare)
        for page in rendered.rglob('nbs/**/*.html'):
            text = slim(page.read_text(encoding='utf-8'), short=not quarto)
            up = '../' * (len(page.relative_to(rendered).parts) - 1)
            text = apart(text, rendered / 'pictures', up)
            text = lean_twins(folded_solutions(text))
            page.write_text(text, encoding='utf-8')
        if bare:
            for css in rendered.rglob('*.css'):
                css.write_text(
                    re.sub(r'@font-face\s*\{[^}]*\}', '', css.read_text(encoding='utf-8')),
                    encoding='utf-8',
                )
        if not bare:
            for package, archive in zip(vendor.PACKAGES, archives):
                vendor.unpack(package, archive, rendered / 'site_libs')
            policy_in_the_page(rendered)
        shutil.rmtree(to, ignore_errors=True)
        shutil.move(rendered, to)
    return len(paths)


def main(argv=None):
    p = argparse.ArgumentParser(
        prog='docs.py', description='Render the workbook as a website.'
    )
    p.add_argument('--to', type=Path, default=root / '_docs')
    p.add_argument('--offline', action='store_true')
    p.add_argument('--bare', action='store_true')
    a = p.parse_args(argv)
    to = a.to.resolve()
    os.chdir(root)
    os.environ['IN_TEST'] = '1'
    try:
        n = build(to, a.offline, a.bare)
    except vendor.Missing as e:
        sys.exit(f'docs: {e}')
    wrong = check_site.check(to)
    if wrong:
        sys.exit('\n'.join(['docs: the site is there, but', *wrong]))
    size = sum(f.stat().st_size for f in to.rglob('*') if f.is_file())
    print(
        f'{n + 1} pages, {size / 1e6:.1f} MB, every link resolves: open'
        f' {to.relative_to(root) if to.is_relative_to(root) else to}/index.html'
    )


if __name__ == '__main__':
    main()
