#!/usr/bin/env bash
# Create .venv with Python 3.12 and install this project into it, with its dev, sim, viz, serve, baselines, peft and export extras, at the versions of constraints.txt.
# PYTHON=/path/to/python3.12 chooses the interpreter; PIP_ARGS="..." goes to pip (an index of CPU-only wheels, for example).
# `scripts/setup.sh --which` prints the interpreter that it would take, and makes nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
stamp=.venv/halo-setup.stamp

usable() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.12 "$HOME"/.pyenv/versions/3.12*/bin/python3.12 \
            "$HOME"/.local/share/uv/python/cpython-3.12*/bin/python3.12 python3 python; do
        candidate=$(command -v "$candidate" 2>/dev/null) || continue
        if usable "$candidate"; then printf '%s\n' "$candidate"; return; fi
        if [ -n "${PYTHON:-}" ]; then break; fi  # an interpreter that was asked for is never replaced by another
    done
    if [ -z "${PYTHON:-}" ] && command -v uv >/dev/null; then
        uv python find 3.12 2>/dev/null || { uv python install -q 3.12 >&2 && uv python find 3.12; }
        return
    fi
    return 1
}

how_to_get_python() {
    if [ -n "${PYTHON:-}" ]; then echo "PYTHON=$PYTHON is not a Python 3.12; give the path of one, or unset PYTHON to have one searched."
    elif [ -n "$(apt-cache policy python3.12-venv 2>/dev/null | grep -E 'Candidate: [0-9]')" ]; then
        echo "HALO needs Python 3.12, which is not installed: run 'sudo apt-get install -y python3.12 python3.12-venv', then this command again."
    else
        echo "HALO needs Python 3.12, which this system's packages do not offer: run 'python3 -m venv ~/.uv && ~/.uv/bin/pip install uv && ~/.uv/bin/uv python install 3.12'" \
             "(the first part needs the apt package python3-venv), then this command again."
    fi
}

if [ "${1:-}" = --which ]; then
    python=$(find_python) || { how_to_get_python >&2; exit 1; }
    exec "$python" -c 'import sys; print(sys.executable)'   # not a shim, which may need HOME
fi

if ! usable .venv/bin/python; then
    python=$(find_python) || { how_to_get_python >&2; exit 1; }
    echo "Creating .venv with $("$python" --version)"
    if ! "$python" -m venv --clear .venv 2>.venv.log; then
        rm -rf .venv  # without ensurepip a half-made environment is left behind
        if grep -q ensurepip .venv.log; then echo "Python 3.12 lacks its venv module: run 'sudo apt-get install -y python3.12-venv', then this command again." >&2
        else cat .venv.log >&2; fi
        rm -f .venv.log; exit 1
    fi
    rm -f .venv.log
fi

echo "Installing halo with its dev, sim, viz, serve, baselines, peft and export extras into .venv (the first time fetches about 3 GB and takes some minutes)"
started=$SECONDS
quiet=--quiet; if [ -t 1 ]; then quiet=; fi
# shellcheck disable=SC2086  # PIP_ARGS and quiet are lists of words
.venv/bin/python -m pip install $quiet --disable-pip-version-check ${PIP_ARGS:-} -c constraints.txt -e ".[dev,sim,viz,serve,baselines,peft,export]"
touch "$stamp"
echo "Installed in $((SECONDS - started)) s"
