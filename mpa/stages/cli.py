"""The stages' command line: what every stage takes, how arguments are checked, how errors and signals end a script.

Flags that most users need are on the first screen, which --help shows: those of `StageParser.add_argument`. The others are in
topics, which --help-all shows too: those of `StageParser.topic(…).add_argument`.
"""

import argparse
import os
import random
import select
import signal
import sys
from pathlib import Path

from mpa.data import DATASETS
from mpa.engines import ENGINES
from mpa.engines.batch_plan import GPU_ROWS, ROWS
from mpa.files import disk_errors, distributed, log_file, records, signals
from mpa.files.argument_types import number, path_map, request_json
from mpa.files.records import InputError
from mpa.method.presets import ANCHORED, PRESETS
from mpa.models.families import MAX_PIXELS, MIN_PIXELS
from mpa.models.loading import BITS
from mpa.runs import interchange
from mpa.runs.layout import DATASET, LVLM, SVLM, default_run


class StageParser(argparse.ArgumentParser):
    """Flags in two parts: the first screen and the topics. `doc`, the script's docstring, opens both helps."""

    def __init__(self, doc: str):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(usage="%(prog)s [FLAGS]", description=doc, formatter_class=formatter, add_help=False)
        self._topics = {}
        self.add_argument("-h", "--help", nargs=0, action=_Help, help="show these flags")
        self.add_argument("--help-all", nargs=0, action=_Help, help="show all flags, by topic")

    def topic(self, title: str):
        """The group of flags with this title: it is made when first asked for."""
        if title not in self._topics:
            self._topics[title] = self.add_argument_group(title)
        return self._topics[title]

    def hide_topics(self) -> None:
        """Leave the topics out of the help, and name them at its end."""
        for group in self._topics.values():
            for action in group._group_actions:
                action.help = argparse.SUPPRESS
        self.epilog = f"More flags, with --help-all: {', '.join(title.partition(' (')[0] for title in self._topics)}."


class _Help(argparse.Action):
    def __init__(self, option_strings, dest, **options):
        super().__init__(option_strings, argparse.SUPPRESS, default=argparse.SUPPRESS, **options)

    def __call__(self, parser: StageParser, namespace, values, option_string=None):
        if option_string != "--help-all":
            parser.hide_topics()
        parser.print_help()
        parser.exit()


def parser(doc: str) -> StageParser:
    """A parser with the flags that all stages share; see `parse`."""
    p = StageParser(doc)
    _first_flags(p)
    _data_flags(p.topic("data"))
    _result_flags(p.topic("results"))
    _model_flags(p.topic("models and memory"))
    _vllm_flags(p.topic("engine vllm (bash scripts/setup.sh vllm)"))
    _server_flags(p.topic("engine openai and servers (bash scripts/setup.sh openai; the key from $OPENAI_API_KEY)"))
    _ray_flags(p.topic("engine ray (bash scripts/setup.sh ray; joins $RAY_ADDRESS)"))
    return p


def add_lvlm(p: StageParser, more: str = "") -> None:
    p.add_argument(
        "--model-path-lvlm",
        default=LVLM,
        metavar="MODEL",
        help=f"the L-VLM: a folder or hub id{more} (default: {LVLM})",
    )


def add_svlm(p: StageParser) -> None:
    p.add_argument(
        "--model-path-svlm", default=SVLM, metavar="MODEL", help=f"the S-VLM: a folder or hub id (default: {SVLM})"
    )


def _first_flags(p: StageParser) -> None:
    p.add_argument("--dataset", choices=DATASETS, help=f"which dataset (default: {DATASET})")
    p.add_argument("--image-root", metavar="DIR", help="folder of the images (default: the dataset's, under data/)")
    some = p.add_mutually_exclusive_group()
    some.add_argument("--limit", type=number(1), metavar="N", help="only the first N samples (default: all)")
    some.add_argument("--sample", type=number(1), metavar="N", help="only N samples, drawn at random with --seed")
    p.add_argument(
        "--run",
        default=default_run(),
        help="results go to results/RUN, or to RUN if it has a slash (default: $RUN, or today's date)",
    )
    p.add_argument("--restart", action="store_true", help="delete the results of earlier calls, and start again")
    p.add_argument(
        "--dry-run",
        nargs="?",
        const="text",
        choices=("text", "json"),
        help="run a few samples, estimate the time, write nothing; json: say so in a line of JSON for each model",
    )
    p.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        default=os.environ.get("VERBOSE") == "1",
        help="print the details, too, that go to results/RUN/log.txt",
    )
    p.add_argument(
        "--preset",
        default="paper",
        choices=(*PRESETS, ANCHORED),
        help="paper: as the paper says; released: as its code does; anchored: paper, with what both models answer right, and 15 %% of "
        "the images held out for the guard (default: %(default)s)",
    )
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of all sampling (default: %(default)s)")
    p.add_argument("--engine", default="hf", choices=ENGINES, help="what runs the model (default: %(default)s)")
    p.add_argument(
        "--batch-size",
        type=number(1),
        metavar="N",
        help=f"at most N samples per batch, if memory allows (default: on a GPU what fits, up to {GPU_ROWS}; else {ROWS})",
    )
    for name, default, what in (("min", MIN_PIXELS, "enlarge"), ("max", MAX_PIXELS, "shrink")):
        p.add_argument(
            f"--{name}-pixels",
            type=number(1),
            default=default,
            metavar="N",
            help=f"{what} images to this area (default: {default // 28**2}*28*28)",
        )


def _data_flags(data) -> None:
    data.add_argument("--annotations", metavar="FILE", help="annotation file (default: the dataset's, under data/)")
    data.add_argument(
        "--path-map",
        type=path_map,
        action="append",
        metavar="OLD=NEW",
        help="images that the files name in OLD/… are now in NEW/…; can be repeated",
    )


def _result_flags(results) -> None:
    results.add_argument("--out", type=Path, metavar="FILE", help="write the result here instead")


def _model_flags(model) -> None:
    model.add_argument(
        "--max-new-tokens", type=number(1), default=128, help="longest reply, in tokens (default: %(default)s)"
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
        help="auto: the fastest on this device in which the model does not overflow (default: auto)",
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
    quantization = (
        "load the L-VLM's language model in so many bits, with --engine hf (bash scripts/setup.sh quantization)"
    )
    model.add_argument("--quantization", choices=BITS, help=quantization)
    model.add_argument("--device-map", choices=("auto",), help="auto: spread the model over all GPUs, with --engine hf")
    model.add_argument(
        "--static-cache",
        action="store_true",
        help="--engine hf decodes on key-values of a fixed size, on a CUDA GPU with a CUDA graph: fewer launches, same replies; "
        "left out, with the reason, where the model has none",
    )


def _vllm_flags(vllm) -> None:
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


def _server_flags(openai) -> None:
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
    openai.add_argument(
        "--batch",
        action="store_true",
        help="ask through the provider's batch interface: half the price, replies within a day; stopped or killed, the same command "
        "picks up what was submitted",
    )
    openai.add_argument(
        "--price-in",
        type=number(0, kind=float),
        default=0.0,
        help="price of a million prompt tokens, of single requests",
    )
    openai.add_argument("--price-out", type=number(0, kind=float), default=0.0, help="price of a million reply tokens")
    openai.add_argument(
        "--image-detail", choices=("auto", "low", "high"), default="auto", help="the API's image detail (default: auto)"
    )


def _ray_flags(ray) -> None:
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


def parse(p: StageParser, argv, named_by: tuple[str, ...] = ()) -> argparse.Namespace:
    """The checked arguments; of the preset `anchored`, `anchored` is True and `preset` is "paper". `named_by` are
    the arguments whose file names imply --dataset; where such files are given, it has no other default.
    """
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
        if files and not of_file:
            p.error(f"--dataset is required: one of {', '.join(DATASETS)}")
        args.dataset = of_file.pop() if of_file else DATASET
    if args.device_map and distributed.WORLD > 1:
        p.error("--device-map: one process takes all GPUs; leave GPUS out")
    engines = {args.engine, getattr(args, "engine_lvlm", None)}
    if args.batch and ("openai" not in engines or "ray" in engines):
        p.error("--batch is for --engine openai or --engine-lvlm openai, without ray; leave it out")
    if args.batch and distributed.WORLD > 1:
        p.error("--batch: one process submits all; leave GPUS out")
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
        distributed.leave(f"error: {error}")
        sys.exit(f"error: {error}")
    except BrokenPipeError:
        if not _unread(sys.stdout):
            raise
        sys.exit(128 + signal.SIGPIPE)  # quietly, as other programs end before `head`
    except OSError as error:
        if line := disk_line(error, remedy):
            distributed.leave(line)
            sys.exit(line)
        distributed.leave()
        raise
    except KeyboardInterrupt:
        said, code = "stopped. Run the same command again to go on.", 128 + (signals.Heard.signal or signal.SIGINT)
        distributed.leave(said, code)
        print(said, file=sys.stderr)
        sys.exit(code)
    except Exception:
        distributed.leave()
        raise
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
