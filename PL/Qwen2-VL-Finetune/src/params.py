"""The trainer's flags, named as in the Qwen2-VL-Finetune project; all of transformers' own come with them.

What differs from that project's, and why, is in FORK.md.
"""

import os
import sys
from ast import literal_eval
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import flags
import process_group
import torch
import transformers
from activations import PRODUCTS
from record_formats import DataError
from transformers.hf_argparser import string_to_bool

# Spelling of that project's older versions -> today's. A flag may be given in one of them.
RENAMED = {
    "--min_pixels": "--image_min_pixels",
    "--max_pixels": "--image_max_pixels",
    "--use_liger": "--use_liger_kernel",
    "--gradient_checkpointing": "--activation_checkpointing",
    "--warmup_ratio": "--warmup_steps",  # which takes a share of all steps too
}
OPPOSITE = {"--tune_merger": "--freeze_merger"}


@dataclass
class ModelArguments:
    model_id: str = field(metadata={"help": "S-VLM to start from: a folder or a hub id."})
    freeze_vision_tower: bool = field(default=False, metadata={"help": "Leave the vision tower as it is."})
    freeze_llm: bool = field(default=False, metadata={"help": "Leave the language model as it is."})
    freeze_merger: bool = field(
        default=False, metadata={"help": "Leave what joins vision to language as it is (older: --tune_merger False)."}
    )
    lora_enable: bool = field(
        default=False, metadata={"help": "Train LoRA adapters in the language model, which itself stays as it is."}
    )
    vision_lora: bool = field(
        default=False, metadata={"help": "With --lora_enable: in the vision tower too, which itself stays as it is."}
    )
    lora_rank: int = field(default=64, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=16, metadata={"help": "Their scale is alpha / rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before them."})
    lora_namespan_exclude: list[str] = field(
        default_factory=list, metadata={"help": "No adapter where a module's name holds one of these words."}
    )
    num_lora_modules: int = field(default=-1, metadata={"help": "Only the last so many modules get one; -1: all."})
    disable_flash_attn2: bool = field(
        default=False, metadata={"help": "Do not use flash-attention 2 where it is installed: torch's attention."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the checkpoint."})
    save_dtype: str = field(
        default="auto",
        metadata={
            "help": "What the final weights are written in; auto: as the base's. Checkpoints on the way are in float32.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
        },
    )


@dataclass
class DataArguments:
    data_path: list[str] = field(
        metadata={
            "help": "Train JSON: a list of {id, image, conversations} (LLaVA form). Several are joined; with shares, as in "
            "parity.json:0.9 old.json:0.1, so many of each are drawn that the mixture has these shares."
        }
    )
    image_folder: str = field(default="", metadata={"help": "Folder that relative image paths start from."})
    path_map: list[str] = field(
        default_factory=list, metadata={"help": "OLD=NEW …: images that the JSON has in OLD/ now lie in NEW/."}
    )
    image_min_pixels: int = field(
        default=128 * 28 * 28, metadata={"help": "Enlarge images to this area, in pixels (older: --min_pixels)."}
    )
    image_max_pixels: int = field(
        default=512 * 28 * 28, metadata={"help": "Shrink images to this area, in pixels (older: --max_pixels)."}
    )
    max_seq_length: int = field(
        default=32768, metadata={"help": "Longest sample in tokens, visual ones included; nothing is cut."}
    )
    on_too_long: str = field(
        default="error", metadata={"help": "A longer sample is an error, or dropped.", "choices": ["error", "drop"]}
    )
    lazy_preprocess: bool = field(
        default=True,
        metadata={
            "help": "Keep --cache_gb of the samples as the check before step 0 made them. False: as many as there is room for."
        },
    )
    cache_gb: float | None = field(
        default=None,
        metadata={
            "help": "See --lazy_preprocess. On disk; one device alone has 1 GiB of them in memory first. Others are made again. "
            "By default none where each sample is used once, else 20 or a tenth of what is free on the disk."
        },
    )
    samples_dir: str = field(
        default="",
        metadata={"help": "Where on disk, for other runs too. By default within output_dir, until the training ends."},
    )
    cache_features: bool = field(
        default=False,
        metadata={
            "help": "Keep there what the frozen vision tower makes of the images, in their place. Needs --freeze_vision_tower "
            "and --freeze_merger: a change of method where they are trained otherwise."
        },
    )
    packing: bool = field(
        default=False,
        metadata={"help": "A device's batch becomes one row without padding or attention across samples."},
    )
    batch_tokens: int = field(
        default=0,
        metadata={
            "help": "Most tokens, visual and padding included, that a device takes at once; --gradient_accumulation_steps "
            "follows from it. A step still has as many samples as that and --per_device_train_batch_size say."
        },
    )
    eval_data_path: str = field(
        default="", metadata={"help": "The same form: answers are generated and compared at every --eval_strategy."}
    )


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers' arguments, with this trainer's defaults."""

    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the data (the paper's: 1)."})
    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate."})
    vision_lr: float | None = field(default=None, metadata={"help": "That of the vision tower, if another."})
    merger_lr: float | None = field(default=None, metadata={"help": "That of the merger, if another."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "How the learning rate falls."})
    logging_steps: float = field(default=10, metadata={"help": "Log the loss every so many steps."})
    save_strategy: str = field(default="steps", metadata={"help": "Checkpoints on the way: no, steps, epoch."})
    save_steps: float = field(default=200, metadata={"help": "One every so many steps (below 1: share of all)."})
    save_total_limit: int = field(default=1, metadata={"help": "Checkpoints kept, beside the best."})
    activation_checkpointing: str = field(
        default="auto",
        metadata={
            "help": "What is not kept for the backward pass but worked out again: False, nothing; products, all but matrix "
            "products and attention; True, layers (older: --gradient_checkpointing). auto: the first that fits the memory.",
            "nargs": "?",
            "const": "True",
        },
    )
    resume_from_checkpoint: str = field(
        default="auto",
        metadata={"help": "auto: go on from the last complete checkpoint in output_dir; no: start again."},
    )
    report_to: str = field(default="tensorboard", metadata={"help": "Where curves go: none, tensorboard, wandb …"})
    load_best: bool = field(
        default=False, metadata={"help": "Keep the checkpoint best in --eval_data_path's accuracy as the final model."}
    )
    dataloader_num_workers: int = field(
        default=-1,
        metadata={"help": "Processes that make what is not kept; -1: beside a GPU up to 4, without one none."},
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must be False: the collator needs them all."})

    def __post_init__(self):
        if self.dataloader_num_workers < 0:
            cores = len(os.sched_getaffinity(0)) // process_group.local_world_size()
            self.dataloader_num_workers = min(4, cores - 1) if torch.cuda.is_available() and not self.use_cpu else 0
        super().__post_init__()
        self.keep = str(self.activation_checkpointing)
        if self.keep not in ("auto", PRODUCTS):
            self.keep = str(string_to_bool(self.activation_checkpointing))
        self.activation_checkpointing = self.gradient_checkpointing = False  # Trainer's own: Leveler does it


KINDS = (ModelArguments, DataArguments, TrainingArguments)


def parse(argv: list[str] | None) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """The flags, in any of their spellings. Raises DataError for unknown ones, values out of range and combinations without sense."""
    words = _todays(sys.argv[1:] if argv is None else argv)
    parser = transformers.HfArgumentParser(KINDS, allow_abbrev=False)
    parser.error = _refuse
    flags.refuse_unknown(words, [flag for action in parser._actions for flag in action.option_strings])
    try:
        model, data, args = parser.parse_args_into_dataclasses(words)
    except (ValueError, TypeError, KeyError, ImportError, RuntimeError, OSError) as error:
        raise DataError(f"{str(error).strip().splitlines()[0]} `train.py --help` lists all flags.") from None
    flags.check(model, data, args)
    if len(model.lora_namespan_exclude) == 1 and model.lora_namespan_exclude[0].startswith("["):
        try:
            model.lora_namespan_exclude = list(
                literal_eval(model.lora_namespan_exclude[0])
            )  # as that project's scripts write it
        except (ValueError, SyntaxError):
            raise DataError(
                f"--lora_namespan_exclude {model.lora_namespan_exclude[0]}: expected words, or ['a', 'b']."
            ) from None
    if Path(model.model_id).is_dir():
        model.model_id = str(Path(model.model_id).resolve())  # an adapter names its base from anywhere
    if data.eval_data_path and args.eval_strategy == "no":
        args.eval_strategy = args.save_strategy if args.load_best else "epoch"
        args.eval_steps = args.save_steps
    if args.load_best:
        args.load_best_model_at_end, args.greater_is_better = True, True
        args.metric_for_best_model = "eval_accuracy"
    return model, data, args


def _refuse(message: str):
    raise DataError(f"{message}. `train.py --help` lists all flags.")


def _todays(words: list[str]) -> list[str]:
    """Older spellings put into today's."""
    left, found, result = deque(words), {}, []
    while left:
        word = left.popleft()
        flag, equals, value = word.partition("=")
        if not flag.startswith("--"):
            result.append(word)
            continue
        new = RENAMED.get(flag, OPPOSITE.get(flag, flag))
        if found.setdefault(new, flag) != flag:
            raise DataError(f"{found[new]} and {flag} are one flag; give it once.")
        if flag == "--warmup_ratio":
            value = value if equals else left.popleft() if left else ""
            try:
                share = float(value)
            except ValueError:
                share = -1.0
            if not 0 <= share < 1:
                raise DataError(f"--warmup_ratio {value}: a share of all steps, from 0 to below 1.")
            equals = "="
        if flag in OPPOSITE:
            if not equals:
                value = left.popleft() if left and not left[0].startswith("--") else "True"
            equals, value = "=", str(not string_to_bool(value))
        result.append(new + equals + value)
    return result
