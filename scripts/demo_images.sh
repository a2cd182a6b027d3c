#!/usr/bin/env bash
# Image segmentation from one YAML file, from nothing to coloured pictures, on made-up street scenes: about two minutes on two cores.
#   bash scripts/demo_images.sh [DIR]       # results in DIR, default exp/segmentation_demo
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
out=${1:-exp/segmentation_demo} data=datasets/demo_images
started=$SECONDS

echo "== 1/4 made-up street scenes with masks in $data"
[ -f $data/classes.json ] || python -m data.synthetic image $data --num-train 40 --num-val 8 --num-test 8 --size 160 120 --seed 0

echo "== 2/4 a U-Net from scratch"
python train_segmentation.py configs/segmentation_demo.yaml --output-dir "$out" --device cpu

echo "== 3/4 scores on the test scenes, before and after a mode filter"
python evaluate.py "$out/model/model_best.pth" postprocess.mode=3 --device cpu

echo "== 4/4 labels and overlays of new photographs"
python predict.py "$out/model/model_best.pth" $data/images/test --output "$out/predictions" --device cpu

echo
echo "Done in $((SECONDS - started)) s. Look at"
echo "  $out/evaluation/report.html           scores, curves, pictures"
echo "  $out/predictions/*_overlay.png        predicted classes over the photographs"
