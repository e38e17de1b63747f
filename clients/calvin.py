"""CALVIN's client: run it in the simulator's own environment (configs/requirements/calvin.txt). It needs a checkout of this repository, no installation of it."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from halo.calvin import main  # noqa: E402 - imports numpy and the standard library only

if __name__ == '__main__': main()
