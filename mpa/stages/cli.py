"""The stages' command line: what every stage takes, how arguments are checked, how errors and signals end a script."""

import argparse
import os
import random
import select
import signal
import sys
from datetime import date
from pathlib import Path

from mpa.data import DATASETS
from mpa.engines import ENGINES
from mpa.files import disk_errors, distributed, log_file, records, signals
from mpa.files.argument_types import number, path_map, request_json
from mpa.files.records import InputError
from mpa.method.presets import ANCHORED, PRESETS
from mpa.models.families import MAX_PIXELS, MIN_PIXELS
from mpa.models.loading import BITS
from mpa.runs import interchange

LVLM = "Qwen/Qwen2-VL-7B-Instruct"
SVLM = "Qwen/Qwen2-VL-2B-Instruct"


def parser(doc: str) -> argparse.ArgumentParser:
    """A parser with the flags that all stages share; see `parse`. `doc`, the script's docstring, is the help text."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    _data_flags(p)
    _result_flags(p)
    _model_flags(p)
    _engine_flags(p)
    return p


def _data_flags(p: argparse.ArgumentParser) -> None:
    data = p.add_argument_group("data")
    data.add_argument("--dataset", choices=DATASETS, help="which dataset")
    data.add_argument("--annotations", metavar="FILE", help="annotation file (default: the dataset's, under data/)")
    data.add_argument("--image-root", metavar="DIR", help="folder of the images (default: the dataset's, under data/)")
    data.add_argument(
        "--path-map",
        type=path_map,
        action="append",
        metavar="OLD=NEW",
        help="images that the files name in OLD/… are now in NEW/…; can be repeated",
    )
    some = data.add_mutually_exclusive_group()
    some.add_argument("--limit", type=number(1), metavar="N", help="only the first N samples (default: all)")
    some.add_argument("--sample", type=number(1), metavar="N", help="only N samples, drawn at random with --seed")


def _result_flags(p: argparse.ArgumentParser) -> None:
    out = p.add_argument_group("results")
    out.add_argument(
        "--run",
        default=os.environ.get("RUN") or date.today().isoformat(),
        help="results go to results/RUN, or to RUN itself if it has a slash (default: $RUN, or today's date)",
    )
    out.add_argument("--out", type=Path, metavar="FILE", help="write the result here instead")
    out.add_argument("--restart", action="store_true", help="start again: delete the results of earlier calls")
    out.add_argument(
        "--dry-run",
        nargs="?",
        const="text",
        choices=("text", "json"),
        help="run a few samples, estimate the time of all, and write nothing; json: say so in a line of JSON for each model",
    )
    out.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        default=os.environ.get("VERBOSE") == "1",
        help="also print the details that otherwise go only to results/RUN/log.txt",
    )
    method = p.add_argument_group("method")
    method.add_argument(
        "--preset",
        default="paper",
        choices=(*PRESETS, ANCHORED),
        help="paper: as the paper says. released: as the released code does, to the letter. anchored: as the paper, but PI adds all "
        "samples that both models answer right, and holds out 15 %% of the images for the guard (default: %(default)s)",
    )
    method.add_argument("--seed", type=int, default=0, help="random seed for all sampling (default: %(default)s)")
    method.add_argument(
        "--max-new-tokens", type=number(1), default=128, help="longest reply, in tokens (default: %(default)s)"
    )


def _model_flags(p: argparse.ArgumentParser) -> None:
    model = p.add_argument_group("model")
    model.add_argument("--engine", default="hf", choices=ENGINES, help="what runs the model (default: %(default)s)")
    model.add_argument(
        "--batch-size",
        type=number(1),
        default=8,
        help="maximum samples per batch, if memory allows (default: %(default)s)",
    )
    model.add_argument(
        "--batch-tokens",
        type=number(1),
        metavar="N",
        help="maximum tokens per batch, prompts and replies (default: on a GPU what fits in memory, measured; else no limit)",
    )
    model.add_argument(
        "--device", default="auto", help="cpu, cuda:0, mps …; auto: the first GPU, else the CPU (default: auto)"
    )
    model.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="auto: the fastest dtype on this device (default: auto)",
    )
    model.add_argument(
        "--min-pixels", type=number(1), default=MIN_PIXELS, help="enlarge images to this area (default: 128*28*28)"
    )
    model.add_argument(
        "--max-pixels", type=number(1), default=MAX_PIXELS, help="shrink images to this area (default: 512*28*28)"
    )
    model.add_argument(
        "--max-tiles",
        type=number(1),
        metavar="N",
        help="cut an image into at most N tiles, besides the whole image (default: InternVL 6, else the checkpoint's own)",
    )
    model.add_argument(
        "--workers",
        type=number(0),
        metavar="N",
        help="processes that prepare images for a GPU, or that run the model on a CPU, one core each; "
        "0: none (default: 4, or a CPU's number of cores)",
    )
    model.add_argument("--trust-remote-code", action="store_true", help="run code that comes with a checkpoint")


def _engine_flags(p: argparse.ArgumentParser) -> None:
    """Flags of single engines."""
    hf = p.add_argument_group("model, with --engine hf")
    quantization = "load the L-VLM's language model in so many bits (bash scripts/setup.sh quantization)"
    hf.add_argument("--quantization", choices=BITS, help=quantization)
    hf.add_argument("--device-map", choices=("auto",), help="auto: spread the model over all GPUs")
    vllm = p.add_argument_group("model, with --engine vllm (bash scripts/setup.sh vllm)")
    vllm.add_argument(
        "--tensor-parallel-size", type=number(1), default=1, help="GPUs that share each layer (default: %(default)s)"
    )
    vllm.add_argument(
        "--pipeline-parallel-size", type=number(1), default=1, help="GPUs that share the layers (default: %(default)s)"
    )
    vllm.add_argument(
        "--gpu-memory-utilization",
        type=number(0, 1, float, above=True),
        default=0.9,
        help="share of the GPU's memory to take (default: %(default)s)",
    )
    vllm.add_argument(
        "--max-model-len", type=number(1), help="longest prompt plus reply, in tokens (default: from the data)"
    )
    openai = p.add_argument_group(
        "model, with --engine openai (bash scripts/setup.sh openai; its key from $OPENAI_API_KEY)"
    )
    openai.add_argument("--base-url", help="of the server, e.g. http://localhost:8000/v1 (default: OpenAI's)")
    openai.add_argument(
        "--request-json",
        type=request_json,
        metavar="JSON",
        help='further fields of each request, e.g. \'{"reasoning_effort": "none"}\', which switches thinking off; a setting that '
        "decides the replies",
    )
    openai.add_argument("--concurrency", type=number(1), default=16, help="concurrent requests (default: %(default)s)")
    openai.add_argument(
        "--max-cost",
        type=number(0, kind=float),
        metavar="MONEY",
        help="stop before the run costs more, all stages and calls together (default: no limit)",
    )
    openai.add_argument("--price-in", type=number(0, kind=float), default=0.0, help="price of a million prompt tokens")
    openai.add_argument("--price-out", type=number(0, kind=float), default=0.0, help="price of a million reply tokens")
    openai.add_argument(
        "--image-detail", choices=("auto", "low", "high"), default="auto", help="the API's image detail (default: auto)"
    )
    ray = p.add_argument_group("model, with --engine ray (bash scripts/setup.sh ray; joins $RAY_ADDRESS)")
    ray.add_argument(
        "--ray-engine",
        default="hf",
        choices=[name for name in ENGINES if name != "ray"],
        help="engine of each actor (default: %(default)s)",
    )
    ray.add_argument(
        "--actors",
        type=number(1),
        metavar="N",
        help="number of actors on all nodes (default: one per GPU, else one per two cores; for openai one per node)",
    )


def parse(p: argparse.ArgumentParser, argv, named_by: tuple[str, ...] = ()) -> argparse.Namespace:
    """The checked arguments; of the preset `anchored`, `anchored` is True and `preset` is "paper". `named_by` are the arguments whose file names may imply --dataset."""
    args = p.parse_args(argv)
    for name in ("VERBOSE", "MEMORY_CHECK"):
        if (value := os.environ.get(name, "")) not in ("", "0", "1"):
            p.error(f"the variable {name} is {value!r}; give 0 or 1")
    args.anchored, args.preset = args.preset == ANCHORED, "paper" if args.preset == ANCHORED else args.preset
    if not args.dataset:
        named = [getattr(args, name) or () for name in named_by]
        files = [path for value in named for path in (value if isinstance(value, list | tuple) else [value])]
        of_file = set(filter(None, map(_dataset_of, files)))
        if len(of_file) > 1:
            p.error(f"the files are from several datasets: {', '.join(sorted(of_file))}; give files of one dataset")
        if not of_file:
            p.error(f"--dataset is required: one of {', '.join(DATASETS)}")
        (args.dataset,) = of_file
    if args.device_map and distributed.WORLD > 1:
        p.error("--device-map: one process takes all GPUs; leave GPUS out")
    if args.min_pixels > args.max_pixels:
        p.error(f"--min-pixels {args.min_pixels} is more than --max-pixels {args.max_pixels}")
    if args.out and args.out.is_dir():
        p.error(f"--out {args.out} is a folder; name a file")
    folder = args.out.parent if args.out else records.run_folder(args.run)
    args.ledger = folder / "spending.json"
    args.path_map = dict(args.path_map or ())
    args.log = folder / "log.txt"
    return args


def open_log(args, writes: bool = False) -> None:
    """Start results/RUN/log.txt; with --dry-run, which writes nothing, there is none.

    In a new folder only once something `writes`: a call that is refused makes no folder.
    """
    if args.log and not args.dry_run and (writes or args.log.parent.is_dir()):
        log_file.open_log(args.log, args.verbose)
        args.log = None


def _dataset_of(file: Path) -> str | None:
    """The dataset at the end of a result file's name, ours or lmms-eval's."""
    return next((name for name in DATASETS if f"_{name}." in file.name), None) or interchange.dataset_of(file.name)


def selected(items: list, args) -> list:
    """The first --limit items, or --sample random items in their original order."""
    if args.sample and args.sample < len(items):
        drawn = random.Random(args.seed).sample(range(len(items)), args.sample)
        return [items[i] for i in sorted(drawn)]
    return items[: args.limit]


def run(main, remedy: str = "Choose another --run or --out.") -> None:
    """Run a script's `main()`. An error that the user can correct is one line, not a traceback.

    SIGTERM, SIGHUP and Ctrl-C end it with exit code 143, 129 and 130. `remedy` is the advice for a path that cannot be written.
    """
    log_file.install()
    before, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
    sys.unraisablehook = signals.say_unraisable
    for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(signum) != signal.SIG_IGN:  # nohup
            signal.signal(signum, signals.Heard.handle)
    signals.end_with_launcher()
    for stream in (sys.stdout, sys.stderr):  # a file name may be no Unicode
        stream.reconfigure(errors="backslashreplace")
    if not distributed.FIRST:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 -- all say the same
    try:
        try:
            main()
            signals.stop_if_asked()  # e.g. scripts that never looked: what called this must not go on
            distributed.end()
        finally:
            sys.stdout.flush()  # now, where it can still be said that nobody reads
    except InputError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:
        if not _unread(sys.stdout):
            raise
        sys.exit(128 + signal.SIGPIPE)  # quietly, as other programs end before `head`
    except OSError as error:
        if line := disk_line(error, remedy):
            sys.exit(line)
        raise
    except KeyboardInterrupt:
        print("stopped. Run the same command again to go on.", file=sys.stderr)
        sys.exit(128 + (signals.Heard.signal or signal.SIGINT))
    finally:
        signals.Heard.signal = 0
        signal.signal(signal.SIGINT, before)
        sys.unraisablehook = hook


def disk_line(error: OSError, remedy: str) -> str:
    """The one line for an error of the disk; "" for another error."""
    if error.errno in disk_errors.FULL:
        remedy = "Make room and run the same command again: what is finished is kept."
    what = disk_errors.cause(error)
    return f"error: {error.filename or 'the results folder'}: {what}. {remedy}" if what else ""


def _unread(stream) -> bool:
    """Has what read the stream gone? Then nothing more is written there, at the interpreter's end neither."""
    poll = select.poll()
    poll.register(stream, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return True
