"""What the trainer tells: the line at the start, the device's pace, the model card."""

from pathlib import Path


def size_of(folder: Path) -> int:
    """Bytes of the weights in a model's folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def start_lines(samples, counts: dict, groups: list[dict], steps: str, args) -> list[str]:
    """Samples, `steps` in words, tokens, parameters by part with their learning rates, and the memory of weights and optimizer."""
    tokens, visual = sum(samples.lengths), sum(samples.visual)
    trained = sum(of for _, of in counts.values())
    total = sum(whole for whole, _ in counts.values())
    half = 2 if args.bf16 or args.fp16 else 4
    # Weights as computed with, gradients, and for what is trained a float32 copy and Adam's two averages.
    state = total * half + trained * (half + 8 + (4 if half == 2 else 0))
    rates = {group["part"]: group["lr"] for group in groups}
    lines = [
        f"PL: {len(samples):,} samples, {tokens:,} tokens ({visual:,} visual), {steps} on {args.world_size} "
        f"device{'s' * (args.world_size > 1)} ({args.device.type}); {total / 1e6:,.1f} M parameters, {trained / 1e6:,.1f} M trained; "
        f"{state / 2**30:.1f} GiB for weights, gradients and optimizer before any sharding."
    ]
    for part, (whole, of) in counts.items():
        rate = f"learning rate {rates[part]:g}" if part in rates else "frozen"
        lines.append(f"  {part}: {whole / 1e6:,.2f} M parameters, {of / 1e6:,.2f} M trained, {rate}")
    return lines


def labelled_line(encoded: dict, tokenizer, ignore: int) -> str:
    """The first sample as it is learnt, decoded: the prompt's end, and in >> << what is labelled."""
    ids, at = encoded["input_ids"], encoded["labels"] != ignore
    start = int(at.int().argmax())
    before, answer = tokenizer.decode(ids[max(0, start - 40) : start]), tokenizer.decode(ids[at])
    return f"  first sample, labelled between >> and <<: …{before!r}>>{answer!r}<<"
