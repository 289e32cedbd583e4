#!/usr/bin/env bash
# Runs the test suite in a virtual environment of its own, .venv-test beside the project.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
VENV=.venv-test

if [ ! -x "$VENV/bin/python" ]; then
    echo "== making $VENV with $PYTHON"
    "$PYTHON" -m venv "$VENV"
fi
echo "== installing torch and streamconv[dev] into $VENV"
# torch first and on its own: the versions of everything else are then chosen to fit it.
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -e '.[dev]'

echo "== pytest"
"$VENV/bin/python" -m pytest -n 2 "$@"
