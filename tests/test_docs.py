"""The site: every link resolves, nothing is asked of another machine, and in a real browser
every explorer draws what its controls say.
"""

import base64
import gzip
import html
import io
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from browser import Site, Watched, chromium, root
from PIL import Image

sys.path.insert(0, str(root / 'scripts'))
import check_site
import docs
import landing
import lean
import vendor

unable = pytest.mark.skipif(
    chromium() is None,
    reason=(
        'NO CHROMIUM HERE: the site was not opened in a browser; `apt-get install chromium`'
        ' brings one'
    ),
)


def browses(test):
    return pytest.mark.browser(unable(test))


# is KaTeX in the cache?
whole = all(vendor.sound(p, vendor.cache / p.archive) for p in vendor.PACKAGES)


@pytest.fixture(scope='session')
def site(tmp_path_factory):
    """The site, rendered once.

    Tests do not ask npm: without its packages in the cache the site is the bare one.
    """
    to = tmp_path_factory.mktemp('site') / '_docs'
    if not whole:
        warnings.warn(
            'NO KATEX IN .cache/npm: the site was tested without it; `make docs` fetches it'
        )
    done = subprocess.run(
        [
            sys.executable,
            root / 'scripts/docs.py',
            '--to',
            to,
            '--offline' if whole else '--bare',
        ],
        capture_output=True,
        text=True,
        cwd=root,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return to


def books():
    "Every notebook's path below nbs/, without its ending."
    found = sorted((root / 'nbs').rglob('*.ipynb'))
    return [
        p.relative_to(root / 'nbs').with_suffix('').as_posix()
        for p in found
        if not p.name.startswith('_') and '.ipynb_checkpoints' not in p.parts
    ]


def test_the_site_is_whole(site):
    assert check_site.check(site) == []
    pages = {p.relative_to(site).as_posix() for p in site.rglob('*.html')} - {
        'style/after.html'
    }
    assert pages == {'index.html', *(f'nbs/{name}.html' for name in books())}
    size = {f: f.stat().st_size for f in site.rglob('*') if f.is_file()}
    maths = 0 if whole else 0.65e6  # KaTeX and the fonts, where they could not be fetched
    model = sum(n for f, n in size.items() if site / 'live' in f.parents)
    assert sum(size.values()) - model + maths < 15e6 and size[site / 'film.webp'] < 1.5e6
    assert model < 10e6 and (model > 5e6) == whole
    # what a reader waits for
    assert max(n for f, n in size.items() if f.suffix == '.html') < 1.2e6


def test_no_notebook_vanishes_from_the_sidebar(site):
    made = check_site.Page((site / 'nbs/method/03_salr.html').read_text())
    there = {posixpath.normpath(posixpath.join('nbs/method', l)) for l in made.links}
    for name in books():
        assert f'nbs/{name}.html' in there, name
    new = [
        root / 'nbs' / n
        for n in (
            'index.ipynb',
            'method/03_salr.ipynb',
            'method/index.ipynb',
            'benchmarks/25_last.ipynb',
            'elsewhere/77_beyond.ipynb',
            'named.ipynb',
        )
    ]
    found = {s['section']: s['contents'] for s in docs.sidebar(new)[1:]}
    assert found == {
        'The method': ['nbs/method/index.ipynb', 'nbs/method/03_salr.ipynb'],
        'Benchmarks': ['nbs/benchmarks/25_last.ipynb'],
        'Further': ['nbs/elsewhere/77_beyond.ipynb', 'nbs/named.ipynb'],
    }


def test_first_page_reads_its_figures(site):
    page = (site / 'index.html').read_text()
    for name in landing.POLICIES:
        s = json.loads(
            (root / 'checkpoints/flash_place' / name / 'evaluation.json').read_text()
        )['success']
        assert f"{s['successes']} / {s['n']}" in page
    with Image.open(site / 'film.webp') as film:
        assert film.n_frames > 20
        film.seek(0)
        first = np.asarray(film.convert('RGB')).astype(int)
        film.seek(film.n_frames - 1)
        last = np.asarray(film.convert('RGB')).astype(int)
    # saturated: the flashing pads (and a puck)
    flashed = lambda x: (x.max(-1) - x.min(-1) > 180)[: landing.HEAD + landing.SIDE].mean()
    assert flashed(first) > 4 * flashed(last)


def test_exported_code_says_where_it_goes(site):
    page = (site / 'nbs/method/04_flow.html').read_text()
    assert 'halo/method/flow.py</summary>' in page.replace('<span>', '').replace(
        '</span>', ''
    ) and re.search(r'<details open', page)
    assert (
        'forward'
        not in check_site.Page((site / 'nbs/method/06_model.html').read_text()).ids
        and 'halomodel.velocity'
        in check_site.Page((site / 'nbs/method/06_model.html').read_text()).ids
    )


FAULTS = {
    '<a href="nowhere.html">x</a>': 'dead link nowhere.html',
    '<a href="other.html#nobody">x</a>': 'dead anchor other.html#nobody',
    '<a href="#gone">x</a>': 'dead anchor #gone',
    '<img src="none.png">': 'none.png is not there',
    '<script src="https://cdn.example.org/katex.min.js"></script>': (
        'asks another machine for https://cdn.example.org/katex.min.js'
    ),
    '<link rel="stylesheet" href="//cdn.example.org/x.css">': (
        'asks another machine for //cdn.example.org/x.css'
    ),
    '<style>@import url(https://fonts.example.org/css2?family=X:wght@300;400);</style>': (
        'asks another machine for https://fonts.example.org'
    ),
    "<script type=module>import m from 'https://cdn.example.org/m.mjs'</script>": (
        'asks another machine for https://cdn.example.org/m.mjs'
    ),
    '<iframe srcdoc="&lt;img src=&quot;https://example.org/x.png&quot;&gt;"></iframe>': (
        'asks another machine for https://example.org/x.png'
    ),
    '<p id="one"></p><p id="one"></p>': 'the id one is there 2 times',
    '<pre>File "/home/someone/halo/x.py"</pre>': (
        'a path of one machine: /home/someone/halo/x.py'
    ),
    '<a href="file:///etc/hosts">x</a>': 'a link to a file of one machine',
    '<a href="../outside.html">x</a>': 'dead link ../outside.html',
}


@pytest.mark.parametrize('fault', FAULTS)
def test_the_check_finds(fault, tmp_path):
    good = (
        '<!doctype html><h1 id="top">x</h1><a href="other.html#there">y</a><a'
        ' href="https://example.org">z</a><p'
        ' style="background:url(data:image/png;base64,AA)">'
    )
    (tmp_path / 'other.html').write_text('<p id="there">')
    (tmp_path / 'index.html').write_text(good)
    assert check_site.check(tmp_path) == []
    (tmp_path / 'index.html').write_text(good + fault)
    found = check_site.check(tmp_path)
    assert len(found) == 1 and FAULTS[fault] in found[0], found


def test_the_check_finds_faults_in_the_site(site, tmp_path):
    copy = tmp_path / '_docs'
    shutil.copytree(site, copy)
    page = copy / 'nbs/method/03_salr.html'
    page.write_text(
        page.read_text().replace(
            '</main>',
            '<a href="04_flow.html#nobody">x</a><script'
            ' src="https://cdn.example.org/k.js"></script></main>',
            1,
        )
    )
    (copy / 'nbs/method/05_expert.html').unlink()
    found = check_site.check(copy)
    assert (
        any('method/03_salr.html: dead anchor 04_flow.html#nobody' in f for f in found)
        and any(
            'method/03_salr.html: asks another machine for https://cdn' in f for f in found
        )
        and sum(bool(re.search(r'dead link (\S*/)?05_expert\.html', f)) for f in found) > 20
    )


def test_a_package_that_is_not_to_be_had_is_one_error(tmp_path, monkeypatch):
    p = vendor.PACKAGES[0]
    with pytest.raises(
        vendor.Missing,
        match=(
            f'{p.spec} .* is not there; run `make docs` once with a network, or add --bare'
        ),
    ):
        vendor.fetch(p, tmp_path, offline=True)
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(
        vendor.Missing, match='nor is the npm client that could fetch it; install npm'
    ):
        vendor.fetch(p, tmp_path)
    (tmp_path / p.archive).write_bytes(b'another archive')
    with pytest.raises(
        vendor.Missing, match='is not the archive that scripts/vendor.py pins'
    ):
        vendor.fetch(p, tmp_path, offline=True)
    npm = tmp_path / 'npm'  # a client that brings something else
    npm.write_text(
        '#!/bin/sh\nfor a in "$@"; do case $a in --pack-destination=*) echo other >'
        ' "${a#*=}/katex.tgz";; esac; done\n'
    )
    npm.chmod(0o755)
    with pytest.raises(vendor.Missing, match='do not use it'):
        vendor.fetch(p, tmp_path)
    assert (tmp_path / p.archive).read_bytes() == b'another archive'


def test_styles_lose_their_web_fonts_and_nothing_else(tmp_path):
    (tmp_path / 'a.css').write_text(
        '@charset "UTF-8";@import'
        ' url(https://f.example.org/css2?family=S:wght@300;400&display=swap);:root{--x:1}@import'
        ' "//f.example.org/y;z.css";p{color:red}'
    )
    docs.no_styles_from_elsewhere(tmp_path)
    assert (tmp_path / 'a.css').read_text() == '@charset "UTF-8";:root{--x:1}p{color:red}'


# ---- in a browser


@pytest.fixture(scope='module')
def served(site):
    from playwright.sync_api import sync_playwright

    server = Site(site)
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=chromium())
        yield b, server.url, site
        b.close()
    server.close()


def twins(path):
    "How many static twins a notebook's outputs hold."
    outputs = [
        o for c in json.loads(path.read_text())['cells'] for o in c.get('outputs', [])
    ]
    return sum(
        'class="halo-twin"' in ''.join(o.get('data', {}).get('text/html', ''))
        for o in outputs
    )


class Drawn:
    "A twin on a page, and what its own data say must be drawn."

    def __init__(self, page, frame):
        self.page, self.frame = page, frame
        frame.wait_for_function(
            '() => document.body && document.body.dataset.drawn !== undefined',
            timeout=20_000,
        )
        self.spec = json.loads(frame.locator('#spec').text_content())
        sent = gzip.decompress(base64.b64decode(self.spec['blob']))
        end = 4 + int.from_bytes(sent[:4], 'little')
        self.spec |= json.loads(sent[4:end])
        self.blob = sent[end:]
        self.state = [c['start'] for c in self.spec['controls']]

    def key(self):
        return ','.join(
            str(c['index'][v]) for c, v in zip(self.spec['controls'], self.state)
        )

    def row(self):
        return self.spec['states'][self.key()]

    def piece(self, panel):
        at, size = self.spec['pieces'][self.row()[panel]]
        return self.blob[at : at + size]

    def move(self, i, to):
        """Control `i` to its value `to`, as a hand would; by the key's rule, others of its
        group go back to their start.
        """
        c, e = self.spec['controls'][i], self.frame.locator(f'#c{i}')
        if c['kind'] == 'toggle':
            e.click() if to != self.state[i] else None
        elif c['kind'] == 'choice':
            e.select_option(index=to)
        else:
            e.focus()
            end = len(c['texts']) - 1
            e.press('Home' if to <= end / 2 else 'End')
            for _ in range(min(to, end - to)):
                e.press('ArrowRight' if to <= end / 2 else 'ArrowLeft')
        self.state[i] = to
        if c['alone'] and to != c['start']:
            self.state = [
                o['start'] if k != i and o['alone'] == c['alone'] else v
                for k, (o, v) in enumerate(zip(self.spec['controls'], self.state))
            ]
        self.frame.wait_for_function(
            'key => document.body.dataset.drawn === key', arg=self.key(), timeout=10_000
        )
        if c['kind'] == 'slider':
            assert self.frame.locator(f'#o{i}').text_content() == c['texts'][to]

    def picture(self):
        "What the canvas shows, (height, width, 4)."
        data = self.frame.evaluate(
            "() => document.getElementById('canvas').toDataURL('image/png')"
        )
        return np.asarray(
            Image.open(io.BytesIO(base64.b64decode(data.split(',')[1]))).convert('RGBA')
        ).astype(int)

    def box(self, panel, shape, margin=0):
        "Rows and columns of a panel; of words, the lines that they may reach."
        p = self.spec['panels'][panel]
        x, y, w, h = np.array(p['box']) * [shape[1], shape[0], shape[1], shape[0]]
        if p['kind'] == 'words':
            base, tall = y + (1 - p['at'][1]) * h, p['size'] * shape[1]
            return slice(max(0, int(base - 6 * tall)), int(base + tall) + 2), slice(
                0, shape[1]
            )
        return slice(max(0, int(y) - margin), int(y + h) + 1 + margin), slice(
            max(0, int(x) - margin), int(x + w) + 1 + margin
        )

    def agrees(self, shown, rng):
        """Panels on which nothing else lies show the colours, bars, lines and pictures that
        the pieces of this key say; the number of things looked at.
        """
        panels, looked = self.spec['panels'], 0
        boxes = [np.array(p['box']) for p in panels]
        alone = lambda i: (
            not any(
                k != i
                and p['kind'] != 'words'
                and all(
                    boxes[i][a] < boxes[k][a] + boxes[k][a + 2]
                    and boxes[k][a] < boxes[i][a] + boxes[i][a + 2]
                    for a in (0, 1)
                )
                for k, p in enumerate(panels)
            )
        )
        for i, p in enumerate(panels):
            rows, cols = self.box(i, shown.shape)
            left, top, w, h = boxes[i] * [
                shown.shape[1],
                shown.shape[0],
                shown.shape[1],
                shown.shape[0],
            ]
            if not alone(i):
                continue
            if p['kind'] == 'heat' and not p['smooth']:
                table, index = (
                    np.frombuffer(base64.b64decode(p['table']), np.uint8).reshape(256, 4),
                    np.frombuffer(self.piece(i), np.uint8).reshape(p['rows'], p['cols']),
                )
                x0, y0, x1, y1 = p['at']
                for r, c in zip(
                    rng.integers(0, p['rows'], 5), rng.integers(0, p['cols'], 5)
                ):
                    x, y = (
                        left + (x0 + (c + 0.5) / p['cols'] * (x1 - x0)) * w,
                        (
                            top + ((1 - y1) + (r + 0.5) / p['rows'] * (y1 - y0)) * h
                            if y1 > y0
                            else top + ((1 - y0) + (r + 0.5) / p['rows'] * (y0 - y1)) * h
                        ),
                    )
                    if (
                        not (0 <= y < shown.shape[0] and 0 <= x < shown.shape[1])
                        or index[r, c] == 0
                    ):
                        continue
                    assert np.abs(shown[int(y), int(x)] - table[index[r, c]]).max() <= 3, (
                        p['name'],
                        r,
                        c,
                    )
                    looked += 1
            elif p['kind'] == 'bars':
                for colour, (a0, b0, a1, b1) in zip(
                    p['colors'], np.frombuffer(self.piece(i), '<i2').reshape(-1, 4) / 1e4
                ):
                    x, y = left + (a0 + a1) / 2 * w, top + (1 - (b0 + b1) / 2) * h
                    if (
                        abs(a1 - a0) * w < 4
                        or abs(b1 - b0) * h < 4
                        or not (left < x < left + w and top < y < top + h)
                    ):
                        continue
                    assert (
                        np.abs(
                            shown[int(y), int(x), :3]
                            - [int(colour[k : k + 2], 16) for k in (1, 3, 5)]
                        ).max()
                        <= 3
                    ), p['name']
                    looked += 1
            elif p['kind'] == 'lines':
                v = np.frombuffer(self.piece(i), '<i2').astype(int)
                at = len(p['styles'])
                for k, style in enumerate(p['styles']):
                    xy = v[at : at + 2 * v[k]].reshape(-1, 2)
                    at += 2 * v[k]
                    there = (xy > -32000).all(1)
                    for m in range(len(xy) - 1):  # both ends of a stroke have ink on them
                        if (
                            style['dash']
                            or style['alpha'] < 0.3
                            or not there[m : m + 2].all()
                        ):
                            continue
                        x, y = left + xy[m, 0] / 1e4 * w, top + (1 - xy[m, 1] / 1e4) * h
                        if not (
                            left + 1 < x < left + w - 1 and top + 1 < y < top + h - 1
                        ) or m % max(1, len(xy) // 8):
                            continue
                        assert (
                            shown[int(y) - 1 : int(y) + 2, int(x) - 1 : int(x) + 2, 3].max()
                            > 30
                        ), (p['name'], k, m)
                        looked += 1
            elif p['kind'] == 'picture':
                want = np.asarray(
                    Image.open(io.BytesIO(self.piece(i)))
                    .convert('RGB')
                    .resize((16, 16), Image.Resampling.BOX)
                ).astype(float)
                got = np.asarray(
                    Image.fromarray(shown[rows, cols, :3].astype(np.uint8)).resize(
                        (16, 16), Image.Resampling.BOX
                    )
                ).astype(float)
                assert np.abs(want - got).mean() < 8, p['name']
                looked += 1
        return looked


def scrub(twin, rng):
    """Move every control of a twin: panels whose piece stays keep their pixels, of those
    whose piece changes something moves, and colours are those of the data.
    """
    looked = 0
    for i, c in enumerate(twin.spec['controls']):
        end = len(c['texts']) - 1
        if not end:
            continue
        before, old = twin.picture(), twin.row()
        for to in [v for v in dict.fromkeys((0, end, end // 2)) if v != twin.state[i]][
            :2
        ] + [c['start']]:
            if to == twin.state[i]:
                continue
            twin.move(i, to)
            now, new = twin.picture(), twin.row()
            changed = [k for k, (a, b) in enumerate(zip(old, new)) if a != b]
            may = np.zeros(now.shape[:2], bool)
            for k in changed:
                may[twin.box(k, now.shape, 5)] = True
            moved = (now != before).any(-1)
            assert not (moved & ~may).any(), (
                f"{twin.spec['title']}: {c['name']} moved what its key says stays"
            )
            assert not changed or moved.any(), (
                f"{twin.spec['title']}: {c['name']} moved nothing, its key says"
                f" {[twin.spec['panels'][k]['name'] for k in changed]}"
            )
            looked += twin.agrees(now, rng)
            before, old = now, new
    return looked


PAGES = [name for name in books() if twins(root / f'nbs/{name}.ipynb')]


@browses
def test_the_pages_with_explorers_are_known():
    assert {
        'viz/01_explorer',
        'viz/03_masks',
        'viz/04_attention',
        'viz/05_denoising',
        'viz/06_rollouts',
        'viz/07_sampling',
        'viz/08_flow',
    } <= set(PAGES)


@browses
@pytest.mark.parametrize('name', PAGES)
def test_every_control_of_every_twin(served, name):
    b, url, _ = served
    watched = Watched(b, viewport=dict(width=1280, height=900))
    page = watched.page
    page.goto(f'{url}/nbs/{name}.html')
    frames, rng, looked = page.locator('iframe.halo-twin'), np.random.default_rng(0), 0
    assert frames.count() == twins(root / f'nbs/{name}.ipynb')
    for k in range(frames.count()):
        frames.nth(k).scroll_into_view_if_needed()
        twin = Drawn(page, frames.nth(k).element_handle().content_frame())
        assert (
            len(twin.spec['controls'])
            == twin.frame.locator('#controls [name], #controls input[type=hidden]').count()
        )
        looked += scrub(twin, rng)
        for i, c in enumerate(twin.spec['controls']):
            if not c['play'] or len(c['texts']) == 1:
                continue
            was = twin.key()
            twin.frame.locator(f'#p{i}').click()
            twin.frame.wait_for_function(
                'was => document.body.dataset.drawn !== was', arg=was, timeout=5_000
            )
            twin.frame.locator(f'#p{i}').click()
    assert looked > 20 and not watched.wrong, (looked, watched.wrong)
    page.close()


@browses
def test_every_page_opens_quietly_and_fits(served):
    b, url, site = served
    files = sorted([site / 'index.html', *(site / 'nbs').rglob('*.html')])
    # a tab of its own: what a page asks for is not given up because the next is opened.
    # Several at once: each has to be quiet for half a second before it is looked at
    for k in range(0, len(files), 6):
        tabs = {
            f: Watched(b, viewport=dict(width=390, height=800)) for f in files[k : k + 6]
        }
        for f, tab in tabs.items():
            tab.page.goto(f'{url}/{f.relative_to(site).as_posix()}')
        for f, tab in tabs.items():
            opens_quietly_and_fits(f, tab)
            tab.page.close()


def opens_quietly_and_fits(f, watched):
    "No complaint, no failed request, no formula unread, and no wider than a phone."
    page = watched.page
    page.wait_for_load_state('networkidle')  # the icon too
    assert not watched.wrong, (f.name, watched.wrong)
    wide = page.evaluate('document.documentElement.scrollWidth')
    assert wide <= 390, f'{f.name} is wider than a phone'
    if whole and 'katex.min.js' in f.read_text():
        page.wait_for_function("() => document.querySelector('.katex')")
        wrong = page.locator('.katex-error')
        assert not wrong.count(), (f.name, wrong.first.text_content())


def explorer_of(name):
    "The explorer of a page, made here."
    if name == 'viz/08_flow':
        from halo.viz.flow import flow_explorer

        return flow_explorer()
    from halo.viz.recording import shipped
    from halo.viz.sampling import sampling_explorer

    return sampling_explorer(shipped('full'))


def says_what_python_says(twin, explorer):
    "Every panel of the twin but its pictures holds what the data function gives now."
    values = {
        c['name']: explorer.controls[c['name']].values[c['index'][v]]
        for c, v in zip(twin.spec['controls'], twin.state)
    }
    found = explorer.ask(**values)
    for k, p in enumerate(twin.spec['panels']):
        here, there = twin.piece(k), explorer.panels[p['name']].pack(found[p['name']])
        if p['kind'] == 'words':
            assert here.decode() == str(found[p['name']]), values
        elif p['kind'] != 'picture':
            kind = np.uint8 if p['kind'] == 'heat' else '<i2'
            here, there = (np.frombuffer(x, kind).astype(int) for x in (here, there))
            assert np.abs(here - there).max(initial=0) <= 1, (p['name'], values)


@browses
@pytest.mark.parametrize('name', ['viz/07_sampling', 'viz/08_flow'])
def test_a_twin_says_what_python_says(served, name):
    b, url, _ = served
    watched = Watched(b, viewport=dict(width=1280, height=900))
    page, explorer = watched.page, explorer_of(name)
    page.goto(f'{url}/nbs/{name}.html')
    frame = page.locator('iframe.halo-twin').first
    frame.scroll_into_view_if_needed()
    twin = Drawn(page, frame.element_handle().content_frame())
    assert [c['name'] for c in twin.spec['controls']] == list(explorer.controls)
    says_what_python_says(twin, explorer)
    for i, c in enumerate(twin.spec['controls']):
        for to in {0, len(c['texts']) - 1, c['start']} - {twin.state[i]}:
            twin.move(i, to)
            says_what_python_says(twin, explorer)
    # a hand on the keyboard: one step of the first slider
    was = twin.state[0]
    twin.move(0, was - 1 if was else 1)
    says_what_python_says(twin, explorer)
    assert not watched.wrong, watched.wrong
    page.close()


def words(page):
    "What a page says outside of its code, scripts and explorers."
    text = re.sub(r'''srcdoc=("[^"]*"|'[^']*')''', '', page.read_text())
    text = re.sub(r'<(pre|script|style)\b.*?</\1>', '', text, flags=re.S)
    return html.unescape(re.sub(r'<[^>]+>', '', text))


def test_pictures_lie_beside_the_pages(site, tmp_path):
    bits, to = bytes(range(256)) * 12, tmp_path / 'pictures'
    big, small = base64.b64encode(bits).decode(), '<img src="data:image/png;base64,AA">'
    frame = f'<iframe srcdoc="&lt;img src=&quot;data:image/png;base64,{big}&quot;>">'
    picture = f'<img src="data:image/webp;base64,{big}" alt="x">'
    made = docs.apart(picture + small + frame, to, '../')
    name = re.match(r'<img src="[.][.]/pictures/(\w{16}[.]webp)" alt="x">', made)[1]
    assert (to / name).read_bytes() == bits and made.endswith(small + frame)
    # on a page of the site none is left inside; check_site asks whether the files are there
    salr = (site / 'nbs/method/03_salr.html').read_text()
    assert '../../pictures/' in salr and '<img src="data:image/webp' not in salr


def test_an_explorer_is_the_same_in_fewer_bytes():
    inner = '<p class="a">it\'s 1 &lt; 2 &amp;amp; "3"</p>\n    <b>x</b>'
    page = f'<iframe class="halo-twin" srcdoc="{html.escape(inner)}" style="a"></iframe>'
    lean = docs.lean_twins(page)
    held = re.search(r"srcdoc='([^']*)'", lean)[1]
    assert html.unescape(held) == inner.replace('    ', '') and len(lean) < len(page)
    assert lean.endswith(' style="a"></iframe>') and docs.lean_twins(lean) == lean


def cell(code, n=1):
    "A cell's code as smalldocs writes it."
    return (
        '<div class="code-copy-outer-scaffold"><div class="sourceCode" id="cb'
        + str(n)
        + '"><pre class="sourceCode python code-with-copy cell-code">'
        '<code class="sourceCode python">' + code + '</code></pre></div>'
        '<button title="Copy to Clipboard" class="code-copy-button">'
        '<i class="bi"></i></button></div>'
    )


def test_a_page_says_the_same_in_fewer_bytes():
    code = (
        '<span class="kw">if</span> x <span class="op">==</span> <span class="dv">3</span>:'
        ' <span class="fu">f</span>(<span class="st">&#x27;a</span>'
        '<span class="ss">&lt;&amp;gt;&#x27;</span>)'
    )
    tip = '<a title="&quot;1&quot; > 0" href="x.html">it&#x27;s 1 &gt; 0</a>'
    script = '<script>if (1 < 2) { s = "&gt;<b>"; }</script>'
    load = '<script src="../site_libs/smalldocs.js" defer></script>'
    page = load + cell(code) + tip + script + cell('y', 2)
    made = lean.short(page)
    assert made == (
        f'<script src="../style/page.js" defer></script>{load}'
        '<div class=sourceCode><pre class=sourceCode><code class=sourceCode>'
        "<b>if</b> x == <u>3</u>: <i class=fu>f</i>(<i>'a&lt;&amp;gt;'</i>)"
        f'</code></pre></div><a title="&quot;1&quot; > 0" href="x.html">it\'s 1 > 0</a>'
        f'{script}<div class=sourceCode><pre class=sourceCode><code class=sourceCode>'
        'y</code></pre></div>'
    )
    was, now = check_site.Page(page), check_site.Page(made)
    assert ''.join(was.said) == ''.join(now.said) and was.scripts == now.scripts


def test_a_drawing_is_the_same_in_fewer_bytes():
    "Places within a hundredth of a point; scales, names and other fonts stay."
    font = "font-family: &#x27;DejaVu Sans&#x27;, &#x27;Arial&#x27;, sans-serif; "
    text = f'<text style="font-size: 9px; {font}fill: #1b1f24" x="1.23456" y="2"'
    other = '<text style="font-family: &#x27;Mono&#x27;; fill: #000000">0.123456</text>'
    svg = (
        '<svg viewBox="0 0 7 7"><metadata>x</metadata>\n'
        '<path id="m1234.5678" d="M 10.006 -0.0046 \nL 3.14159 2e-05 \nz\n"/>'
        f'{text} transform="rotate(-0 1.23 2)">a 1.23456</text>'
        f'{text} transform="rotate(-90 1.23456 2)">b</text>{other}'
        '<g transform="translate(1.23456 7.5) scale(0.015625)"/></svg>'
    )
    kept = '<text style="font-size: 9px; fill: #1b1f24" x="1.23" y="2"'
    assert lean.drawing(svg) == (
        f'<svg style="{font[:-2]}" viewBox="0 0 7 7">'
        '<path id="m1234.5678" d="M10.01 0L3.14 2e-05z"/>'
        f'{kept}>a 1.23456</text>{kept} transform="rotate(-90 1.23 2)">b</text>{other}'
        '<g transform="translate(1.23 7.5) scale(0.015625)"/></svg>'
    )


def test_only_icons_that_a_page_shows_have_a_name(tmp_path):
    css = tmp_path / 'bootstrap-icons.min.css'
    head = '.bi::before,[class^=bi-]::before{display:inline-block}'
    names = ('search', 'search-heart', 'moon')
    css.write_text(head + ''.join(f'.bi-{n}::before{{content:"\\f1"}}' for n in names))
    (tmp_path / 'a.html').write_text('<i class="bi bi-search"></i>')
    (tmp_path / 'a.js').write_text('e.className = "bi-moon"')
    lean.used_icons(tmp_path)
    kept = ''.join(f'.bi-{n}::before{{content:"\\f1"}}' for n in ('search', 'moon'))
    assert css.read_text() == head + kept


@browses
@pytest.mark.parametrize('opened', ['served', 'as a file'])
def test_what_pages_leave_out_is_put_back(served, opened):
    "Code is copied by a button, and the parts of the sidebar fold."
    b, url, site = served
    top = url if opened == 'served' else site.as_uri()
    context = b.new_context(viewport=dict(width=1280, height=900))
    context.grant_permissions(['clipboard-read', 'clipboard-write'])
    watched = Watched(context)
    page = watched.page
    page.goto(f'{top}/nbs/method/04_flow.html')
    cells = page.locator('.cell div.sourceCode')
    assert cells.count() > 20
    assert page.locator('.cell button.code-copy-button').count() == cells.count()
    page.locator('button.code-copy-button').first.click()
    page.wait_for_function("() => document.querySelector('button[title=\"Copied!\"]')")
    copied = page.evaluate('navigator.clipboard.readText()')
    assert copied.strip() == cells.first.locator('code').inner_text().strip() != ''
    links = page.locator('#quarto-sidebar li > a[href]')
    assert links.count() == len(books()) and links.first.is_visible()
    parts = page.locator('#quarto-sidebar ul ul')
    folds = page.locator('#quarto-sidebar a.sidebar-item-toggle')
    assert folds.count() == parts.count() >= len(docs.PARTS)
    folds.nth(1).click()
    parts.nth(1).wait_for(state='hidden')
    assert (
        parts.nth(0).is_visible() and folds.nth(1).get_attribute('aria-expanded') == 'false'
    )
    assert not watched.wrong, watched.wrong
    context.close()


def test_a_page_without_scripts_lacks_no_link_and_no_text(site):
    page = (site / 'nbs/method/04_flow.html').read_text()
    bar = re.search(r'<nav id="quarto-sidebar".*?</nav>', page, re.S)[0]
    assert len(re.findall('<a href=', bar)) == len(books())
    assert len(re.findall(r'<li><b>[^<]+</b><ul>', bar)) >= len(docs.PARTS)
    assert 'data-bs-toggle' not in bar and bar.count('aria-current="page"') == 1


def test_no_link_is_left_as_it_was_written(site):
    for page in (site / 'nbs').rglob('*.html'):
        found = re.findall(r'.{0,40}\]\([^)\s]+\)', words(page))
        assert not found, (page, found)


def test_a_link_keeps_its_own_target():
    "nbdev links names in the text of a link too; the author's own link wins."
    written = '[[`encode`](/m/vlm.html#encode) of a block](#two), [`x`](/m/vlm.html#x)'
    made = docs.relinked(written, {}, Path('method'))
    assert made == '[`encode` of a block](#two), [`x`](./../m/vlm.html#x)'


def test_a_word_is_not_linked_to_its_namesake():
    "`linear` is a compression in one chapter and counts operations in another."
    said = '[`linear`](/train/plan.html#linear) and [`encode`](/method/vlm.html#encode)'
    assert docs.meant(said, {'method.salr', 'method.vlm'}) == (
        '`linear` and [`encode`](/method/vlm.html#encode)'
    )
    assert docs.meant('[`SALR`](/method/salr.html#salr)', set()).endswith('#salr)')
    chapter = docs.read_nb(root / 'nbs/policy/02_processor.ipynb')
    assert {'policy.processor', 'policy.configuration'} <= docs.modules_of(chapter)


def test_a_solution_is_folded_with_what_it_prints(site):
    page = (site / 'nbs/method/04_flow.html').read_text()
    solutions = page.split('<summary>Solution</summary>')[1:]
    assert solutions
    for text in solutions:
        inside, _, after = text.partition('</details>')
        assert 'cell-output' in inside, 'a solution that shows nothing'
        assert after.lstrip().startswith('</div>'), 'something of it stands open'


@browses
def test_no_code_scrolls_sideways(served):
    b, url, site = served
    page = b.new_page(viewport=dict(width=1280, height=900))
    wide = '''() => [...document.querySelectorAll('pre.sourceCode')]
        .filter(e => e.scrollWidth > e.clientWidth).map(e => e.textContent.slice(0, 200))'''
    for f in sorted((site / 'nbs').rglob('*.html')):
        page.goto(f'{url}/{f.relative_to(site).as_posix()}')
        page.evaluate('document.fonts.ready')
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert not (found := page.evaluate(wide)), (f.name, found)
    page.close()


@browses
def test_a_twin_that_is_half_read_is_left_alone(served):
    b, url, _ = served
    watched = Watched(b, viewport=dict(width=1280, height=900))
    page = watched.page
    page.goto(f'{url}/nbs/viz/03_masks.html')
    page.wait_for_load_state('load')
    page.evaluate(
        '''() => {
        const late = window.late = document.createElement('iframe');
        late.className = 'halo-twin';
        document.body.append(late);
        late.contentDocument.open();
        late.contentDocument.write('<html><body><div id="frame"></div>');
    }'''
    )
    # every twin is dressed again, this one while it is being read
    page.locator('.quarto-color-scheme-toggle').first.click()
    page.wait_for_timeout(100)
    assert not watched.wrong, watched.wrong
    page.evaluate(
        '''() => {
        const inside = window.late.contentDocument, kind = 'type="application/json"';
        inside.write(`<script id="spec" ${kind}>{"ratio": 1}</` + 'script></body></html>');
        inside.close();
    }'''
    )
    page.locator('.quarto-color-scheme-toggle').first.click()
    page.wait_for_function("() => window.late.contentDocument.getElementById('site')")
    assert not watched.wrong, watched.wrong
    page.close()


MIDDLE = """kind => {
  const p = halo.spec.panels.find(p => p.kind == kind);
  const c = document.getElementById('canvas'), g = c.getContext('2d');
  const [x, y] = [p.box[0] + p.box[2] / 2, p.box[1] + p.box[3] / 2];
  return Array.from(
    g.getImageData(Math.round(x * c.width), Math.round(y * c.height), 4, 4).data);
}"""
DARKEN = """dark => {
  const drawn = document.body.dataset.drawn;
  document.body.dataset.drawn = '';
  document.body.style.background = dark ? '#22272c' : '';
  document.documentElement.classList.toggle('dark', dark);
  return drawn;
}"""


@browses
@pytest.mark.parametrize('name, kind', [('03_masks', 'heat'), ('06_rollouts', 'picture')])
def test_drawings_are_dark_on_a_dark_page(served, name, kind):
    "Axes and lines turn; a heat map's colours are numbers and stay, and so do pictures."
    b, url, _ = served
    page = b.new_page(viewport=dict(width=1280, height=900))
    page.goto(f'{url}/nbs/viz/{name}.html')
    frame = page.locator('iframe.halo-twin').first
    frame.scroll_into_view_if_needed()
    inside = frame.element_handle().content_frame()
    inside.wait_for_function('() => document.body.dataset.drawn')
    ink = "() => getComputedStyle(document.querySelector('#frame svg')).fill"

    def look():
        shot = Image.open(io.BytesIO(inside.locator('#frame').screenshot())).convert('L')
        return np.median(shot), inside.evaluate(ink), inside.evaluate(MIDDLE, kind)

    seen = [look()]
    for dark in (True, False):
        drawn = inside.evaluate(DARKEN, dark)
        inside.wait_for_function('was => document.body.dataset.drawn === was', arg=drawn)
        seen.append(look())
    light, dark, again = seen
    assert light[0] > 200 and dark[0] < 130, (light[0], dark[0])
    assert light[1] != dark[1] and again == light
    assert light[2] == dark[2], 'a colour that is a number has changed'
    page.close()


@browses
def test_dark_mode_search_and_the_film(served):
    b, url, _ = served
    watched = Watched(b, viewport=dict(width=1280, height=900), color_scheme='light')
    page = watched.page
    light = lambda: sum(
        map(
            int,
            re.findall(
                r'\d+', page.evaluate('getComputedStyle(document.body).backgroundColor')
            )[:3],
        )
    )
    page.goto(f'{url}/index.html')
    assert light() > 700
    film = page.locator('.halo-film img')
    assert (
        film.evaluate('e => e.complete && e.naturalWidth') == 2 * landing.SIDE + landing.GAP
    )
    # the first screen shows it acting and says how to run it
    assert (
        film.bounding_box()['y'] + film.bounding_box()['height'] < 900
        and page.locator('.halo-run').bounding_box()['y'] < 800
    )
    first = film.screenshot()
    page.wait_for_timeout(700)
    assert film.screenshot() != first
    page.locator('.quarto-color-scheme-toggle').first.click()
    page.wait_for_function(
        "() => document.documentElement.classList.contains('quarto-dark')"
    )
    assert light() < 150
    # remembered
    page.goto(f'{url}/nbs/viz/03_masks.html')
    assert light() < 150
    frame = page.locator('iframe.halo-twin').first
    frame.scroll_into_view_if_needed()
    inside = frame.element_handle().content_frame()
    inside.wait_for_function("() => document.documentElement.classList.contains('dark')")
    page.locator('.quarto-color-scheme-toggle').first.click()
    inside.wait_for_function("() => !document.documentElement.classList.contains('dark')")
    assert light() > 700
    page.locator('#quarto-search input').fill('rotary')
    found = page.locator('.smalldocs-search-results a')
    found.first.wait_for()
    assert any(
        '.html' in (found.nth(k).get_attribute('href') or '') for k in range(found.count())
    )
    assert not watched.wrong, watched.wrong
    page.close()


@browses
def test_answers_from_before_where_no_model_is(served):
    b, url, site = served
    watched = Watched(b, viewport=dict(width=1280, height=900))
    page = watched.page
    name = 'nbs/deploy/06_live.html'
    text = (site / name).read_text().replace('name="halo-live"', 'name="elsewhere"')
    plain = dict(body=text, content_type='text/html')
    page.route(f'**/{name}', lambda route: route.fulfill(**plain))
    page.goto(f'{url}/{name}')
    inside = page.frame_locator('iframe.halo-live')
    inside.locator('body[data-model=missing][data-how=before]').wait_for()
    assert 'Computed before' in inside.locator('#said').inner_text()
    assert inside.locator('#steps').is_disabled() and inside.locator('#show0').is_disabled()
    ends = set()
    for k in range(3):
        inside.locator(f'#swap{k}').click()
        body = inside.locator('body')
        end, goal = (body.get_attribute(f'data-{x}') for x in ('end', 'goal'))
        assert end == goal
        ends.add(end)
    assert len(ends) > 1 and not watched.wrong, (ends, watched.wrong)
    page.close()


def looks_of(site, frames=20):
    "Inputs, noise and Python's answer, by the same programs, for looks of the recording."
    from halo.deploy.export import arranged, layout_of
    from halo.deploy.exported import Programs
    from halo.sim.evaluate import load_policy, observation_at
    from halo.viz.recording import shipped

    policy, pre, _ = load_policy('checkpoints/flash_place/full')
    r, lay = shipped('full'), layout_of(policy, 16)
    made = site.parent / 'unpacked'
    made.mkdir(exist_ok=True)
    for name in ('prefix.onnx', 'denoise.onnx'):
        packed = site / f'live/full/{name}.gz'
        (made / name).write_bytes(gzip.decompress(packed.read_bytes()))
    about = json.loads((site / 'live/full/policy.json').read_text())
    programs, rng = Programs(made, about, 1), np.random.default_rng(0)
    for tick in np.linspace(0, len(r) - 1, frames).astype(int):
        obs = observation_at(policy, pre, r.record, r.task, int(tick))
        seen = {k: v.numpy() for k, v in arranged(obs, lay).items()}
        noise = rng.standard_normal((1, 16, 8)).astype(np.float32)
        noise[..., 4:] = 0
        answer = programs.denoised(programs.encode(seen), noise)[-1].ravel()
        flat = {k: np.asarray(v).ravel().tolist() for k, v in seen.items()}
        yield flat, noise.ravel().tolist(), answer


@browses
@pytest.mark.skipif(not whole, reason='a bare site has no model')
def test_the_policy_runs_in_the_page(served):
    b, url, site = served
    watched = Watched(b, viewport=dict(width=1280, height=900))
    page, sent = watched.page, []
    page.on('response', lambda r: sent.append(r))
    page.goto(f'{url}/nbs/deploy/06_live.html')
    inside = page.frame_locator('iframe.halo-live')
    inside.locator('body[data-model=here][data-how=now]').wait_for(timeout=60_000)
    frame = page.locator('iframe.halo-live').element_handle().content_frame()
    frame.wait_for_function('() => halo.models.no_history && halo.idle()', timeout=60_000)

    def settled():
        frame.wait_for_function('() => halo.idle()')
        return frame.evaluate('() => JSON.parse(JSON.stringify(halo.plans()))')

    moves = lambda plan: np.diff(plan, axis=0)

    start = settled()
    # the flash: the plan follows, without a history it stays
    followed = 0
    for k in (0, 1, 2, 0, 1, 2):
        inside.locator(f'#swap{k}').click()
        plans = settled()
        body = frame.evaluate('() => ({...document.body.dataset})')
        followed += body['end'] == body['goal']
        assert np.allclose(plans['no_history'], start['no_history'], atol=1e-5)
    assert followed >= 5, followed
    inside.locator('#reset').click()
    assert np.allclose(settled()['full'], start['full'], atol=1e-5)
    # every other control moves the plan
    for change in (
        lambda: inside.locator('#word').select_option(index=0),
        lambda: inside.locator('#show0').uncheck(),
        lambda: inside.locator('#freeze').check(),
        lambda: inside.locator('#reverse').check(),
        *(lambda i=i: inside.locator(f'#{i}').fill('2') for i in ('light', 'x', 'y', 'z')),
        lambda: inside.locator('#steps').fill('3'),
        lambda: inside.locator('#seed').fill('5'),
    ):
        inside.locator('#reset').click()
        settled()
        change()
        assert not np.allclose(moves(settled()['full']), moves(start['full']), atol=1e-4)
    # the page's colours are the site's
    page.locator('.quarto-color-scheme-toggle').first.click()
    dark = "() => document.documentElement.classList.contains('dark')"
    frame.wait_for_function(dark)
    page.locator('.quarto-color-scheme-toggle').first.click()
    frame.wait_for_function(f'() => !({dark})()')
    inside.locator('#without').uncheck()
    # Python's actions, and how long a look takes
    took = []
    for seen, noise, want in looks_of(site):
        have, ms = frame.evaluate(
            """async ([o, noise]) => {
                const seen = {
                    history: Uint8Array.from(o.history), pairs: o.pairs[0], text: o.text,
                    words: o.words[0], state: Float32Array.from(o.state),
                    views: [o.view0, o.view1].map(v => Uint8Array.from(v)),
                };
                const start = performance.now();
                const x = await halo.models.full.chunk(seen, noise, 10);
                return [Array.from(x), performance.now() - start];
            }""",
            [seen, noise],
        )
        took.append(ms)
        assert np.abs(np.array(have) - want).max() < 1e-3
    print(f'a look in the page: median {np.median(took):.0f} ms of {len(took)}')
    assert np.median(took) < 250 or len(os.sched_getaffinity(0)) < 2
    bytes_ = sum(len(r.body()) for r in sent if r.ok and r.url.startswith(url))
    print(f'{bytes_ / 1e6:.1f} MB came with the page')
    assert bytes_ < 12e6 and not watched.wrong, (bytes_, watched.wrong)
    page.close()
