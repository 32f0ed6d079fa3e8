"""Conversion of an original InternVL2 checkpoint of 1 GB, made at random in two shards: seconds and peak memory.

    python benchmarks/conversion.py [--gigabytes 1]

The peak is that of a process that converts, minus that of one that only imports what a conversion imports, and with the
pages of files left out that the kernel may drop at any time. The last line is a JSON object.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
ORIGINAL = ROOT / "tests/data/originals/internvl2_2b_like"
HIDDEN, VOCABULARY = 1024, 40_000


def make(folder: Path, gigabytes: float) -> None:
    """A checkpoint in bfloat16 with enough layers, in two shards of about the same size."""
    import torch
    from safetensors.torch import load_file, save_file

    config = json.loads((ORIGINAL / "config.json").read_text())
    config["llm_config"] |= {"hidden_size": HIDDEN, "intermediate_size": 4 * HIDDEN, "vocab_size": VOCABULARY}
    config["llm_config"] |= {"num_attention_heads": 16, "num_key_value_heads": 8}
    shapes = {name: list(tensor.shape) for name, tensor in load_file(ORIGINAL / "model.safetensors").items()}
    layer = "language_model.model.layers.0."
    wide = {
        **{f"{layer}attention.wqkv.weight": [2 * HIDDEN, HIDDEN], f"{layer}attention.wo.weight": [HIDDEN, HIDDEN]},
        **{f"{layer}feed_forward.{w}.weight": [4 * HIDDEN, HIDDEN] for w in ("w1", "w3")},
        f"{layer}feed_forward.w2.weight": [HIDDEN, 4 * HIDDEN],
        **{f"{layer}{norm}.weight": [HIDDEN] for norm in ("attention_norm", "ffn_norm")},
    }
    outer = {
        "language_model.model.tok_embeddings.weight": [VOCABULARY, HIDDEN],
        "language_model.model.norm.weight": [HIDDEN],
    }
    outer |= {
        "language_model.output.weight": [VOCABULARY, HIDDEN],
        "mlp1.1.weight": [HIDDEN, 256],
        "mlp1.1.bias": [HIDDEN],
    }
    outer |= {"mlp1.3.weight": [HIDDEN, HIDDEN], "mlp1.3.bias": [HIDDEN]}
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * VOCABULARY * HIDDEN) / sum(map(_size, wide.values()))))
    config["llm_config"]["num_hidden_layers"] = layers
    shapes = {name: shape for name, shape in shapes.items() if ".layers." not in name or "vision" in name} | outer
    for n in range(layers):
        shapes |= {name.replace(".0.", f".{n}.", 1): shape for name, shape in wide.items()}
    names, table = sorted(shapes), {}
    half, total = 0, sum(map(_size, shapes.values())) / 2
    shards = [[], []]
    for name in names:
        shards[half >= total].append(name)
        half += _size(shapes[name])
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: torch.randn(shapes[name]).bfloat16() for name in shard}, folder / file)
        table |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    (folder / "config.json").write_text(json.dumps(config))


def _size(shape: list[int]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size


def child(source: str, out: str) -> None:
    """Import; then convert, watching this process's own memory. Prints both peaks in bytes, and the seconds."""
    import torch  # noqa: F401
    import transformers  # noqa: F401
    from transformers.models.internvl import modeling_internvl  # noqa: F401

    from mpa import conversion

    def anonymous() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) * 1024

    before, peak, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    conversion.convert(source, out, 592)
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    print(json.dumps({"seconds": round(seconds, 1), "peak_bytes": peak - before}))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gigabytes", type=float, default=1.0, help="size of the checkpoint (default: %(default)s)")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "original"
        source.mkdir()
        make(source, args.gigabytes)
        largest = max(file.stat().st_size for file in source.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        command = [sys.executable, __file__, "child", str(source), f"{folder}/out"]
        measured = json.loads(
            subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
        )
        print(f"{size / 1e9:.2f} GB in 2 shards, the largest of {largest / 1e9:.2f} GB: {measured['seconds']} s,")
        print(
            f"peak memory {measured['peak_bytes'] / 1e9:.2f} GB, {measured['peak_bytes'] / largest:.2f} of the largest shard."
        )
        print(json.dumps(measured | {"bytes": size, "largest_shard_bytes": largest}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(*sys.argv[2:])
    else:
        main()
