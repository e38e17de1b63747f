"""Run nbdev_test on each notebook in a process of its own, two at a time, with one line per
notebook.

A process per notebook keeps state (default dtypes, seeds, registries, memory) from leaking
between notebooks, as workers shared by nbdev_test would let it.
The processes are forks of one that has already imported what nearly all notebooks import;
`--fresh` starts them from nothing.
Flags name cells that are skipped otherwise: `--flags "slow sim"` runs them too, in the
notebooks that have any.
"""

import argparse
import contextlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

root = Path(__file__).resolve().parent.parent
# What nearly every notebook imports, ten seconds of a core; nothing of halo: notebooks
# register its classes
PRELOADED = (
    'matplotlib.pyplot',
    'nbdev.test',
    'lerobot.datasets.lerobot_dataset',
    'lerobot.policies.factory',
    'transformers.models.qwen2_5_vl.modeling_qwen2_5_vl',
)


def notebooks():
    "Every notebook under nbs/ that nbdev would test."
    return [
        p
        for p in sorted((root / 'nbs').rglob('*.ipynb'))
        if not any(part.startswith(('_', '.')) for part in p.relative_to(root).parts)
    ]


def flagged(path, flags):
    "Whether a code cell of the notebook opens with one of `flags` as a directive."
    sources = (
        ''.join(c['source'])
        for c in json.loads(path.read_text(encoding='utf-8'))['cells']
        if c['cell_type'] == 'code'
    )
    return any(
        re.search(rf'^\s*#\s*\|\s*{f}\s*:?\s*$', s, re.M) for s in sources for f in flags
    )


def preload():
    "Import what most notebooks need, with one thread each: nothing may run beside a fork."
    os.chdir(root)
    sys.path.insert(0, str(root))
    import matplotlib

    matplotlib.use('agg')
    for name in PRELOADED:
        importlib.import_module(name)
    # the one thread is Arrow's allocator, which knows forks
    warnings.filterwarnings(
        'ignore', 'This process .* is multi-threaded', DeprecationWarning
    )


def start(path, flags, fresh):
    """A process that tests one notebook, in a group of its own, and the file with what it
    prints: (pid, file).
    """
    out = tempfile.TemporaryFile('w+', encoding='utf-8')
    if fresh:
        command = [
            Path(sys.executable).parent / 'nbdev_test',
            '--path',
            path,
            '--flags',
            ' '.join(flags),
        ]
        return (
            subprocess.Popen(
                command,
                cwd=root,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            ).pid,
            out,
        )
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid, out
    code = 1
    try:
        os.setsid()
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        from nbdev.test import nbdev_test

        nbdev_test(path=str(path), flags=' '.join(flags))
        code = 0
    except SystemExit as e:
        code = int(bool(e.code))
    except BaseException:
        __import__('traceback').print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def test_all(paths, flags, limit, workers, fresh=False):
    """Test notebooks, `workers` at a time: yields (path, passed, seconds, output), in their
    order.
    """
    waiting, running, done = list(paths), {}, {}
    try:
        for path in paths:
            while path not in done:
                while waiting and len(running) < workers:
                    p = waiting.pop(0)
                    running[p] = (*start(p, flags, fresh), time.monotonic())
                for p, (pid, out, began) in list(running.items()):
                    late = time.monotonic() - began > limit
                    if late:
                        os.killpg(pid, signal.SIGKILL)
                    ended, status = os.waitpid(pid, 0 if late else os.WNOHANG)
                    if not ended:
                        continue
                    out.seek(0)
                    why = (
                        f'Stopped after {limit:.0f} s; mark slow cells with `#| slow` or'
                        ' raise --limit.\n'
                        if late
                        else ''
                    )
                    done[p] = (
                        not late and os.waitstatus_to_exitcode(status) == 0,
                        time.monotonic() - began,
                        out.read() + why,
                    )
                    out.close()
                    del running[p]
                time.sleep(0.1)
            yield (path, *done[path])
    finally:  # interrupted: no process stays behind
        for pid, *_ in running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        'notebooks', nargs='*', type=Path, help='notebooks to test (default: all)'
    )
    parser.add_argument(
        '--flags',
        default='',
        help='run cells with these directives too, such as "slow sim"',
    )
    parser.add_argument('--workers', type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument('--limit', type=float, default=600, help='seconds for one notebook')
    parser.add_argument(
        '--fresh', action='store_true', help='start every process from nothing'
    )
    args = parser.parse_args()
    for name, value in dict(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1').items():
        os.environ.setdefault(name, value)
    flags = args.flags.split()
    paths = [p.resolve() for p in args.notebooks] or [
        p for p in notebooks() if not flags or flagged(p, flags)
    ]
    failed, started = [], time.monotonic()
    fresh = args.fresh or len(paths) < 3
    if not fresh:
        preload()
    for path, passed, seconds, out in test_all(
        paths, flags, args.limit, max(1, args.workers), fresh
    ):
        print(
            f"{'ok    ' if passed else 'FAILED'} {path.name:<32} {seconds:6.1f} s",
            flush=True,
        )
        if not passed:
            failed.append(path.name)
            print(out, flush=True)
    print(
        f"Notebooks: {len(paths) - len(failed)} of {len(paths)} passed in"
        f" {time.monotonic() - started:.0f} s"
        + (f"; failed: {', '.join(failed)}" if failed else '')
    )
    sys.exit(bool(failed))


if __name__ == '__main__':
    main()
