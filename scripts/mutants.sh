#!/usr/bin/env bash
# Plant N random mistakes in a copy of models/, data/ and utils/ and count how many the tests notice: scripts/mutants.py.
#   bash scripts/mutants.sh 50
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements-dev.txt
exec python scripts/mutants.py "$@"
