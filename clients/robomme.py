"""RoboMME's client: run it where RoboMME and LeRobot's class for it are installed (configs/requirements/robomme.txt). It needs a checkout of this repository, no installation of it."""
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)   # instead of this folder, in which this file would hide the package robomme
from halo.memory import main_robomme as main  # noqa: E402

if __name__ == '__main__': main()
