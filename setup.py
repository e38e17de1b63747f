"""Install the package `halo` and LeRobot's plug-in module. Every value comes from
settings.ini.

A wheel has no repository around it: what HALO reads besides its modules
(`halo.data.files.SHIPS`) is
copied into halo/shipped while it is built. An editable installation reads the repository
itself.
"""

import shutil
import sys
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

root = Path(__file__).resolve().parent
sys.path.insert(0, str(root))
from halo.data.files import SHIPS  # noqa: E402 - the standard library only

ini = ConfigParser(delimiters=['='])
ini.read(root / 'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
readme = root / 'README.md'
extras = ('dev', 'sim', 'viz', 'serve', 'baselines', 'peft', 'export', 'int8', 'flash')
kinds = {'.csv', '.json', '.jsonl', '.md', '.py', '.safetensors', '.sh', '.txt', '.yaml'}


def to_ship():
    "Files that come along: every file of a known kind below the names in SHIPS."
    for name in SHIPS:
        if not (root / name).exists():
            raise FileNotFoundError(
                f'{name} is missing: build from a clone or an unpacked sdist'
            )
        for p in sorted([root / name, *(root / name).rglob('*')]):
            if p.is_file() and p.suffix in kinds:
                yield p.relative_to(root)


class BuildWithFiles(build_py):
    "setuptools' copying of modules, and of what HALO ships."

    def shipped(self):
        return {
            str(Path(self.build_lib, 'halo/shipped', f)): str(root / f) for f in to_ship()
        }

    def run(self):
        super().run()
        if self.editable_mode:
            return
        # an older build's
        shutil.rmtree(Path(self.build_lib, 'halo/shipped'), ignore_errors=True)
        for target, source in self.shipped().items():
            self.mkpath(str(Path(target).parent))
            self.copy_file(source, target)

    def get_outputs(self, include_bytecode=1):
        found = super().get_outputs(include_bytecode)
        return found if self.editable_mode else [*found, *self.shipped()]


setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else '',
    long_description_content_type='text/markdown',
    author=cfg['author'],
    license='Apache-2.0',
    keywords=cfg['keywords'].split(),
    classifiers=[
        'Development Status :: 3 - Alpha',
        f"Intended Audience :: {cfg['audience']}",
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    python_requires=f">={cfg['min_python']}",
    # LeRobot imports, from each distribution whose name starts with `lerobot_policy_`, the
    # module of that same name
    packages=find_packages(include=[cfg['lib_path'], f"{cfg['lib_path']}.*"]),
    py_modules=[cfg['lib_name']],
    include_package_data=True,
    install_requires=cfg['requirements'].split(),
    extras_require={extra: cfg[f'{extra}_requirements'].split() for extra in extras},
    entry_points={
        'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
        'console_scripts': [f"halo={cfg['lib_path']}.cli:main"],
    },
    cmdclass={'build_py': BuildWithFiles},
    zip_safe=False,
)
