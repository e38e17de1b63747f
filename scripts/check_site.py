"""Is a rendered site whole? Links, anchors, pictures, ids; nothing asked of another
machine; no path of the machine that rendered it.

python scripts/check_site.py [DIR]      # _docs
"""

import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

root = Path(__file__).resolve().parent.parent
ELSEWHERE = re.compile(r'^\s*(?:https?:)?//', re.I)
LOADS = {
    'script': ('src',),
    'img': ('src', 'srcset'),
    'source': ('src', 'srcset'),
    'iframe': ('src',),
    'link': ('href',),
    'video': ('src', 'poster'),
    'audio': ('src',),
    'embed': ('src',),
    'object': ('data',),
    'image': ('href', 'xlink:href'),
    'use': ('href', 'xlink:href'),
    'track': ('src',),
    'input': ('src',),
}
IN_CSS = re.compile(r'url\(\s*["\']?([^"\')]+)["\']?\s*\)|@import\s+["\']([^"\']+)["\']')
IN_SCRIPT = re.compile(
    r'''(?:import\s*\(?|from|fetch\s*\(|importScripts\s*\(|\.src\s*=|new\s+(?:Worker|WebSocket|EventSource)\s*\()\s*["'`]((?:https?:|wss?:)?//[^"'`]+)'''
)
LOCAL = re.compile(
    r'(?<![\w./:-])(?:/home/[\w.-]+|/root|/Users/[\w.-]+|/work|/tmp|/private/var|[A-Z]:\\Users)(?=/[\w.])[\w./\\-]*'
)
# A coloured piece of code: four in five of all tags of a page, and neither links nor loads
COLOURED = re.compile(r'<(?:span class="\w\w"|[ibu]|i class=\w\w)>([^<]*)</(?:span|[ibu])>')


class Page(HTMLParser):
    "What a page links to, loads, names and says."

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        (
            self.ids,
            self.links,
            self.loads,
            self.styles,
            self.scripts,
            self.said,
            self.inner,
            self.silent,
            self._in,
        ) = ([], [], [], [], [], [], [], [], [])
        self.feed(COLOURED.sub(r'\1', text))
        self.close()

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if a.get('id'):
            self.ids.append(a['id'])
        if tag == 'a' and a.get('name'):
            self.ids.append(a['name'])
        if tag in ('a', 'area') and a.get('href') is not None:
            self.links.append(a['href'])
        if tag == 'img' and 'alt' not in a and 'cell' not in (a.get('class') or ''):
            self.silent.append((a.get('src') or '')[:60])
        for name in LOADS.get(tag, ()):
            if not a.get(name):
                continue
            if tag == 'link' and not {
                'stylesheet',
                'icon',
                'preload',
                'modulepreload',
                'prefetch',
                'manifest',
                'preconnect',
                'dns-prefetch',
            } & set((a.get('rel') or '').split()):
                continue
            self.loads += (
                [p.split()[0] for p in a[name].split(', ') if p.split()]
                if name == 'srcset'
                else [a[name]]
            )
        if a.get('style'):
            self.styles.append(a['style'])
        if a.get('srcdoc'):
            self.inner.append(Page(a['srcdoc']))
        if tag in ('script', 'style'):
            self._in.append((tag, a.get('type') or ''))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag in ('script', 'style'):
            self._in.pop()

    def handle_endtag(self, tag):
        if tag in ('script', 'style') and self._in:
            self._in.pop()

    def handle_data(self, data):
        if not self._in:
            self.said.append(data)
        elif self._in[-1][0] == 'style':
            self.styles.append(data)
        else:
            self.scripts.append(data)


def loaded(page):
    "All that a page asks for by itself."
    return (
        page.loads
        + [u for s in page.styles for m in IN_CSS.findall(s) for u in m if u]
        + [u for s in page.scripts for u in IN_SCRIPT.findall(s)]
    )


def check(folder):
    "What is wrong with the site in `folder`: one line each, sorted; none if it is whole."
    folder, wrong = Path(folder).resolve(), set()
    files = {f.relative_to(folder).as_posix() for f in folder.rglob('*') if f.is_file()}
    pages = {
        name: Page((folder / name).read_text(encoding='utf-8'))
        for name in sorted(files)
        if name.endswith('.html')
    }
    if 'index.html' not in pages:
        wrong.add(f'{folder.name}: there is no index.html')

    def target(name, address):
        """The file that an address on page `name` means, or None if it leads out of the
        site.
        """
        path = unquote(address.split('#')[0].split('?')[0])
        to = (
            os.path.normpath(os.path.join(os.path.dirname(name), path)).replace(os.sep, '/')
            if path
            else name
        )
        return (
            None
            if to.startswith('..') or path.startswith('/')
            else (
                'index.html'
                if to == '.'
                else (
                    to
                    if to in files
                    else f'{to}/index.html'
                    if f'{to}/index.html' in files
                    else to
                )
            )
        )

    def one(name, page, where):
        for address in page.links:
            if re.match(r'(?:[a-z][a-z0-9+.-]*:|//)', address, re.I):
                if re.match(r'file:', address, re.I):
                    wrong.add(f'{where}: a link to a file of one machine: {address}')
                continue
            to, anchor = target(name, address), unquote(address.partition('#')[2])
            if to not in files:
                wrong.add(f'{where}: dead link {address}')
            elif anchor and to in pages and anchor not in pages[to].ids:
                wrong.add(f'{where}: dead anchor {address}')
        for address in loaded(page):
            if address.startswith(('data:', 'blob:', '#', 'about:')):
                continue
            if ELSEWHERE.match(address):
                wrong.add(f'{where}: asks another machine for {address[:120]}')
            elif target(name, address) not in files:
                wrong.add(f'{where}: {address[:120]} is not there')
        for i in sorted({i for i in page.ids if page.ids.count(i) > 1}):
            wrong.add(f'{where}: the id {i} is there {page.ids.count(i)} times')
        for k, inner in enumerate(page.inner):
            one(name, inner, f'{where} (frame {k + 1})')
        for text in page.said:
            for found in LOCAL.findall(text):
                wrong.add(f'{where}: a path of one machine: {found}')

    for name, page in pages.items():
        one(name, page, name)
    for name in files:
        if name.endswith('.css'):
            text = re.sub(
                r'/\*.*?\*/', '', (folder / name).read_text(encoding='utf-8'), flags=re.S
            )
            for u in (
                u
                for m in IN_CSS.findall(text)
                for u in m
                if u and not u.startswith(('data:', '#'))
            ):
                if ELSEWHERE.match(u):
                    wrong.add(f'{name}: asks another machine for {u[:120]}')
                elif target(name, u) not in files and not (
                    u.endswith('.woff2') and '/fonts/source-' in u
                ):
                    wrong.add(f'{name}: {u[:120]} is not there')
    return sorted(wrong)


if __name__ == '__main__':
    wrong = check(Path(sys.argv[1]) if len(sys.argv) > 1 else root / '_docs')
    sys.exit('\n'.join(wrong) if wrong else 0)
