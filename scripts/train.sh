#!/usr/bin/env bash
# The runs behind the tables of docs/, ready made. Data: datasets/humanbody_1500/{train,test} with NAME.obj + NAME.txt.
#   bash scripts/train.sh humanbody            # all rows, one after another; hours on two cores
#   bash scripts/train.sh humanbody_hks        # one row: humanbody_{linear,nohks,hks,random,jepa}
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt

humanbody_linear() {    # raw features without and with signatures, multinomial logistic regression
    python benchmarks/linear_baseline.py configs/mesh_humanbody_nohks.yaml --split test
    python benchmarks/linear_baseline.py configs/mesh_humanbody.yaml --split test
}
score() {               # eight views of every test mesh
    python evaluate.py "exp/$1/model/model_best.pth" evaluation.views=8
}
humanbody_nohks() {
    python train_downstream.py configs/mesh_humanbody_nohks.yaml --output-dir exp/humanbody_nohks
    score humanbody_nohks
}
humanbody_hks() {
    python train_downstream.py configs/mesh_humanbody.yaml --output-dir exp/humanbody_hks
    score humanbody_hks
}
humanbody_random() {    # a head on the encoder as it was initialised
    python train_downstream.py configs/mesh_humanbody_frozen.yaml training.use_pretrained=false --output-dir exp/humanbody_random
    score humanbody_random
}
humanbody_jepa() {      # pre-training, then a head on the frozen encoder; 12 epochs show the chain, configs/jepa_humanbody.yaml has more
    python train_jepa.py configs/jepa_humanbody.yaml --output-dir exp/humanbody_jepa \
        training.epochs=12 scheduler.warmup_epochs=2 probe.interval=6
    python train_downstream.py configs/mesh_humanbody_frozen.yaml --pretrained_path exp/humanbody_jepa/model/model_last.pth \
        --output-dir exp/humanbody_frozen
    score humanbody_frozen
    python predict.py exp/humanbody_frozen/model/model_best.pth datasets/humanbody_1500/test --output exp/humanbody_predictions
}
humanbody() {
    humanbody_linear; humanbody_nohks; humanbody_hks; humanbody_random; humanbody_jepa
}

case "${1:-}" in
    humanbody | humanbody_linear | humanbody_nohks | humanbody_hks | humanbody_random | humanbody_jepa) "$1" ;;
    *) echo "error: name a run: humanbody or humanbody_{linear,nohks,hks,random,jepa}, got '${1:-}'" >&2; exit 2 ;;
esac
