"""Checks of the flags before anything is loaded. The messages name the remedy.

Each of transformers' TrainingArguments is either HONOURED, or REFUSED unless it has its default value. A test fails if
a transformers release adds an argument that is in neither.
"""

import difflib
import importlib.util
import json
import math
import os
from dataclasses import fields
from pathlib import Path

import torch
import transformers
from activations import PRODUCTS
from transformers.integrations import is_deepspeed_zero3_enabled

from mpa.files.records import InputError

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
_HUB = "Nothing is uploaded; upload the folder yourself after the training."
_EVALUATION = "It has no effect: evaluation generates answers and compares them."
REFUSED = {
    "dataloader_drop_last": "Every sample is trained on; the last step may have fewer samples.",
    "length_column_name": "The trainer counts the lengths itself.",
    "label_names": "The labels are the answers.",
    "auto_find_batch_size": "Limit the micro-batches with --batch_tokens.",
    "optim_target_modules": "Train fewer weights with --lora_enable or --freeze_….",
    "torch_compile": "It does not support the layers that skip unlabelled positions.",
    "torch_compile_backend": "See --torch_compile.",
    "torch_compile_mode": "See --torch_compile.",
    "use_cache": "Training uses no key-value cache.",
    "bf16_full_eval": _EVALUATION,
    "fp16_full_eval": _EVALUATION,
    "prediction_loss_only": _EVALUATION,
    "eval_do_concat_batches": _EVALUATION,
    "eval_use_gather_object": _EVALUATION,
    "eval_accumulation_steps": _EVALUATION,
    "include_for_metrics": _EVALUATION,
    "batch_eval_metrics": _EVALUATION,
    "include_num_input_tokens_seen": "Tokens per second are logged.",
    "enable_jit_checkpoint": "SIGTERM saves a checkpoint anyway.",
    "push_to_hub": _HUB,
    "hub_token": _HUB,
    "hub_private_repo": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
    "ignore_data_skip": "A resumed training continues with the samples that it would have had.",
    "restore_callback_states_from_checkpoint": "No callback has a state.",
    "accelerator_config": "Use the separate flags.",
    "parallelism_config": "Use --deepspeed.",
    "fsdp": "Use --deepspeed.",
    "fsdp_config": "Use --deepspeed.",
    "do_eval": "Give --eval_data_path.",
    "do_predict": "Use evaluate.sh.",
}
# Flags of Qwen2-VL-Finetune that are not supported: see FORK.md.
UNSUPPORTED = {
    **dict.fromkeys(("--double_quant", "--quant_type"), "--bits 4 is nf4 with double quantisation. Leave it out."),
    **dict.fromkeys(("--fps", "--nframes", "--video_max_pixels", "--video_min_pixels"), "Video is not supported."),
    **dict.fromkeys(("--image_resized_width", "--image_resized_height"), "It distorts images; set --image_max_pixels."),
    **dict.fromkeys(("--eval_path", "--eval_image_folder"), "Give --eval_data_path."),
    "--group_by_length": "A step's samples are always sorted by length. Leave it out.",
    "--use_dora": "It has no effect in Qwen2-VL-Finetune. Leave it out.",
    "--cache_dir": "Set HF_HOME.",
    "--evaluation_strategy": "It is called --eval_strategy now.",
}
# (lower bound, exclusive upper bound or None, whether the lower bound itself is allowed)
_COUNT, _SHARE, _POSITIVE, _NOT_NEGATIVE = (1, None, True), (0, 1, True), (0, None, False), (0, None, True)
RANGES = {
    **dict.fromkeys(
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps save_total_limit max_seq_length "
        "image_min_pixels image_max_pixels max_tiles lora_rank lora_alpha".split(),
        _COUNT,
    ),
    **dict.fromkeys(
        "learning_rate num_train_epochs adam_epsilon logging_steps save_steps eval_steps".split(),
        _POSITIVE,
    ),
    **dict.fromkeys(
        "vision_lr merger_lr weight_decay max_grad_norm warmup_steps batch_tokens seed data_seed neftune_noise_alpha "
        "eval_delay".split(),
        _NOT_NEGATIVE,
    ),
    **dict.fromkeys("adam_beta1 adam_beta2 label_smoothing_factor lora_dropout".split(), _SHARE),
    "dataloader_num_workers": (-1, None, True),
}
REPORTERS = "tensorboard wandb mlflow comet_ml clearml trackio swanlab neptune dvclive codecarbon".split()


def refuse_unknown(words: list[str], known: list[str]) -> None:
    """Raises InputError for a flag that is not in `known`, or REFUSED with another value than its default."""
    defaults = {field.name: field.default for field in fields(transformers.TrainingArguments)}
    for word, following in zip(words, [*words[1:], "True"], strict=True):
        flag, equals, value = word.partition("=")
        if not flag.startswith("--"):
            continue
        name = flag[2:].replace("-", "_")
        if name in REFUSED:
            value = value if equals else "True" if following.startswith("--") else following
            if value.lower() not in ("false", "no", "none", str(defaults[name]).lower()):
                raise InputError(f"{flag} {value}: is not supported. {REFUSED[name]}")
        if flag in known:
            continue
        if flag in UNSUPPORTED:
            raise InputError(f"{flag}: {UNSUPPORTED[flag]}")
        near = difflib.get_close_matches(flag, known, 1)
        raise InputError(
            f"{flag}: no such flag{f'; did you mean {near[0]}?' if near else '.'} `train.py --help` lists all."
        )


def check(model, data, args) -> None:
    """Raises InputError for values out of range, and for combinations without effect or impossible on this machine."""
    for arguments in (model, data, args):
        _check_ranges(arguments)
    _check_model(model)
    _check_training(data, args)
    _check_evaluation(data, args)
    _check_machine(model, args)


def _check_ranges(arguments) -> None:
    for name, (lower, upper, inclusive) in RANGES.items():
        value = getattr(arguments, name, None)
        if not isinstance(value, int | float):
            continue
        too_low = value < lower or (value == lower and not inclusive)
        if not math.isfinite(value) or too_low or (upper is not None and value >= upper):
            bounds = f"{'at least' if inclusive else 'above'} {lower}" + (
                f" and below {upper}" if upper is not None else ""
            )
            raise InputError(f"--{name} {value}: must be {bounds}.")


def _check_model(model) -> None:
    for flag, value in (("--vision_lora", model.vision_lora), ("--lora_namespan_exclude", model.lora_namespan_exclude)):
        if value and not model.lora_enable:
            raise InputError(f"{flag} has no effect without --lora_enable True.")
    if model.num_lora_modules == 0 or model.num_lora_modules < -1:
        raise InputError(f"--num_lora_modules {model.num_lora_modules}: give a number, or -1 for all.")
    if model.bits != 16:
        _check_bits(model)
    if model.freeze_vision_tower and model.freeze_merger and model.freeze_llm and not model.lora_enable:
        raise InputError("everything is frozen; there is nothing to train.")
    if (Path(model.model_id) / "adapter_config.json").is_file():
        raise InputError(
            f"{model.model_id}: holds LoRA adapters, which would not be saved with the trained weights. Merge them first "
            "with scripts/merge_lora.sh."
        )


def _check_bits(model) -> None:
    if not model.lora_enable:
        raise InputError(
            f"--bits {model.bits}: needs --lora_enable True; quantised weights cannot be trained themselves."
        )
    if is_deepspeed_zero3_enabled():
        raise InputError(
            f"--bits {model.bits}: not with ZeRO-3, which would shard the quantised weights. Use ZERO=zero2."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"--bits {model.bits}: needs bitsandbytes. Install with: pip install bitsandbytes==0.50.2")


def _check_training(data, args) -> None:
    if data.image_min_pixels > data.image_max_pixels:
        raise InputError(
            f"--image_min_pixels {data.image_min_pixels} is more than --image_max_pixels {data.image_max_pixels}."
        )
    if args.max_steps == 0 or args.max_steps < -1:
        raise InputError(f"--max_steps {args.max_steps}: give a number, or -1 for all steps of --num_train_epochs.")
    if args.train_sampling_strategy not in ("random", "sequential"):
        raise InputError(
            f"--train_sampling_strategy {args.train_sampling_strategy}: give random or sequential. A step's samples are "
            "always sorted by length."
        )
    if args.remove_unused_columns:
        raise InputError("--remove_unused_columns: must be False; the collator needs all of them.")
    if args.activation_checkpointing_kwargs:
        raise InputError("--activation_checkpointing_kwargs: choose with --activation_checkpointing alone.")
    if args.activation_policy == PRODUCTS and is_deepspeed_zero3_enabled():
        raise InputError(
            "--activation_checkpointing products: gives wrong results under ZeRO-3, which releases weights; use True."
        )


def _check_evaluation(data, args) -> None:
    if args.load_best_model_at_end or args.metric_for_best_model is not None or args.greater_is_better is not None:
        raise InputError(
            "--load_best_model_at_end, --metric_for_best_model, --greater_is_better: Use --load_best, with --eval_data_path."
        )
    if args.load_best and not data.eval_data_path:
        raise InputError("--load_best needs --eval_data_path.")
    if args.load_best and args.save_strategy == "no":
        raise InputError("--load_best: --save_strategy no leaves no checkpoint to choose from; give steps or epoch.")
    if args.eval_strategy != "no" and not data.eval_data_path:
        raise InputError(
            f"--eval_strategy {getattr(args.eval_strategy, 'value', args.eval_strategy)}: needs --eval_data_path."
        )


def _check_machine(model, args) -> None:
    """What this machine's devices, packages and paths allow."""
    if args.n_gpu > 1:
        raise InputError(
            "one process sees several GPUs: start it with scripts/, deepspeed or torchrun, or set CUDA_VISIBLE_DEVICES to one."
        )
    if args.fp16 and args.device.type != "cuda":
        raise InputError("--fp16: needs a GPU; a CPU trains in float32, or with --bf16 if it has bfloat16.")
    if args.use_liger_kernel and args.device.type != "cuda":
        raise InputError("--use_liger: Liger's kernels run on GPUs only, and there is no GPU. Leave it out.")
    for name in args.report_to or []:
        if name in ("none", "all"):
            continue
        if name not in REPORTERS:
            raise InputError(f"--report_to {name}: known are none, {', '.join(REPORTERS)}.")
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f"--report_to {name}: it is not installed. pip install {name}, or --report_to tensorboard."
            )
    out = Path(args.output_dir)
    if out.exists() and not out.is_dir():
        raise InputError(f"--output_dir {out}: is a file; name a folder.")
    if out.exists() and os.path.isdir(model.model_id) and os.path.samefile(out, model.model_id):
        raise InputError(
            f"--output_dir {out}: is the model that is trained, and would be overwritten; name another folder."
        )
    if isinstance(args.deepspeed, str):
        try:
            json.loads(Path(args.deepspeed).read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"--deepspeed {args.deepspeed}: is not a JSON file ({error}).") from None
    if args.bf16 and args.device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise InputError("--bf16: this GPU has no bfloat16; give --fp16.")
