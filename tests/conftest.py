"""Every test runs offline, and where a renderer was found (scripts/system.py) with that
renderer.
"""

import importlib.util
import os
import re
import socket
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent

for name in ('HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE', 'HF_DATASETS_OFFLINE'):
    os.environ[name] = '1'
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
noted = root / '.venv/halo.env'
if found := re.search(r'MUJOCO_GL:-(\w+)', noted.read_text()) if noted.exists() else None:
    os.environ.setdefault('MUJOCO_GL', found[1])


def pytest_collection_modifyitems(items):
    "Skip what this machine cannot run, with the reason."
    missing = [m for m in ('mujoco', 'metaworld') if importlib.util.find_spec(m) is None]
    for item in items:
        if 'sim' in item.keywords and missing:
            item.add_marker(
                pytest.mark.skip(
                    reason=f"needs {' and '.join(missing)}: pip install -e '.[sim]'"
                )
            )
        if 'gpu' in item.keywords and not cuda():
            item.add_marker(pytest.mark.skip(reason='needs a CUDA device'))


def cuda():
    import torch

    return torch.cuda.is_available()


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    "Refuse connections to other machines."
    connect = socket.socket.connect

    def local(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in (
            '127.0.0.1',
            '::1',
            'localhost',
        ):
            raise AssertionError(
                f'a test tried to connect to {address}: tests run without a network'
            )
        return connect(self, address)

    monkeypatch.setattr(socket.socket, 'connect', local)
