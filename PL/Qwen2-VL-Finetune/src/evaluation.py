"""Accuracy of generated answers."""

import re

import torch
import torch.distributed as dist
from transformers import Trainer

from data import IGNORE


class EvaluatingTrainer(Trainer):
    @torch.inference_mode()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict:
        """Share of samples whose first answer, generated greedily, equals the reference, case, punctuation and spaces aside."""
        samples, world = self.eval_dataset, self.args.world_size
        model, processor, size = (
            self.accelerator.unwrap_model(self.model),
            self.processing_class,
            self.args.eval_batch_size,
        )
        model.eval()
        self.answer_logits.choose(None)
        right, ours = 0, range(self.args.process_index, -(-len(samples) // world) * world, world)
        for start in range(0, len(ours), size):
            asked = [samples[place % len(samples)] for place in ours[start : start + size]]
            batch = {name: value.to(self.args.device) for name, value in self.data_collator.prompts(asked).items()}
            references = [sample["labels"][sample["labels"] != IGNORE] for sample in asked]
            longest = max(map(len, references)) + 8
            out = model.generate(**batch, max_new_tokens=longest, do_sample=False, synced_gpus=world > 1)
            written = out[:, batch["input_ids"].shape[1] :]
            for place, text, reference in zip(ours[start : start + size], written, references, strict=True):
                pair = (_plain(processor.decode(ids, skip_special_tokens=True)) for ids in (text, reference))
                right += place < len(samples) and len(set(pair)) == 1
        total = torch.tensor(float(right), device=self.args.device)
        if world > 1:
            dist.all_reduce(total)
        metrics = {
            f"{metric_key_prefix}_accuracy": total.item() / len(samples),
            f"{metric_key_prefix}_samples": len(samples),
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.logged_at = None  # this was no training
        return metrics


def _plain(text: str) -> str:
    return re.sub(r"[\W_]+", "", text.casefold())
