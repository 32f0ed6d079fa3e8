"""Let people rate pseudo labels before and after PI on a local web page, for the paper's table 4.

    bash scripts/setup.sh rating
    python scripts/rate.py results/RUN                   # then open the address that it prints
    python scripts/tables.py results/RUN --table ratings

Reads  the run's PA file and parity set, and their images.
Writes ratings_<lvlm>_<svlm>_<dataset>.jsonl in the run folder: every click at once. The same command goes on where it was stopped.
The samples are random ones of D_PI and of D_PA without D_PI, shuffled together; raters do not see which is which. Several raters
use one address under their own names. The page is served to this machine only.
"""

import argparse
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpa.analysis.ratings import Item, Ratings, pools, select
from mpa.data import DATASETS
from mpa.files import log_file, packages, records
from mpa.files.image_files import ImageError, open_image
from mpa.files.records import InputError
from mpa.runs.folders import ParitySet, RunFolder
from mpa.runs.layout import RunFiles
from mpa.stages import cli


def arguments(argv=None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", type=Path, help="the run folder")
    which = p.add_argument_group("if the folder has several parity sets")
    which.add_argument("--dataset", choices=DATASETS)
    which.add_argument("--lvlm", help="the L-VLM's path or name")
    which.add_argument("--svlm", help="the S-VLM's path or name")
    p.add_argument(
        "--samples", type=cli.number(1), default=50, metavar="N", help="of each of the two sets (default: 50)"
    )
    p.add_argument("--seed", type=int, default=0, help="of selection and order (default: 0)")
    p.add_argument("--pa-json", type=Path, metavar="FILE", help="the PA file (default: the run's)")
    p.add_argument("--image-root", metavar="DIR", help="folder of the images, as for PI")
    p.add_argument(
        "--path-map", type=cli.path_map, action="append", default=[], metavar="OLD=NEW", help="moved images, as for PI"
    )
    p.add_argument(
        "--port", type=cli.number(0, 65535), default=8765, help="on 127.0.0.1; 0: any free port (default: 8765)"
    )
    return p.parse_args(argv)


def parity_set(args) -> ParitySet:
    """The parity set in the run folder that the arguments select. Raises InputError if it is not exactly one."""
    wanted = [args.dataset, *(model and records.short_name(model) for model in (args.lvlm, args.svlm))]
    found = [
        one
        for one in RunFolder(args.run).parity.values()
        if not one.ending and all(w in (None, name) for w, name in zip(wanted, one.cell, strict=True))
    ]
    if len(found) != 1:
        there = "; ".join(f"--dataset {c.dataset} --lvlm {c.lvlm} --svlm {c.svlm}" for c in (one.cell for one in found))
        raise InputError(
            f"{args.run}: holds {len(found)} parity sets; choose one: {there}."
            if found
            else f"{args.run}: no parity set with a meta file for these models and dataset. Run PI.sh first."
        )
    return found[0]


def selected(args, parity: ParitySet, files: RunFiles) -> tuple[list[Item], dict[str, list[Item]]]:
    """(the items to rate, all items of both sets). Raises InputError if a set is empty or an image cannot be opened."""
    pa_json = args.pa_json or files.needed(files.pa, "--pa-json", "PA.sh")
    held_out = set()
    if parity.meta.get("held_out"):
        held_out = {r["image_path"] for r in records.read_json(parity.file.parent / parity.meta["held_out"])}
    by_set = pools(pa_json, parity.file, held_out, dict(args.path_map), args.image_root)
    if not all(by_set.values()):
        raise InputError(f"{parity.file}: PI kept {len(by_set['after'])} of the samples; nothing to compare.")
    items = select(by_set, args.samples, args.seed)
    for item in items:
        try:
            open_image(item.image)
        except ImageError as error:
            raise InputError(
                f"{item.image}: {error}. Name the images' folder with --image-root, or their new place with --path-map."
            ) from None
    return items, by_set


def listen(port: int) -> socket.socket:
    """A listening socket on 127.0.0.1. Raises InputError if the port is taken."""
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(("127.0.0.1", port))
        found.listen()  # now: a browser that opens the address at once waits
    except OSError as error:
        found.close()
        raise InputError(f"--port {port}: {error.strerror}. Choose another, or 0 for any free one.") from None
    return found


def main(argv=None) -> None:
    args = arguments(argv)
    packages.require("The rating page", "rating", "fastapi", "uvicorn")
    if not args.run.is_dir():
        raise InputError(f"{args.run}: no such folder; give a run folder.")
    parity = parity_set(args)
    files = RunFiles(args.run, parity.cell)
    items, by_set = selected(args, parity, files)
    door = listen(args.port)
    log_file.open_log(args.run / "log.txt")
    ratings = Ratings(files.ratings, parity.cell, items, by_set, args.samples, args.seed)

    import uvicorn

    from mpa.analysis.rating_app import application

    counts = [sum(item.set == name for item in items) for name in ("before", "after")]
    print(
        f"{counts[1]} samples of the parity set and {counts[0]} that PI did not keep, shuffled. Ratings go to {ratings.file}."
    )
    print(f"Open http://127.0.0.1:{door.getsockname()[1]}/ and stop with Ctrl-C.", flush=True)
    uvicorn.Server(uvicorn.Config(application(ratings), log_level="warning")).run(sockets=[door])


if __name__ == "__main__":
    cli.run(main)
