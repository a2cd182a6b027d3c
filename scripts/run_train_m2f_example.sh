#!/usr/bin/env bash
# A Mask2Former head on a frozen backbone, from nothing to coloured pictures, on made-up street scenes: minutes on two cores.
#   bash scripts/run_train_m2f_example.sh                                            # untrained backbone: tries the machinery
#   bash scripts/run_train_m2f_example.sh --backbone-weights dinov3_vits16_pretrain_lvd1689m-08c60483.pth --device cuda
# Further flags go to train_m2f_head.py.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
data=datasets/demo_images out=exp/m2f_example
[ -f $data/classes.json ] || python -m data.synthetic image $data --num-train 40 --num-val 8 --num-test 8 --size 160 120 --seed 0

python train_m2f_head.py --output-dir $out --backbone dinov3_vits16 --backbone-weights random \
    --image-paths "$data/images/train/*.jpg" --mask-paths "$data/masks/train/*.png" \
    --val-image-paths "$data/images/val/*.jpg" --val-mask-paths "$data/masks/val/*.png" \
    --classes $data/classes.json --num-classes 7 --hidden-dim 64 --ffn-dim 256 --num-queries 20 --num-points 2048 \
    --image-size 128 --augment windows --cache-features --batch-size 4 --epochs 10 --lr 1e-3 --clip-grad 0.1 \
    --val-interval 5 --log-interval 5 --num-workers 2 --validate "$@"
python evaluate.py $out/model/model_best.pth --data-dir $data/images/test --label-dir $data/masks/test
python predict.py $out/model/model_best.pth $data/images/test --output $out/predictions
echo "Look at $out/evaluation/report.html and $out/predictions/*_overlay.png"
