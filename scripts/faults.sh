#!/usr/bin/env bash
# Set up what is missing, then kill every training script, run it beside others, split it over processes, feed it with rubbish, let it run
# long, and on devices that are not here; at the end a table: kills survived, inputs refused, equalities held ... of those tried. The 175 runs
# killed need 8 minutes of one core. Arguments go to pytest:
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
