"""Run notebooks in place in a fresh kernel and clean them, skipping the cells that the
tests skip (their outputs stay as they are).

`jupyter nbconvert --execute` ignores nbdev's directives and would run every cell. Flags run
marked cells too: `--flags "slow sim"`.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbdev.config import get_config
from readme import directives

root = Path(__file__).resolve().parent.parent


class Client(NotebookClient):
    """A client that leaves out cells with `#| eval: false` or a test flag that was not
    asked for.
    """

    skip = frozenset()

    async def async_execute_cell(self, cell, cell_index, **kwargs):
        found, _ = directives(cell.source)
        if cell.cell_type == 'code' and (
            found.get('eval') == 'false' or self.skip & found.keys()
        ):
            return cell
        return await super().async_execute_cell(cell, cell_index, **kwargs)


def run(path, skip, limit):
    "Run one notebook in place; on an error it stays as it was."
    notebook = nbformat.read(path, as_version=4)
    client = Client(
        notebook,
        timeout=limit,
        kernel_name='python3',
        store_widget_state=False,
        resources={'metadata': {'path': str(path.parent)}},
    )
    client.skip = skip
    client.execute()
    part = path.with_name(f'_{path.name}.part')
    nbformat.write(notebook, part)
    os.replace(part, path)
    subprocess.run(
        [Path(sys.executable).parent / 'nbdev_clean', '--fname', path], cwd=root, check=True
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('notebooks', nargs='+', type=Path)
    parser.add_argument(
        '--flags',
        default='',
        help='run cells with these directives too, such as "slow sim"',
    )
    parser.add_argument('--limit', type=int, default=1200, help='seconds for one cell')
    args = parser.parse_args()
    skip = set(get_config(path=root).tst_flags.split()) - set(args.flags.split())
    for path in args.notebooks:
        started = time.monotonic()
        run(path.resolve(), skip, args.limit)
        print(
            f'{path.name:<32} {time.monotonic() - started:6.1f} s,'
            f' {path.stat().st_size / 1e3:.0f} kB',
            flush=True,
        )


if __name__ == '__main__':
    main()
