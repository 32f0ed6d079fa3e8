"""Held-out accuracy: answers are generated greedily and compared with the references."""

import process_group
import torch
import torch.distributed as dist
from collator import Collator
from transformers import LogitsProcessor, LogitsProcessorList, TrainingArguments

from data import IGNORE, Samples
from mpa.answers.metrics import exact
from mpa.files.records import InputError

EXTRA_TOKENS = 8  # an answer may be so much longer than the longest reference of its batch


@torch.inference_mode()
def accuracy(model, processor, samples: Samples, collator: Collator, args: TrainingArguments) -> float:
    """Share of samples whose generated first answer equals the reference (`metrics.exact`).

    Collective: rank r takes samples r, r + world size, ... The last batch is padded with samples from the start, so
    that all ranks generate equally often (ZeRO-3 would hang otherwise); the padding does not count. Raises InputError,
    with the samples' ids, if logits are not finite.
    """
    world, size, correct, wrong = args.world_size, args.eval_batch_size, 0, []
    indices = range(args.process_index, -(-len(samples) // world) * world, world)
    for start in range(0, len(indices), size):
        chunk = indices[start : start + size]
        encoded = [samples[i % len(samples)] for i in chunk]
        batch = {name: value.to(args.device) for name, value in collator.prompts(encoded).items()}
        references = [sample["labels"][sample["labels"] != IGNORE] for sample in encoded]
        max_new_tokens = max(map(len, references)) + EXTRA_TOKENS
        watch = _Watch()
        output = model.generate(
            **batch,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            synced_gpus=world > 1,
            logits_processor=LogitsProcessorList([watch]),
        )
        generated = output[:, batch["input_ids"].shape[1] :]
        for i, ids, reference in zip(chunk, generated, references, strict=True):
            answer, expected = (processor.decode(tokens, skip_special_tokens=True) for tokens in (ids, reference))
            correct += i < len(samples) and exact(answer, [expected])
        wrong += [sample["sample"] for sample, bad in zip(encoded, watch.bad.tolist(), strict=True) if bad]
    wrong = [name for of_rank in process_group.all_gather(wrong) for name in of_rank]
    if wrong:
        raise InputError(
            f"evaluation: the logits are NaN or infinite for {len(wrong)} of {len(samples)} samples, such as id {wrong[0]}. "
            f"{'Train with --bf16 True or in float32' if args.fp16 else 'Lower --learning_rate, or train in float32'}."
        )
    total = torch.tensor(float(correct), device=args.device)
    if world > 1:
        dist.all_reduce(total)
    return total.item() / len(samples)


class _Watch(LogitsProcessor):
    """Notes the rows [B] in which a logit was NaN or infinite."""

    bad = False

    def __call__(self, input_ids, scores):  # [B, T], [B, V]
        self.bad = ~scores.amax(-1).isfinite() | self.bad
        return scores
