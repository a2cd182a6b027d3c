#!/usr/bin/env bash
# Set up what is missing, then check the style and run the tests (about 10 minutes on two cores). Arguments go to pytest:
#   bash scripts/test.sh                    # the default tests
#   bash scripts/test.sh -m slow            # the slow ones
#   bash scripts/test.sh tests/test_ema.py
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements-dev.txt
ruff check .
exec python -m pytest -q "$@"
