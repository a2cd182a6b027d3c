#!/usr/bin/env bash
# The runs behind the tables of docs/, ready made. Data: datasets/humanbody_1500/{train,test} with NAME.obj + NAME.txt;
# datasets/camvid/{images,masks}/{train,val,test} with NAME.jpg + NAME.png and classes.json.
#   bash scripts/results.sh humanbody            # all rows, one after another; hours on two cores
#   bash scripts/results.sh humanbody_hks        # one row: humanbody_{linear,nohks,hks,random,official,diffusion,finetuned}
#                                                # official and finetuned want WEIGHTS, the folder of human_seg_*_4x128.pth
#   bash scripts/results.sh pretraining          # train_jepa.py, and what its encoder is worth; pretraining_lod3 after it
#   bash scripts/results.sh lod3_folds           # buildings of datasets/lod3_ingolstadt_textured on six folds: forests, then the network;
#                                                # lod3_planes: the same network on the three parts of its config
#   bash scripts/results.sh camvid               # camvid_{linear,upernet,m2f,pmt}: heads on an untrained frozen ViT-S; camvid_eomt: all of it trained;
#                                                # camvid_unet; camvid_prototype and camvid_deeplab, the ordinary classifier beside it
#   bash scripts/results.sh tabletop_trees       # datasets/tabletop: boosted trees on the test clouds; tabletop_local: a small network;
#                                                # tabletop_folds: both on folds that hold objects out
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
# DiffusionNet trained on all 381 meshes: val_mesh_dir is train itself, and the last step counts.
WEIGHTS=${WEIGHTS:-weights/diffusionnet}
diffusion() {           # run folder, further flags: three seeds, one thread each
    out=$1; shift
    for seed in 0 1 2; do
        OMP_NUM_THREADS=1 python train_downstream.py configs/mesh_humanbody_diffusion.yaml --output-dir "exp/${out}_$seed" --seed $seed \
            --device cpu --num-workers 0 paths.val_mesh_dir=datasets/humanbody_1500/train evaluation.interval=100 "$@"
    done
}
average() {             # rows: run folders joined by "+", "exp/" and the file left out
    OMP_NUM_THREADS=1 python scripts/average_mesh_scores.py --device cpu $(printf '%s\n' "$@" | sed -E 's#[^+]+#exp/&/model/model_last.pth#g')
}
humanbody_official() {  # without training: signatures, coordinates, both
    for features in hks xyz; do
        python train_downstream.py configs/mesh_humanbody_official.yaml --output-dir exp/humanbody_official_$features "model.features=[$features]" \
            --pretrained_path "$WEIGHTS/human_seg_${features}_4x128.pth" --device cpu --num-workers 0
        average humanbody_official_$features
    done
    average humanbody_official_hks+humanbody_official_xyz
}
humanbody_diffusion() { # from scratch
    diffusion humanbody_diffusion
    average humanbody_diffusion_{0,1,2}
}
humanbody_finetuned() { # the official file fine-tuned, and averaged with humanbody_diffusion's networks; after that and humanbody_official
    diffusion humanbody_tuned --pretrained_path "$WEIGHTS/human_seg_hks_4x128.pth" "model.features=[hks]" model.hks_scale=1 \
        training.pretrained_head=true training.num_unfrozen_encoder_layers=all training.epochs=1 optimizer.learning_rate=1e-4
    average humanbody_tuned_{0,1,2}
    average humanbody_diffusion_0+humanbody_tuned_0 humanbody_diffusion_1+humanbody_tuned_1 humanbody_diffusion_2+humanbody_tuned_2
    average $(for seed in 0 1 2; do echo "humanbody_diffusion_$seed+humanbody_tuned_$seed+humanbody_official_xyz"; done)
}
NO_HKS='model.features=[corners,normal,area,angles,curvature,dihedral] augmentation.hks_noise=0'
pretrain() {            # run folder, overrides: half an hour on a core
    out=$1; shift
    OMP_NUM_THREADS=1 python train_jepa.py configs/jepa_humanbody.yaml --device cpu --num-workers 0 --output-dir "$out" "$@"
}
pretraining() {         # with signatures and without: pre-training, then frozen and trained networks on 16, 64 and all meshes
    strong='augmentation.scale_range=[0.7,1.3] augmentation.deformation=0.05 augmentation.noise_std=0.05'
    pretrain exp/jepa_hks
    pretrain exp/jepa_nohks $NO_HKS
    OMP_NUM_THREADS=1 python benchmarks/bench_pretraining.py configs/mesh_humanbody_frozen.yaml $strong augmentation.hks_noise=0.4 \
        --pretrained_path exp/jepa_hks/model/model_last.pth --device cpu
    OMP_NUM_THREADS=1 python benchmarks/bench_pretraining.py configs/mesh_humanbody_frozen.yaml $strong $NO_HKS \
        --pretrained_path exp/jepa_nohks/model/model_last.pth --device cpu
}
pretraining_lod3() {    # the encoder of human bodies on buildings, unchanged
    OMP_NUM_THREADS=1 python benchmarks/bench_pretraining.py configs/mesh_lod3.yaml $NO_HKS model.use_texture=false model.unit=null \
        model.embedding_dim=64 model.num_attention_blocks=5 model.faces_per_cluster=24 training.clusters_per_batch=null \
        --pretrained_path exp/jepa_nohks/model/model_last.pth --rows "frozen random" "frozen pre-trained" --labelled all --steps 150 --device cpu
}
lod3_folds() {          # a forest without and with plane, part and height, then the network; one thread, three seeds
    export OMP_NUM_THREADS=1
    for seed in 0 1 2; do
        python scripts/lod3_folds.py configs/mesh_lod3.yaml --forest --seed $seed model.use_texture=false
        python scripts/lod3_folds.py configs/mesh_lod3_planes.yaml --forest --seed $seed
        python scripts/lod3_folds.py configs/mesh_lod3_planes.yaml --output-dir exp/lod3_folds_$seed --seed $seed --device cpu
    done
}
lod3_planes() {         # 24 files train, 6 validate, 8 test; three seeds
    export OMP_NUM_THREADS=1
    for seed in 0 1 2; do
        python train_downstream.py configs/mesh_lod3_planes.yaml --output-dir exp/lod3_planes_$seed --device cpu --num-workers 0 --seed $seed
        python evaluate.py exp/lod3_planes_$seed/model/model_best.pth --split test --device cpu
    done
}
humanbody() {
    humanbody_linear; humanbody_nohks; humanbody_hks; humanbody_random; humanbody_official; humanbody_diffusion; humanbody_finetuned
}

# On a CPU: half the time where the processor computes in bfloat16; elsewhere several times as long.
BFLOAT16=$(grep -qsE '\b(avx512_bf16|amx_bf16|bf16)\b' /proc/cpuinfo && echo --amp-dtype bfloat16) || true
camvid_head() {         # script, run folder, further flags: one thread each, so that two runs fit on two cores
    script=$1 out=$2; shift 2
    OMP_NUM_THREADS=1 python "$script" --output-dir "$out" --device cpu --num-workers 1 --validate \
        --image-paths datasets/camvid/images/train --mask-paths datasets/camvid/masks/train \
        --val-image-paths datasets/camvid/images/val --val-mask-paths datasets/camvid/masks/val \
        --test-image-paths datasets/camvid/images/test --test-mask-paths datasets/camvid/masks/test \
        --classes datasets/camvid/classes.json --num-classes 11 --backbone dinov3_vits16 --backbone-weights random "$@"
    python evaluate.py "$out/model/model_best.pth" --device cpu --amp-dtype float32
}
camvid_upernet() {
    camvid_head train_upernet_head.py exp/camvid_upernet --hidden-dim 128 --image-size 192 --batch-size 4 --epochs 20 \
        --val-interval 5 --lr 1e-3 $BFLOAT16
}
camvid_m2f() {
    camvid_head train_m2f_head.py exp/camvid_m2f --hidden-dim 128 --ffn-dim 512 --num-queries 50 --num-points 4096 \
        --image-size 192 --batch-size 2 --epochs 12 --val-interval 4 --lr 5e-4 --clip-grad 0.1
}
camvid_eomt() {         # everything trained from scratch: the backbone is random, so no layer has a lower rate
    camvid_head train_eomt.py exp/camvid_eomt --num-queries 50 --num-points 4096 --image-size 192 --batch-size 4 --epochs 22 \
        --val-interval 5 --lr 5e-4 --layer-decay 1 --clip-grad 0.1 --amp-dtype bfloat16
}
camvid_linear() {       # on cached features
    camvid_head train_linear_head.py exp/camvid_linear --image-size 192 --batch-size 8 --epochs 40 --val-interval 10 \
        --augment windows --cache-features
}
camvid_pmt() {          # three seeds, also of the random backbone
    for seed in 0 1 2; do
        camvid_head train_pmt_head.py exp/camvid_pmt_$seed --seed $seed --num-queries 50 --num-points 4096 \
            --image-size 192 --batch-size 2 --epochs 12 --val-interval 4 --lr 5e-4 --clip-grad 0.1
    done
}
camvid_unet() {         # from scratch, one thread
    OMP_NUM_THREADS=1 python train_segmentation.py configs/segmentation_camvid.yaml --device cpu --output-dir exp/camvid_unet
    python evaluate.py exp/camvid_unet/model/model_best.pth --device cpu
}
camvid_prototype() {    # all three phases, push and pruning, from scratch
    OMP_NUM_THREADS=1 python train_prototype.py configs/prototype_camvid.yaml --device cpu $BFLOAT16 --num-workers 0 \
        --output-dir exp/camvid_prototype
    for stage in joint push finetune prune refinetune; do
        python evaluate.py "exp/camvid_prototype/model/$stage.pth" --device cpu --amp-dtype float32 --output-dir "exp/camvid_prototype/evaluation_$stage"
    done
}
camvid_deeplab() {
    OMP_NUM_THREADS=1 python train_segmentation.py configs/segmentation_camvid_deeplab.yaml --device cpu --output-dir exp/camvid_deeplab
    python evaluate.py exp/camvid_deeplab/model/model_last.pth --device cpu --amp-dtype float32
}
camvid() {
    camvid_linear; camvid_upernet; camvid_m2f; camvid_pmt; camvid_eomt; camvid_unet; camvid_prototype; camvid_deeplab
}

TABLETOP=configs/sonata/tabletop-ft.yaml
SHAPE=('data.features=[normal,height,shape]' 'data.shape_sizes=[0.015,0.03,0.06]')       # after unit: 0.5, 1 and 2 cm
# Trial K of docs/lab/tabletop.md: one stage, which sees a few centimetres.
LOCAL=(training.epochs=48 training.eval_epochs=4 training.batch_size=2 'augmentation.elastic=[]' augmentation.elastic_probability=0.0
    augmentation.stretch=0.3 'model.encoder={in_channels: 16, order: [z, z-trans, hilbert, hilbert-trans], enc_depths: [2],
    enc_channels: [48], enc_num_head: [3], enc_patch_size: [16], dec_depths: [], dec_channels: [], dec_num_head: [],
    dec_patch_size: [], drop_path: 0.1}')
tabletop_trees() {      # the test clouds
    OMP_NUM_THREADS=1 python benchmarks/point_trees.py "$TABLETOP" --split test "${SHAPE[@]}"
}
tabletop_local() {      # three seeds
    for seed in 0 1 2; do
        OMP_NUM_THREADS=1 python train_sonata.py "$TABLETOP" --device cpu --num-workers 0 --seed $seed --output-dir exp/tabletop_local_$seed \
            "${SHAPE[@]}" "${LOCAL[@]}"
        OMP_NUM_THREADS=1 python evaluate.py exp/tabletop_local_$seed/model/model_last.pth --device cpu
    done
}
tabletop_folds() {      # folds that hold objects out: trees on 5, 10, 20, 30 and all clouds, then the network
    python scripts/tabletop_folds.py datasets/tabletop datasets/tabletop_folds
    for fold in 0 1 2; do
        root="data.root=datasets/tabletop_folds/fold$fold"
        for clouds in 5 10 20 30 37; do
            OMP_NUM_THREADS=1 python benchmarks/point_trees.py "$TABLETOP" --points 30000 --clouds "$clouds" "$root" "${SHAPE[@]}"
        done
        OMP_NUM_THREADS=1 python train_sonata.py "$TABLETOP" --device cpu --num-workers 0 --output-dir "exp/tabletop_fold$fold" \
            "$root" data.test=null "${SHAPE[@]}" "${LOCAL[@]}"
    done
}

case "${1:-}" in
    camvid | camvid_linear | camvid_pmt | camvid_upernet | camvid_m2f | camvid_eomt | camvid_unet | camvid_prototype | camvid_deeplab | humanbody | humanbody_linear | humanbody_nohks | humanbody_hks | humanbody_random | humanbody_official | humanbody_diffusion | humanbody_finetuned | pretraining | pretraining_lod3 | lod3_folds | lod3_planes | tabletop_trees | tabletop_local | tabletop_folds) "$1" ;;
    *) echo "error: name a run: camvid, camvid_{linear,pmt,upernet,m2f,eomt,unet,prototype,deeplab}, pretraining, pretraining_lod3, lod3_folds, lod3_planes, tabletop_{trees,local,folds}, humanbody or humanbody_{linear,nohks,hks,random,official,diffusion,finetuned}, got '${1:-}'" >&2; exit 2 ;;
esac
