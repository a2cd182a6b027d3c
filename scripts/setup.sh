# Sourced by the scripts beside it: go to the repository, use the active virtual environment or make .venv, install what is missing
# Usage: source scripts/setup.sh requirements.txt
# A PyTorch that is already there is never replaced; where there is none, this one is installed:
TORCH=torch==2.13.0
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -x .venv/bin/python ] || python3 -m venv .venv
    source .venv/bin/activate
fi
torch_version=$(python - <<'PY'
import importlib.metadata, re, sys
if sys.version_info < (3, 11):
    sys.exit(f"error: Python {sys.version.split()[0]} is too old; SegHeads needs 3.11 or newer (python3 --version)")
try:
    version = importlib.metadata.version("torch")
except importlib.metadata.PackageNotFoundError:
    sys.exit()
print(version)
oldest = re.search(r"^torch>=([\d.]+)", open("requirements.txt").read(), re.MULTILINE)[1]
if [int(n) for n in re.findall(r"\d+", version)[:2]] < [int(n) for n in oldest.split(".")[:2]]:
    sys.exit(f"error: PyTorch {version} in {sys.prefix} is too old; SegHeads needs {oldest} or newer and does not replace "
             f"what is there. Update it (pip install --upgrade torch), or use another environment")
PY
)
if [ -z "$torch_version" ]; then
    echo "Installing $TORCH. On Linux for PCs that may be the CUDA build, several GB; for the CPU build, stop this and run first:"
    echo "  $VIRTUAL_ENV/bin/pip install torch --index-url https://download.pytorch.org/whl/cpu"
    python -m pip install --quiet --disable-pip-version-check "$TORCH"
fi
python -m pip install --quiet --disable-pip-version-check -r "$1"
