#!/usr/bin/env bash
# S3DIS, 13 classes: a linear head on the frozen Sonata, on one GPU; Area 5 is held out, or the one AREA names.
#   SONATA_WEIGHTS=sonata.pth bash scripts/s3dis_linear.sh              # further options and arguments as for scripts/train.sh:
#   SONATA_WEIGHTS=sonata.pth AREA=2 bash scripts/s3dis_linear.sh -g 4 -- training.batch_size=12
# The 6-fold score: AREA=1 to 6, evaluate.py of each, then scripts/s3dis_6fold.py.
name=semseg-sonata-v1m1-0-base-3a-s3dis-lin
if [ -n "${AREA:-}" ]; then
    case $AREA in [1-6]) ;; *) echo "error: AREA='$AREA': expected 1 to 6" >&2; exit 2 ;; esac
    others=$(printf 'Area_%s\n' 1 2 3 4 5 6 | grep -v "$AREA" | paste -sd ,)
    name=$name-area$AREA
    set -- "$@" "data.train=[$others]" "data.val=Area_$AREA" "data.test=Area_$AREA"
fi
exec bash "$(dirname "$0")/train.sh" -m 1 -g 1 -d sonata -c semseg-sonata-v1m1-3a-s3dis-lin -n "$name" \
    -w "${SONATA_WEIGHTS:-exp/sonata/pretrain-sonata-v1m1-0-base/model/model_last.pth}" "$@"
