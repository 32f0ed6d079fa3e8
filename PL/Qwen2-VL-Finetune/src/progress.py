"""What a training prints: lines before the first step, and one for each entry of the log; and its peak memory."""

import resource
import sys

import torch
from transformers import ProgressCallback

from data import IGNORE
from mpa.files.log_file import detail

PROMPT_TOKENS_SHOWN = 40  # of the first sample


class Progress(ProgressCallback):
    """A line for each log entry, and on a terminal a progress bar that shows the last one."""

    def on_train_begin(self, args, state, control, **kwargs):
        if not args.disable_tqdm:
            super().on_train_begin(args, state, control, **kwargs)
            if self.training_bar is not None:
                self.training_bar.set_description("PL")

    def on_step_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        line = log_line(logs or {}, state.global_step, state.max_steps)
        if not line or not state.is_world_process_zero:
            return
        if self.training_bar is None or "eval_accuracy" in logs:
            print(line, flush=True)
        else:
            detail(line)
            self.training_bar.set_postfix_str(line.partition(": ")[2].partition(": ")[2])


def log_line(logs: dict, step: int, steps: int) -> str:
    """An entry of the log as text; "" for one without a loss or an accuracy. trainer_state.json has the entries themselves."""
    figures = []
    if "loss" in logs:
        rates = sorted({float(value) for name, value in logs.items() if name.startswith("lr_")})
        figures += [f"loss {logs['loss']:.4g}", f"gradient norm {logs.get('grad_norm', float('nan')):.3g}"]
        figures += [f"learning rate {' to '.join(f'{rate:.3g}' for rate in dict.fromkeys((rates[0], rates[-1])))}"]
    if "samples_per_second" in logs:
        figures += [f"{logs['samples_per_second']:.3g} samples/s", f"MFU {logs['mfu']:.0%}"]
        figures += [f"{logs['minutes_left']:.1f} min left"]
    if "eval_accuracy" in logs:
        figures += [f"accuracy {logs['eval_accuracy']:.1%} on {logs['eval_samples']} held-out samples"]
    return f"PL: step {step} of {steps}: {', '.join(figures)}" if figures else ""


def start_lines(samples, counts: dict[str, tuple[int, int]], groups: list[dict], steps: str, args) -> list[str]:
    """Samples, steps and tokens on the first line; then each part's parameters and learning rate.

    `counts` are `param_groups.counts`, `groups` the optimizer's parameter groups, `steps` a phrase such as "10 steps of 4".
    """
    tokens, visual = sum(samples.lengths), sum(samples.visual_lengths)
    total, trained = (sum(column) for column in zip(*counts.values(), strict=True))
    rates = {group["part"]: group["lr"] for group in groups}
    lines = [
        f"PL: {len(samples):,} samples, {tokens:,} tokens ({visual:,} visual), {steps} on {args.world_size} "
        f"device{'s' * (args.world_size > 1)} ({args.device.type}); {total / 1e6:,.1f} M parameters, {trained / 1e6:,.1f} M trained."
    ]
    for part, (total, trained) in counts.items():
        rate = f"learning rate {rates[part]:g}" if part in rates else "frozen"
        lines.append(f"  {part}: {total / 1e6:,.2f} M parameters, {trained / 1e6:,.2f} M trained, {rate}")
    return lines


def first_sample_line(encoded: dict, tokenizer) -> str:
    """An encoded sample as text: the end of the prompt, then the labelled tokens between >> and <<."""
    ids, labelled = encoded["input_ids"], encoded["labels"] != IGNORE
    start = int(labelled.int().argmax())
    prompt = tokenizer.decode(ids[max(0, start - PROMPT_TOKENS_SHOWN) : start])
    return f"  first sample, labelled between >> and <<: …{prompt!r}>>{tokenizer.decode(ids[labelled])!r}<<"


def peak_bytes(device: torch.device) -> int:
    """Peak memory of this process: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
