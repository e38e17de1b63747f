#!/usr/bin/env bash
# Run a command with .venv first on PATH and with the renderer that scripts/system.py found: scripts/env.sh pytest -q
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -f "$root/.venv/halo.env" ]; then . "$root/.venv/halo.env"; fi
export VIRTUAL_ENV="$root/.venv" PATH="$root/.venv/bin:$PATH"
exec "$@"
