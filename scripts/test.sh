#!/usr/bin/env bash
# Set up what is missing, then check the style and run the tests (about 6 minutes on two cores). Arguments go to pytest:
#   bash scripts/test.sh                    # the default tests, in two processes of one thread each
#   bash scripts/test.sh -n 8               # in eight
#   bash scripts/test.sh -m slow -n 0       # the slow ones, one after the other
#   bash scripts/test.sh tests/test_ema.py
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements-dev.txt
ruff check .
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m pytest -q -n 2 --dist loadfile "$@"
