"""Flags that would have no effect, or a wrong one, are refused before anything is loaded, with what to do instead.

transformers' TrainingArguments come with this trainer. Each is either honoured, HONOURED, or refused where it is given another
value than its default, REFUSED; a test fails when transformers has one that is in neither.
"""

import difflib
import importlib.util
import json
import math
from dataclasses import fields
from pathlib import Path

import torch
import transformers
from activations import PRODUCTS
from record_formats import DataError
from transformers.integrations import is_deepspeed_zero3_enabled

HONOURED = set(
    "output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs "
    "warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon gradient_accumulation_steps "
    "average_tokens_across_devices max_grad_norm label_smoothing_factor bf16 fp16 tf32 activation_checkpointing "
    "activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs use_liger_kernel liger_kernel_config "
    "neftune_noise_alpha torch_empty_cache_steps logging_strategy logging_steps logging_first_step log_on_each_node "
    "logging_nan_inf_filter log_level log_level_replica disable_tqdm report_to run_name project trackio_space_id "
    "trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size eval_on_start "
    "save_only_model save_strategy save_steps save_on_each_node save_total_limit full_determinism seed data_seed use_cpu "
    "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
    "dataloader_multiprocessing_context dataloader_in_order train_sampling_strategy remove_unused_columns "
    "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout deepspeed debug "
    "skip_memory_metrics do_train resume_from_checkpoint local_rank load_best_model_at_end metric_for_best_model "
    "greater_is_better".split()
)
_BEST = "Use --load_best, with --eval_data_path."
_HUB = "Nothing is sent anywhere; upload the folder yourself when it is done."
_EVALUATION = "Evaluation here generates answers and compares them; this has no effect on it."
REFUSED = {
    "dataloader_drop_last": "Every sample is trained on; the last step may have fewer.",
    "length_column_name": "Lengths are counted here.",
    "label_names": "Labels are made here, of the answers.",
    "auto_find_batch_size": "Bound a device's batch with --batch_tokens.",
    "optim_target_modules": "Train fewer weights with --lora_enable or --freeze_….",
    "torch_compile": "It does not know the layers that work only where there is a label.",
    "torch_compile_backend": "See --torch_compile.",
    "torch_compile_mode": "See --torch_compile.",
    "use_cache": "Training keeps no key-values.",
    "bf16_full_eval": _EVALUATION,
    "fp16_full_eval": _EVALUATION,
    "prediction_loss_only": _EVALUATION,
    "eval_do_concat_batches": _EVALUATION,
    "eval_use_gather_object": _EVALUATION,
    "eval_accumulation_steps": _EVALUATION,
    "include_for_metrics": _EVALUATION,
    "batch_eval_metrics": _EVALUATION,
    "include_num_input_tokens_seen": "Tokens a second are logged.",
    "enable_jit_checkpoint": "SIGTERM saves a checkpoint as it is.",
    "push_to_hub": _HUB,
    "hub_token": _HUB,
    "hub_private_repo": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
    "ignore_data_skip": "A training goes on with the samples that it would have had.",
    "restore_callback_states_from_checkpoint": "There are no callbacks with a state.",
    "accelerator_config": "Set what you need by its own flag.",
    "parallelism_config": "Use --deepspeed.",
    "fsdp": "Use --deepspeed.",
    "fsdp_config": "Use --deepspeed.",
    "do_eval": "Give --eval_data_path.",
    "do_predict": "Use evaluate.sh.",
}
# Flags of Qwen2-VL-Finetune that are not kept: see FORK.md.
NOT_KEPT = {
    "--bits": "Quantised training is not kept. --lora_enable with --freeze_… needs the least memory.",
    **dict.fromkeys(("--double_quant", "--quant_type"), "Quantised training is not kept."),
    **dict.fromkeys(
        ("--fps", "--nframes", "--video_max_pixels", "--video_min_pixels"), "Video is not trained on here."
    ),
    **dict.fromkeys(("--image_resized_width", "--image_resized_height"), "It distorts images; set --image_max_pixels."),
    **dict.fromkeys(("--eval_path", "--eval_image_folder"), "Give --eval_data_path."),
    "--group_by_length": "A step's samples are sorted by length as it is; nothing is to be set.",
    "--use_dora": "Read nowhere in that project. Leave it out.",
    "--cache_dir": "Set HF_HOME.",
    "--evaluation_strategy": "It is called --eval_strategy now.",
}
# (least, most, whether the least is allowed); None: no bound
_COUNT, _SHARE, _POSITIVE, _NOT_NEGATIVE = (1, None, True), (0, 1, True), (0, None, False), (0, None, True)
RANGES = {
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), _COUNT
    ),
    **dict.fromkeys(("save_total_limit", "max_seq_length", "image_min_pixels", "image_max_pixels"), _COUNT),
    **dict.fromkeys(("lora_rank", "lora_alpha"), _COUNT),
    **dict.fromkeys(
        ("learning_rate", "num_train_epochs", "adam_epsilon", "logging_steps", "save_steps", "eval_steps"), _POSITIVE
    ),
    **dict.fromkeys(
        ("vision_lr", "merger_lr", "weight_decay", "max_grad_norm", "warmup_steps", "batch_tokens"), _NOT_NEGATIVE
    ),
    **dict.fromkeys(("cache_gb", "seed", "data_seed", "neftune_noise_alpha", "eval_delay"), _NOT_NEGATIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor", "lora_dropout"), _SHARE),
    "dataloader_num_workers": (-1, None, True),
}
REPORTERS = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "comet_ml": "comet_ml",
    "clearml": "clearml",
}
REPORTERS |= {
    "trackio": "trackio",
    "swanlab": "swanlab",
    "neptune": "neptune",
    "dvclive": "dvclive",
    "codecarbon": "codecarbon",
}


def refuse_unknown(words: list[str], known: list[str]) -> None:
    """Raises DataError for a flag that does not exist, is not kept, or is REFUSED and set to another value than its default."""
    defaults = {field.name: field.default for field in fields(transformers.TrainingArguments)}
    for word, following in zip(words, [*words[1:], "True"], strict=True):
        flag, equals, value = word.partition("=")
        if not flag.startswith("--"):
            continue
        name = flag[2:].replace("-", "_")
        if name in REFUSED:
            value = value if equals else "True" if following.startswith("--") else following
            if value.lower() not in ("false", "no", "none", str(defaults[name]).lower()):
                raise DataError(f"{flag} {value}: has no place here. {REFUSED[name]}")
        if flag in known:
            continue
        if flag in NOT_KEPT:
            raise DataError(f"{flag}: {NOT_KEPT[flag]}")
        near = difflib.get_close_matches(flag, known, 1)
        raise DataError(
            f"{flag}: no such flag{f'; did you mean {near[0]}?' if near else '.'} `train.py --help` lists all."
        )


def check(model, data, args) -> None:
    """Raises DataError for values out of range and combinations without sense, or that this machine cannot do."""
    for owner in (model, data, args):
        _in_range(owner)
    _sensible(model, data, args)
    _possible(model, data, args)


def _in_range(owner) -> None:
    for name, (least, most, including) in RANGES.items():
        value = getattr(owner, name, None)
        if not isinstance(value, int | float):
            continue
        if (
            not math.isfinite(value)
            or value < least
            or (value == least and not including)
            or (most is not None and value >= most)
        ):
            bound = f"{'at least' if including else 'above'} {least}" + (
                f" and below {most}" if most is not None else ""
            )
            raise DataError(f"--{name} {value}: must be {bound}.")


def _sensible(model, data, args) -> None:
    for flag, value in (("--vision_lora", model.vision_lora), ("--lora_namespan_exclude", model.lora_namespan_exclude)):
        if value and not model.lora_enable:
            raise DataError(f"{flag} has no effect without --lora_enable True.")
    if model.num_lora_modules == 0 or model.num_lora_modules < -1:
        raise DataError(f"--num_lora_modules {model.num_lora_modules}: how many, or -1 for all.")
    if model.freeze_vision_tower and model.freeze_merger and model.freeze_llm and not model.lora_enable:
        raise DataError("everything is frozen; there is nothing to train.")
    if data.image_min_pixels > data.image_max_pixels:
        raise DataError(
            f"--image_min_pixels {data.image_min_pixels} is more than --image_max_pixels {data.image_max_pixels}."
        )
    if args.max_steps == 0 or args.max_steps < -1:
        raise DataError(f"--max_steps {args.max_steps}: how many, or -1 for as many as --num_train_epochs makes.")
    if args.train_sampling_strategy not in ("random", "sequential"):
        raise DataError(
            f"--train_sampling_strategy {args.train_sampling_strategy}: give random or sequential. A step's samples are sorted "
            "by length as it is."
        )
    if args.remove_unused_columns:
        raise DataError("--remove_unused_columns: must be False; the collator needs them all.")
    if args.activation_checkpointing_kwargs:
        raise DataError("--activation_checkpointing_kwargs: choose with --activation_checkpointing alone.")
    if data.cache_features:
        if not (model.freeze_vision_tower and model.freeze_merger) or model.vision_lora or is_deepspeed_zero3_enabled():
            raise DataError(
                "--cache_features: only with --freeze_vision_tower, --freeze_merger, no --vision_lora, no ZeRO-3."
            )
        if data.lazy_preprocess and data.cache_gb == 0:
            raise DataError("--cache_features: --cache_gb 0 leaves no room for them.")
    if args.keep == PRODUCTS and is_deepspeed_zero3_enabled():
        raise DataError(
            "--activation_checkpointing products: wrong under ZeRO-3, which takes weights away; True is right."
        )
    if args.load_best_model_at_end or args.metric_for_best_model is not None or args.greater_is_better is not None:
        raise DataError(f"--load_best_model_at_end, --metric_for_best_model, --greater_is_better: {_BEST}")
    if args.load_best and not data.eval_data_path:
        raise DataError("--load_best needs --eval_data_path.")
    if args.load_best and args.save_strategy == "no":
        raise DataError("--load_best: --save_strategy no leaves no checkpoint to choose from; give steps or epoch.")
    if args.eval_strategy != "no" and not data.eval_data_path:
        raise DataError(
            f"--eval_strategy {getattr(args.eval_strategy, 'value', args.eval_strategy)}: needs --eval_data_path."
        )


def _possible(model, data, args) -> None:
    """What this machine and these paths allow."""
    if (Path(model.model_id) / "adapter_config.json").is_file():
        raise DataError(
            f"{model.model_id}: holds LoRA adapters, which would not be saved with what is trained here. Merge them first: "
            "scripts/merge_lora.sh."
        )
    if args.n_gpu > 1:
        raise DataError("several GPUs and one process: start with scripts/, deepspeed or torchrun, or show it one GPU.")
    if args.fp16 and args.device.type != "cuda":
        raise DataError("--fp16: needs a GPU; on a CPU it is float32, or --bf16 where the CPU has it.")
    if args.use_liger_kernel and args.device.type != "cuda":
        raise DataError("--use_liger: Liger's kernels run on GPUs only, and there is none here. Leave it out.")
    for name in args.report_to or []:
        if name in ("none", "all"):
            continue
        if name not in REPORTERS:
            raise DataError(f"--report_to {name}: known are none, {', '.join(REPORTERS)}.")
        if importlib.util.find_spec(REPORTERS[name]) is None:
            raise DataError(
                f"--report_to {name}: it is not installed. pip install {REPORTERS[name]}, or --report_to tensorboard."
            )
    out = Path(args.output_dir)
    if out.exists() and not out.is_dir():
        raise DataError(f"--output_dir {out}: is a file; name a folder.")
    if isinstance(args.deepspeed, str):
        try:
            json.loads(Path(args.deepspeed).read_text())
        except (OSError, ValueError) as error:
            raise DataError(f"--deepspeed {args.deepspeed}: no JSON file of settings ({error}).") from None
    if args.bf16 and args.device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise DataError("--bf16: this GPU does not have it; give --fp16.")
