#!/usr/bin/env bash
# Prototype segmentation, from nothing to explained pictures, on made-up street scenes: warm-up, joint training, push, fine-tuning, pruning.
#   bash scripts/example_prototype.sh                          # further arguments go to train_prototype.py
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
data=datasets/demo_images out=exp/prototype_example
[ -f $data/classes.json ] || python -m data.synthetic image $data --num-train 40 --num-val 8 --num-test 8 --size 160 120 --seed 0

python train_prototype.py configs/prototype_demo.yaml --output-dir $out --num-workers 1 "$@"
python evaluate.py $out/model/model_best.pth
python predict.py $out/model/model_best.pth $data/images/test --output $out/predictions --explain 80,90
echo "Look at $out/prototypes/index.html, $out/predictions/*_explain.html, *_prototypes.png and $out/evaluation/report.html"
