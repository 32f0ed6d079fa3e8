"""The Parity Leveler's trainer: transformers' Trainer for fine-tuning a VLM on answers. See `Leveler`."""

import math
import time
from collections import Counter
from itertools import chain

import activations
import evaluation
import first_sample
import param_groups
import process_group
import progress
import torch
import torch.distributed as dist
import training_memory
from answer_logits import AnswerLogits
from batching import step_sampler
from checkpointing import CheckpointingTrainer
from collator import Collator, packed_rope_positions
from model_loading import compute_dtype
from throughput import FlopCounter, peak_matmul_flops
from torch.nn import functional as F
from transformers import PrinterCallback, ProgressCallback, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from data import IGNORE, Samples
from mpa.files import signals
from mpa.files.log_file import detail
from mpa.files.records import InputError

DIVERGED = 5  # training stops at this multiple of the loss of a uniform guess over the vocabulary


class EpochLoader(torch.utils.data.DataLoader):
    """A DataLoader that passes the epoch, which Trainer sets, on to its batch sampler."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


class Leveler(CheckpointingTrainer):
    """Trainer with these differences:

    - Logits are computed only for labelled tokens (`AnswerLogits`).
    - Vision tower, merger and language model have their own learning rates.
    - A step's samples do not depend on the world size (`batching.StepBatchSampler`).
    - Packed rows get each sample's own positions.
    - A non-finite or exploding loss, or a non-finite gradient, raises InputError with the samples' ids.
    - Checkpoints are atomic; SIGTERM and Ctrl-C save one and stop (`CheckpointingTrainer`).
    - Evaluation measures the accuracy of generated answers.

    Args:
        samples, eval_samples: samples to train on, and held-out ones.
        batch_tokens: maximum tokens of a micro-batch, padding included; 0 for no limit.
    """

    def __init__(
        self,
        *,
        args: TrainingArguments,
        samples: Samples,
        eval_samples: Samples | None = None,
        collator: Collator,
        batch_tokens: int = 0,
        **kwargs,
    ):
        self.sampler, self.epochs = step_sampler(samples.lengths, args, batch_tokens)
        if batch_tokens:
            _set_accumulation(args, self.sampler.micro_batches)
        super().__init__(
            args=args,
            train_dataset=samples,
            data_collator=collator,
            eval_dataset=eval_samples,
            compute_loss_func=_unused,
            **kwargs,
        )
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.add_callback(progress.Progress())
        core = self._base_model()
        self.rope_index = getattr(core.model, "get_rope_index", None)
        self.answer_logits = AnswerLogits(core)
        self.max_loss = DIVERGED * torch.tensor(float(core.config.get_text_config().vocab_size)).log().item()
        self.flops_per_token, self.peak_flops, self.train_seconds = None, None, 0.0
        self.first_step, self.updates = 0, 0  # the step that this call began at, and its steps that changed the weights
        # This rank's samples and tokens in the timed steps: so far, and at the last log; and the time of that log.
        self.timed, self.logged, self.logged_at = Counter(), Counter(), None

    def get_train_dataloader(self) -> EpochLoader:
        args = self.args
        return EpochLoader(
            self.train_dataset,
            batch_sampler=self.sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            persistent_workers=args.dataloader_persistent_workers,
            worker_init_fn=signals.follow_parent,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            in_order=args.dataloader_in_order,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    # --- step and loss ------------------------------------------------------------------------------------

    def _prepare_inputs(self, inputs: dict) -> dict:
        """The batch on the device. The labels stay here, where it is known without waiting for the device what they select.

        The positions of a packed row are computed here, too: there, each sample's size would be waited for.
        """
        if "position_ids" in inputs and self.rope_index:
            inputs = inputs | {"position_ids": packed_rope_positions(inputs, self.rope_index)}
        return super()._prepare_inputs(inputs) | {name: inputs[name] for name in ("labels",) if name in inputs}

    def _prepare_input(self, data):
        if isinstance(data, torch.Tensor) and data.device != self.args.device:
            data = data.to(self.args.device, non_blocking=True)  # the loader has pinned it
        return super()._prepare_input(data)

    def training_step(self, model, inputs, num_items_in_batch=None):
        ids = [sample for sample in inputs["samples"] if sample is not None]
        self.step_ids += ids
        tokens = int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else inputs["input_ids"].numel()
        self.rates = {f"lr_{group['part']}": float(group["lr"]) for group in self.optimizer.param_groups}
        if self.logged_at is None:
            self.logged_at = time.perf_counter()
        if self.flops_per_token is None:
            self.first_step = self.state.global_step
            if not self.answer_logits.tested:
                first_sample.check(self, model)
            self._set_activation_policy()
            self.peak_flops = peak_matmul_flops(self.args.device, compute_dtype(self.args))
            with FlopCounter(self.model) as counter:
                loss = self._checked_step(model, inputs, num_items_in_batch)
            self.flops_per_token, self.logged_at = counter.total / tokens, None  # the first step is slow: not timed
            return loss
        loss = self._checked_step(model, inputs, num_items_in_batch)
        self.timed += Counter(samples=len(ids), tokens=tokens)
        return loss

    def _checked_step(self, model, inputs, num_items_in_batch):
        loss = super().training_step(model, inputs, num_items_in_batch)
        # DeepSpeed's step is part of it. DeepSpeed silently skips a step with a non-finite gradient: right for float16 only.
        if self.is_deepspeed_enabled and not self.args.fp16 and self.model_wrapped.skipped_steps:
            raise self._gradient_divergence()
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """This micro-batch's share of the step's loss: the mean cross-entropy of the labelled tokens of all ranks.

        Raises InputError, with the samples' ids, if the micro-batch's own mean is not finite or above `max_loss`.
        """
        ids, labels = inputs.pop("samples"), inputs.pop("labels")
        next_labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
        mask = next_labels != IGNORE
        self.answer_logits.select(mask, self.args.device)
        logits = self.answer_logits.of(model(**inputs, use_cache=False).logits).float()  # [N, V]
        targets, smoothing = next_labels[mask].to(logits.device, non_blocking=True), self.args.label_smoothing_factor
        loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
        mean = loss.item() / max(1, len(targets))
        if not mean < self.max_loss:  # NaN fails this comparison too
            raise self._divergence(f"the loss is {mean:.1f}", ids)
        world = self.args.world_size if self.args.average_tokens_across_devices else 1
        return loss * world / num_items_in_batch

    # --- activation memory --------------------------------------------------------------------------------

    def _set_activation_policy(self) -> None:
        """Apply `--activation_checkpointing`; "auto" measures the largest micro-batch first. Collective."""
        policy = self.args.activation_policy
        if policy == "auto":
            sizes = self._largest_activation_bytes()
            if is_deepspeed_zero3_enabled():
                del sizes[activations.PRODUCTS]
            policy, reason = activations.fitting_policy(sizes, self._first_step_bytes(), self.args.device)
            if self.args.process_index == 0:
                detail(f"PL: {reason}")
        activations.apply_policy(self.model, policy)

    def _first_step_bytes(self) -> int:
        """Bytes that the first step allocates permanently: gradients, and Adam's two averages unless they exist."""
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        if self.is_deepspeed_enabled:  # which allocates the averages at its start
            config = self.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
            sizes = (getattr(weight, "ds_numel", weight.numel()) * 4 for weight in weights)  # float32
            return 0 if "offload_optimizer" in config else sum(sizes) // self.args.world_size
        averages = 0 if self.optimizer.state else 8
        return sum(weight.numel() * (weight.itemsize + averages) for weight in weights)

    def _largest_activation_bytes(self) -> dict[str, int]:
        """`activations.activation_bytes` of the micro-batch with the most tokens among those still to come."""
        lengths = self.train_dataset.lengths

        def tokens(batch: list[int]) -> int:
            batch_lengths = [lengths[i] for i in batch]
            if self.data_collator.packing:
                return sum(batch_lengths)
            return max(batch_lengths, default=0) * len(batch_lengths)

        batches = map(self.sampler.epoch_batches, range(self.sampler.epoch, self.epochs))
        largest = max(chain.from_iterable(batches), key=tokens)
        batch = self._prepare_inputs(self.data_collator([self.train_dataset[i] for i in largest]))
        self.model.train()
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices),
            self.compute_loss_context_manager(),
            training_memory.must_fit(len(largest)),
        ):
            return activations.activation_bytes(
                lambda: self.compute_loss(self.model, batch, num_items_in_batch=1), self.model
            )

    # --- optimizer ----------------------------------------------------------------------------------------

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class(self._parameter_groups(), **settings)
            if hasattr(self.optimizer, "register_step_pre_hook"):  # it also runs where DeepSpeed wraps the optimizer
                self.optimizer.register_step_pre_hook(self._check_gradients)
        return self.optimizer

    def _parameter_groups(self) -> list[dict]:
        return param_groups.groups(self.model, set(self.get_decay_parameter_names(self.model)), self.args)

    def _check_gradients(self, optimizer, *_) -> None:
        """Before the weights change: raises InputError on all ranks if a gradient on any rank is not finite."""
        gradients = [w.grad for group in optimizer.param_groups for w in group["params"] if w.grad is not None]
        bad = torch.zeros((), device=self.args.device)
        for gradient in gradients:
            bad += (~gradient.isfinite().all()).to(bad)
        if self.args.world_size > 1:
            dist.all_reduce(bad)
        if bad:
            raise self._gradient_divergence()
        self.last_step_ids, self.step_ids = self.step_ids, []
        self.updates += 1

    @property
    def skipped_steps(self) -> int:
        """Steps of this call that changed nothing: in float16, where a gradient overflows, the loss scale is lowered instead."""
        return self.state.global_step - self.first_step - self.updates if self.args.fp16 else 0

    def _gradient_divergence(self) -> InputError:
        """The error for a non-finite gradient, with the step's sample ids of all ranks. Collective."""
        ids = [i for rank_ids in process_group.all_gather(self.step_ids) for i in rank_ids]
        return self._divergence("a gradient is not finite", ids)

    # --- evaluation and logging ---------------------------------------------------------------------------

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict:
        """Measure `evaluation.accuracy` on the held-out samples; log and return it."""
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        self.answer_logits.select(None)
        samples = self.eval_dataset
        accuracy = evaluation.accuracy(model, self.processing_class, samples, self.data_collator, self.args)
        metrics = {f"{metric_key_prefix}_accuracy": accuracy, f"{metric_key_prefix}_samples": len(samples)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.logged_at = None  # the time of the evaluation is not the training's
        return metrics

    def log(self, logs: dict, start_time=None) -> None:
        """Add each part's learning rate, and the throughput since the last log over all ranks, to the logs."""
        if not math.isfinite(logs.get("grad_norm", 0)):  # float16: DeepSpeed skipped the step
            if not self.args.fp16:
                raise self._divergence("the norm of the gradients is not finite", self.last_step_ids)
            del logs["grad_norm"]  # which the log's JSON could not hold
        if "loss" in logs:
            logs.pop("learning_rate", None)
            logs |= self.rates
            now, new = time.perf_counter(), self.timed - self.logged
            if self.logged_at is not None and new:
                seconds = now - self.logged_at
                world, flops = self.args.world_size, self.flops_per_token * new["tokens"] / seconds
                self.train_seconds += seconds
                steps = self.state.max_steps - self.state.global_step
                rank_samples = self.sampler.step_size / world
                logs["minutes_left"] = round(steps * rank_samples * seconds / max(1, new["samples"]) / 60, 1)
                logs["samples_per_second"] = round(new["samples"] * world / seconds, 2)
                logs["tokens_per_second"] = round(new["tokens"] * world / seconds)
                logs["tflops"], logs["mfu"] = round(flops * world / 1e12, 3), round(flops / self.peak_flops, 3)
            self.logged, self.logged_at = self.timed.copy(), now
        super().log(logs, start_time)

    def start_lines(self) -> list[str]:
        """`progress.start_lines` of this training."""
        steps = int(self.sampler.steps_per_epoch * self.args.num_train_epochs)
        steps = self.args.max_steps if self.args.max_steps > 0 else steps
        steps = f"{steps:,} steps of {self.sampler.step_size} (micro-batches per device: {self.sampler.micro_batches})"
        counts = param_groups.counts(self.model)
        return progress.start_lines(self.train_dataset, counts, self._parameter_groups(), steps, self.args)

    def pace(self) -> dict:
        """Seconds of the timed steps (not the first after a start), this rank's samples and tokens in them, and MFU."""
        flops = (self.flops_per_token or 0) * self.timed["tokens"] / max(self.train_seconds, 1e-9)
        figures = {"train_seconds": round(self.train_seconds, 3), "timed": dict(self.timed)}
        return figures | {"mfu": round(flops / (self.peak_flops or 1), 4)}


def _unused(*_, **__):
    """Never called. Trainer counts a step's labelled tokens only if a loss function is given."""
    raise AssertionError


def _set_accumulation(args: TrainingArguments, micro_batches: int) -> None:
    """Set the number of micro-batches of a step, also for DeepSpeed."""
    args.gradient_accumulation_steps = micro_batches
    if args.deepspeed:
        size = args.per_device_train_batch_size * micro_batches * args.world_size
        args.hf_deepspeed_config.config |= {"gradient_accumulation_steps": micro_batches, "train_batch_size": size}
