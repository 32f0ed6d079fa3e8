"""transformers' Trainer, with what fine-tuning a VLM on answers needs: see `Leveler`."""

import math
import time
from collections import Counter
from itertools import chain

import activations
import param_groups
import process_group
import report
import throughput
import torch
import torch.distributed as dist
from answer_logits import AnswerLogits
from batching import Batches, pieces_within
from checkpointing import CheckpointingTrainer, StopWhenAsked
from collator import Collator
from evaluation import EvaluatingTrainer
from features import Features
from torch.nn import functional as F
from transformers import TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from data import IGNORE, Samples

EXPLODED = 5  # times the loss of guessing among all tokens, at which training stops


class Loader(torch.utils.data.DataLoader):
    """Tells its batch sampler the epoch, as Trainer tells its loader."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


class Leveler(CheckpointingTrainer, EvaluatingTrainer):
    """Trainer, but:

    logits, and what only they need, are computed only where there is a label; each part of the model has its learning rate; a step's
    samples do not depend on the number of devices; packed rows get each sample's own positions; a loss that is no
    number stops with the samples' ids; checkpoints are written aside and renamed; SIGTERM and Ctrl-C save and stop;
    evaluation is the share of answers generated right.
    """

    def __init__(
        self,
        *,
        args: TrainingArguments,
        samples: Samples,
        eval_samples: Samples | None = None,
        collator: Collator,
        features: Features | None = None,
        batch_tokens: int = 0,
        settings: dict,
        save_dtype: torch.dtype | None = None,
        **kwargs,
    ):
        self.save_dtype = save_dtype
        self.stop = StopWhenAsked()
        self.batches = Batches(
            samples.lengths,
            args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
            args.gradient_accumulation_steps,
            args.process_index,
            args.world_size,
            args.seed if args.data_seed is None else args.data_seed,
            shuffle=args.train_sampling_strategy != "sequential",
        )
        self.epochs = math.ceil(
            args.max_steps / self.batches.steps_an_epoch if args.max_steps > 0 else args.num_train_epochs
        )
        if batch_tokens:
            self.batches.pieces = pieces_within(self.batches, batch_tokens, self.epochs)
            _accumulate(args, self.batches.pieces)
        super().__init__(
            args=args,
            train_dataset=samples,
            callbacks=[self.stop],
            data_collator=collator,
            eval_dataset=eval_samples,
            compute_loss_func=_unused,
            **kwargs,
        )
        self.settings, self.features, self.aside = settings, features, None
        core = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        self.rope_index = getattr(core.model, "get_rope_index", None)
        self.answer_logits = AnswerLogits(core)
        self.limit = EXPLODED * torch.tensor(float(core.config.get_text_config().vocab_size)).log().item()
        self.flops_a_token, self.peak, self.train_seconds = None, None, 0.0
        self.seen, self.logged, self.logged_at = Counter(), Counter(), None
        self.step_ids, self.last_ids = [], []  # of the samples since the last optimizer step, and before it

    # --- data -----------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Loader:
        args = self.args
        return Loader(
            self.train_dataset,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    # --- loss -----------------------------------------------------------------------------------------

    def training_step(self, model, inputs, num_items_in_batch=None):
        ids = [sample for sample in inputs["samples"] if sample is not None]
        self.step_ids += ids
        tokens = int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else inputs["input_ids"].numel()
        self.rates = {f"lr_{group['part']}": float(group["lr"]) for group in self.optimizer.param_groups}
        if self.logged_at is None:
            self.logged_at = time.perf_counter()
        if self.flops_a_token is None:
            self._keep_what_fits()
            self.peak = throughput.matmul_peak(self.args.device, compute_dtype(self.args))
            with throughput.Operations(self.model) as counted:
                loss = self._step(model, inputs, num_items_in_batch)
            self.flops_a_token, self.logged_at = counted.total / tokens, None  # a first step is slow
            return loss
        loss = self._step(model, inputs, num_items_in_batch)
        self.seen += Counter(samples=len(ids), tokens=tokens)
        return loss

    def _step(self, model, inputs, num_items_in_batch):
        loss = super().training_step(model, inputs, num_items_in_batch)
        # DeepSpeed steps in there, and leaves a step out in silence where a gradient is not finite: right with float16 alone.
        if self.is_deepspeed_enabled and not self.args.fp16 and self.model_wrapped.skipped_steps:
            raise self._gone_wrong(
                "a gradient is not finite", [i for of_rank in process_group.all_gather(self.step_ids) for i in of_rank]
            )
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean over all labelled tokens of the step, on whatever devices they are."""
        ids, labels = inputs.pop("samples"), inputs.pop("labels")
        following = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
        chosen = following != IGNORE
        self.answer_logits.choose(chosen)
        if "position_ids" in inputs and self.rope_index:
            inputs["position_ids"] = self._packed_positions(inputs)
        if "features" in inputs:
            self.features.put_into(inputs)
        logits = model(**inputs, use_cache=False).logits[0]  # [N, V]
        targets = following[chosen]
        smoothing = self.args.label_smoothing_factor
        loss = F.cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=smoothing)
        mean = loss.item() / max(1, len(targets))
        if not mean < self.limit:  # nan too
            raise self._gone_wrong(f"the loss is {mean:.1f}", ids)
        world = self.args.world_size if self.args.average_tokens_across_devices else 1
        return loss * world / num_items_in_batch

    def _packed_positions(self, inputs: dict) -> torch.Tensor:
        """[4, 1, T] for models that give a token three positions: within its sample, then the model's three."""
        within = inputs["position_ids"][0]
        sizes = torch.diff((within == 0).nonzero()[:, 0], append=torch.tensor([len(within)], device=within.device))
        rows = {}
        for name in ("input_ids", "mm_token_type_ids"):
            pieces = inputs[name][0].split(sizes.tolist())
            rows[name] = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True)
        mask = (torch.arange(rows["input_ids"].shape[1], device=within.device) < sizes[:, None]).long()
        three, _ = self.rope_index(**rows, image_grid_thw=inputs.get("image_grid_thw"), attention_mask=mask)
        return torch.cat([within[None], three[:, mask.bool()].to(within)])[:, None]

    # --- memory ---------------------------------------------------------------------------------------

    def _keep_what_fits(self) -> None:
        """Before the first step, unless `--activation_checkpointing` says what is to be kept."""
        way = self.args.keep
        if way == "auto":
            kept = self._largest_batch_keeps()
            if is_deepspeed_zero3_enabled():
                del kept[activations.PRODUCTS]
            way, says = activations.fitting(kept, self._to_come(), self.args.device)
            if self.args.process_index == 0:
                print(f"PL: {says}", flush=True)
        activations.use(self.model, way)

    def _to_come(self) -> int:
        """Bytes that the first step adds for good: gradients, and Adam's two averages where they are not there yet."""
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        if self.is_deepspeed_enabled:  # which has its averages from the start
            offloads = (
                "offload_optimizer" in self.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
            )
            sizes = (getattr(weight, "ds_numel", weight.numel()) * weight.itemsize for weight in weights)
            return 0 if offloads else sum(sizes) // self.args.world_size
        averages = 0 if self.optimizer.state else 8
        return sum(weight.numel() * (weight.itemsize + averages) for weight in weights)

    def _largest_batch_keeps(self) -> dict[str, int]:
        """What the batch with the most tokens that is still to come keeps for its backward pass, by the ways to keep it."""
        lengths = self.train_dataset.lengths

        def tokens(batch: list[int]) -> int:
            of = [lengths[i] for i in batch]
            return sum(of) if self.data_collator.packing else max(of, default=0) * len(of)

        to_come = (self.batches.of(epoch) for epoch in range(self.batches.epoch, self.epochs))
        largest = max(chain.from_iterable(to_come), key=tokens)
        batch = self._prepare_inputs(self.data_collator([self.train_dataset[i] for i in largest]))
        self.model.train()
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices), self.compute_loss_context_manager():
            return activations.kept_bytes(
                lambda: self.compute_loss(self.model, batch, num_items_in_batch=1), self.model
            )

    # --- optimizer --------------------------------------------------------------------------------------

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = kind(self._groups(), **settings)
            if hasattr(self.optimizer, "register_step_pre_hook"):  # DeepSpeed steps with it, too
                self.optimizer.register_step_pre_hook(self._refuse_bad_gradients)
        return self.optimizer

    def _refuse_bad_gradients(self, optimizer, *_) -> None:
        """Before any weight is changed: raises DataError, on all ranks, where a gradient is not finite on one."""
        gradients = [w.grad for group in optimizer.param_groups for w in group["params"] if w.grad is not None]
        bad = torch.zeros((), device=self.args.device)
        for gradient in gradients:
            bad += (~gradient.isfinite().all()).to(bad)
        if self.args.world_size > 1:
            dist.all_reduce(bad)
        if bad:
            ids = [i for of_rank in process_group.all_gather(self.step_ids) for i in of_rank]
            raise self._gone_wrong("a gradient is not finite", ids)
        self.last_ids, self.step_ids = self.step_ids, []

    def _groups(self) -> list[dict]:
        return param_groups.groups(self.model, set(self.get_decay_parameter_names(self.model)), self.args)

    # --- what a user sees --------------------------------------------------------------------------------

    def log(self, logs: dict, start_time=None) -> None:
        if "loss" in logs:
            logs.pop("learning_rate", None)
            logs |= self.rates
            now, new = time.perf_counter(), self.seen - self.logged
            if self.logged_at is not None and new:
                seconds = now - self.logged_at
                world, flops = self.args.world_size, self.flops_a_token * new["tokens"] / seconds
                self.train_seconds += seconds
                steps = self.state.max_steps - self.state.global_step
                batch = self.batches.size / world
                logs["minutes_left"] = round(steps * batch * seconds / max(1, new["samples"]) / 60, 1)
                logs["samples_per_second"] = round(new["samples"] * world / seconds, 2)
                logs["tokens_per_second"] = round(new["tokens"] * world / seconds)
                logs["tflops"], logs["mfu"] = round(flops * world / 1e12, 3), round(flops / self.peak, 3)
            self.logged, self.logged_at = self.seen.copy(), now
        super().log(logs, start_time)

    def start_lines(self) -> list[str]:
        steps = int(self.batches.steps_an_epoch * self.args.num_train_epochs)
        steps = self.args.max_steps if self.args.max_steps > 0 else steps
        steps = f"{steps:,} steps of {self.batches.size} ({self.batches.pieces} batches a device)"
        return report.start_lines(self.train_dataset, param_groups.counts(self.model), self._groups(), steps, self.args)

    def pace(self) -> dict:
        """Seconds of the steps timed (all but the first after a start), this device's samples and tokens in them, and MFU."""
        flops = (self.flops_a_token or 0) * self.seen["tokens"] / max(self.train_seconds, 1e-9)
        figures = {"train_seconds": round(self.train_seconds, 3), "timed": dict(self.seen)}
        return figures | {"mfu": round(flops / (self.peak or 1), 4)}

    @property
    def interrupted(self) -> bool:
        return self.stop.asked and self.state.global_step < self.state.max_steps


def _unused(*_, **__):
    """Trainer counts the step's labelled tokens only where it is given a loss; `compute_loss` is used instead."""
    raise AssertionError


def _accumulate(args: TrainingArguments, pieces: int) -> None:
    """Have a step's gradients come from so many pieces a device, for DeepSpeed too."""
    args.gradient_accumulation_steps = pieces
    if args.deepspeed:
        size = args.per_device_train_batch_size * pieces * args.world_size
        args.hf_deepspeed_config.config |= {"gradient_accumulation_steps": pieces, "train_batch_size": size}


def compute_dtype(args) -> torch.dtype:
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
