#!/usr/bin/env bash
# Set up what is missing, then kill every training script, run it beside others, on several processes, on malformed input, for long and on
# devices that are not here (tests/fake_device.py, needs g++); at the end a table: kills survived, inputs refused, equalities held ... of those
# tried. The 175 runs killed need 8 minutes of one core, the devices 6. Arguments go to pytest:
#   bash scripts/faults.sh                  # all of it
#   bash scripts/faults.sh -k sonata
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements-dev.txt
SEGHEADS_FAULTS_REPORT=$(mktemp)
export SEGHEADS_FAULTS_REPORT
trap 'rm -f "$SEGHEADS_FAULTS_REPORT"' EXIT
status=0
python -m pytest -q -m "slow or not slow" tests/test_{kills,beside,distributed_runs,bad_inputs,fuzz,long_runs,fake_device}.py "$@" || status=$?
echo "== summary"
sort "$SEGHEADS_FAULTS_REPORT"
exit "$status"
