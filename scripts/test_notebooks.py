"""Run nbdev_test on each notebook in a process of its own, two at a time, with one line per notebook.

A process per notebook keeps state (default dtypes, seeds, registries, memory) from leaking between notebooks, as workers shared by nbdev_test would let it.
Flags name cells that are skipped otherwise: `--flags "slow sim"` runs them too, in the notebooks that have any.
"""
import argparse, json, os, re, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

root = Path(__file__).resolve().parent.parent


def notebooks():
    "Every notebook under nbs/ that nbdev would test."
    return [p for p in sorted((root/'nbs').rglob('*.ipynb')) if not any(part.startswith(('_', '.')) for part in p.relative_to(root).parts)]


def flagged(path, flags):
    "Whether a code cell of the notebook opens with one of `flags` as a directive."
    sources = (''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code')
    return any(re.search(rf'^\s*#\s*\|\s*{f}\s*:?\s*$', s, re.M) for s in sources for f in flags)


def test(path, flags, limit):
    "Run one notebook's tests: (passed, seconds, output)."
    command = [Path(sys.executable).parent/'nbdev_test', '--path', path, '--flags', ' '.join(flags)]
    env = {'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1'} | os.environ
    started = time.monotonic()
    with tempfile.TemporaryFile('w+', encoding='utf-8') as out:
        try: passed, why = subprocess.run(command, cwd=root, env=env, stdout=out, stderr=subprocess.STDOUT, timeout=limit).returncode == 0, ''
        except subprocess.TimeoutExpired: passed, why = False, f'Stopped after {limit:.0f} s; mark slow cells with `#| slow` or raise --limit.\n'
        out.seek(0)
        return passed, time.monotonic() - started, out.read() + why


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('notebooks', nargs='*', type=Path, help='notebooks to test (default: all)')
    parser.add_argument('--flags', default='', help='run cells with these directives too, such as "slow sim"')
    parser.add_argument('--workers', type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument('--limit', type=float, default=600, help='seconds for one notebook')
    args = parser.parse_args()
    flags = args.flags.split()
    paths = [p.resolve() for p in args.notebooks] or [p for p in notebooks() if not flags or flagged(p, flags)]
    failed, started = [], time.monotonic()
    with ThreadPoolExecutor(max(1, args.workers)) as pool:
        for path, (passed, seconds, out) in zip(paths, pool.map(lambda p: test(p, flags, args.limit), paths)):
            print(f"{'ok    ' if passed else 'FAILED'} {path.name:<32} {seconds:6.1f} s", flush=True)
            if not passed: failed.append(path.name); print(out, flush=True)
    print(f"Notebooks: {len(paths) - len(failed)} of {len(paths)} passed in {time.monotonic() - started:.0f} s" + (f"; failed: {', '.join(failed)}" if failed else ''))
    sys.exit(bool(failed))


if __name__ == '__main__': main()
