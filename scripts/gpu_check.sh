#!/usr/bin/env bash
# Set up what is missing, then check and time everything on this machine's GPU, in under 8 minutes; the table goes into docs/gpu.md.
#   bash scripts/gpu_check.sh                        # on the GPU
#   bash scripts/gpu_check.sh --tiny --device cpu    # small networks, to try it without one
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements-dev.txt
exec python -m benchmarks.gpu_check "$@"
