#!/usr/bin/env bash
# What a pre-trained encoder is for, on made-up figures, from nothing to a report: less than three minutes on two cores after installation.
#   bash scripts/demo.sh [DIR]              # results in DIR, default exp/demo
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
out=${1:-exp/demo} data=datasets/demo
started=$SECONDS
brief() { grep --line-buffered -Ev "^Epoch [0-9]*([1-9]|[13579]0):"; }             # the log's line of every 20th epoch
export PYTHONUNBUFFERED=1
score() { awk '/^mean /{ miou = $2 } /^overall accuracy/{ printf "accuracy %5.1f %%, mIoU %4.1f %%", $3, miou }' "$out/$1/scores.txt"; }

echo "== 1/5 60 made-up figures without labels, 8 of them with; 8 for validation and 10 for the test"
python -m data.synthetic mesh $data --num-train 60 --num-val 8 --num-test 10 --faces 300 500 --seed 0
mkdir -p $data/labelled
mv $data/train/*_00[0-7].txt $data/labelled
cp $data/train/*_00[0-7].obj $data/labelled
rm $data/train/*.txt

echo "== 2/5 an encoder is pre-trained on the 60, without labels"
python train_jepa.py configs/jepa_demo.yaml --output-dir "$out/jepa" --device cpu --num-workers 1 --threads 1 | brief

echo "== 3/5 it is fine-tuned with a head on the 8; beside it, into $out/scratch, the same network from scratch, as many steps"
few=(configs/mesh_demo.yaml --device cpu --num-workers 0 --threads 1)
python train_downstream.py "${few[@]}" --output-dir "$out/scratch" > /dev/null &
python train_downstream.py "${few[@]}" --output-dir "$out/finetuned" --pretrained_path "$out/jepa/model/model_last.pth" \
    training.num_unfrozen_encoder_layers=all | brief
wait $!

echo "== 4/5 scores on the test figures, and a report"
for run in scratch finetuned; do
    python evaluate.py "$out/$run/model/model_best.pth" --device cpu > "$out/$run/scores.txt"
done
cat "$out/finetuned/scores.txt"

echo "== 5/5 labels and coloured meshes for new files"
python predict.py "$out/finetuned/model/model_best.pth" $data/test --output "$out/predictions" --html --device cpu

cat <<END

Done in $((SECONDS - started)) s. With 8 labelled figures, on the 10 test figures:
  pre-trained without labels, fine-tuned    $(score finetuned)
  from scratch, as many steps               $(score scratch)
Pre-training pays where labels are few and the inputs do not say it all: with heat kernel signatures among the features, or many
steps on many labelled figures, training from scratch is as good (docs/jepa.md).

Look at
  $(realpath "$out")/finetuned/evaluation/report.html   scores, curves, pictures
  $(realpath "$out")/predictions/*.html                 predicted parts, to turn with the mouse
END
