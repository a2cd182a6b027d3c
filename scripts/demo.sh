#!/usr/bin/env bash
# The whole chain on made-up figures, from nothing to a report: about 5 minutes on two cores after installation.
#   bash scripts/demo.sh [DIR]              # results in DIR, default exp/demo
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
out=${1:-exp/demo}
started=$SECONDS

echo "== 1/6 made-up data: labelled figures in datasets/demo"
python -m data.synthetic mesh datasets/demo --num-train 60 --num-val 8 --num-test 10 --seed 0

echo "== 2/6 I-JEPA pre-training without labels"
python train_jepa.py configs/jepa_demo.yaml --output-dir "$out/jepa" --device cpu

echo "== 3/6 a head on the frozen pre-trained encoder"
python train_downstream.py configs/mesh_demo.yaml --pretrained_path "$out/jepa/model/model_last.pth" \
    --output-dir "$out/frozen" --device cpu training.epochs=12

echo "== 4/6 the same network trained whole"
python train_downstream.py configs/mesh_demo.yaml --output-dir "$out/scratch" --device cpu

echo "== 5/6 scores on the test figures"
python evaluate.py "$out/frozen/model/model_best.pth" --device cpu | grep -E "^(mean|overall)"
python evaluate.py "$out/scratch/model/model_best.pth" --device cpu

echo "== 6/6 labels and coloured meshes for new files"
python predict.py "$out/scratch/model/model_best.pth" datasets/demo/test --output "$out/predictions" --html --device cpu

echo
echo "Done in $((SECONDS - started)) s. Look at"
echo "  $out/scratch/evaluation/report.html   scores, curves, pictures"
echo "  $out/predictions/*.html               predicted parts, to turn with the mouse"
