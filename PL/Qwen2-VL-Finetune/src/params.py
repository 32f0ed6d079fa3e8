"""The trainer's flags, compatible with the Qwen2-VL-Finetune project's; all of transformers' own are flags too.

FORK.md lists what differs from that project, and why.
"""

import os
import sys
from ast import literal_eval
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import flags
import process_group
import transformers
from activations import PRODUCTS
from transformers.hf_argparser import string_to_bool

from mpa.files.records import InputError
from mpa.models import gpus
from mpa.models.families import MAX_PIXELS, MIN_PIXELS

# Older spelling -> current spelling. A command may use only one of them.
RENAMED = {
    "--min_pixels": "--image_min_pixels",
    "--max_pixels": "--image_max_pixels",
    "--use_liger": "--use_liger_kernel",
    "--gradient_checkpointing": "--activation_checkpointing",
    "--warmup_ratio": "--warmup_steps",  # a value below 1 is a share of all steps
}
NEGATED = {"--tune_merger": "--freeze_merger"}


@dataclass
class ModelArguments:
    model_id: str = field(metadata={"help": "Model to fine-tune (the S-VLM): a folder or a hub id."})
    freeze_vision_tower: bool = field(default=False, metadata={"help": "Freeze the vision tower."})
    freeze_llm: bool = field(default=False, metadata={"help": "Freeze the language model."})
    freeze_merger: bool = field(
        default=False,
        metadata={"help": "Freeze the merger, which joins vision and language (older: --tune_merger False)."},
    )
    lora_enable: bool = field(
        default=False, metadata={"help": "Train LoRA adapters in the language model; its own weights are frozen."}
    )
    vision_lora: bool = field(
        default=False, metadata={"help": "With --lora_enable: also in the vision tower; its own weights are frozen."}
    )
    lora_rank: int = field(default=64, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of the adapters: alpha / rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout of the adapters' input."})
    lora_namespan_exclude: list[str] = field(
        default_factory=list, metadata={"help": "No adapter in modules whose name contains one of these words."}
    )
    num_lora_modules: int = field(default=-1, metadata={"help": "Adapt only the last N modules; -1: all."})
    bits: int = field(
        default=16,
        metadata={
            "help": "With --lora_enable, the frozen language model's weights in 4 bits (nf4 with double quantisation: QLoRA) or "
            "8; 16: not quantised. Needs bitsandbytes.",
            "choices": [4, 8, 16],
        },
    )
    disable_flash_attn2: bool = field(
        default=False, metadata={"help": "Use PyTorch's attention even if flash-attention 2 is installed."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})
    save_dtype: str = field(
        default="auto",
        metadata={
            "help": "Dtype of the final weights; auto: the base model's. Checkpoints are in float32.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
        },
    )


@dataclass
class DataArguments:
    data_path: list[str] = field(
        metadata={
            "help": "Train JSON: a list of {id, image, conversations} (LLaVA format). Several files are joined. With shares "
            "(parity.json:0.9 old.json:0.1) samples are drawn so that the mixture has these shares."
        }
    )
    image_folder: str = field(default="", metadata={"help": "Folder to which relative image paths are relative."})
    path_map: list[str] = field(
        default_factory=list, metadata={"help": "OLD=NEW …: images that the JSON names in OLD/ are now in NEW/."}
    )
    image_min_pixels: int = field(
        default=MIN_PIXELS, metadata={"help": "Enlarge images to this area, in pixels (older: --min_pixels)."}
    )
    image_max_pixels: int = field(
        default=MAX_PIXELS, metadata={"help": "Shrink images to this area, in pixels (older: --max_pixels)."}
    )
    max_tiles: int | None = field(
        default=None,
        metadata={
            "help": "Cut an image into at most N tiles, besides the whole image (default: InternVL 6, else the checkpoint's own)."
        },
    )
    max_seq_length: int = field(
        default=32768, metadata={"help": "Longest sample in tokens, visual tokens included. Nothing is truncated."}
    )
    on_too_long: str = field(
        default="error",
        metadata={"help": "For a longer sample: raise an error, or leave it out.", "choices": ["error", "drop"]},
    )
    lazy_preprocess: bool = field(default=True, metadata={"help": "No effect, as in Qwen2-VL-Finetune."})
    packing: bool = field(
        default=False,
        metadata={"help": "Put a micro-batch into one row, without padding or attention across samples."},
    )
    batch_tokens: int = field(
        default=0,
        metadata={
            "help": "Maximum tokens of a micro-batch, visual tokens and padding included; determines the number of micro-batches. "
            "The batch size of a step stays --per_device_train_batch_size x --gradient_accumulation_steps x world size."
        },
    )
    eval_data_path: str = field(
        default="",
        metadata={
            "help": "Held-out JSON of the same format. Answers are generated and compared at each --eval_strategy."
        },
    )


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers' arguments, with this trainer's defaults and these additions.

    Sets `activation_policy` (a key of `activations.DESCRIPTIONS`, or "auto") from --activation_checkpointing.
    """

    num_train_epochs: float = field(default=1.0, metadata={"help": "Number of epochs (paper: 1)."})
    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate."})
    vision_lr: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the vision tower. Default: --learning_rate."}
    )
    merger_lr: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the merger. Default: --learning_rate."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    logging_steps: float = field(default=10, metadata={"help": "Log the loss every N steps."})
    save_strategy: str = field(default="steps", metadata={"help": "When to save checkpoints: no, steps, epoch."})
    save_steps: float = field(default=200, metadata={"help": "Save every N steps (below 1: share of all steps)."})
    save_total_limit: int = field(
        default=1, metadata={"help": "Number of checkpoints to keep, in addition to the best one."}
    )
    activation_checkpointing: str = field(
        default="auto",
        metadata={
            "help": "Activations to recompute in the backward pass. False: none; products: all but matrix products and "
            "attention; True: whole layers (older: --gradient_checkpointing); auto: the first of these that fits in memory.",
            "nargs": "?",
            "const": "True",
        },
    )
    resume_from_checkpoint: str = field(
        default="auto",
        metadata={
            "help": "auto: resume from the last complete checkpoint in output_dir; no: start again; or a checkpoint."
        },
    )
    report_to: str = field(default="tensorboard", metadata={"help": "Loggers: none, tensorboard, wandb …"})
    log_file: str = field(default="", metadata={"help": "File to append to what is printed, and details."})
    verbose: bool = field(default=False, metadata={"help": "With --log_file: print the details, too."})
    load_best: bool = field(
        default=False,
        metadata={"help": "The final model is the checkpoint with the best accuracy on --eval_data_path."},
    )
    dataloader_num_workers: int = field(
        default=-1,
        metadata={"help": "Worker processes that encode samples; -1: up to 4 with a GPU, none without."},
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "No effect, but a wait for the device: such a loss ends the training."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must be False: the collator needs all."})

    def __post_init__(self):
        self.vision_lr = self.learning_rate if self.vision_lr is None else self.vision_lr
        self.merger_lr = self.learning_rate if self.merger_lr is None else self.merger_lr
        on_gpu = not self.use_cpu and bool(gpus.usable())  # an error where torch cannot use the GPU
        if self.dataloader_num_workers < 0:
            cores = len(os.sched_getaffinity(0)) // process_group.local_world_size()
            self.dataloader_num_workers = min(4, cores - 1) if on_gpu else 0
        if self.deepspeed and self.use_cpu:
            process_group.use_gloo()
        super().__post_init__()
        if self.deepspeed:  # in bfloat16, its default, the sum of eight micro-batches is wrong by 0.4 %
            self.hf_deepspeed_config.config.setdefault("data_types", {"grad_accum_dtype": "fp32"})
        self.activation_policy = str(self.activation_checkpointing)
        if self.activation_policy not in ("auto", PRODUCTS):
            self.activation_policy = str(string_to_bool(self.activation_checkpointing))
        self.activation_checkpointing = self.gradient_checkpointing = False  # Leveler applies it instead of Trainer


KINDS = (ModelArguments, DataArguments, TrainingArguments)


def parse(argv: list[str] | None) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """The flags, in any of their spellings.

    Raises InputError for unknown flags, values out of range, and combinations that have no effect or cannot work.
    """
    words = _current_spelling(sys.argv[1:] if argv is None else argv)
    parser = transformers.HfArgumentParser(KINDS, allow_abbrev=False)
    parser.error = _refuse
    flags.refuse_unknown(words, [flag for action in parser._actions for flag in action.option_strings])
    try:
        model, data, args = parser.parse_args_into_dataclasses(words)
    except (ValueError, TypeError, KeyError, ImportError, RuntimeError, OSError) as error:
        _refuse(str(error).strip().splitlines()[0].removesuffix("."))
    flags.check(model, data, args)
    model.lora_namespan_exclude = _word_list(model.lora_namespan_exclude)
    if Path(model.model_id).is_dir():
        model.model_id = str(Path(model.model_id).resolve())  # an adapter records its base's path
    if data.eval_data_path and args.eval_strategy == "no":
        args.eval_strategy = args.save_strategy if args.load_best else "epoch"
        args.eval_steps = args.save_steps
    if args.load_best:
        args.load_best_model_at_end, args.greater_is_better = True, True
        args.metric_for_best_model = "eval_accuracy"
    return model, data, args


def _refuse(message: str) -> NoReturn:
    raise InputError(f"{message}. `train.py --help` lists all flags.") from None


def _word_list(words: list[str]) -> list[str]:
    """The words, also if they are one Python list such as "['a', 'b']", as Qwen2-VL-Finetune's scripts write it."""
    if len(words) != 1 or not words[0].startswith("["):
        return words
    try:
        return list(literal_eval(words[0]))
    except (ValueError, SyntaxError):
        raise InputError(f"--lora_namespan_exclude {words[0]}: expected words, or ['a', 'b'].") from None


def _current_spelling(words: list[str]) -> list[str]:
    """The command line with older spellings replaced. Raises InputError if a flag is given in two spellings."""
    rest, spellings, result = deque(words), {}, []
    while rest:
        word = rest.popleft()
        flag, equals, value = word.partition("=")
        if not flag.startswith("--"):
            result.append(word)
            continue
        current = RENAMED.get(flag, NEGATED.get(flag, flag))
        if spellings.setdefault(current, flag) != flag:
            raise InputError(f"{spellings[current]} and {flag} are one flag; give it once.")
        if flag == "--warmup_ratio":
            value = value if equals else rest.popleft() if rest else ""
            equals = "="
            _check_share(flag, value)
        if flag in NEGATED:
            if not equals:
                value = rest.popleft() if rest and not rest[0].startswith("--") else "True"
            equals, value = "=", str(not string_to_bool(value))
        result.append(current + equals + value)
    return result


def _check_share(flag: str, value: str) -> None:
    try:
        share = float(value)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise InputError(f"{flag} {value}: a share of all steps, from 0 to below 1.")
