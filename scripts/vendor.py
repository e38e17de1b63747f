"""What the site's pages need from npm: KaTeX, two fonts, and ONNX Runtime for the policy in
the page. Fetched once with `npm pack`, checked against the hashes below, kept in
.cache/npm.

python scripts/vendor.py            # fill the cache
"""

import base64
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

root = Path(__file__).resolve().parent.parent
cache = root / '.cache/npm'


@dataclass(frozen=True)
class Package:
    """One version of an npm package: the SHA-512 of its archive as npm writes it (base64),
    and which of its files the site takes, from where to where.
    """

    name: str
    version: str
    sha512: str
    # path in the archive (a trailing / takes the .woff2 files of a folder) -> path below
    # site_libs/
    take: dict[str, str]

    @property
    def spec(self):
        return f'{self.name}@{self.version}'

    @property
    def archive(self):
        return f'{self.name.lstrip("@").replace("/", "-")}-{self.version}.tgz'


PACKAGES = (
    Package(
        'katex',
        '0.16.11',
        'RQrI8rlHY92OLf3rho/Ts8i/XvjgguEjOkO1BEXcU3N8BqPpSzBNwV/G0Ukr+P/l3ivvJUE/Fa/CwbS6HesGNQ==',
        {
            'LICENSE': 'katex/LICENSE',
            'dist/katex.min.css': 'katex/katex.min.css',
            'dist/katex.min.js': 'katex/katex.min.js',
            'dist/contrib/auto-render.min.js': 'katex/contrib/auto-render.min.js',
            'dist/fonts/': 'katex/fonts/',
        },
    ),
    Package(
        '@fontsource-variable/source-sans-3',
        '5.3.1',
        'u0p5Z/PM2e1uxYOMiodLM6NVzxHwULcB6Oi7QSr2WU/sdoLBFP/BeOZ3YYHeJ6rHsjPZA1nZweZVaV7sf2MAyQ==',
        {
            'LICENSE': 'fonts/source-sans-3-LICENSE',
            'files/source-sans-3-latin-wght-normal.woff2': 'fonts/source-sans-3.woff2',
            'files/source-sans-3-latin-wght-italic.woff2': (
                'fonts/source-sans-3-italic.woff2'
            ),
        },
    ),
    Package(
        '@fontsource-variable/source-code-pro',
        '5.3.1',
        'N0nZDizh8CQ19+AHHA8Ssb1i/aQf4N2lpRl3qZVH4/9f1yNgWzTkBFpc26v+QQr2hm4By4aiv597BCoEg2SDQg==',
        {
            'LICENSE': 'fonts/source-code-pro-LICENSE',
            'files/source-code-pro-latin-wght-normal.woff2': 'fonts/source-code-pro.woff2',
        },
    ),
    Package(
        'onnxruntime-web',
        '1.24.3',
        '41dDq7fxtTm0XzGE7N0d6m8FcOY8EWtUA65GkOixJPB/G7DGzBmiDAnVVXHznRw9bgUZpb+4/1lQK/PNxGpbrQ==',
        {
            'package.json': 'onnxruntime-web/package.json',
            'README.md': 'onnxruntime-web/README.md',
            'dist/ort.wasm.bundle.min.mjs': 'onnxruntime-web/ort.mjs',
            'dist/ort-wasm-simd-threaded.wasm': 'onnxruntime-web/ort.wasm',
        },
    ),
)


class Missing(RuntimeError):
    pass


def sound(package, path):
    "Is the archive at `path` the one that is pinned?"
    return (
        path.is_file()
        and base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
        == package.sha512
    )


def fetch(package, folder=cache, offline=False):
    """The archive of `package` in `folder`, fetched with npm if it is not there.

    Raises `Missing`, naming what to do.
    """
    path = folder / package.archive
    if sound(package, path):
        return path
    here = (
        f'the site needs {package.spec} and'
        f' {path.relative_to(root) if path.is_relative_to(root) else path} '
        + (
            'is not the archive that scripts/vendor.py pins'
            if path.exists()
            else 'is not there'
        )
    )
    npm = shutil.which('npm')
    if offline:
        raise Missing(
            f'{here}; run `make docs` once with a network, or add --bare for a site'
            ' without it'
        )
    if npm is None:
        raise Missing(
            f'{here}, nor is the npm client that could fetch it; install npm (apt-get'
            ' install npm), or run `make docs ARGS=--bare` for a site without it'
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        done = subprocess.run(
            [
                npm,
                'pack',
                package.spec,
                '--ignore-scripts',
                '--loglevel=error',
                f'--pack-destination={temporary}',
            ],
            cwd=temporary,
            capture_output=True,
            text=True,
        )
        found = sorted(Path(temporary).glob('*.tgz'))
        if done.returncode or not found:
            raise Missing(
                f'{here}, and npm could not fetch it:'
                f' {(done.stderr.strip().splitlines() or ["no message"])[-1]}; try again'
                ' with a network, or add --bare for a site without it'
            )
        if not sound(package, found[0]):
            digest = hashlib.sha512(found[0].read_bytes()).digest()
            raise Missing(
                f'npm fetched {package.spec} with SHA-512'
                f' {base64.b64encode(digest).decode()},'
                f' scripts/vendor.py pins {package.sha512}; do not use it'
            )
        os.replace(found[0], path)
    return path


def unpack(package, archive, libraries):
    """Write the files that the site takes from `archive` below `libraries`, the licence
    among them.
    """
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            name = member.name.partition('/')[2]
            to = package.take.get(name) or next(
                (
                    t + name[len(f) :]
                    for f, t in package.take.items()
                    if f.endswith('/') and name.startswith(f) and name.endswith('.woff2')
                ),
                None,
            )
            if not (to and member.isfile()):
                continue
            (libraries / to).parent.mkdir(parents=True, exist_ok=True)
            (libraries / to).write_bytes(tar.extractfile(member).read())
    css = libraries / 'katex/katex.min.css'
    # every browser of today reads woff2; the other two forms are not taken
    if package.name == 'katex':
        css.write_text(
            re.sub(
                r',url\([^)]*\.(?:woff|ttf)\) format\("(?:woff|truetype)"\)',
                '',
                css.read_text(encoding='utf-8'),
            ),
            encoding='utf-8',
        )


def vendor(libraries, offline=False):
    "Put everything the pages need below `libraries` (the site's site_libs/)."
    for archive, package in [(fetch(p, offline=offline), p) for p in PACKAGES]:
        unpack(package, archive, libraries)


if __name__ == '__main__':
    try:
        print('\n'.join(f'{p.spec}: {fetch(p).relative_to(root)}' for p in PACKAGES))
    except Missing as e:
        sys.exit(f'vendor: {e}')
