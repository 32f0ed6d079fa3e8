"""The trainer's flags, named as in the Qwen2-VL-Finetune project; all of transformers' own come with them."""

from dataclasses import dataclass, field

import transformers


@dataclass
class ModelArguments:
    model_id: str = field(metadata={"help": "S-VLM to start from: a folder or a hub id."})
    freeze_vision_tower: bool = field(default=False, metadata={"help": "Leave the vision tower as it is."})
    freeze_llm: bool = field(default=False, metadata={"help": "Leave the language model as it is."})
    freeze_merger: bool = field(default=False, metadata={"help": "Leave the vision-to-language merger as it is."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the checkpoint."})


@dataclass
class DataArguments:
    data_path: str = field(metadata={"help": "Train JSON: a list of {id, image, conversations} (LLaVA form)."})
    image_folder: str = field(default="", metadata={"help": "Folder that relative image paths start from."})
    path_map: list[str] = field(
        default_factory=list, metadata={"help": "OLD=NEW …: images that the JSON has in OLD/ now lie in NEW/."}
    )
    image_min_pixels: int = field(default=128 * 28 * 28, metadata={"help": "Enlarge pictures to this area, in pixels."})
    image_max_pixels: int = field(default=512 * 28 * 28, metadata={"help": "Shrink pictures to this area, in pixels."})


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers' arguments with this trainer's defaults: one epoch, and only the final model is saved.

    A training that was killed starts again from the base model, whatever checkpoints it left.
    """

    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the data (the paper's: 1)."})
    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "How the learning rate falls."})
    logging_steps: float = field(default=10, metadata={"help": "Log the loss every so many steps."})
    save_strategy: str = field(
        default="no", metadata={"help": "Checkpoints on the way: no, steps, epoch. None is resumed from."}
    )
    report_to: str = field(default="none", metadata={"help": "Where curves go: none, tensorboard, wandb …"})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "Has no effect: a killed training starts again from the base model."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must be False: the collator needs them all."})
