"""MIKASA-Robo's client and recorder: run it in ManiSkill's own environment
(configs/requirements/maniskill.txt).

HALO need not be installed there: this file finds the folder halo/ that it came with, in a
checkout or in an installation elsewhere.
"""

import sys
from pathlib import Path

home = next(
    d for d in Path(__file__).resolve().parents if (d / 'halo/__init__.py').exists()
)
sys.path[0] = str(home)  # for a moment, in place of this folder
import halo  # noqa: E402, F401

# what lies beside halo (a wheel's site-packages) is not for this interpreter
del sys.path[0]
from halo.benchmarks.mikasa import main  # noqa: E402 - imports numpy and the standard library only

if __name__ == '__main__':
    main()
