#!/usr/bin/env bash
# Stage 3, the Parity Leveler: fine-tune the S-VLM on the parity set, one epoch. Edit or export what you change.
# A second call says that all is done; after a killed one it starts again from the S-VLM.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
export PATH="$ROOT/.venv/bin:$PATH"

DATASET=${DATASET:-textVQA}
LVLM=${LVLM:-Qwen/Qwen2-VL-7B-Instruct} # named the parity set
SVLM=${SVLM:-Qwen/Qwen2-VL-2B-Instruct} # is trained
RUN=${RUN:-$(date +%F)}
[[ $RUN == */* ]] || RUN=$ROOT/results/$RUN
TRAIN_JSON=${TRAIN_JSON:-$RUN/PI_$(basename "$LVLM")_train_$(basename "$LVLM")_$(basename "$SVLM")_$DATASET.json}
OUTPUT_DIR=${OUTPUT_DIR:-$RUN/PL_$(basename "$LVLM")_$(basename "$SVLM")_$DATASET}
EPOCHS=${EPOCHS:-1}
BATCH_SIZE=${PL_BATCH_SIZE:-4}    # a device
ACCUMULATION=${ACCUMULATION:-4}   # steps whose gradients are added up
LEARNING_RATE=${LEARNING_RATE:-1e-5}
SEED=${SEED:-0}
MIN_PIXELS=${MIN_PIXELS:-$((128 * 28 * 28))}
MAX_PIXELS=${MAX_PIXELS:-$((512 * 28 * 28))}
ZERO=${ZERO:-zero2}               # a DeepSpeed configuration beside this file
FREE_PORT='import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
MASTER_PORT=${MASTER_PORT:-$(python -c "$FREE_PORT")} # trainings on one machine need one each

# All visible GPUs, in bfloat16 or, where they only emulate it, float16; else this machine's CPU as one device.
HALF='"bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"'
PRECISION=$(python -c "import torch; print($HALF if torch.cuda.device_count() else 'use_cpu')")
DEVICES=()
if [[ $PRECISION == use_cpu ]]; then
    export DS_ACCELERATOR=cpu
    DEVICES=(--num_accelerators 1)
fi

deepspeed "${DEVICES[@]}" --master_port "$MASTER_PORT" "$ROOT/PL/Qwen2-VL-Finetune/src/train.py" \
    --deepspeed "$ROOT/PL/Qwen2-VL-Finetune/scripts/$ZERO.json" --model_id "$SVLM" --data_path "$TRAIN_JSON" \
    --output_dir "$OUTPUT_DIR" --num_train_epochs "$EPOCHS" --per_device_train_batch_size "$BATCH_SIZE" \
    --gradient_accumulation_steps "$ACCUMULATION" --learning_rate "$LEARNING_RATE" --seed "$SEED" \
    --image_min_pixels "$MIN_PIXELS" --image_max_pixels "$MAX_PIXELS" "--$PRECISION" True "$@"
