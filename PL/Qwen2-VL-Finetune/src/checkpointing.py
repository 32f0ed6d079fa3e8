"""Saving and loading of checkpoints: atomic, never with non-finite weights, also on SIGTERM or Ctrl-C."""

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

from mpa.files import signals
from mpa.files.records import InputError
from mpa.models import model_files
from mpa.models.loading_errors import explained

SETTINGS = "train_settings.json"  # in each checkpoint: the settings of `resume_settings`
STAGING = ".saving"  # folder in the output folder that a checkpoint is written to before it is renamed


class CheckpointingTrainer(Trainer):
    """Trainer with atomic checkpoints in float32 and final weights in `save_dtype`.

    Args:
        settings: written to each checkpoint as `train_settings.json`; a resumed run must have the same.
        save_dtype: dtype of the final weights; None keeps the training's float32.
    """

    def __init__(self, *, settings: dict, save_dtype: torch.dtype | None = None, **kwargs):
        self.settings, self.save_dtype, self.staging = settings, save_dtype, None
        # This rank's sample ids since the last optimizer step, and those of that step.
        self.step_ids, self.last_step_ids = [], []
        self.stop = StopOnSignal()
        super().__init__(callbacks=[self.stop], **kwargs)
        self.base_digests = getattr(self.model, "base_digests", None)  # of adapters

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended the training before its last step."""
        return self.stop.requested and self.state.global_step < self.state.max_steps

    def train(self, resume_from_checkpoint=None, **kwargs):
        """Raises InputError if the checkpoint's adapters were trained on another base model."""
        if resume_from_checkpoint and self.base_digests:
            with explained(resume_from_checkpoint):
                model_files.check_base(Path(resume_from_checkpoint), self.settings["model_id"], self.base_digests)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _get_output_dir(self, trial) -> str:
        return str(self.staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model, trial) -> None:
        """Write to the staging folder, then rename: a checkpoint that exists is complete. Collective."""
        out, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        self.staging = out / STAGING
        if self.args.should_save:
            shutil.rmtree(self.staging, ignore_errors=True)
        process_group.barrier()
        super()._save_checkpoint(model, trial)
        self.staging = None
        process_group.barrier()
        if best := self.state.best_global_step:
            self.state.best_model_checkpoint = str(out / f"checkpoint-{best}")
        if self.args.should_save:
            staged = out / STAGING / name
            self.state.save_to_json(str(staged / "trainer_state.json"))
            model_files.write_json(staged / SETTINGS, self.settings)
            checkpoints.write_manifest(staged)
            shutil.rmtree(out / name, ignore_errors=True)
            os.rename(staged, out / name)
            model_files.sync(out)
            shutil.rmtree(out / STAGING)
            rotate_checkpoints(str(out), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True)
        process_group.barrier()

    def _save(self, output_dir=None, state_dict=None) -> None:
        """Write the weights: checkpoints in float32, so that resuming is exact; the final model in `save_dtype`.

        Raises InputError if a weight is not finite; then nothing is written.
        """
        output_dir = output_dir or self.args.output_dir
        tied = getattr(self.model, "all_tied_weights_keys", {})
        if state_dict is None:
            state_dict = self.model.state_dict()
        # It holds each tied tensor twice, and in another dtype these are no longer seen to be one.
        state_dict = {name: value for name, value in state_dict.items() if name not in tied}
        final = not self.staging
        if final and self.save_dtype is not None:
            state_dict = {n: v.to(self.save_dtype) if v.is_floating_point() else v for n, v in state_dict.items()}
        bad = [name for name, value in state_dict.items() if value.is_floating_point() and not value.isfinite().all()]
        if bad:
            dtype = f" in {self.save_dtype}" if final else ""
            what = f"{len(bad)} of {len(state_dict)} weights are not finite{dtype}, such as {bad[0]}, after training"
            raise self._divergence(what, self.last_step_ids)
        with use_cache_restored(self._base_model().config):
            super()._save(output_dir, state_dict)
        Path(output_dir, "training_args.bin").unlink(missing_ok=True)  # a pickle
        if self.args.should_save:
            clean_configs(Path(output_dir), self.save_dtype if final else None)
            if self.base_digests:
                model_files.write_json(Path(output_dir, model_files.BASE), self.base_digests)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        """Load the weights, all of them: transformers 5.23 compares the file's names with the model's and may load none."""
        with explained(resume_from_checkpoint):
            if hasattr(self.model, "peft_config"):
                return model_files.load_adapters(self.model, resume_from_checkpoint, is_trainable=True)
            kind, dtype = type(self.model), self.model.dtype
            saved = model_files.load(resume_from_checkpoint, model_class=kind, dtype=dtype)
        self.model.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if why := checkpoints.fault(Path(best)):
            raise InputError(f"{best}: {why}. It had the best accuracy; --resume_from_checkpoint no starts again.")
        if self.is_deepspeed_enabled:
            return super()._load_best_model()
        self._load_from_checkpoint(best)

    def _base_model(self) -> torch.nn.Module:
        """The model without PEFT's wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def _divergence(self, what: str, ids: list) -> InputError:
        """The error that ends a diverged training: step, sample ids (16 at most) and the last good checkpoint."""
        last, _ = checkpoints.last_complete(Path(self.args.output_dir))
        good = f"The last checkpoint, {last.name}, is good" if last else "There is no checkpoint yet"
        named = ", ".join(map(str, ids[:16])) + (f" and {len(ids) - 16} more" if len(ids) > 16 else "")
        dtype = ", or train with --bf16 True" if self.args.fp16 else ""
        return InputError(
            f"step {self.state.global_step + 1}: {what} for the samples with id {named}. Check them, or lower "
            f"--learning_rate{dtype}. {good}; nothing was written since."
        )


@contextlib.contextmanager
def use_cache_restored(config):
    """Set `use_cache` to True while the configuration is written, since training turned it off."""
    parts = [config, *(getattr(config, name) for name in config.sub_configs if getattr(config, name, None) is not None)]
    off = [part for part in parts if getattr(part, "use_cache", None) is False]
    for part in off:
        part.use_cache = True
    try:
        yield
    finally:
        for part in off:
            part.use_cache = False


def clean_configs(folder: Path, dtype: torch.dtype | None) -> None:
    """Remove local paths from the saved configuration files, and set the weights' dtype in config.json if given."""
    for path in folder.glob("*config.json"):
        content = json.loads(path.read_text())
        kept = json.loads(
            path.read_text(),
            object_hook=lambda part: {k: v for k, v in part.items() if k not in model_files.LOCAL_KEYS},
        )
        for part in (kept, *(value for value in kept.values() if isinstance(value, dict))):
            if dtype is not None and "dtype" in part and path.name == "config.json":
                part["dtype"] = str(dtype).removeprefix("torch.")
        if kept != content:
            model_files.write_json(path, kept)


class StopOnSignal(TrainerCallback):
    """On SIGTERM or Ctrl-C: finish the step, save a checkpoint and stop, all ranks at the same step.

    A second Ctrl-C ends the process at once.
    """

    def __init__(self):
        self.requested, self.signal = False, signal.SIGTERM

    def on_train_begin(self, args, state, control, **_):
        signals.stop_if_asked()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number, _):
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested, self.signal = True, number

    def on_step_end(self, args, state, control, **_):
        requested = torch.tensor(float(self.requested), device=args.device)
        if args.world_size > 1:
            dist.all_reduce(requested)
        if requested and state.global_step < state.max_steps:
            self.requested = control.should_save = control.should_training_stop = True
        elif state.global_step >= state.max_steps and not args.load_best:
            control.should_save = False  # the same weights are about to be written as the final model
