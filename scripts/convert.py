"""Convert an original checkpoint of InternVL2, InternVL2.5 or TinyLLaVA into one that transformers loads by itself.

    python scripts/convert.py OpenGVLab/InternVL2-2B --out models/InternVL2-2B-hf
    python scripts/convert.py bczhou/TinyLLaVA-2.0B --out models/TinyLLaVA-2.0B-hf

The originals need code that comes with them. This reads their config.json, safetensors and tokenizer files only, and
runs none of that code. The result is an ordinary model folder: weights, configuration, processor, tokenizer, chat template.

The stages and PL.sh convert an original by themselves, once, into $MPA_CACHE (default: mpa, beside the Hugging Face
cache); so SVLM=OpenGVLab/InternVL2-2B just works.
"""

import argparse
import contextlib
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpa.files.argument_types import number
from mpa.files.printable import as_size
from mpa.models import conversion
from mpa.stages import cli


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", help="the original: a folder or a hub id")
    where = p.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, metavar="DIR", help="write the converted model to this new folder")
    where.add_argument(
        "--cached", action="store_true", help="print the folder to load for any model; an original is converted once"
    )
    p.add_argument(
        "--vision-tower",
        metavar="MODEL",
        help="TinyLLaVA's vision tower, a folder or a hub id (default: mm_vision_tower in config.json, looked for "
        "inside and beside the checkpoint, then on the hub)",
    )
    p.add_argument(
        "--image-token-id",
        type=number(0),
        metavar="N",
        help="id of the image token, for a checkpoint without tokenizer files; then no processor is written",
    )
    args = p.parse_args(argv)
    if args.cached:
        with contextlib.redirect_stdout(sys.stderr):
            folder = conversion.converted(args.model)
        print(folder)
        return
    started = time.time()
    conversion.convert(args.model, args.out, args.image_token_id, args.vision_tower)
    size = sum(file.stat().st_size for file in args.out.iterdir())
    print(f"Wrote {args.out} ({as_size(size)}, {time.time() - started:.0f} s). Use it as LVLM or SVLM in any stage.")


if __name__ == "__main__":
    cli.run(main, remedy="Choose another --out.")
