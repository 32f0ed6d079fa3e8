#!/usr/bin/env bash
# Stage 3, the Parity Leveler: fine-tune the S-VLM on the parity set for one epoch. Edit or export the variables below.
# The same command resumes a stopped training; it does nothing if the training is complete. Several GPUs: launch.sh.
set -euo pipefail
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/launch.sh"

about DATASET=dataset LVLM=lvlm SVLM=svlm RUN=folder TRAIN=train LEVELLED=levelled
TRAIN_JSON=${TRAIN_JSON:-$TRAIN}
OUTPUT_DIR=${OUTPUT_DIR:-$LEVELLED}
# The paper does not publish its values. These and the trainer's defaults are from Qwen2-VL-Finetune's finetune.sh at the
# commit that the released code pins, except for the pixel limits, which are PA's, and ZeRO-2, which is faster and needs more memory.
PL_BATCH_SIZE=${PL_BATCH_SIZE:-2} # per device
ACCUMULATION=${ACCUMULATION:-8}   # micro-batches per step
VISION_LR=${VISION_LR:-2e-6}
SEED=${SEED:-0}
ZERO=${ZERO:-zero2}               # zero2, zero2_offload, zero3, zero3_offload: in this order less memory and slower
FLAGS=(
    ${EPOCHS:+--num_train_epochs "$EPOCHS"}
    ${LEARNING_RATE:+--learning_rate "$LEARNING_RATE"}
    ${MERGER_LR:+--merger_lr "$MERGER_LR"}
    ${MIN_PIXELS:+--image_min_pixels "$MIN_PIXELS"}
    ${MAX_PIXELS:+--image_max_pixels "$MAX_PIXELS"}
    ${MAX_TILES:+--max_tiles "$MAX_TILES"}
)

launch --model_id "$SVLM" --data_path "$TRAIN_JSON" --output_dir "$OUTPUT_DIR" --per_device_train_batch_size "$PL_BATCH_SIZE" \
    --gradient_accumulation_steps "$ACCUMULATION" --vision_lr "$VISION_LR" --warmup_steps 0.03 --adam_beta2 0.98 \
    --adam_epsilon 1e-7 --seed "$SEED" --log_file "$RUN/log.txt" --verbose "${VERBOSE:-0}" "${FLAGS[@]}" "$@"
