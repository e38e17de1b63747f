"""Write constraints.txt: the exact version of everything that halo and its dev, sim, viz,
serve, baselines, peft and export extras pull into .venv.
"""

import os
import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

root = Path(__file__).resolve().parent.parent
# torch pins these exactly itself, per platform
own = re.compile(r'^(nvidia-|cuda-|triton$)')
head = (
    '# Written by `make lock`: the versions that the tests ran with. make setup installs'
    ' with them.\n'
)


def closure(name, extras, seen):
    """Add to `seen` (name -> version) what distribution `name` with `extras` requires here,
    itself excluded.
    """
    for line in distribution(name).requires or []:
        need = Requirement(line)
        if need.marker and not any(
            need.marker.evaluate({'extra': e}) for e in ['', *extras]
        ):
            continue
        key = re.sub(r'[-_.]+', '-', need.name).lower()
        try:
            version = distribution(key).version
        except PackageNotFoundError:
            continue
        if (key, frozenset(need.extras)) in seen:
            continue
        seen[key, frozenset(need.extras)] = version
        closure(key, need.extras, seen)
    return seen


if __name__ == '__main__':
    found = closure(
        'lerobot_policy_halo',
        ['dev', 'sim', 'viz', 'serve', 'baselines', 'peft', 'export'],
        {},
    )
    lines = sorted(
        {
            f"{name}=={version.partition('+')[0]}\n"
            for (name, _), version in found.items()
            if not own.match(name)
        }
    )
    part = root / 'constraints.txt.part'
    part.write_text(head + ''.join(lines), encoding='utf-8')
    os.replace(part, root / 'constraints.txt')
    print(f'constraints.txt: {len(lines)} versions')
