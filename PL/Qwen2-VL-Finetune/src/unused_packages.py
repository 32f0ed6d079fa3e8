"""What a training need not import, which takes seconds."""

import os
from pathlib import Path


def unused(flags: list[str]) -> list[str]:
    """Packages that a training with these flags does not use, and that transformers, accelerate and PEFT would import."""
    configs = [os.path.join(flag.rpartition("=")[2], "config.json") for flag in flags]
    models = [Path(file).read_bytes() for file in configs if os.path.isfile(file) and os.access(file, os.R_OK)]
    quantised = not models or any(b'"quantization_config"' in model for model in models)  # a hub id may be
    # --bits, and the optimizers of bitsandbytes.
    quantised |= any(word in flag for flag in flags for word in ("bit", "bnb", "ademamix"))
    found = ["datasets"] + ([] if quantised else ["bitsandbytes"])
    return found if any("deepspeed" in flag for flag in flags) else [*found, "deepspeed"]
