#!/usr/bin/env bash
# ScanNet, 20 classes: Sonata and a decoder trained whole, on one GPU.
#   SONATA_WEIGHTS=sonata.pth bash scripts/scannet_finetune.sh                # further options and arguments as for scripts/train.sh:
#   SONATA_WEIGHTS=sonata.pth bash scripts/scannet_finetune.sh -g 4 -- training.batch_size=12
exec bash "$(dirname "$0")/train.sh" -m 1 -g 1 -d sonata -c semseg-sonata-v1m1-0c-scannet-ft -n semseg-sonata-v1m1-0-base-0c-scannet-ft \
    -w "${SONATA_WEIGHTS:-exp/sonata/pretrain-sonata-v1m1-0-base/model/model_last.pth}" "$@"
