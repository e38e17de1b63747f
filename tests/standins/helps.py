"""Run commands that print their help, each in a fork of one process that has imported what
most of them import.
"""

import io
import os
import runpy
import shlex
import sys
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import lerobot.datasets.lerobot_dataset  # noqa: F401
import lerobot.policies.factory  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl  # noqa: F401

warnings.filterwarnings('ignore', 'This process .* is multi-threaded', DeprecationWarning)


def carry_out(words):
    "Run a command in this process as Python would in its own."
    program, *rest = words
    if program == 'halo':
        from halo.cli import main

        sys.argv = words
        sys.exit(main())
    if program != 'python':
        sys.exit(f'{program} is not Python')
    if rest[0] == '-m':
        sys.argv = rest[1:]
        runpy.run_module(rest[1], run_name='__main__', alter_sys=True)
    else:
        sys.argv = rest
        sys.path.insert(0, str(Path(rest[0]).resolve().parent))
        runpy.run_path(rest[0], run_name='__main__')


def status(text):
    "Whether a help was printed: the exit status of a fork."
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code, said = 0, io.StringIO()
    try:
        with redirect_stdout(said):
            carry_out(shlex.split(text))
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException as e:
        print(f'{type(e).__name__}: {e}', flush=True)
        code = 1
    os._exit(code or int('usage: ' not in said.getvalue()))


if __name__ == '__main__':
    sys.path.insert(0, os.getcwd())
    for text in sys.argv[1:]:
        if status(text):
            print('FAILED', text, flush=True)
