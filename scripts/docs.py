"""Render nbs/ as a website into _docs/, with Quarto where it is installed and with smalldocs elsewhere. No cell is run.

nbdev's processors apply the directives; exported cells stay as code, each under an anchor that `name` in backticks links to.
The site's options are those of _quarto.yml at the top of the repository; its sidebar lists the notebooks in their order.
"""
import ast, os, re, shutil, subprocess, sys
from pathlib import Path

import yaml
from execnb.nbio import mk_cell, read_nb, write_nb
from nbdev.doclinks import nbglob
from nbdev.process import NBProcessor, Processor
from nbdev.processors import add_links, filter_stream_, hide_, hide_line, populate_language, strip_ansi

root = Path(__file__).resolve().parent.parent
built, site = root/'_proc', root/'_docs'


class exported(Processor):
    "Fold an exported cell open, say where it goes, and give it its first definition's name as an anchor."
    def begin(self): self.module = next((c.directives_['default_exp'][0] for c in self.nb.cells if 'default_exp' in c.get('directives_', {})), '')

    def cell(self, cell):
        if cell.cell_type != 'code' or not {'export', 'exporti', 'exports'} & cell.directives_.keys(): return
        named = [o.name for o in ast.parse(cell.source).body if hasattr(o, 'name')]
        options = ['#| code-fold: show', f'#| code-summary: "halo/{self.module.replace(".", "/")}.py"']
        if named: options.append(f'#| label: {named[0].lower()}')
        cell.source = '\n'.join([*options, cell.source])


class title(Processor):
    "Turn the opening `# title` and `> promise` into front matter; what else that cell says stays (nbdev's own processor would drop it)."
    def begin(self):
        first = self.nb.cells[0]
        lines = first.source.splitlines() if first.cell_type == 'markdown' else []
        fields = {}
        for field, mark in (('title', '# '), ('description', '> ')):
            found = next((l for l in lines if l.startswith(mark)), None)
            if found: lines.remove(found); fields[field] = found[2:].strip()
        if not fields: return
        first.source = '\n'.join(lines).strip() or None
        self.nb.cells.insert(0, mk_cell(f'---\n{yaml.safe_dump(fields, allow_unicode=True, width=10**6)}---', 'raw'))
        self.nb.cells[0].directives_ = {}


def drop_empty(cell):
    "Drop code cells of which only directives were there."
    if cell.cell_type == 'code' and not cell.source.strip(): cell.source = None


def page_names(paths):
    "nbdev's page names (without the leading number) to the names that the site has."
    return {re.sub(r'^\d+[a-zA-Z0-9]*_', '', p.name.lower()).replace('.ipynb', '.html'): p.with_suffix('.html').name for p in paths}


def process(path, to, pages):
    "Write the notebook `path` to `to` with its directives applied and nbdev's links turned to the site's pages."
    notebook = read_nb(path)
    NBProcessor(nb=notebook, procs=[title, populate_language, strip_ansi, hide_line, filter_stream_, hide_, add_links, exported, drop_empty]).process()
    for cell in notebook.cells:
        if cell.cell_type == 'markdown': cell.source = re.sub(r'\]\(/*([\w-]+\.html)(#[\w.]*)\)', lambda m: f'](./{pages.get(m[1], m[1])}{m[2]})', cell.source)
    to.parent.mkdir(parents=True, exist_ok=True)
    write_nb(notebook, to)


def options(paths):
    "The site's options with a sidebar of all notebooks."
    made = yaml.safe_load((root/'_quarto.yml').read_text(encoding='utf-8'))
    made['website'].setdefault('sidebar', {})['contents'] = [str(p.relative_to(root)) for p in sorted(paths, key=lambda p: (p.name != 'index.ipynb', p))]
    return made


def main():
    os.chdir(root)
    os.environ['IN_TEST'] = '1'
    paths = [p for p in nbglob(root/'nbs', as_path=True) if p.suffix == '.ipynb']
    shutil.rmtree(built, ignore_errors=True)
    for path in paths: process(path, built/path.relative_to(root), page_names(paths))
    for media in (root/'nbs').rglob('*'):
        if media.suffix in {'.png', '.gif', '.svg', '.jpg', '.mp4', '.webm', '.csv', '.css'} and '.ipynb_checkpoints' not in media.parts:
            (built/media.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(media, built/media.relative_to(root))
    shutil.copy2(root/'LICENSE', built)
    if (root/'assets').is_dir(): shutil.copytree(root/'assets', built/'assets')
    made = options(paths)
    (built/'_quarto.yml').write_text(yaml.safe_dump(made, sort_keys=False), encoding='utf-8')
    quarto = shutil.which('quarto')
    command = [quarto, 'render', '--no-execute'] if quarto else [Path(sys.executable).parent/'smalldocs', 'render', '.', '--quiet']
    if subprocess.run(command, cwd=built).returncode: sys.exit('The site was not rendered; the message is above.')
    rendered = built/made['project'].get('output-dir', '_site')
    (rendered/'index.html').write_text('<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0; url=nbs/index.html"><a href="nbs/index.html">HALO</a>\n')
    shutil.rmtree(site, ignore_errors=True)
    shutil.move(rendered, site)
    print(f'{len(paths)} pages: open {site.name}/index.html')


if __name__ == '__main__': main()
