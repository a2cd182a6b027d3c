#!/usr/bin/env bash
# Train configs/FOLDER/CONFIG.yaml into exp/FOLDER/NAME, on one process, all GPUs of a machine or several machines.
#   bash scripts/train.sh -g 4 -d sonata -c semseg-sonata-v1m1-0a-scannet-lin -n my-run -w sonata.pth
#   bash scripts/train.sh -n my-run -r true                               # go on where it stopped
#   bash scripts/train.sh -c CONFIG -n my-run -w sonata.pth -- training.batch_size=8 --num-workers 8
#   MASTER_ADDR=10.0.0.1 bash scripts/train.sh -m 2 --node 0 -c CONFIG ...        # and --node 1 on the second machine
# -d FOLDER   under configs/ and exp/, default sonata        -p PYTHON    instead of the environment of scripts/setup.sh
# -c CONFIG   name without .yaml                             -m MACHINES  default 1
# -n NAME     of the run, default debug                      -g GPUS      of this machine, 0: CPU, default all
# -w WEIGHTS  of the encoder, e.g. sonata.pth                --node RANK  of this machine of several, default $SLURM_NODEID
# -r true     go on with the run NAME and its own config; a run that is not there is an error
# What follows -- (or begins with a key=value) goes to the training script. Paths count from the repository. Without -r a run of
# the same name starts afresh; its checkpoints are moved to model/previous_1. Without a visible GPU: one process on the CPU.
# Several machines: MASTER_ADDR is the first one's address (under SLURM it is looked up), MASTER_PORT a free port of it.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"          # sh scripts/train.sh
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
    echo "error: $* (see bash scripts/train.sh -h)" >&2
    exit 2
}
folder=sonata config="" name=debug weights="" resume=false python="" machines=1 gpus="" node=""
while getopts ":d:c:n:w:r:p:m:g:h-:" option; do
    case $option in
        d) folder=$OPTARG ;;
        c) config=$OPTARG ;;
        n) name=$OPTARG ;;
        w) weights=$OPTARG ;;
        r) resume=$OPTARG ;;
        p) python=$OPTARG ;;
        m) machines=$OPTARG ;;
        g) gpus=$OPTARG ;;
        h) sed -n '2,/^[^#]/s/^# \{0,1\}//p' scripts/train.sh; exit ;;
        -)  case $OPTARG in
                node) node=${!OPTIND:-}; OPTIND=$((OPTIND + 1)) ;;
                node=*) node=${OPTARG#node=} ;;
                *) fail "unknown option --$OPTARG; flags of the training script go behind --" ;;
            esac ;;
        :) fail "-$OPTARG needs a value" ;;
        *) fail "unknown option -$OPTARG" ;;
    esac
done
before=${*:OPTIND-1:1}
shift $((OPTIND - 1))
[[ $# -eq 0 || $before == -- || $1 == [a-z]*=* ]] ||
    fail "unexpected argument '$1'; flags of the training script go behind --"

# what would only show after minutes, or not at all
[ "$machines" = 1 ] || node=${node:-${SLURM_NODEID:-}}
for number in "-m $machines" "-g ${gpus:-0}" "--node ${node:-0}"; do
    [[ ${number#* } =~ ^(0|[1-9][0-9]{0,3})$ ]] || fail "${number%% *} '${number#* }': expected a number"
done
[ "$machines" -ge 1 ] || fail "-m $machines: expected 1 or more machines"
[[ $machines -eq 1 || -n $node ]] || fail "-m $machines: say which one this is, --node 0 to $((machines - 1))"
[ "${node:-0}" -lt "$machines" ] || fail "--node $node: with -m $machines the machines are 0 to $((machines - 1))"
[[ $resume == true || $resume == false ]] || fail "-r '$resume': expected true or false"
[[ -n $name && -n $folder ]] || fail "-n and -d must not be empty"
[ "$weights" != None ] || weights=""
[ -z "$weights" ] || [ -f "$weights" ] || fail "-w $weights: no such file; sonata.pth is at https://huggingface.co/facebook/sonata"
run=exp/$folder/$name path=configs/$folder/$config.yaml
if [ -n "$config" ] || [ "$resume" = false ]; then
    there=$(ls "configs/$folder" 2>/dev/null | sed -n 's/\.yaml$//p' | paste -sd " ") || true
    [ -f "$path" ] || fail "-c '$config': no $path; in configs/$folder there are: ${there:-none}"
fi
if [ "$resume" = true ]; then
    path=$run/config/config.yaml                            # as changed by the arguments of the first start
    [ -f "$path" ] && compgen -G "$run/model/*.pth" >/dev/null || fail "-r true: $run holds no run to go on with"
fi
case $folder/$config/$name in
    sonata/* | */*sonata*) script=train_sonata.py ;;
    *) fail "-d $folder -c '$config': no training script is known for it; train_sonata.py takes configs/sonata and *sonata*.yaml" ;;
esac

if [ -n "$python" ]; then
    command -v "$python" >/dev/null || fail "-p $python: no such program"
else
    source scripts/setup.sh requirements.txt
    python=python
fi
visible=0
[ "$gpus" = 0 ] || visible=$("$python" -c 'import torch; print(torch.cuda.device_count())')
if [ "$visible" -eq 0 ]; then
    echo "no GPU: one process on the CPU"
    set -- --device cpu "$@"
fi
gpus=${gpus:-$visible}
[ "$visible" -eq 0 ] || [ "$gpus" -le "$visible" ] || fail "-g $gpus: there are $visible visible GPUs"
processes=$((visible ? gpus : 1))

set -- "$script" "$path" --output-dir "$run" ${weights:+--pretrained_path "$weights"} "$@"
[ "$resume" = false ] || set -- "$@" --resume auto
if [ "$machines" -gt 1 ]; then
    if [ -z "${MASTER_ADDR:-}" ]; then
        [ -n "${SLURM_JOB_NODELIST:-}" ] || fail "-m $machines: set MASTER_ADDR to the address of machine 0"
        MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    fi
    port=${MASTER_PORT:-$((20000 + $(echo "$run" | cksum | cut -d " " -f 1) % 10000))}      # the same on all machines
    set -- -m torch.distributed.run --nnodes "$machines" --node_rank "$node" --nproc_per_node "$processes" \
        --master_addr "$MASTER_ADDR" --master_port "$port" "$@"
elif [ "$processes" -gt 1 ]; then
    set -- -m torch.distributed.run --standalone --nproc_per_node "$processes" "$@"
fi
exec "$python" "$@"
