"""Install the package `halo` and LeRobot's plug-in module. Every value comes from settings.ini."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).resolve().parent
ini = ConfigParser(delimiters=['='])
ini.read(root/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
readme = root/'README.md'

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else '',
    long_description_content_type='text/markdown',
    author=cfg['author'],
    license='Apache-2.0',
    keywords=cfg['keywords'].split(),
    classifiers=['Development Status :: 3 - Alpha', f"Intended Audience :: {cfg['audience']}",
                 'Programming Language :: Python :: 3.12', 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
    python_requires=f">={cfg['min_python']}",
    # LeRobot imports, from each distribution whose name starts with `lerobot_policy_`, the module of that same name
    packages=find_packages(include=[cfg['lib_path'], f"{cfg['lib_path']}.*"]),
    py_modules=[cfg['lib_name']],
    include_package_data=True,
    install_requires=cfg['requirements'].split(),
    extras_require={extra: cfg[f'{extra}_requirements'].split() for extra in ('dev', 'sim', 'viz', 'serve', 'baselines', 'peft', 'int8', 'flash')},
    entry_points={'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"], 'console_scripts': [f"halo={cfg['lib_path']}.cli:main"]},
    zip_safe=False,
)
