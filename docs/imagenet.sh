#!/usr/bin/env bash
# The paper's search and finetuning of MobileNetV2-1.4 on ImageNet, a command each; run it again to go on.
#
#   DATA=/data/imagenet OUT=runs/imagenet bash docs/imagenet.sh                     # one GPU
#   LAUNCH="torchrun --nproc-per-node 8 --no-python" ... bash docs/imagenet.sh     # eight; docs/imagenet.slurm: several nodes
#
# DATA   a folder with train/ and val/, one folder a class in each       OUT    a folder for everything that is made
# MODEL  default mobilenetv2_140 (timm)                                  WEIGHTS  default, or a file
# K      sites to keep, default 8                                        SEARCH, FINETUNE, ALL  more options
# ESTIMATE=" "  only tell what it would take, GPU-hours among it (or more options for that)
# OPTION of the model, name=value                                        SIZE, PRECISION  default 224, bfloat16
set -euo pipefail
: "${DATA:?set DATA to the folder that holds train/ and val/}" "${OUT:?set OUT to a folder for the results}"
MODEL=${MODEL:-mobilenetv2_140} WEIGHTS=${WEIGHTS:-default} K=${K:-8}
network=(--model "$MODEL" ${OPTION:+--model-option "$OPTION"} --weights "$WEIGHTS")
# 180 epochs, batch 256 over all GPUs, SGD and cosine are the defaults; these two are the paper's augmentation
paper=(--rand-augment 5 --erase 0.25 --precision "${PRECISION:-bfloat16}")
if [ -n "${ESTIMATE:-}" ]; then # the hours of both, from some real steps; writes nothing
    # shellcheck disable=SC2086
    ${LAUNCH:-} dslib run "${network[@]}" --data "$DATA" --image-size "${SIZE:-224}" --k "$K" --boundary ReLU6 --dry-run \
        --search-epochs 180 --search-lr 0.1 --search-batch-size 256 --search-rand-augment 5 --search-erase 0.25 \
        --search-precision "${PRECISION:-bfloat16}" --finetune-epochs 180 --finetune-lr 0.1 --finetune-batch-size 256 \
        --finetune-rand-augment 5 --finetune-erase 0.25 --finetune-precision "${PRECISION:-bfloat16}" $ESTIMATE
    exit
fi
mkdir -p "$OUT"

[ -e "$OUT/cost.json" ] || dslib profile "${network[@]::${#network[@]}-2}" --image-size "${SIZE:-224}" --boundary ReLU6 --out "$OUT/cost.json"
# shellcheck disable=SC2086  # options are words
[ -e "$OUT/search.json" ] || ${LAUNCH:-} dslib search "${network[@]}" --data "$DATA" --image-size "${SIZE:-224}" --k "$K" \
    --latency-weight 0.03 --cost "$OUT/cost.json" "${paper[@]}" --curves "$OUT" --out "$OUT/search.json" ${SEARCH:-} ${ALL:-}
[ -e "$OUT/shrunk.json" ] || dslib shrink "${network[@]}" --data "$DATA" --image-size "${SIZE:-224}" \
    --search "$OUT/search.json" --k "$K" --boundary ReLU6 --out "$OUT/shrunk.json"
# shellcheck disable=SC2086
[ -e "$OUT/finetuned.json" ] || ${LAUNCH:-} dslib finetune "$OUT/shrunk.json" --trust "$MODEL" --data "$DATA" --teacher-weights "$WEIGHTS" \
    "${paper[@]}" --curves "$OUT" --out "$OUT/finetuned.json" ${FINETUNE:-} ${ALL:-}
[ -e "$OUT/merged.json" ] || dslib merge "$OUT/finetuned.json" --trust "$MODEL" --out "$OUT/merged.json"
# shellcheck disable=SC2086
${LAUNCH:-} dslib eval "$OUT/merged.json" --trust "$MODEL" --data "$DATA"
