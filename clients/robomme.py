"""RoboMME's client and recorder: run it where RoboMME and LeRobot's class are installed
(configs/requirements/robomme.txt).

HALO need not be installed there: this file finds the folder halo/ that it came with, in a
checkout or in an installation elsewhere.
"""

import sys
from pathlib import Path

home = next(
    d for d in Path(__file__).resolve().parents if (d / 'halo/__init__.py').exists()
)
# a process that records beside others begins without this folder on its path
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    del sys.path[0]
sys.path.insert(0, str(home))  # for a moment
import halo  # noqa: E402, F401

# what lies beside halo (a wheel's site-packages) is not for this interpreter
del sys.path[0]
from halo.benchmarks.robomme_demos import main  # noqa: E402

if __name__ == '__main__':
    main()
