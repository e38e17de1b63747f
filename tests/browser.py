"""A real browser on the workbook: JupyterLab with a kernel, and the rendered site.

Used by test_browser.py.
"""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import urlopen

import numpy as np
from PIL import Image

root = Path(__file__).resolve().parent.parent


def chromium():
    "The path of a Chromium, or None."
    return next(
        (
            found
            for name in (
                'chromium',
                'chromium-browser',
                'google-chrome',
                'google-chrome-stable',
            )
            if (found := shutil.which(name))
        ),
        None,
    )


def given_up(url, failure):
    """Is this a request that JupyterLab takes back itself? It sets a picture under the
    address written in the cell and replaces that by the one it serves; whether the browser
    has asked by then is chance. `undrawn` says whether the picture came.
    """
    return '/lab/tree/' in url and failure == 'net::ERR_ABORTED'


def undrawn(page, patience=20):
    "The addresses of pictures on the page that do not appear, after `patience` seconds."
    missing = """() => [...document.images]
        .filter(i => i.getAttribute('src') && !(i.complete && i.naturalWidth))
        .map(i => i.src.slice(0, 200))"""
    for _ in range(patience * 5):
        if not (left := page.evaluate(missing)):
            break
        page.wait_for_timeout(200)
    return left


class Watched:
    """A browser page and what went wrong on it: console errors, failed requests, requests
    that left the machine.
    """

    def __init__(self, browser, **kw):
        self.page, self.wrong = browser.new_page(**kw), []
        self.page.on(
            'console',
            lambda m: (
                self.wrong.append(f'console: {m.text}') if m.type == 'error' else None
            ),
        )
        self.page.on('pageerror', lambda e: self.wrong.append(f'error: {e}'))
        self.page.on(
            'requestfailed',
            lambda r: (
                None
                if given_up(r.url, r.failure)
                else self.wrong.append(f'failed: {r.url[:200]} {r.failure}')
            ),
        )
        self.page.on(
            'response',
            lambda r: (
                self.wrong.append(f'{r.status}: {r.url[:200]}') if r.status >= 400 else None
            ),
        )
        self.page.on(
            'request',
            lambda r: (
                None
                if re.match(
                    r'(https?|wss?)://(127\.0\.0\.1|localhost)[:/]|data:|blob:|about:|file:',
                    r.url,
                )
                else self.wrong.append(f'left the machine: {r.url[:200]}')
            ),
        )


class Lab:
    """JupyterLab on copies of notebooks, on a free port of the loopback; the checkout's
    notebooks stay as they are.
    """

    def __init__(self, folder, notebooks, leave_out=()):
        "`leave_out`: code cells that hold one of these strings are not copied."
        self.folder = Path(folder)
        shutil.copytree(root / 'nbs/map', self.folder / 'map')
        for n in notebooks:
            book = json.loads((root / 'nbs' / n).read_text())
            book['cells'] = [
                c
                for c in book['cells']
                if not (
                    c['cell_type'] == 'code'
                    and any(x in ''.join(c['source']) for x in leave_out)
                )
            ]
            for c in book['cells']:
                if c['cell_type'] == 'code':
                    c['outputs'], c['execution_count'] = [], None
            (self.folder / n).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / n).write_text(json.dumps(book))
        env = os.environ | {
            'OMP_NUM_THREADS': '1',
            'JUPYTER_CONFIG_DIR': str(self.folder / '.config'),
            'JUPYTER_DATA_DIR': str(self.folder / '.data'),
            'JUPYTERLAB_SETTINGS_DIR': str(self.folder / '.settings'),
            'JUPYTERLAB_WORKSPACES_DIR': str(self.folder / '.workspaces'),
        }
        options = [
            '--no-browser',
            '--ServerApp.ip=127.0.0.1',
            '--port=0',
            '--IdentityProvider.token=',
            '--ServerApp.password=',
            '--LabApp.expose_app_in_browser=True',
            '--LabApp.news_url=None',
            '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate',
            '--allow-root',
        ]
        self.log = open(self.folder / 'lab.log', 'wb')
        self.process = subprocess.Popen(
            [sys.executable, '-m', 'jupyterlab', *options, str(self.folder)],
            env=env,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            cwd=self.folder,
        )
        self.url = self._address()

    def _address(self, patience=60):
        "The server's address, once it answers."
        for _ in range(patience * 5):
            time.sleep(0.2)
            if self.process.poll() is not None:
                break
            if found := re.search(
                r'http://127\.0\.0\.1:\d+',
                (self.folder / 'lab.log').read_text(errors='replace'),
            ):
                try:
                    urlopen(f'{found[0]}/api').close()
                    return found[0]
                except OSError:
                    pass
        self.close()
        raise RuntimeError(
            'JupyterLab did not start:\n'
            + (self.folder / 'lab.log').read_text(errors='replace')[-2000:]
        )

    def close(self):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


def run_all(page, lab, name, patience=180):
    """Open notebook `name` in JupyterLab and run all its cells; raises if one of them
    failed.
    """
    page.goto(f'{lab.url}/lab/tree/{name}?reset')
    page.wait_for_function(
        '() => window.jupyterapp && jupyterapp.shell.currentWidget &&'
        ' jupyterapp.shell.currentWidget.context &&'
        ' jupyterapp.shell.currentWidget.context.isReady',
        timeout=60_000,
    )
    page.evaluate('() => jupyterapp.shell.currentWidget.context.sessionContext.ready')
    page.wait_for_timeout(500)
    page.evaluate("() => jupyterapp.commands.execute('notebook:run-all-cells')")
    done = '''() => {
        const code = c => c.model.type == 'code' && c.model.sharedModel.source.trim();
        const left = c => c.model.sharedModel.source.includes('#| eval: false');
        const cells = jupyterapp.shell.currentWidget.content.widgets.filter(code);
        return cells.length && cells.every(c => c.model.executionCount !== null || left(c));
    }'''
    page.wait_for_function(done, timeout=1000 * patience)
    failed = page.evaluate(
        "() => jupyterapp.shell.currentWidget.content.widgets.flatMap(c => c.model.type =="
        " 'code' ? c.model.outputs.toJSON().filter(o => o.output_type == 'error').map(o =>"
        " o.ename + ': ' + o.evalue) : [])"
    )
    assert not failed, failed
    assert not (left := undrawn(page)), f'pictures that did not come: {left}'


class Live:
    "A live explorer in JupyterLab, found by its title."

    def __init__(self, page, title):
        self.page = page
        self.box = (
            page.locator('.halo-live')
            .filter(has=page.locator(f'b:text-is("{title}")'))
            .last
        )
        self.box.scroll_into_view_if_needed(timeout=20_000)

    def picture(self):
        "What the image widget shows, as an array."
        src = self.box.locator('img').first.evaluate(
            "async e => { const b = await (await fetch(e.src)).arrayBuffer(); return"
            " Array.from(new Uint8Array(b)); }"
        )
        return np.asarray(Image.open(io.BytesIO(bytes(src))).convert('RGB'))

    def changed(self, before, patience=15):
        "The picture once it differs from `before` and has come to rest."
        now, still = before, 0
        for _ in range(patience * 10):
            self.page.wait_for_timeout(100)
            last, now = now, self.picture()
            still = (
                still + 1
                if now.shape == last.shape
                and (now == last).all()
                and (now.shape != before.shape or (now != before).any())
                else 0
            )
            if still == 6:
                return now
        raise AssertionError('the picture did not change')

    def widget(self, label):
        "The control with this label."
        return self.box.locator(f'label:text-is("{label}")').first.locator('xpath=..')

    def step(self, label, by=1):
        "Move a slider by keys, `by` steps."
        handle = self.widget(label).locator('.noUi-handle').first
        handle.focus()
        for _ in range(abs(by)):
            self.page.keyboard.press('ArrowRight' if by > 0 else 'ArrowLeft')

    def choose(self, label, text):
        self.widget(label).locator('select').select_option(label=text)

    def toggle(self, label):
        self.box.locator('label', has_text=label).locator(
            'input[type=checkbox]'
        ).last.click()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


class Site:
    "A folder served on the loopback."

    def __init__(self, folder):
        self.server = ThreadingHTTPServer(
            ('127.0.0.1', 0), partial(Quiet, directory=str(folder))
        )
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f'http://127.0.0.1:{self.server.server_port}'

    def close(self):
        self.server.shutdown()
        self.server.server_close()
