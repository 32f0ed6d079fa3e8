"""Run the jobs of an experiment file with Snakemake, then list what failed. `scripts/reproduce.sh` prepares and calls this.

    python scripts/reproduce.py RESULTS EXPERIMENT_FILE FLAGS AND TARGETS OF SNAKEMAKE…

Reads  experiments/Snakefile, the experiment file, and $GPUS and $JOBS.
Writes RESULTS/<preset>-<seed>/, with the stages' files; logs/, what each job printed; failed/, the commands of failed jobs;
       snakemake.log, what Snakemake printed.
"""

import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import definition
from mpa.files.records import REPOSITORY as ROOT
from mpa.files.records import InputError
from mpa.models import gpus
from mpa.stages import cli

ALWAYS = [
    *("--snakefile", str(ROOT / "experiments/Snakefile")),
    *("--nolock", "--keep-going"),  # reproduce.sh holds a lock that a kill releases
    # Results are written whole, by renaming: none is deleted, and the stage of a killed job says whether it is finished.
    *("--rerun-incomplete", "--keep-incomplete"),
    *("--rerun-triggers", "mtime", "params", "input"),
]
ROOM = 2**16  # bytes; with fewer Snakemake cannot keep its records
# Flags of the user with which Snakemake only prints (-n also among others, as in -np), and those that are not the user's.
SHOWN = re.compile("-[a-zA-Z]*n[a-zA-Z]*|-h|--(dry-?run|help|dag|rulegraph|summary)")
OWN = re.compile("-[Cds].*|--(config|directory|snakefile)(=.*)?")


def places(experiment: definition.Experiment, given: list[str]) -> tuple[int, list[str]]:
    """(GPUs, Snakemake's flags that say how many jobs run at once), from $GPUS, $JOBS and what is visible.

    Jobs of this machine find its GPUs in $MPA_GPUS, of which scripts/cell.sh takes some for each; those of another executor get theirs
    from a cluster's scheduler. Raises InputError for more GPUs than are visible.
    """
    from snakemake.cli import parse_args

    asked = os.environ.get("GPUS")
    os.environ.pop("MPA_GPUS", None)
    if parse_args(given)[1].executor not in (None, "local"):
        return int(asked or 1), []
    if asked == "0":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # by which nvidia-smi counts
    visible = gpus.visible()
    if shutil.which("nvidia-smi"):
        gpus.usable()  # an old driver would end each job
    n = int(asked or len(visible))
    if n > len(visible):
        raise InputError(f"GPUS is {n}, and {len(visible)} GPUs are visible: {', '.join(visible) or 'none'}.")
    if 0 < n < experiment.most_gpus:  # Snakemake would give it fewer, and a training other results
        here = f"GPUS is {n}" if asked else f"{n} are visible: {', '.join(visible)}"
        raise InputError(f"a job of this experiment has {experiment.most_gpus} GPUs, and {here}.")
    os.environ["MPA_GPUS"] = " ".join(f"{name}={uuid}" for name, uuid in visible.items())
    return n, ["--resources", f"gpu={n}", "--cores", str(n or os.environ.get("JOBS") or 1)]


def failures(results: Path) -> list[Path]:
    """The commands that failed jobs left in failed/: each has a log of the same name, which no file of anybody else's has."""
    found, logs = results / "failed", results / "logs"
    return sorted(p for p in found.rglob("*") if p.is_file() and (logs / f"{p.relative_to(found)}.log").is_file())


def snakemake(results: Path, flags: list[str], shown: bool) -> int:
    """Run Snakemake in this process, which so gets the signals; its own lines go to snakemake.log, unless they are asked for.

    Returns its exit status.
    """
    from snakemake.cli import main

    screen = os.dup(sys.stderr.fileno())
    if not shown:
        for old in failures(results):
            old.unlink()
        log = os.open(results / "snakemake.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, sys.stderr.fileno())
    try:
        main([*ALWAYS, "--directory", str(results), *flags])
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        os.dup2(screen, sys.stderr.fileno())
    return 0


def report_failures(results: Path) -> int:
    """Print each failed job with the command that repeats it. Returns their number."""
    failed = failures(results)
    if failed:
        print(
            f"\n{len(failed)} jobs failed, and what depends on them was not run. The same command tries again; each alone:"
        )
    for path in failed:
        name = path.relative_to(results / "failed")
        print(f"  {name}, log {results / 'logs' / name}.log\n    {path.read_text().strip()}")
    return len(failed)


def main(argv: list[str]) -> int:
    results, file, given = Path(argv[0]), argv[1], argv[2:]
    if taken := list(filter(OWN.fullmatch, given)):
        sys.exit(f"error: {taken[0]}: reproduce.sh sets this flag itself. Leave it out.")
    shown = any(map(SHOWN.fullmatch, given))
    experiment = definition.read(file)
    if experiment.data:
        os.environ["MPA_DATA"] = str(experiment.data.folder)
    n, flags = places(experiment, given)
    own = ["--config", f"experiment={file}", f"gpus={n}", *flags]
    # The last flag takes one value, so that what follows it may be a target.
    code = snakemake(results, [*own, "--local-cores", "4", *given], shown)
    failed = report_failures(results)
    if code and shutil.disk_usage(results).free < ROOM:
        full = OSError(errno.ENOSPC, "", str(results))
        print(cli.disk_line(full, ""), file=sys.stderr)
    elif code and not failed:
        log = results / "snakemake.log"
        said = log.read_text().strip().splitlines()[-12:] if log.exists() else []
        print("\n".join([f"error: stopped, by a signal or by Snakemake. The end of {log}:", *said]), file=sys.stderr)

    # --- the tables of what there is, what looks wrong in it, and how it looks ---
    if not shown and "pace" not in given:
        scripts = ["tables.py", "diagnose.py --short", *(["report.py"] if os.environ.get("REPORT") != "0" else [])]
        for script in scripts:
            print(flush=True)
            name, *more = script.split()
            subprocess.run(
                [sys.executable, str(ROOT / "scripts" / name), str(results), *more], stderr=subprocess.STDOUT
            )
    return code


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except InputError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if line := cli.disk_line(error, "Choose another RESULTS."):
            sys.exit(line)
        raise
