#!/usr/bin/env bash
# Stage 3, the Parity Leveler: fine-tune the S-VLM on the parity set, one epoch. Edit or export what you change.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
export PATH="$ROOT/.venv/bin:$PATH"

DATASET=${DATASET:-textVQA}
LVLM=${LVLM:-Qwen/Qwen2-VL-7B-Instruct} # named the parity set
SVLM=${SVLM:-Qwen/Qwen2-VL-2B-Instruct} # is trained
RUN=${RUN:-$(date +%F)}
[[ $RUN == */* ]] || RUN=$ROOT/results/$RUN
DATA=${DATA:-$RUN/PI_$(basename "$LVLM")_train_$(basename "$LVLM")_$(basename "$SVLM")_$DATASET.json}
OUTPUT=${OUTPUT:-$RUN/PL_$(basename "$LVLM")_$(basename "$SVLM")_$DATASET}
EPOCHS=${EPOCHS:-1}
BATCH_SIZE=${PL_BATCH_SIZE:-4}    # a device
ACCUMULATION=${ACCUMULATION:-4}   # steps whose gradients are added up
LEARNING_RATE=${LEARNING_RATE:-1e-5}
SEED=${SEED:-0}
MIN_PIXELS=${MIN_PIXELS:-$((128 * 28 * 28))}
MAX_PIXELS=${MAX_PIXELS:-$((512 * 28 * 28))}
ZERO=${ZERO:-zero2}               # a DeepSpeed configuration beside this file

# All visible GPUs, else this machine's CPU as one device.
if [[ $(python -c 'import torch; print(torch.cuda.device_count())') -gt 0 ]]; then
    DEVICES=() PRECISION=(--bf16 True)
else
    export DS_ACCELERATOR=cpu
    DEVICES=(--num_accelerators 1) PRECISION=(--use_cpu True)
fi

deepspeed "${DEVICES[@]}" --master_port "${PORT:-29500}" "$ROOT/PL/Qwen2-VL-Finetune/src/train.py" \
    --deepspeed "$ROOT/PL/Qwen2-VL-Finetune/scripts/$ZERO.json" --model_id "$SVLM" --data_path "$DATA" \
    --output_dir "$OUTPUT" --num_train_epochs "$EPOCHS" --per_device_train_batch_size "$BATCH_SIZE" \
    --gradient_accumulation_steps "$ACCUMULATION" --learning_rate "$LEARNING_RATE" --seed "$SEED" \
    --image_min_pixels "$MIN_PIXELS" --image_max_pixels "$MAX_PIXELS" "${PRECISION[@]}" "$@"
