#!/usr/bin/env bash
# The whole method in a few minutes on two CPU cores: MPA with the embedded pair on easy-VQA images, without
# their labels, and then the baselines. The same command continues a stopped demo.
# SEEDS="0 1 2" runs three seeds and reports the spread. Remove results/demo to start again.
# Details go to results/demo/log.txt; `-v` prints them too.
set -euo pipefail
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/environment.sh"
options "${BASH_SOURCE[0]}" "$@"
expect_settings
expect 1+ LIMIT QUESTIONS
for SEED in ${SEEDS:-}; do expect 0+ SEED; done

RUN=${RUN:-demo}             # results go to results/demo; seed 1 to results/demo-1 …
SEEDS=${SEEDS:-0}
export LIMIT=${LIMIT:-1000}  # images to annotate
REPORT=${REPORT:-1}          # 0: no HTML report at the end
QUESTIONS=${QUESTIONS:-2000} # test questions, drawn at random from 9,673
export LVLM=$ROOT/data/mini/teacher SVLM=$ROOT/data/mini/student DATASET=easyVQA
export BATCH_SIZE=${BATCH_SIZE:-64} DTYPE=float32 MIN_PIXELS=3136 MAX_PIXELS=3136
export PL_BATCH_SIZE=${PL_BATCH_SIZE:-16} ACCUMULATION=1 LEARNING_RATE=${LEARNING_RATE:-1.5e-4}
export VISION_LR=$LEARNING_RATE
export HF_HUB_OFFLINE=1
run bash "$ROOT/scripts/setup.sh"

RUNS=()
about BASE=folder
for SEED in $SEEDS; do
    RUN=$BASE$([[ $SEED == 0 ]] || echo "-$SEED")
    export SEED RUN
    RUNS+=("$RUN")
    REPORT=0 PA_FLAGS="--temperature 1" EVALUATE_FLAGS="--sample $QUESTIONS" run bash "$ROOT/scripts/mpa.sh"

    # The baselines of the paper's table 6: one epoch each, with the same settings.
    about PA=pa TRAIN=train
    run python "$ROOT/scripts/baselines.py" --pa-json "$PA" --train-json "$TRAIN" --seed "$SEED"
    MODELS=()
    for BASELINE in all_pseudo random_pseudo human_n human; do
        title "Baseline: the same training on $BASELINE"
        about TRAIN_JSON="train:$BASELINE" OUTPUT_DIR="levelled:$BASELINE"
        MODELS+=("$OUTPUT_DIR")
        TRAIN_JSON=$TRAIN_JSON OUTPUT_DIR=$OUTPUT_DIR run bash "$ROOT/PL/Qwen2-VL-Finetune/scripts/PL.sh"
    done
    title "evaluate: the baselines"
    run bash "$ROOT/evaluate.sh" --model-path "${MODELS[@]}" --sample "$QUESTIONS"
done
run python "$ROOT/scripts/tables.py" --dataset easyVQA --lvlm "$LVLM" --svlm "$SVLM" "${RUNS[@]}"
if [[ $REPORT != 0 ]]; then run python "$ROOT/scripts/report.py" "${RUNS[@]}"; fi
