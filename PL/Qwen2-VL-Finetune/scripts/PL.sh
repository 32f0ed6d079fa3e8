#!/usr/bin/env bash
# Stage 3, the Parity Leveler: fine-tune the S-VLM on the parity set for one epoch. Edit or export the variables below.
# The same command resumes a stopped training; it does nothing if the training is complete. Several GPUs: launch.sh.
set -euo pipefail
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/launch.sh"

DATASET=${DATASET:-textVQA}
LVLM=${LVLM:-Qwen/Qwen2-VL-7B-Instruct} # as in the name of the parity set
SVLM=${SVLM:-Qwen/Qwen2-VL-2B-Instruct} # the model to train
RUN=${RUN:-$(date +%F)}
RUN=$(run_folder "$RUN")
NAMES=$(basename -- "$LVLM")_$(basename -- "$SVLM")_$DATASET
TRAIN_JSON=${TRAIN_JSON:-$RUN/PI_$(basename -- "$LVLM")_train_$NAMES.json}
OUTPUT_DIR=${OUTPUT_DIR:-$RUN/PL_$NAMES}
# The paper does not publish its values. These are from Qwen2-VL-Finetune's finetune.sh at the commit that the released
# code pins, except for the pixel limits, which are PA's, and ZeRO-2, which is faster and needs more memory.
EPOCHS=${EPOCHS:-1}
BATCH_SIZE=${PL_BATCH_SIZE:-2}    # per device
ACCUMULATION=${ACCUMULATION:-8}   # micro-batches per step
LEARNING_RATE=${LEARNING_RATE:-1e-5}
MERGER_LR=${MERGER_LR:-$LEARNING_RATE}
VISION_LR=${VISION_LR:-2e-6}
SEED=${SEED:-0}
MIN_PIXELS=${MIN_PIXELS:-$((128 * 28 * 28))}
MAX_PIXELS=${MAX_PIXELS:-$((512 * 28 * 28))}
MAX_TILES=${MAX_TILES:-}          # at most so many tiles of an image (default: InternVL 6, else the model's)
ZERO=${ZERO:-zero2}               # zero2, zero2_offload, zero3, zero3_offload: in this order less memory and slower

launch --model_id "$SVLM" --data_path "$TRAIN_JSON" --output_dir "$OUTPUT_DIR" --num_train_epochs "$EPOCHS" \
    --per_device_train_batch_size "$BATCH_SIZE" --gradient_accumulation_steps "$ACCUMULATION" \
    --learning_rate "$LEARNING_RATE" --merger_lr "$MERGER_LR" --vision_lr "$VISION_LR" --lr_scheduler_type cosine \
    --warmup_steps 0.03 --weight_decay 0 --adam_beta1 0.9 --adam_beta2 0.98 --adam_epsilon 1e-7 --seed "$SEED" \
    --image_min_pixels "$MIN_PIXELS" --image_max_pixels "$MAX_PIXELS" --log_file "$RUN/log.txt" \
    ${MAX_TILES:+--max_tiles "$MAX_TILES"} --verbose "${VERBOSE:-0}" "$@"
