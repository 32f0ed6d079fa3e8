#!/usr/bin/env bash
# LoRA in the language model and in the vision tower; nothing else is trained.
# Edit or export the variables below; further arguments are flags of the trainer. Several GPUs or machines: launch.sh.
#   DATA=train.json IMAGES=images/ OUTPUT_DIR=out bash scripts/finetune_lora_vision.sh
set -euo pipefail
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/launch.sh"

MODEL=${MODEL:-Qwen/Qwen2-VL-2B-Instruct}
DATA=${DATA:?name a train JSON, or several with shares, "a.json:0.9 b.json:0.1"}
IMAGES=${IMAGES:-} # folder of relative image paths
OUTPUT_DIR=${OUTPUT_DIR:-output/finetune_lora_vision}
BATCH_SIZE=${BATCH_SIZE:-4}     # per device
ACCUMULATION=${ACCUMULATION:-4} # micro-batches per step
EPOCHS=${EPOCHS:-1}
ZERO=${ZERO:-zero2}

read -ra FILES <<<"$DATA"
launch --model_id "$MODEL" --data_path "${FILES[@]}" --image_folder "$IMAGES" --output_dir "$OUTPUT_DIR" \
    --num_train_epochs "$EPOCHS" --per_device_train_batch_size "$BATCH_SIZE" \
    --gradient_accumulation_steps "$ACCUMULATION" --warmup_steps 0.03 --lr_scheduler_type cosine \
    --lora_enable True --vision_lora True --freeze_vision_tower True --freeze_merger True --lora_rank 64 --lora_alpha 64 --learning_rate 2e-4 --weight_decay 0.1 "$@"
