"""SIMPLER's client: run it where SIMPLER is installed (configs/requirements/simpler.txt). It needs a checkout of this repository, no installation of it. Not verified here."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from halo.simpler import main  # noqa: E402 - imports numpy and the standard library only

if __name__ == '__main__': main()
