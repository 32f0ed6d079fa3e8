"""How the trainer saves and loads checkpoints."""

import contextlib
import json
import os
import shutil
import signal
from pathlib import Path

import checkpoints
import process_group
import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from data import DataError

SETTINGS = "train_settings.json"  # in each checkpoint: what it was trained with
ASIDE = ".saving"


class CheckpointingTrainer(Trainer):
    def _get_output_dir(self, trial) -> str:
        return str(self.aside or super()._get_output_dir(trial))

    def _save_checkpoint(self, model, trial) -> None:
        """Write all aside, then rename: a checkpoint that is there is complete."""
        out, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        self.aside = out / ASIDE
        if self.args.should_save:
            shutil.rmtree(self.aside, ignore_errors=True)
        process_group.barrier()
        super()._save_checkpoint(model, trial)
        self.aside = None
        process_group.barrier()
        if best := self.state.best_global_step:
            self.state.best_model_checkpoint = str(out / f"checkpoint-{best}")
        if self.args.should_save:
            self.state.save_to_json(str(out / ASIDE / name / "trainer_state.json"))
            checkpoints.write_json(out / ASIDE / name / SETTINGS, self.settings)
            checkpoints.write_manifest(out / ASIDE / name)
            shutil.rmtree(out / name, ignore_errors=True)
            os.rename(out / ASIDE / name, out / name)
            shutil.rmtree(out / ASIDE)
            rotate_checkpoints(str(out), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True)
        process_group.barrier()

    def _save(self, output_dir=None, state_dict=None) -> None:
        """In float32 on the way, so that a training goes on exactly; at the end in `save_dtype`. Raises DataError where a weight
        is not finite, and writes nothing."""
        output_dir = output_dir or self.args.output_dir
        tied = getattr(self.model, "all_tied_weights_keys", {})
        if state_dict is None:
            state_dict = self.model.state_dict()
        else:  # DeepSpeed's has each tied tensor twice
            state_dict = {name: value for name, value in state_dict.items() if name not in tied}
        core = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        final = not self.aside
        if final and self.save_dtype is not None:
            state_dict = {n: v.to(self.save_dtype) if v.is_floating_point() else v for n, v in state_dict.items()}
        bad = [name for name, value in state_dict.items() if value.is_floating_point() and not value.isfinite().all()]
        if bad:
            dtype = f" in {self.save_dtype}" if final else ""
            what = f"{len(bad)} of {len(state_dict)} weights are not finite{dtype}, such as {bad[0]}, after training"
            raise self._gone_wrong(what, self.last_ids)
        with with_cache(core.config):
            super()._save(output_dir, state_dict)
        Path(output_dir, "training_args.bin").unlink(missing_ok=True)  # a pickle
        if self.args.should_save:
            without_traces(Path(output_dir), self.save_dtype if final else None)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        """By the names that the model gives its tensors: transformers 5.23 goes by the file's, and then loads none."""
        if hasattr(self.model, "peft_config"):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        saved = type(self.model).from_pretrained(resume_from_checkpoint, dtype=self.model.dtype, use_safetensors=True)
        self.model.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:
            return super()._load_best_model()
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _gone_wrong(self, what: str, ids: list) -> DataError:
        kept, _ = checkpoints.last_whole(Path(self.args.output_dir))
        kept = f"The last checkpoint, {kept.name}, is good" if kept else "There is no checkpoint yet"
        named = ", ".join(map(str, ids[:16])) + (f" and {len(ids) - 16} more" if len(ids) > 16 else "")
        return DataError(
            f"step {self.state.global_step + 1}: {what} for the samples with id {named}. Look at them, or lower "
            f"--learning_rate. {kept}; nothing was written since."
        )


@contextlib.contextmanager
def with_cache(config):
    """The configuration as it is to be written: with the cache that training switches off."""
    parts = [config, *(getattr(config, name) for name in config.sub_configs if getattr(config, name, None) is not None)]
    off = [part for part in parts if getattr(part, "use_cache", None) is False]
    for part in off:
        part.use_cache = True
    try:
        yield
    finally:
        for part in off:
            part.use_cache = False


TRACES = ("local_files_only", "_name_or_path")


def without_traces(folder: Path, dtype: torch.dtype | None) -> None:
    """Take out of the saved JSON files what says where and how they were made, and say in what dtype the weights are."""
    for path in folder.glob("*config.json"):
        content = json.loads(path.read_text())
        kept = json.loads(path.read_text(), object_hook=lambda part: {k: v for k, v in part.items() if k not in TRACES})
        for part in (kept, *(value for value in kept.values() if isinstance(value, dict))):
            if dtype is not None and "dtype" in part and path.name == "config.json":
                part["dtype"] = str(dtype).removeprefix("torch.")
        if kept != content:
            checkpoints.write_json(path, kept)


class StopWhenAsked(TrainerCallback):
    """SIGTERM or Ctrl-C: finish the step, save a checkpoint, stop. On all ranks at the same step.

    A second Ctrl-C, of a person who does not want to wait, ends at once.
    """

    def __init__(self):
        self.asked, self.heard = False, signal.SIGTERM

    def on_train_begin(self, args, state, control, **_):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._hear)

    def _hear(self, number, _):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked, self.heard = True, number

    def on_step_end(self, args, state, control, **_):
        asked = torch.tensor(float(self.asked), device=args.device)
        if args.world_size > 1:
            dist.all_reduce(asked)
        if asked and state.global_step < state.max_steps:
            self.asked = control.should_save = control.should_training_stop = True
        elif state.global_step >= state.max_steps and not args.load_best:
            control.should_save = False  # what is about to be written as the final model
