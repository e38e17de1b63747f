"""Find a library that renders MuJoCo without a screen, install one where that is possible,
and note it in .venv/halo.env.

Run by `make system`. A library counts as found only when a 16 x 16 frame was drawn with it.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
venv = root / '.venv'
libraries = {'osmesa': 'OSMesa', 'egl': 'EGL'}
packages = ['libosmesa6', 'libegl1', 'libegl-mesa0', 'libgl1-mesa-dri', 'ffmpeg']
probe = """
import mujoco
world = '<light pos="0 0 3"/><geom size=".1" rgba="1 0 0 1"/>'
model = mujoco.MjModel.from_xml_string(
    f'<mujoco><worldbody>{world}</worldbody></mujoco>')
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer = mujoco.Renderer(model, 16, 16)
renderer.update_scene(data)
frame = renderer.render()
renderer.close()
assert frame.max() > 0
"""


def loads(name, extra=''):
    """Whether the dynamic loader of a fresh process finds library `name`, with the folder
    `extra` on its path.
    """
    code = (
        f"import ctypes\nfor so in ('lib{name}.so', 'lib{name}.so.8', 'lib{name}.so.1',"
        f" 'lib{name}.so.0'):\n    try: ctypes.CDLL(so); break\n    except OSError:"
        " pass\nelse: raise SystemExit(1)"
    )
    return (
        subprocess.run(
            [sys.executable, '-c', code], env=environment('', extra), capture_output=True
        ).returncode
        == 0
    )


def environment(backend, extra=''):
    """This process's environment with `backend` as MuJoCo's renderer and `extra` ahead on
    the library path.
    """
    paths = [p for p in (extra, os.environ.get('LD_LIBRARY_PATH', '')) if p]
    env = {k: v for k, v in os.environ.items() if k != 'PYOPENGL_PLATFORM'}
    return (
        env
        | {'MUJOCO_GL': backend}
        | ({'LD_LIBRARY_PATH': ':'.join(paths)} if paths else {})
    )


def draws(backend, extra=''):
    """Whether `backend` draws a frame in a fresh process; without MuJoCo, whether its
    library loads.
    """
    if not loads(libraries[backend], extra):
        return False
    if not importlib.util.find_spec('mujoco'):
        return True
    return (
        subprocess.run(
            [sys.executable, '-c', probe],
            env=environment(backend, extra),
            capture_output=True,
            timeout=120,
        ).returncode
        == 0
    )


def working(extra=''):
    """The first backend that draws: the one asked for by MUJOCO_GL, else OSMesa, else EGL;
    None if none does.
    """
    asked = os.environ.get('MUJOCO_GL', '')
    order = [asked] if asked in libraries else list(libraries)
    return next((b for b in order if draws(b, extra)), None)


def available():
    "Those of `packages` that apt knows here (newer releases no longer have OSMesa)."
    known = lambda p: (
        'Candidate: (none)'
        not in (
            out := subprocess.run(
                ['apt-cache', 'policy', p], capture_output=True, text=True
            ).stdout
        )
        and 'Candidate:' in out
    )
    return [p for p in packages if known(p)]


def apt_install():
    "Install `packages` with apt, as root."
    run = lambda *cmd: subprocess.run(
        cmd,
        env=os.environ | {'DEBIAN_FRONTEND': 'noninteractive'},
        stdout=subprocess.DEVNULL,
    )
    run('apt-get', 'update', '-qq')
    print('Installing', *available())
    run('apt-get', 'install', '-y', '-qq', '--no-install-recommends', *available())


def wheel_osmesa():
    """The folder of the OSMesa library that a wheel from PyPI carries, installed into .venv
    and linked under the names MuJoCo looks for.
    """
    pip = [
        sys.executable,
        '-m',
        'pip',
        'install',
        '-q',
        '--disable-pip-version-check',
        '--no-deps',
        'lavavu-osmesa==1.9.10',
    ]
    if subprocess.run(pip).returncode:
        return None
    found = sorted(venv.glob('lib/python*/site-packages/*.libs/libOSMesa*.so*'))
    if not found:
        return None
    for name in ('libOSMesa.so', 'libOSMesa.so.8'):
        link = found[0].parent / name
        if not link.exists():
            link.symlink_to(found[0].name)
    return str(found[0].parent)


def note(backend, extra=''):
    "Write .venv/halo.env for scripts/env.sh; a MUJOCO_GL that is set already stays."
    lines = [f'export MUJOCO_GL="${{MUJOCO_GL:-{backend}}}"']
    if extra:
        lines.append(
            f'export LD_LIBRARY_PATH="{extra}${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}"'
        )
    part = venv / 'halo.env.part'
    part.write_text('\n'.join(lines) + '\n')
    part.replace(venv / 'halo.env')
    print(f'Renderer: {backend}' + (' (from the wheel in .venv)' if extra else ''))


def main():
    apt, admin = shutil.which('apt-get'), os.geteuid() == 0
    extra, backend = '', working()
    if apt and admin and not (backend and shutil.which('ffmpeg')):
        apt_install()
        backend = working()
    if not backend and 'MUJOCO_GL' not in os.environ and (extra := wheel_osmesa() or ''):
        backend = working(extra)
    command = f"sudo apt-get install -y {' '.join(available() if apt else packages)}"
    if not shutil.which('ffmpeg'):
        print(
            "FFmpeg's libraries are missing: videos are then read by PyAV, which is"
            f" slower. With them: {command}"
        )
    if not backend:
        asked = (
            f"MUJOCO_GL={os.environ['MUJOCO_GL']} does not draw here"
            if 'MUJOCO_GL' in os.environ
            else 'No library renders without a screen here'
        )
        sys.exit(
            f'{asked}: run "{command}"'
            + (
                ', or unset MUJOCO_GL.'
                if 'MUJOCO_GL' in os.environ
                else ', then this command again.'
            )
        )
    note(backend, extra)


if __name__ == '__main__':
    main()
