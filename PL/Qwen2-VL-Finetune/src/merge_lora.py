"""Merge LoRA adapters into their base model. The result is a regular model folder.

python src/merge_lora.py --model-path ADAPTER --save-model-path OUT        # the adapter names its base model
"""

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[3]))  # the repository, for mpa

from transformers import AutoProcessor

from mpa.files import disk_errors
from mpa.files.records import InputError
from mpa.models import model_files
from mpa.models.identity import adapted
from mpa.models.loading_errors import explained
from mpa.models.model_files import ADAPTER


def merge(adapter: Path, out: Path, base: str | None = None, trust_remote_code: bool = False) -> None:
    """Write the merged model in float32, and the processor, to `out`. Adapter and base model are not changed.

    `base` replaces the base model that the adapter names. Raises InputError, and writes nothing, if one of the two is damaged,
    incomplete, or not what it was in the training.
    """
    with explained(str(adapter)):
        base = base or adapted(str(adapter))
        processor = AutoProcessor.from_pretrained(adapter, trust_remote_code=trust_remote_code)
    with explained(base):
        model = model_files.load(base, str(adapter), dtype="float32", trust_remote_code=trust_remote_code)
    model.merge_and_unload().save_pretrained(out)
    processor.save_pretrained(out)
    model_files.write_manifest(out, model_files.files_of(out))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model-path", type=Path, required=True, help="the adapter's folder")
    p.add_argument("--model-base", help="the base model, if it is not where the adapter says")
    p.add_argument("--save-model-path", type=Path, required=True, help="folder for the merged model")
    p.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the base model")
    args = p.parse_args()
    if not (args.model_path / ADAPTER).is_file():
        sys.exit(f"error: {args.model_path}: has no {ADAPTER}. Name the output folder of a LoRA training.")
    out = args.save_model_path
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        sys.exit(f"error: {out}: is not an empty folder. Choose another --save-model-path.")
    try:
        with disk_errors.named(args.save_model_path):
            merge(args.model_path, args.save_model_path, args.model_base, args.trust_remote_code)
    except InputError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if not (what := disk_errors.cause(error)):
            raise
        shutil.rmtree(args.save_model_path, ignore_errors=True)  # a part of it
        sys.exit(
            f"error: {error.filename}: {what}. Nothing was merged; the adapter is as it was. Make room and try again."
        )
    print(f"Wrote {args.save_model_path}. Next: evaluate.sh with MODEL={args.save_model_path}.")


if __name__ == "__main__":
    main()
