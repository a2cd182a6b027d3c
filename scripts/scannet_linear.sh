#!/usr/bin/env bash
# ScanNet, 20 classes: a linear head on the frozen Sonata, on one GPU.
#   SONATA_WEIGHTS=sonata.pth bash scripts/scannet_linear.sh                # further options and arguments as for scripts/train.sh:
#   SONATA_WEIGHTS=sonata.pth bash scripts/scannet_linear.sh -g 4 -- training.batch_size=12
exec bash "$(dirname "$0")/train.sh" -m 1 -g 1 -d sonata -c semseg-sonata-v1m1-0a-scannet-lin -n semseg-sonata-v1m1-0-base-0a-scannet-lin \
    -w "${SONATA_WEIGHTS:-exp/sonata/pretrain-sonata-v1m1-0-base/model/model_last.pth}" "$@"
