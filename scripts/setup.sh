# Sourced by the scripts beside it: go to the repository, use the active virtual environment or make .venv, install what is missing
# Usage: source scripts/setup.sh requirements.txt
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -x .venv/bin/python ] || python3 -m venv .venv
    source .venv/bin/activate
fi
python - <<'PY'
import sys
if sys.version_info < (3, 11):
    sys.exit(f"error: Python {sys.version.split()[0]} is too old; SegHeads needs 3.11 or newer (python3 --version)")
PY
python -m pip install --quiet --disable-pip-version-check -r "$1"
